"""``quantize``: which weights, where they are, and with other passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graphc import pipeline
from graphc.errors import BadInput
from graphc.model import save
from graphc.opset.portable import portable
from graphc.passes.quantize import Quantize
from graphc.passes.shrink import Shrink
from tests.fashion import batches
from tests.quantized_models import (
    CONTEXT,
    DATA,
    build,
    context,
    held,
    images,
    mlp,
    normal,
    pictures,
    quantized,
    reasons,
    reference,
    rows,
    run,
)


def test_nan_stays_and_is_said() -> None:
    w = normal(64, 48)
    w[2, 2] = np.nan
    model = mlp(w=w)
    result = quantized(model)
    assert "it holds NaN or infinity" in reasons(result)
    assert held(model, "w").dtype == np.float32 and held(model, "v").dtype == np.int8


def test_an_embedding_and_its_head_share_one_table_whose_rows_are_looked_up() -> None:
    text = "e = Gather(t, i) h = MatMul(e, w) k = Transpose<perm=[1,0]>(t) y = MatMul(h, k)"
    model = build(text, "int64[N] i", "float[N,100] y", t=normal(100, 32), w=normal(32, 32))
    table = held(model, "t").copy()
    ids = np.arange(7)
    quantized(model, bits=4, block=16)
    assert held(model, "t").dtype == np.int8 and held(model, "w").dtype == ml_dtypes.int4
    assert sum(value.const_value.size == 3200 for value in model.graph.initializers.values()) == 1
    found = reference(table, 8, True, 0, 0)
    w = model.graph.initializers["w"]
    values = held(model, "w").astype(np.float32) * np.repeat(held(model, "w.scale"), 16, 0)
    assert w.dtype == ir.DataType.INT4
    np.testing.assert_allclose(run(model, i=ids)["y"], found[ids] @ values @ found.T, rtol=1e-4, atol=1e-4)
    gathered = next(node for node in model.graph if node.op_type == "Gather")
    assert gathered.inputs[0].dtype == ir.DataType.INT8


def test_a_tied_head_of_a_gemm_reads_the_same_table() -> None:
    text = "e = Gather(t, i) y = Gemm<transB=1>(e, t, b)"
    model = build(text, "int64[N] i", "float[N,100] y", t=normal(100, 32), b=normal(100))
    found = reference(held(model, "t"), 8, True, 0, 0)
    quantized(model)
    assert sum(value.const_value.size == 3200 for value in model.graph.initializers.values()) == 1
    want = found[:5] @ found.T + held(model, "b")
    np.testing.assert_allclose(run(model, i=np.arange(5))["y"], want, rtol=1e-4, atol=1e-4)
    model = build(text, "int64[N] i", "float[N,100] y", t=normal(100, 32), b=normal(100))
    assert not quantized(model, embeddings=0).changed


@pytest.mark.parametrize("scheme", ["weights", "dynamic"])
def test_shared_weights_are_stored_once(scheme: str) -> None:
    text = "a = MatMul(x, w) b = MatMul(a, w) y = Add(a, b)"
    model = build(text, "float[N,32] x", "float[N,32] y", w=normal(32, 32))
    x = normal(5, 32)
    want = run(model, x=x)["y"]
    quantized(model, scheme=scheme)
    assert len([v for v in model.graph.initializers.values() if v.dtype == ir.DataType.INT8]) == 1
    got = run(model, x=x)["y"]
    assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_stacked_weights_of_experts() -> None:
    model = build("y = MatMul(x, w)", "float[4,N,32] x", "float[4,N,16] y", w=normal(4, 32, 16))
    want = reference(held(model, "w"), 4, True, 1, 32)
    x = normal(4, 3, 32)
    result = quantized(model, bits=4)
    assert result.changed
    np.testing.assert_allclose(run(model, x=x)["y"], x @ want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2, 16])
@pytest.mark.parametrize("scheme", ["weights", "static"])
def test_convolutions_with_groups(groups: int, scheme: str) -> None:
    model = images(groups)
    x = pictures(1)[0]["x"]
    want = run(model, x=x)["y"]
    quantized(model, context(pictures()), scheme=scheme)
    assert held(model, "v").dtype == np.int8
    got = run(model, x=x)["y"]
    assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_weights_in_bodies_of_if() -> None:
    text = (
        "y = If (c) <then_branch = t () => (float[N,32] p) { p = MatMul(x, w) }, "
        "else_branch = e () => (float[N,32] q) { q = Neg(x) }>"
    )
    model = build(text, "bool c, float[N,32] x", "float[N,32] y", w=normal(32, 32))
    x = normal(3, 32)
    want = run(model, c=np.array(True), x=x)["y"]
    result = quantized(model, bits=8)
    assert result.changed
    got = run(model, c=np.array(True), x=x)["y"]
    assert 0 < np.abs(got - want).max() < 0.03 * np.abs(want).max()
    np.testing.assert_array_equal(run(model, c=np.array(False), x=x)["y"], -x)


@pytest.mark.parametrize("scheme", ["weights", "dynamic", "static"])
def test_nothing_is_quantized_twice(scheme: str) -> None:
    model = mlp()
    quantized(model, context(rows()), scheme=scheme)
    before = [(n.op_type, [v.name for v in n.inputs if v is not None]) for n in model.graph]
    result = quantized(model, context(rows()), scheme="weights", bits=4)
    assert not result.changed
    assert "its weight is quantized already" in reasons(result)
    assert before == [(n.op_type, [v.name for v in n.inputs if v is not None]) for n in model.graph]


def test_cast_and_mul_of_integers_count_as_quantized() -> None:
    text = "f = Cast<to=1>(w) m = Mul(f, s) y = MatMul(x, m)"
    model = build(text, "float[N,8] x", "float[N,4] y", w=np.ones((8, 4), np.int8), s=np.ones(4, np.float32))
    assert "its weight is quantized already" in reasons(quantized(model))


def test_names_choose_layers() -> None:
    model = mlp()
    quantized(model, include=("v",))
    assert held(model, "w").dtype == np.float32 and held(model, "v").dtype == np.int8
    model = mlp()
    quantized(model, exclude=("Gemm*",))
    assert held(model, "w").dtype == np.int8 and held(model, "v").dtype == np.float32
    with pytest.raises(BadInput, match="no weight or node is called 'z'"):
        quantized(mlp(), include=("z",))


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 5},
        {"block": 8},
        {"form": "float8e5m2", "bits": 4},
        {"scheme": "dynamic", "bits": 4},
        {"kinds": ("LSTM",)},
        {"damp": 0.0},
        {"embeddings": 3},
    ],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        Quantize(**options)


def test_old_opsets_are_left_with_the_reason() -> None:
    model = mlp()
    model.graph.opset_imports[""] = 20
    assert "it needs opset 21, the model has 20" in reasons(quantized(model, bits=4))
    assert quantized(model, bits=8).changed


def test_float16_weights_keep_their_type() -> None:
    model = build("y = MatMul(x, w)", "float16[N,32] x", "float16[N,16] y", w=normal(32, 16).astype(np.float16))
    want = reference(held(model, "w").astype(np.float32), 8, True, 1, 0)
    quantized(model)
    x = normal(3, 32).astype(np.float16)
    np.testing.assert_allclose(run(model, x=x)["y"], x.astype(np.float32) @ want, rtol=2e-2, atol=2e-2)
    assert held(model, "w.scale").dtype == np.float16


def test_shrink_after_quantize() -> None:
    """Channels that are zero go, codes and scales with them."""
    w, v = normal(64, 48), normal(32, 48, seed=1)
    w[:, 10:20] = 0
    b = normal(48)
    b[10:20] = 0
    model = mlp(w=w, v=v, b=b)
    quantized(model)
    x = rows(1)[0]["x"]
    want = run(model, x=x)["y"]
    result = Shrink().run(model, CONTEXT)
    assert result.changed
    assert held(model, "w").shape == (64, 38) and held(model, "w").dtype == np.int8
    np.testing.assert_allclose(run(model, x=x)["y"], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", ["quantize", "quantize{bits=4 block=32 rounding=gptq}", "quantize{scheme=dynamic}"])
def test_a_real_transformer_after_fusion(tmp_path: Path, recipe: str) -> None:
    samples = batches("calib", 48, 16)
    path = tmp_path / "o.onnx"
    report = pipeline.optimize(
        DATA / "fmnist_vit_tiny.onnx",
        path,
        recipe=f"simplify,fuse,{recipe}",
        calibrate=samples,
        data=samples,
        measure=False,
    )
    assert path.stat().st_size < (DATA / "fmnist_vit_tiny.onnx").stat().st_size * 0.5
    assert report.approximation["error"] < (0.2 if "bits=4" in recipe else 0.05)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for i in range(2):
        model = mlp()
        quantized(model, context(rows()), bits=4, block=16, rounding="gptq", clip="mse")
        save(portable(model, CONTEXT.target), tmp_path / f"{i}.onnx")
        found.append((tmp_path / f"{i}.onnx").read_bytes())
    assert found[0] == found[1]


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    source, half, whole, rest = (tmp_path / f"{name}.onnx" for name in ("in", "half", "whole", "rest"))
    save(mlp(), source)
    how: dict[str, Any] = {"measure": False, "cache": False}
    recipe = "simplify,quantize{bits=4 block=32 least=0},lower,lower-int8"
    pipeline.optimize(source, whole, recipe=recipe, **how)
    pipeline.optimize(source, half, recipe=recipe, stop_after="quantize", **how)
    pipeline.optimize(half, rest, resume=True, **how)
    assert rest.read_bytes() == whole.read_bytes()
