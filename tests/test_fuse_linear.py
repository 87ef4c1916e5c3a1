"""The rules of ``fuse`` around convolutions and products, each before and after, in numbers and in nodes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphc.rewrites import weights
from tests.small_models import build, numbers, operators, reasons
from tests.test_fuse import BN, ROWS, B, M, S, T, W, fused


@pytest.mark.parametrize(
    "body, constants, expected",
    [
        ("c = Conv(x, w) y = BatchNormalization(c, g, b, m, v)", {"w": W, **BN}, ["Conv"]),
        (
            "c = Conv<pads=[1,1,1,1]>(x, w, c0) y = BatchNormalization<epsilon=0.1>(c, g, b, m, v)",
            {"w": W, "c0": B, **BN},
            ["Conv"],
        ),
        ("c = Conv(x, w) y = Mul(c, s)", {"w": W, "s": S.reshape(5, 1, 1)}, ["Conv"]),
        ("c = Conv(x, w) y = Mul(s, c)", {"w": W, "s": S.reshape(1, 5, 1, 1)}, ["Conv"]),
        ("c = Conv(x, w) y = Div(c, s)", {"w": W, "s": [4.0]}, ["Conv"]),
        ("c = Conv(x, w, c0) d = Sub(s, c) y = Neg(d)", {"w": W, "c0": B, "s": T.reshape(5, 1, 1)}, ["Conv"]),
        (
            "c = Conv(x, w) d = Add(c, t) e = Mul(d, s) f = Div(e, s) y = Sub(f, t)",
            {"w": W, "s": S.reshape(5, 1, 1), "t": T.reshape(5, 1, 1)},
            ["Conv"],
        ),
        ("c = Conv(x, w) y = Sum(t, c)", {"w": W, "t": T.reshape(1, 5, 1, 1)}, ["Conv"]),
        (
            "c = Conv<group=2>(x, w) y = BatchNormalization(c, g, b, m, v)",
            {"w": numbers(6, 2, 3, 3), **{k: np.resize(v, 6) for k, v in BN.items()}},
            ["Conv"],
        ),
        (
            "c = ConvTranspose<strides=[2,2]>(x, w) y = BatchNormalization(c, g, b, m, v)",
            {"w": numbers(4, 5, 3, 3), **BN},
            ["ConvTranspose"],
        ),
        (
            "c = ConvTranspose<group=2, strides=[2,2], output_padding=[1,1]>(x, w, c0) "
            "y = BatchNormalization(c, g, b, m, v)",
            {"w": numbers(4, 3, 3, 3), "c0": numbers(6), **{k: np.resize(v, 6) for k, v in BN.items()}},
            ["ConvTranspose"],
        ),
        # batch normalisation as arithmetic, behind a change of layout
        (
            "c = Conv(x, w) h = Transpose<perm=[0,2,3,1]>(c) d = Sub(h, m) e = Mul(d, g) y = Add(e, b)",
            {"w": W, "m": T, "g": S, "b": B},
            ["Conv", "Transpose"],
        ),
        (
            "c = Conv(x, w) h = Transpose<perm=[0,2,3,1]>(c) d = Mul(h, g) e = Transpose<perm=[0,3,1,2]>(d) "
            "y = Add(e, b)",
            {"w": W, "g": S, "b": B.reshape(5, 1, 1)},
            ["Conv", "Transpose", "Transpose"],
        ),
        (
            "c = Conv(x, w) h = Unsqueeze(c, one) d = Mul(h, g) e = Squeeze(d, one) y = Mul(e, s)",
            {"w": W, "one": np.array([1]), "g": S.reshape(5, 1, 1), "s": S.reshape(5, 1, 1)},
            ["Conv", "Unsqueeze", "Squeeze"],
        ),
    ],
)
def test_after_a_convolution(body: str, constants: dict, expected: list[str]) -> None:
    after, result = fused(build(body, **constants))
    assert operators(after) == expected
    assert not result.refusals


@pytest.mark.parametrize(
    "body, constants, expected",
    [
        ("p = MatMul(x, w) y = Mul(p, s)", {"w": M, "s": S}, ["MatMul"]),
        ("p = MatMul(x, w) y = BatchNormalization(p, g, b, m, v)", {"w": M, **BN}, ["Gemm"]),
        ("p = MatMul(x, w) q = Add(p, t) y = Mul(q, s)", {"w": M, "s": S, "t": T}, ["Gemm"]),
        ("p = MatMul(x, w) y = Add(t, p)", {"w": M, "t": T}, ["Gemm"]),
        ("y = Gemm(x, w, c)", {"w": M, "c": B}, ["Gemm"]),
        ("p = Gemm(x, w) y = Add(p, t)", {"w": M, "t": T}, ["Gemm"]),
        ("d = Tanh(x) p = Gemm<beta=2.0>(x, w) y = Add(p, d)", {"w": numbers(6, 6)}, ["Tanh", "Gemm"]),
        ("d = Tanh(x) p = Gemm(x, w) y = Add(p, d)", {"w": numbers(6, 6)}, ["Tanh", "Gemm"]),
        ("d = Tanh(x) p = MatMul(x, w) y = Add(p, d)", {"w": numbers(6, 6)}, ["Tanh", "MatMul", "Add"]),
        ("p = MatMul(x, w) y = Add(p, t)", {"w": M, "t": numbers(2, 1)}, ["MatMul", "Add"]),
        (
            "p = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, c) q = Mul(p, s) y = Add(q, t)",
            {"w": numbers(5, 6), "c": B, "s": S, "t": T},
            ["Gemm"],
        ),
        ("p = Gemm(x, w, c) y = BatchNormalization(p, g, b, m, v)", {"w": M, "c": [0.5], **BN}, ["Gemm"]),
        ("a = Mul(x, s) y = Gemm(a, w, c)", {"w": M, "c": B, "s": numbers(6)}, ["Gemm"]),
        ("a = Sub(x, s) y = Gemm<alpha=0.5, beta=2.0>(a, w, c)", {"w": M, "c": B, "s": numbers(6)}, ["Gemm"]),
        (
            "a = Sub(x, s) b = Div(a, s) y = Gemm<transB=1>(b, w, c)",
            {"w": numbers(5, 6), "c": B, "s": numbers(6, low=1, high=2)},
            ["Gemm"],
        ),
        ("a = Add(x, s) p = MatMul(a, w) y = Add(p, c)", {"w": M, "c": B, "s": numbers(6)}, ["Gemm"]),
        (
            "a = BatchNormalization(x, s, s, s, s) y = Gemm(a, w, c)",
            {"w": M, "c": B, "s": numbers(6, low=1, high=2)},
            ["Gemm"],
        ),
        (
            "a = Transpose<perm=[1,0]>(x) b = Transpose<perm=[1,0]>(a) y = Gemm(b, w, c)",
            {"w": M, "c": B},
            ["Gemm"],
        ),
        (
            "a = Transpose<perm=[1,0]>(x) b = Mul(a, s) y = Gemm<transA=1>(b, w, c)",
            {"w": M, "c": B, "s": numbers(6, 1)},
            ["Gemm"],
        ),
    ],
)
def test_products(body: str, constants: dict, expected: list[str]) -> None:
    after, _ = fused(build(body, x=ROWS, **constants))
    assert operators(after) == expected


def test_casts_on_the_way_are_passed_unless_digits_would_be_lost() -> None:
    wide = {name: array.astype(np.float64) for name, array in (("m", T), ("g", S), ("b", B))}
    body = """c = Conv(x, w) h = Transpose<perm=[0,2,3,1]>(c) k = Cast<to=11>(h) d = Sub(k, m) e = Mul(d, g)
              f = Add(e, b) y = Cast<to=1>(f)"""
    after, _ = fused(build(body, w=W, **wide))
    assert operators(after) == ["Conv", "Transpose", "Cast", "Cast"]
    body = "k = Cast<to=11>(x) a = Sub(k, s) b = Cast<to=1>(a) y = Gemm(b, w, c)"
    model = build(body, x=ROWS, w=M, c=B, s=np.full(6, 1.5))
    after, _ = fused(model)
    assert operators(after) == operators(model)


def test_a_product_of_higher_rank_keeps_its_add() -> None:
    model = build("p = MatMul(x, w) q = Mul(p, s) y = Add(q, t)", x="float[N,3,6] x", w=M, s=S, t=T)
    after, result = fused(model)
    assert operators(after) == ["MatMul", "Add"]
    assert reasons(result) == ["the product is not two-dimensional, which Gemm needs"]


@pytest.mark.parametrize(
    "body, constants, expected",
    [
        ("a = Mul(x, s) y = Conv<pads=[1,1,1,1]>(a, w)", {"w": W, "s": numbers(4, 1, 1)}, ["Conv"]),
        (
            "a = Sub(x, s) b = Div(a, s) y = Conv(b, w)",
            {"w": W, "s": numbers(1, 4, 1, 1, low=1, high=2)},
            ["Conv"],
        ),
        (
            "a = BatchNormalization(x, s, s, s, s) y = Conv<group=2>(a, w, c)",
            {"w": numbers(6, 2, 3, 3), "c": numbers(6), "s": numbers(4, low=1, high=2)},
            ["Conv"],
        ),
        (
            "a = Mul(x, s) y = ConvTranspose<group=2>(a, w)",
            {"w": numbers(4, 3, 3, 3), "s": numbers(4, 1, 1)},
            ["ConvTranspose"],
        ),
        # what pads takes the scale only
        (
            "a = Sub(x, s) b = Div(a, s) y = Conv<pads=[1,1,1,1]>(b, w)",
            {"w": W, "s": numbers(1, 4, 1, 1, low=1, high=2)},
            ["Add", "Conv"],
        ),
        (
            "a = Mul(x, s) b = Add(a, t) y = Conv<pads=[1,1,1,1]>(b, w, c)",
            {"w": W, "c": B, "s": [0.3], "t": [-0.7]},
            ["Add", "Conv"],
        ),
        (
            "a = BatchNormalization(x, s, s, s, s) b = Div(a, t) y = ConvTranspose<strides=[2,2]>(b, w)",
            {"w": numbers(4, 3, 3, 3), "s": numbers(4, low=1, high=2), "t": numbers(4, 1, 1, low=1, high=2)},
            ["Add", "ConvTranspose"],
        ),
        (
            "a = Mul(x, s) b = Add(a, t) y = ConvTranspose<strides=[2,2]>(b, w)",
            {"w": numbers(4, 3, 3, 3), "s": numbers(4, 1, 1, low=1, high=2), "t": [0.4]},
            ["Add", "ConvTranspose"],
        ),
        (
            "a = Transpose<perm=[0,3,1,2]>(x) b = Mul(a, s) y = Conv(b, w)",
            {"w": numbers(5, 8, 3, 3), "s": numbers(8, 1, 1)},
            ["Transpose", "Conv"],
        ),
    ],
)
def test_before_a_convolution(body: str, constants: dict, expected: list[str]) -> None:
    after, _ = fused(build(body, **constants))
    assert operators(after) == expected


def test_a_weight_keeps_its_name_and_new_biases_are_named_after_it() -> None:
    model = build("c = Conv(x, w) y = BatchNormalization(c, g, b, m, v)", w=W, **BN)
    model.graph.initializers["w"].name = "conv1.weight"
    after, _ = fused(model)
    assert set(after.graph.initializers) == {"conv1.weight", "conv1.bias"}


def test_a_small_shared_weight_is_copied_and_a_big_one_is_not() -> None:
    body = "a = Conv<pads=[1,1,1,1]>(x, w) b = Mul(a, s) c = Conv<pads=[1,1,1,1]>(b, w) y = Relu(c)"
    after, _ = fused(build(body, w=numbers(4, 4, 3, 3), s=[2.0]), only=("conv-affine",))
    assert operators(after) == ["Conv", "Conv", "Relu"]
    big = build(body, x="float[N,64,5,5] x", w=numbers(64, 64, 3, 3, low=-0.1, high=0.1), s=[2.0])
    after, result = fused(big, only=("conv-affine",))
    assert operators(after) == ["Conv", "Mul", "Conv", "Relu"]
    assert reasons(result) == ["the weight is shared with 1 other node"]


def test_a_shared_weight_whose_readers_are_all_scaled_alike_is_folded_once() -> None:
    body = "a = Conv(x, w) b = Mul(a, s) c = Conv(z, w) d = Mul(c, s) y = Add(b, d)"
    model = build(body, x="float[N,64,5,5] x, float[N,64,5,5] z", w=numbers(64, 64, 3, 3), s=[2.0])
    after, _ = fused(model)
    assert operators(after) == ["Conv", "Conv", "Add"]
    assert len(after.graph.initializers) == 1


def test_big_weights_are_computed_when_they_are_read() -> None:
    width = int(np.sqrt(weights.LAZY)) + 1
    model = build("p = MatMul(x, w) y = Mul(p, s)", x=f"float[N,{width}] x", w=numbers(width, width), s=[0.5])
    after, _ = fused(model)
    assert isinstance(after.graph.initializers["w"].const_value, ir.LazyTensor)


def test_half_precision_keeps_its_digits_or_is_left() -> None:
    def half(scale: float) -> ir.Model:
        model = build(
            "c = Conv(x, w) y = Mul(c, s)",
            x="float16[N,4,9,8] x",
            w=W.astype(np.float16),
            s=np.array([scale], dtype=np.float16),
        )
        return model

    after, _ = fused(half(0.5))
    assert operators(after) == ["Conv"]
    after, result = fused(half(1e-6))
    assert operators(after) == ["Conv", "Mul"]
    assert reasons(result) == ["the folded weights lose precision in float16"]
