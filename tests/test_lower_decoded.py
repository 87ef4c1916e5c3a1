"""The form ``decoded-weight`` of ``lower``: codes that the session turns into numbers when it starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graphc import pipeline, runtime
from graphc.contract import PassResult
from graphc.lowering import decoded
from graphc.passes.lower import Lower
from tests.recognised_models import always
from tests.small_models import build, feeds, operators, reasons, run

DATA = Path(__file__).parent / "data"
ROWS, IMAGE = "float[B,S,32] x", "float[N,3,8,8] x"


def codes(*shape: int, dtype: type | np.dtype = np.int8, seed: int = 0) -> np.ndarray:
    low, high = (0, 15) if dtype == ml_dtypes.uint4 else (-8, 7)
    return np.random.default_rng(seed).integers(low, high + 1, shape).astype(dtype)


def scales(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).uniform(0.01, 0.2, shape).astype(np.float32)


def lowered(model: ir.Model, ratio: float = 0.5) -> tuple[ir.Model, PassResult]:
    """Lowered, with the very same results where nothing is optimised."""
    after = model.clone()
    result = Lower(only=("decoded-weight",)).run(after, always(ratio))
    inputs = feeds(model)
    np.testing.assert_array_equal(run(after, inputs)["y"], run(model, inputs)["y"])
    return after, result


PRODUCT = "w = DequantizeLinear<axis=%d>(c, s) y = MatMul(x, w)"
BLOCKS = "w = DequantizeLinear<axis=0, block_size=16>(c, s%s) y = MatMul(x, w)"
CASES = {
    "per output": (PRODUCT % 1, {"c": codes(32, 5), "s": scales(5)}, ["Cast", "Mul", "MatMul"]),
    "per input": (PRODUCT % 0, {"c": codes(32, 5), "s": scales(32)}, ["Cast", "Mul", "MatMul"]),
    "from the end": (PRODUCT % -1, {"c": codes(32, 5), "s": scales(5)}, ["Cast", "Mul", "MatMul"]),
    "one scale": (PRODUCT % 1, {"c": codes(32, 5), "s": scales()}, ["Cast", "Mul", "MatMul"]),
    "4 bits in blocks": (
        BLOCKS % "",
        {"c": codes(32, 6, dtype=ml_dtypes.int4), "s": scales(2, 6)},
        ["Cast", "Reshape", "Mul", "Reshape", "MatMul"],
    ),
    "4 bits with zero points": (
        BLOCKS % ", z",
        {
            "c": codes(32, 6, dtype=ml_dtypes.uint4),
            "s": scales(2, 6),
            "z": codes(2, 6, dtype=ml_dtypes.uint4, seed=1),
        },
        ["Cast", "Reshape", "Sub", "Mul", "Reshape", "MatMul"],
    ),
    "zero points per output": (
        "w = DequantizeLinear<axis=1>(c, s, z) y = MatMul(x, w)",
        {"c": codes(32, 5), "s": scales(5), "z": codes(5, seed=1)},
        ["Cast", "Sub", "Mul", "MatMul"],
    ),
    "Gemm": (
        "f = Flatten<axis=2>(x) w = DequantizeLinear<axis=0>(c, s) y = Gemm<transB=1>(f, w)",
        {"c": codes(5, 32), "s": scales(5)},
        ["Flatten", "Cast", "Mul", "Gemm"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_products(name: str) -> None:
    body, constants, expected = CASES[name]
    model = build(body, x=ROWS, **constants)
    after, result = lowered(model)
    kind = "Gemm" if name == "Gemm" else "MatMul"
    assert operators(after) == expected
    assert result.changes == [f"weight of {kind} decoded at the start"]
    slow, result = lowered(model, ratio=1.0)
    assert operators(slow) == operators(model) and not result.changed


def test_convolutions_are_not_timed() -> None:
    model = build(
        "w = DequantizeLinear<axis=0>(c, s) y = Conv<pads=[1,1,1,1]>(x, w)",
        x=IMAGE,
        c=codes(4, 3, 3, 3),
        s=scales(4),
    )
    after, result = lowered(model, ratio=1.0)
    assert operators(after) == ["Cast", "Mul", "Conv"]
    after = model.clone()
    result = Lower(only=("decoded-weight",)).run(after, dataclasses.replace(always(1.0), time=None))
    assert result.changed and not result.refusals


@pytest.mark.parametrize(
    "body",
    [
        # Integers on both sides, also behind what only moves them; two readers; something between.
        "q = QuantizeLinear(x, t) d = DequantizeLinear(q, t) w = DequantizeLinear<axis=0>(c, s) y = MatMul(d, w)",
        "q = QuantizeLinear(x, t) d = DequantizeLinear(q, t) r = Transpose<perm=[1,0,2]>(d) "
        "w = DequantizeLinear<axis=0>(c, s) y = MatMul(r, w)",
        "w = DequantizeLinear<axis=0>(c, s) a = MatMul(x, w) n = Neg(x) b = MatMul(n, w) y = Add(a, b)",
        "w = DequantizeLinear<axis=0>(c, s) n = Neg(w) y = MatMul(x, n)",
    ],
)
def test_others_stay(body: str) -> None:
    given = {"c": codes(32, 32), "s": scales(32)} | ({"t": np.float32(0.1)} if "t)" in body else {})
    model = build(body, x=ROWS, **given)
    after, result = lowered(model)
    assert operators(after) == operators(model) and not result.changed


def test_blocks_with_a_remainder_stay() -> None:
    model = build(BLOCKS % "", x="float[B,S,40] x", c=codes(40, 6, dtype=ml_dtypes.int4), s=scales(3, 6))
    after = model.clone()
    result = Lower(only=("decoded-weight",)).run(after, always(0.5))
    assert operators(after) == operators(model)
    assert reasons(result) == ["its last block is shorter than the others"]


def test_large_models_keep_their_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded, "BIG", 4 * 32 * 5 - 1)
    model = build(PRODUCT % 1, x=ROWS, c=codes(32, 5), s=scales(5))
    after, result = lowered(model)
    assert operators(after) == operators(model)
    assert reasons(result) == ["all weights together would take more than 0 MB in float32"]


def test_the_session_decodes_once(tmp_path: Path) -> None:
    """Of a real model in 8 bits, what is left when the session has started are the operators of the dense one."""
    import onnx
    import onnxruntime

    left = {}
    for name, recipe in {"dense": "simplify", "decoded": "simplify,quantize,lower{only=[decoded-weight]}"}.items():
        made, seen = tmp_path / f"{name}.onnx", tmp_path / f"{name}.seen.onnx"
        pipeline.optimize(DATA / "fmnist_resnet.onnx", made, recipe=recipe, measure=False)
        options = runtime.settings(optimise=True, threads=1)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(seen)
        runtime.handle(str(made), options, runtime.CPU)
        left[name] = sorted(node.op_type for node in onnx.load(seen).graph.node)
    convolutions = [op for op in left["dense"] if op.endswith("Conv")]
    assert convolutions and [op for op in left["decoded"] if op.endswith("Conv")] == convolutions
    assert "Cast" not in left["decoded"]
