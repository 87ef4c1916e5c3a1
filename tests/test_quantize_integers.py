"""Products in integers against exact integer arithmetic, and what ONNX Runtime makes of codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphc import pipeline, runtime
from graphc.backends.onnxruntime import OnnxRuntime
from graphc.model import save
from graphc.opset.portable import portable
from graphc.quantization import activations
from graphc.stats.base import Valid
from graphc.stats.range import RangeOf
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
    rows,
    run,
)
from tests.small_models import operators


def test_dynamic_is_exact_integer_arithmetic_under_default_options() -> None:
    """Against integers: neither 16-bit sums nor anything else saturates, with weights and rows at their limits."""
    depth = 64
    w = np.where(normal(depth, 48) > 0, 1.0, -1.0).astype(np.float32)
    w[:, 0] = 1
    model = build("y = MatMul(x, w)", "float[N,64] x", "float[N,48] y", w=w)
    quantized(model, scheme="dynamic")
    x = np.where(normal(6, depth, seed=3) > -0.5, 1.0, 0.0).astype(np.float32)
    x[0] = 1
    codes, scale = held(model, "w").astype(np.int64), held(model, "w.scale")
    assert codes.min() == -64 and codes.max() == 64
    rows_ = np.clip(np.rint(x / np.float32(1 / 255)), 0, 255).astype(np.int64)
    want = (rows_ @ codes).astype(np.float64) * (np.float32(1 / 255) * scale.astype(np.float64))
    for optimise in (False, True):
        np.testing.assert_allclose(run(model, optimise, x=x)["y"], want, rtol=1e-5)
    assert operators(model) == ["DynamicQuantizeLinear", "MatMulInteger", "Cast", "Mul", "Mul"]


def test_dynamic_gemm_and_shared_activations() -> None:
    model = build(
        "a = MatMul(x, w) g = Gemm<transB=1>(x, v, b) y = Concat<axis=1>(a, g)",
        "float[N,32] x",
        "float[N,40] y",
        w=normal(32, 16),
        v=normal(24, 32),
        b=normal(24),
    )
    x = normal(5, 32)
    want = run(model, x=x)["y"]
    quantized(model, scheme="dynamic")
    assert operators(model).count("DynamicQuantizeLinear") == 1
    assert np.abs(run(model, x=x)["y"] - want).max() < 0.03 * np.abs(want).max()


def optimised(model: ir.Model, path: Path) -> list[str]:
    import onnx
    import onnxruntime as ort

    save(portable(model, CONTEXT.target), path / "in.onnx")
    options = runtime.settings(optimise=True)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(path / "out.onnx")
    ort.InferenceSession(path / "in.onnx", options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(path / "out.onnx").graph.node]


def test_onnx_runtime_computes_with_the_codes(tmp_path: Path) -> None:
    text = "h = MatMul(x, w) a = Add(h, b) r = Gelu(a) y = MatMul(r, v)"
    model = build(
        text, "float[N,M,64] x", "float[N,M,32] y", opset=21, w=normal(64, 48), b=normal(48), v=normal(48, 32)
    )
    quantized(model, bits=4, block=32)
    assert optimised(model, tmp_path).count("MatMulNBits") == 2
    model = mlp()
    quantized(model, scheme="dynamic")
    assert not {"MatMul", "Gemm"} & set(optimised(model, tmp_path))
    model = mlp()
    quantized(model, context(rows()), scheme="static")
    assert not {"MatMul", "Gemm"} & set(optimised(model, tmp_path))
    model = images()
    quantized(model, context(pictures()), scheme="static")
    found = optimised(model, tmp_path)
    assert found.count("QLinearConv") == 2 and found.count("QLinearAdd") == 1 and "QGemm" in found, found
    assert not {"Conv", "Gemm", "Relu"} & set(found)


@pytest.mark.parametrize("bits, block", [(8, 0), (8, 32), (4, 32)])
@pytest.mark.parametrize(
    "body",
    [
        "k = Transpose(w) y = MatMul(x, k)",
        "k = Transpose<perm=[1,0]>(w) a = MatMul(x, k) r = Relu(a) y = MatMul(r, v)",
        "a = MatMul(x, w) r = Relu(a) y = MatMul(r, v)",
        "a = MatMul(x, w) r = Relu(a) b = MatMul(r, v) y = Add(b, r)",
        "a = MatMul(x, w) s = Sigmoid(a) y = MatMul(s, v)",
    ],
)
def test_every_product_with_codes_is_one_kernel(tmp_path: Path, body: str, bits: int, block: int) -> None:
    used = {"v": normal(64, 64, seed=1) / 8} if "v)" in body else {}
    model = build(body, "float[1,N,64] x", "float[1,N,64] y", w=normal(64, 64) / 8, **used)
    x = normal(1, 5, 64)
    want = run(model, x=x)["y"]
    quantized(model, bits=bits, block=block)
    got = run(model, x=x)["y"]
    assert np.abs(got - want).max() < (0.03 if bits == 8 else 0.4) * np.abs(want).max()
    found = optimised(model, tmp_path)
    assert found.count("MatMulNBits") == 1 + len(used) and "DequantizeLinear" not in found, found


@pytest.mark.parametrize(
    "options", [{"bits": 8}, {"bits": 4, "block": 32}, {"bits": 4, "block": 32, "symmetric": False}]
)
def test_a_weight_of_several_products_is_stored_once_and_each_is_one_kernel(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """As in models whose layers have all the same weights; the last product is written first."""
    text = "a = MatMul(x, w) b = Tanh(a) c = MatMul(b, w) d = Tanh(c) y = MatMul(d, w)"
    model = build(text, "float[1,N,64] x", "float[1,N,64] y", w=normal(64, 64) / 8)
    weight, last = model.graph.initializers["w"], model.graph[-1]
    last.replace_input_with(1, model.graph.inputs[0])
    first = model.graph[0]
    first.replace_input_with(1, model.graph.inputs[0])
    for node in (last, first):
        node.replace_input_with(1, weight)
    quantized(model, **options)
    held = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    assert sum(tensor.size == 64 * 64 for tensor in held) == 1
    x = normal(1, 5, 64)
    plain = run(model, x=x)["y"]
    found = optimised(model, tmp_path)
    assert found.count("MatMulNBits") == 3 and not {"DequantizeLinear", "Transpose"} & set(found), found
    np.testing.assert_allclose(run(model, True, x=x)["y"], plain, atol=0.03 * np.abs(plain).max())


def test_a_tied_head_is_one_kernel(tmp_path: Path) -> None:
    for text in ("y = Gemm<transB=1>(h, t)", "k = Transpose(t) p = MatMul(h, k) y = Relu(p)"):
        model = build(f"e = Gather(t, i) h = Sigmoid(e) {text}", "int64[N] i", "float[N,96] y", t=normal(96, 32))
        quantized(model)
        found = optimised(model, tmp_path)
        # One DequantizeLinear is that of the rows that were looked up.
        assert found.count("MatMulNBits") == 1 and found.count("DequantizeLinear") == 1, found


def test_static_is_what_integers_give() -> None:
    """A convolution of one place and a sum of channels, by hand."""
    model = build(
        "a = Conv(x, w, b) y = Relu(a)", "float[N,8,1,1] x", "float[N,4,1,1] y", w=normal(4, 8, 1, 1), b=normal(4)
    )
    samples = [{"x": normal(50, 8, 1, 1, seed=i)} for i in range(3)]
    x = np.concatenate([sample["x"] for sample in samples])
    float_out = run(model, x=x)["y"]
    w, b = held(model, "w").astype(np.float64).reshape(4, 8), held(model, "b").astype(np.float64)
    quantized(model, context(samples), scheme="static")

    def grid(values: np.ndarray) -> tuple[float, int]:
        low, high = min(float(values.min()), 0), max(float(values.max()), 0)
        scale = float(np.float32((high - low) / 255))
        return scale, int(np.clip(np.rint(-low / scale), 0, 255))

    sx, zx = grid(x)
    sy, zy = grid(float_out)
    # Two neighbours of one sign come to 127 at most before they are rounded.
    sums = [np.maximum(sign * w, 0).reshape(4, -1, 2).sum(axis=2).max(axis=1) for sign in (1, -1)]
    sw = np.float32(np.maximum(*sums) / 127).astype(np.float64)
    codes = np.rint(w / sw[:, None])
    bias = np.rint(b / (sx * sw))
    rows_ = np.clip(np.rint(x.reshape(-1, 8) / sx) + zx, 0, 255) - zx
    real = (rows_ @ codes.T + bias) * (sx * sw)
    want = (np.clip(np.rint(np.maximum(real, 0) / sy) + zy, 0, 255) - zy) * sy
    for optimise in (False, True):
        got = run(model, optimise, x=x)["y"].reshape(-1, 4)
        assert np.abs(got - want).max() <= sy * 1.01
        assert (np.abs(got - want) > sy / 2).mean() < 0.02, "rounding of ties only"


def test_full_range_needs_a_session_option_and_less_does_not(tmp_path: Path) -> None:
    for full, wanted in ((False, {}), (True, {"session.x64quantprecision": "1"})):
        model = mlp()
        result = quantized(model, scheme="dynamic", full_range=full)
        folder = tmp_path / str(full)
        folder.mkdir()
        assert OnnxRuntime().emit(model, folder)["session_options"] == wanted
        assert any("x64quantprecision" in note for note in result.notes) is full


def test_layers_that_are_left_out_stay_precise_in_onnx_runtime() -> None:
    """Its own optimiser would round their weights with one scale for all."""
    v = normal(16, 16, 3, 3, seed=2)
    v[0] *= 100
    model = build(
        "a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) s = Conv<pads=[1,1,1,1]>(r, v, c) u = Relu(s) y = Conv(u, z, d)",
        "float[N,3,8,8] x",
        "float[N,4,8,8] y",
        w=normal(16, 3, 3, 3),
        b=normal(16),
        v=v,
        c=normal(16, seed=2),
        z=normal(4, 16, 1, 1) * (np.arange(16) > 0).astype(np.float32).reshape(16, 1, 1),
        d=normal(4),
    )
    result = quantized(model, context(pictures()), scheme="static", exclude=("v",))
    assert any(change.startswith("weight kept in 16 bits") for change in result.changes)
    sample = pictures(1)[0]
    plain, fused = (run(model, optimise, **sample)["y"] for optimise in (False, True))
    assert np.abs(fused - plain).max() < 0.05 * np.abs(plain).max()


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_ranges_of_activations(method: Any) -> None:
    x = np.random.default_rng(3).normal(size=(200000, 4)).astype(np.float32)
    x[0, 0] = 30
    seen = RangeOf("x").of([x], Valid())
    scale, zero = activations.scale_of(seen, method, 99.9)
    top = (255 - int(zero)) * float(scale)
    inner = x[np.abs(x) < 3]
    codes = np.clip(np.rint(inner / scale) + int(zero), 0, 255)
    error = np.abs((codes - float(zero)) * scale - inner).max()
    if method == "minmax":
        assert top == pytest.approx(30, rel=0.01)
    else:
        assert top < 25
    assert error <= scale * 0.51 + 1e-6
    nothing = RangeOf("x").of([np.zeros((0, 4), np.float32)], Valid())
    assert activations.scale_of(nothing, method, 99.9)[0] > 0


def test_a_real_network_in_integers(tmp_path: Path) -> None:
    samples = batches("calib", 128, 32)
    x = np.concatenate([each["image"] for each in samples])
    path = tmp_path / "o.onnx"
    pipeline.optimize(
        DATA / "fmnist_resnet.onnx",
        path,
        recipe="simplify,fuse,quantize{scheme=static}",
        calibrate=samples,
        measure=False,
    )
    before = runtime.session(DATA / "fmnist_resnet.onnx", optimise=True, threads=1).run({"image": x})["logits"]
    after = runtime.session(path, optimise=True, threads=1).run({"image": x})["logits"]
    assert (before.argmax(1) == after.argmax(1)).mean() > 0.97
    assert path.stat().st_size < (DATA / "fmnist_resnet.onnx").stat().st_size * 0.35
