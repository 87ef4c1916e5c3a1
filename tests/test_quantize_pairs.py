"""Weights of 8 bits whose products are added in pairs in 16 bits: never too large together, no smaller than needed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from graphc.runtime import integers, pairs
from tests.quantized_models import CONTEXT, build, context, held, normal, pictures, quantized, rows

MATMUL = ir.node("MatMul", [ir.Value(name="x"), ir.Value(name="w")])


def saturating(ordered: np.ndarray, activations: np.ndarray) -> np.ndarray:
    """What vpmaddubsw makes of rows of uint8 and the rows of a weight, its pairs then added without limits."""
    padded = [np.pad(each, ((0, 0), (0, each.shape[1] % 2))).astype(np.int64) for each in (activations, ordered)]
    products = padded[0][:, None] * padded[1][None]
    return np.clip(products.reshape(*products.shape[:2], -1, 2).sum(-1), -(1 << 15), (1 << 15) - 1).sum(-1)


@given(arrays(np.int8, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=7)), st.booleans())
def test_no_sum_saturates_and_what_fits_stays(codes: np.ndarray, flipped: bool) -> None:
    found = pairs.summable(MATMUL, codes, flipped=flipped)
    ordered = pairs.rows(MATMUL, found, flipped=flipped)
    assert ordered is not None and found.shape == codes.shape and found.dtype == codes.dtype
    assert (pairs.largest(ordered) <= pairs.MOST).all()
    most = np.full((1, ordered.shape[1]), 255)
    np.testing.assert_array_equal(saturating(ordered, most), most @ ordered.astype(np.int64).T)
    assert (np.abs(found.astype(int)) <= np.abs(codes.astype(int))).all()
    np.testing.assert_array_equal(pairs.summable(MATMUL, found, flipped=flipped), found)
    kept = pairs.largest(pairs.rows(MATMUL, codes, flipped=flipped)) <= pairs.MOST
    axis = 0 if flipped else 1
    np.testing.assert_array_equal(np.compress(kept, found, axis), np.compress(kept, codes, axis))


def test_channels_of_a_kernel_element_are_neighbours() -> None:
    """As in MLAS: the kernel outside, channels inside; an odd number of them makes pairs of two kernel elements."""
    weight = np.arange(2 * 3 * 2 * 1).reshape(2, 3, 2, 1)
    conv = ir.node("Conv", [ir.Value(name="x"), ir.Value(name="w")])
    np.testing.assert_array_equal(pairs.rows(conv, weight), [[0, 2, 4, 1, 3, 5], [6, 8, 10, 7, 9, 11]])
    depthwise = ir.node("Conv", [ir.Value(name="x"), ir.Value(name="w")], {"group": 4})
    assert pairs.rows(depthwise, np.zeros((4, 1, 3, 3))) is None
    assert pairs.rows(depthwise, np.zeros((8, 1, 3, 3))) is not None, "two outputs of a channel are a product of rows"


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "awp"])
@pytest.mark.parametrize("group", [1, 2, 8])
def test_convolutions_use_as_many_codes_as_they_can(rounding: str, group: int) -> None:
    w = normal(8, 8 // group, 3, 3)
    w[0] = np.abs(w[0]) + 3  # neighbours of one sign
    text = f"a = Conv<group={group}, pads=[1,1,1,1]>(x, w, b) y = Relu(a)"
    model = build(text, "float[N,8,8,8] x", "float[N,8,8,8] y", w=w, b=normal(8))
    samples = [{"x": normal(4, 8, 8, 8, seed=i)} for i in range(2)]
    quantized(model, context(samples), scheme="static", rounding=rounding)
    codes = held(model, "w").astype(int)
    largest = np.abs(codes).reshape(8, -1).max(axis=1)
    if group == 8:
        assert (largest >= 127 if rounding == "nearest" else largest >= 120).all()
    else:
        ordered = np.moveaxis(codes, 1, -1).reshape(8, -1)
        most = np.full((1, ordered.shape[1]), 255)
        np.testing.assert_array_equal(saturating(ordered, most), most @ ordered.T)
        assert largest[1:].max() > 64 and largest[0] <= 90
    assert integers.session_options(model) == {}


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_products_of_matrices(scheme: str) -> None:
    """Either way round that they lie."""
    text = "h = Gemm<transB=1>(x, v, b) y = MatMul(h, w)"
    w, v = normal(48, 16), normal(48, 64)
    model = build(text, "float[N,64] x", "float[N,16] y", w=w, v=v, b=normal(48))
    quantized(model, context(rows()), scheme=scheme)
    assert integers.session_options(model) == {}
    assert max(np.abs(held(model, name).astype(int)).max() for name in "wv") > 64


def test_codes_that_saturate_need_the_option() -> None:
    w = np.zeros((64, 16), np.float32)
    w[::7] = 1.0  # never two neighbours
    for places, wanted in (((), {}), ((1,), {integers.OPTION: "1"})):
        w[list(places)] = 1.0
        model = build("y = MatMul(x, w)", "float[N,64] x", "float[N,16] y", w=w)
        quantized(model, CONTEXT, scheme="dynamic", full_range=True)
        assert np.abs(held(model, "w").astype(int)).max() == 127
        assert integers.session_options(model) == wanted


def test_whole_models_keep_default_options() -> None:
    from tests.quantized_models import images

    model = images(2)
    quantized(model, context(pictures()), scheme="static", rounding="gptq", correct=True)
    assert integers.session_options(model) == {}
