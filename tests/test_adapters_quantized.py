"""Adapters folded into quantized weights, which are rounded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.adapter_models import (
    build,
    delta,
    fold,
    lora,
    numbers,
    run,
)


def quantized(kind: str, weight: np.ndarray) -> tuple[ir.Model, Any]:
    """A model with a quantized weight (in, out), and what reads the weight out of it."""
    import ml_dtypes

    inputs, outputs = weight.shape
    if kind == "packed":
        blocks = weight.T.reshape(outputs, inputs // 16, 16)
        scale = np.abs(blocks).max(-1) / 7
        codes = np.clip(np.rint(blocks / scale[..., None]) + 8, 0, 15).astype(np.uint8)
        sizes = f"K={inputs}, N={outputs}, bits=4, block_size=16"
        body = f"y = com.microsoft.MatMulNBits<{sizes}>(x, q__weight_Q4, q__weight_scales)"
        packed = codes[..., 0::2] | codes[..., 1::2] << 4
        return build(body, f"float[N,{inputs}] x", q__weight_Q4=packed, q__weight_scales=scale.astype(np.float32))
    if kind == "int8 per channel":
        scale = (np.abs(weight).max(0) / 127).astype(np.float32)
        codes = np.rint(weight / scale).astype(np.int8)
        body, zero = "d = DequantizeLinear<axis=1>(q__weight_quantized, s)", {}
    elif kind == "uint8 per tensor":
        low, high = weight.min(), weight.max()
        scale = np.float32((high - low) / 255)
        point = np.uint8(np.rint(-low / scale))
        codes = np.clip(np.rint(weight / scale) + point, 0, 255).astype(np.uint8)
        body, zero = "d = DequantizeLinear(q__weight, s, z)", {"z": np.asarray(point)}
        scale = np.asarray(scale)
    else:
        blocks = weight.reshape(inputs // 16, 16, outputs)
        scale = (np.abs(blocks).max(1) / 7).astype(np.float32)
        codes = np.rint(blocks / scale[:, None]).reshape(weight.shape).astype(ml_dtypes.int4)
        body, zero = "d = DequantizeLinear<axis=0, block_size=16>(q__weight, s)", {}
    name = "q__weight_quantized" if "per channel" in kind else "q__weight"
    return build(f"{body} y = MatMul(x, d)", f"float[N,{inputs}] x", s=scale, **{name: codes}, **zero)


@pytest.mark.parametrize(
    "kind, bound", [("int8 per channel", 0.01), ("uint8 per tensor", 0.02), ("int4", 0.12), ("packed", 0.12)]
)
def test_quantized_bases_are_rounded_again(kind: str, bound: float, tmp_path: Path) -> None:
    weight, eye = numbers(32, 24), np.eye(32, dtype=np.float32)
    model = quantized(kind, weight)
    (stands,) = run(model, x=eye)
    folder = lora(tmp_path / "a", q=(24, 32))
    found, done = fold(model, folder)
    assert done.adapted is not None and done.adapted.effect == "lossy"
    wanted = stands + delta(folder, "q").T
    (got,) = run(found, x=eye)
    error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    assert 0 < error < bound
    assert done.measurements["requantized"]["q.weight"] == pytest.approx(error, rel=1e-2)
    assert "rounded again" in done.warnings[0]
    same_dtype = {n: v.const_value.dtype for n, v in model.graph.initializers.items()}
    assert same_dtype == {n: v.const_value.dtype for n, v in found.graph.initializers.items()}


def test_no_adapter_leaves_a_quantized_weight_on_its_grid(tmp_path: Path) -> None:
    model = quantized("int8 per channel", numbers(32, 24))
    folder = lora(tmp_path / "a", q=(24, 32))
    found, _ = fold(model, f"{folder}=0")
    eye = np.eye(32, dtype=np.float32)
    np.testing.assert_allclose(run(found, x=eye)[0], run(model, x=eye)[0], rtol=1e-5, atol=1e-6)
