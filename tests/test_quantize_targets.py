"""What few bits and 8-bit floats are on targets that are not here: valid files, and what is said about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest

from graphc import pipeline, runtime
from graphc.backends.onnxruntime import OnnxRuntime
from graphc.contract import Capabilities, Context
from graphc.errors import BadInput
from graphc.model import save
from graphc.passes.cast import Cast
from graphc.passes.quantize import Quantize
from graphc.quantization import rounding
from graphc.quantization.granularity import Granularity
from graphc.quantization.grid import Grid
from tests.quantized_models import CONTEXT, build, held, mlp, normal, quantized, rows, run


def target(*providers: str) -> Context:
    return Context(Capabilities("onnxruntime", 13, {"": 26}, providers=providers))


CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@pytest.mark.parametrize("form", ["float8e4m3fn", "float8e5m2"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_8_bit_floats_are_valid_onnx_and_mean_what_they_should(form: Any, dtype: Any) -> None:
    """By onnx's checker, its strict shape inference, and its reference evaluator."""
    w = normal(32, 16).astype(dtype)
    name = "float16" if dtype == np.float16 else "float"
    model = build("y = MatMul(x, w)", f"{name}[N,32] x", f"{name}[N,16] y", opset=21, w=w)
    want = rounding.nearest(ir.tensor(w), Grid(8, form=form), Granularity(1)).values()
    assert quantized(model, form=form).changes == [f"weight stored in {form}"]
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    found = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    assert {v.name: v.type.tensor_type.elem_type for v in found.graph.value_info}["w.dequantized"] == (
        onnx.TensorProto.FLOAT16 if dtype == np.float16 else onnx.TensorProto.FLOAT
    )
    x = normal(3, 32).astype(dtype)
    (got,) = onnx.reference.ReferenceEvaluator(proto).run(None, {"x": x})
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == np.float16 else {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(got, x.astype(np.float32) @ want, **tolerance)
    assert np.abs(want - w.astype(np.float32)).max() > 0


@pytest.mark.parametrize(
    "options", [{"bits": 8}, {"bits": 4, "block": 16}, {"bits": 4, "block": 16, "symmetric": False}]
)
def test_integers_are_valid_onnx(options: dict[str, Any]) -> None:
    model = mlp()
    quantized(model, **options)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    x = rows(1)[0]["x"]
    (got,) = onnx.reference.ReferenceEvaluator(proto).run(None, {"x": x})
    want = run(model, x=x)["y"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(
    "options, providers, said",
    [
        ({"form": "float8e4m3fn"}, (CPU,), "8-bit floats have no products on a CPU"),
        ({"form": "float8e4m3fn"}, (CUDA, CPU), ""),
        ({"scheme": "dynamic"}, (CUDA, CPU), "the CUDA provider has no products in 8-bit integers"),
        ({"scheme": "static"}, (CUDA, CPU), "the CUDA provider has no products in 8-bit integers"),
        ({"scheme": "dynamic"}, (CPU,), ""),
        ({"bits": 4, "block": 32}, (CUDA, CPU), ""),
        ({"bits": 2}, (CPU,), "codes of int2 are in ONNX from opset 25 on, and the model has 21: weights stay"),
        ({"bits": 2, "symmetric": False}, (CUDA, CPU), "codes of uint2 are in ONNX from opset 25 on"),
        ({"bits": 4, "block": 48}, (CPU,), "in blocks of a power of two; others are slower"),
        ({"scheme": "dynamic", "full_range": True}, (CPU,), "overflow on CPUs without VNNI"),
    ],
)
def test_what_is_pointless_on_a_target_is_said_before(
    options: dict[str, Any], providers: tuple[str, ...], said: str
) -> None:
    found = list(Quantize(**options).caveats(mlp(), target(*providers)))
    assert any(said in text for text in found) if said else not found, found


def test_float16_on_a_cpu_is_said_before() -> None:
    model = build("y = MatMul(x, w)", "float[N,32] x", "float[N,16] y", w=normal(32, 16))
    (text,) = Cast().caveats(model, target(CPU))
    assert "ONNX Runtime's CPU provider has no products in it" in text
    assert not list(Cast().caveats(model, target(CUDA, CPU)))


@pytest.mark.parametrize("scheme", ["weights", "dynamic"])
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e30])
def test_tiny_and_huge_weights_in_a_model(scheme: str, size: float) -> None:
    """Relative to the largest output, their errors are those of weights of ordinary size."""
    w = normal(32, 16)
    model = build("y = MatMul(x, w)", "float[N,32] x", "float[N,16] y", w=(w * size).astype(np.float32))
    x = normal(4, 32)
    quantized(model, scheme=scheme)
    assert held(model, "w").dtype == np.int8
    got = run(model, x=x)["y"].astype(np.float64) / size
    want = x.astype(np.float64) @ w
    assert np.abs(got - want).max() < 0.04 * np.abs(want).max()


def test_a_context_without_a_target_says_the_same_as_a_cpu() -> None:
    each = Quantize(form="float8e5m2")
    assert list(each.caveats(mlp(), CONTEXT)) == list(each.caveats(mlp(), target(CPU)))


@pytest.mark.parametrize("provider", [CUDA, "TensorrtExecutionProvider", "NoSuchProvider"])
@pytest.mark.parametrize("recipe", ["cast", "quantize{form=float8e4m3fn}"])
def test_a_device_that_is_not_here_is_refused_before_any_work(
    tmp_path: Path, provider: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if provider in runtime.capabilities().providers:
        pytest.skip("it is here")
    monkeypatch.setattr(Quantize, "run", None)
    monkeypatch.setattr(Cast, "run", None)
    save(mlp(), tmp_path / "in.onnx")
    device = OnnxRuntime(provider=provider)
    for out in (None, tmp_path / "out.onnx", tmp_path / "out"):
        with pytest.raises(BadInput, match=f"'{provider}' does not start on this machine"):
            pipeline.optimize(tmp_path / "in.onnx", out, recipe=recipe, target=device)
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


@pytest.mark.parametrize("recipe", ["cast", "cast,quantize{form=float8e5m2 least=0}"])
def test_what_is_for_other_devices_is_valid_onnx(tmp_path: Path, recipe: str) -> None:
    """Of what is made for accelerators, types, operators and sizes can be checked without one."""
    save(mlp(), tmp_path / "in.onnx")
    report = pipeline.optimize(tmp_path / "in.onnx", tmp_path / "out.onnx", recipe=recipe, measure=False, cache=False)
    proto = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(proto, full_check=True)
    found = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    kind = onnx.TensorProto.FLOAT16
    products = [node.output[0] for node in proto.graph.node if node.op_type in ("MatMul", "Gemm")]
    types = {v.name: v.type.tensor_type.elem_type for v in (*found.graph.value_info, *found.graph.output)}
    assert products and {types[name] for name in products} == {kind}
    assert report.ok


def test_an_artifact_for_a_device_that_is_not_here_is_not_loaded(tmp_path: Path) -> None:
    if CUDA in runtime.capabilities().providers:
        pytest.skip("it is here")
    model = mlp()
    Cast().run(model, CONTEXT)
    (tmp_path / "graphc.json").write_text(json.dumps({"runtime": OnnxRuntime(provider=CUDA).emit(model, tmp_path)}))
    with pytest.raises(BadInput, match=CUDA):
        OnnxRuntime().load(tmp_path)
