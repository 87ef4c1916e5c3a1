"""Grids: codes and scales against plain numpy, element by element."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc.quantization import rounding
from graphc.quantization.granularity import Granularity
from graphc.quantization.grid import Grid
from tests.quantized_models import held, mlp, normal, quantized, reference, rows, run
from tests.small_models import operators


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("block", [0, -1, 16, 48])
def test_weights_are_what_the_definition_says(bits: int, symmetric: bool, block: int) -> None:
    model = mlp()
    opset = 25 if bits == 2 else 21
    model.graph.opset_imports[""] = opset
    before = {name: held(model, name).copy() for name in ("w", "v")}
    x = rows(1)[0]["x"]
    result = quantized(model, bits=bits, symmetric=symmetric, block=block)
    dtype = {8: "int8", 4: "int4", 3: "int4", 2: "int2"}[bits]
    assert result.changes == [f"weight stored in {'' if symmetric else 'u'}{dtype} (×2)"]
    granularity = {0: (1, 0), -1: (None, 0)}.get(block, (0, block))
    w = reference(before["w"], bits, symmetric, *granularity)
    v = reference(before["v"].T, bits, symmetric, *(granularity if block < 48 else (1, 0)))
    want = np.maximum(x.astype(np.float64) @ w + held(model, "b"), 0) @ v + held(model, "c")
    got = run(model, x=x)["y"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    assert "Gemm" not in operators(model), "ONNX Runtime multiplies with codes in MatMul only"


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 6),
    st.sampled_from([2, 3, 4, 7, 8]),
    st.booleans(),
    st.sampled_from([None, 0, 1]),
    st.sampled_from([0, 16, 7]),
    st.integers(0, 2**31),
)
def test_codes_survive_the_file_and_are_the_nearest(
    depth: int, width: int, bits: int, symmetric: bool, axis: int | None, block: int, seed: int
) -> None:
    w = np.random.default_rng(seed).normal(size=(depth, width)).astype(np.float32)
    grid, granularity = Grid(bits, symmetric), Granularity(axis, block if axis is not None else 0)
    codes = rounding.nearest(ir.tensor(w), grid, granularity)
    packed = ir.from_proto(ir.to_proto(codes.codes))
    np.testing.assert_array_equal(packed.numpy().astype(int), codes.codes.numpy().astype(int))
    assert packed.nbytes == -(-w.size * grid.dtype.bitwidth // 8)
    low, high = grid.reach
    stored = packed.numpy().astype(int)
    assert low <= stored.min() and stored.max() <= high
    scale = np.broadcast_to(granularity.spread(codes.scale, w.shape), w.shape)
    exact = symmetric and bits > 4
    assert (np.abs(codes.values() - w) <= np.abs(scale) * ((0.5 if exact else 1.0) + 2e-6 * 2**bits)).all()
    np.testing.assert_allclose(
        codes.values(), reference(w, bits, symmetric, axis, block if axis is not None else 0), atol=1e-6
    )


def test_large_weights_are_done_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    w = normal(70, 33)
    whole = [
        rounding.nearest(ir.tensor(w), Grid(4), g) for g in (Granularity(0, 32), Granularity(1), Granularity(1, 16))
    ]
    monkeypatch.setattr(rounding, "PIECE", 100)
    for each in whole:
        again = rounding.nearest(ir.tensor(w), Grid(4), each.granularity)
        np.testing.assert_array_equal(again.values(), each.values())
        np.testing.assert_array_equal(again.scale, each.scale)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("grid", [Grid(8), Grid(4, False), Grid(8, form="float8e4m3fn"), Grid(8, form="float8e5m2")])
def test_zeros_constants_and_extremes(grid: Grid, dtype: Any) -> None:
    top = float(ml_dtypes.finfo(dtype).max)
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    w = np.zeros((8, 4), dtype)
    w[:, 1], w[:, 2], w[:, 3] = 3.25, tiny, np.linspace(-top, top, 8)
    codes = rounding.nearest(ir.Tensor(w), grid, Granularity(1))
    values = codes.values().astype(np.float64)
    assert np.isfinite(values).all()
    assert (values[:, 0] == 0).all()
    np.testing.assert_allclose(values[:, 1], 3.25, rtol=1e-2)
    np.testing.assert_allclose(values[:, 2], 0, atol=2 * tiny)
    np.testing.assert_allclose(values[:, 3], w[:, 3].astype(np.float64), atol=top * 0.14)


def test_clipping_never_has_more_error() -> None:
    w = normal(64, 32)
    w[3, :8] *= 8
    for bits in (4, 3):
        losses = [
            np.square(rounding.nearest(ir.tensor(w), Grid(bits), Granularity(1), clip=clip).values() - w).sum(0)
            for clip in (False, True)
        ]
        assert (losses[1] <= losses[0]).all()
        assert losses[1].sum() < 0.95 * losses[0].sum()
