"""The pass ``fuse``: each rule before and after, in numbers and in nodes, and what it must leave alone."""

from __future__ import annotations

import re
import typing

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc import edit, runtime
from graphc.contract import Capabilities, Context, PassResult
from graphc.errors import BadInput
from graphc.passes import fuse
from graphc.passes.fuse import Fuse
from graphc.recipe import Recipe
from graphc.rewrites import weights

CONTEXT = Context(target=Capabilities("portable", 10, {"": 21}))
IMAGE = "float[N,4,9,8] x"
ROWS = "float[N,6] x"


def numbers(*shape: int, seed: int = 0, low: float = -1.0, high: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def build(body: str, x: str = IMAGE, outputs: str = "y", opset: int = 21, **constants: object) -> ir.Model:
    """A model from ONNX text; ``constants`` become initializers, float32 unless they are integer arrays."""
    declared = ", ".join(f"float {name}" for name in outputs.split())
    text = f'<ir_version: 10, opset_import: ["": {opset}]> g ({x}) => ({declared}) {{ {body} }}'
    model = ir.from_onnx_text(text)
    for output in model.graph.outputs:
        output.shape = None
        output.dtype = next(v.dtype for v in model.graph.inputs)
    missing = {v.name: v for node in edit.nodes(model) for v in node.inputs if v is not None and v.producer() is None}
    for name, data in constants.items():
        array = np.asarray(data, dtype=np.float32 if not isinstance(data, np.ndarray) else None)
        value = missing[name]
        value.const_value = ir.tensor(array, name=name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(value.const_value.dtype)
        model.graph.register_initializer(value)
    return model


def feeds(model: ir.Model, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        v.name: rng.standard_normal([d if isinstance(d, int) else 2 for d in v.shape]).astype(v.dtype.numpy())
        for v in model.graph.inputs
    }


def assert_same(before: ir.Model, after: ir.Model) -> None:
    """Both compute the same in ONNX Runtime, unoptimised, within 64 roundings of the largest value."""
    inputs = feeds(before)
    wanted = runtime.session(before, optimise=False, threads=1).run(inputs)
    found = runtime.session(after, optimise=False, threads=1).run(inputs)
    assert list(wanted) == list(found)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        eps = np.finfo(array.dtype).eps
        np.testing.assert_allclose(found[name], array, rtol=0, atol=64 * eps * (1 + np.abs(array).max()))


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in edit.nodes(model)]


def fused(model: ir.Model, **options: object) -> tuple[ir.Model, PassResult]:
    """Run the pass on a copy, check that it computes the same, and that a second run changes nothing."""
    after = model.clone()
    result = Fuse(**options).run(after, CONTEXT)
    assert_same(model, after)
    assert not Fuse(**options).run(after, CONTEXT).changed
    return after, result


def reasons(result: PassResult) -> list[str]:
    return [refusal.reason for refusal in result.refusals]


W = numbers(5, 4, 3, 3)
B = numbers(5, seed=1)
S = numbers(5, seed=2, low=0.5, high=2)
T = numbers(5, seed=3)
BN = {"g": S, "b": T, "m": numbers(5, seed=4), "v": numbers(5, seed=5, low=0.5, high=2)}
M = numbers(6, 5)


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


@pytest.mark.parametrize(
    "body, constants, reason",
    [
        (
            "c = Conv(x, w) r = Relu(c) y = BatchNormalization(r, g, b, m, v)",
            {"w": W, **BN},
            "the BatchNormalization follows Relu, not a convolution or product",
        ),
        (
            "y = BatchNormalization(x, s, s, s, s)",
            {"s": numbers(4, low=1, high=2)},
            "the BatchNormalization follows an input of the graph, not a convolution or product",
        ),
        (
            "c = Conv(x, w) d = Mul(c, s) y = Add(d, c)",
            {"w": W, "s": S.reshape(5, 1, 1)},
            "the intermediate result has 1 other reader",
        ),
        (
            'a = Sub(x, s) y = Conv<auto_pad="SAME_UPPER">(a, w)',
            {"w": W, "s": numbers(4, 1, 1)},
            "a shift before a zero-padded convolution does not fold",
        ),
        (
            "a = Sub(x, s) y = ConvTranspose(a, w)",
            {"w": numbers(4, 3, 3, 3), "s": numbers(4, 1, 1)},
            "a shift before a transposed convolution does not fold: the borders see less of it",
        ),
        (
            "c = Conv(x, w) y = Mul(c, s)",
            {"w": W, "s": numbers(1, 1, 7, 1)},
            "the constant does not vary along the channels",
        ),
        (
            "c = Conv(x, w) y = Mul(c, s)",
            {"w": W, "s": numbers(5, 7, 1)},
            "the constant varies along more than one axis",
        ),
        (
            "c = Conv(x, w) y = Mul(c, s)",
            {"w": W, "s": numbers(1, 1, 1, 1, 1)},
            "the constant has more axes than the tensor",
        ),
        (
            "c = Conv(x, w) y = Mul(c, s)",
            {"w": numbers(1, 4, 3, 3), "s": numbers(5, 1, 1)},
            "the constant broadcasts the result to more channels",
        ),
        (
            "c = Conv(x, w, z) y = Mul(c, s) z = Neg(t)",
            {"w": W, "s": S.reshape(5, 1, 1), "t": T},
            "the bias is not constant",
        ),
    ],
)
def test_left_with_a_reason(body: str, constants: dict, reason: str) -> None:
    if "z = Neg(t)" in body:
        body = "z = Neg(t) " + body.replace(" z = Neg(t)", "")
    model = build(body, **constants)
    after, result = fused(model)
    assert operators(after) == operators(model)
    assert reason in reasons(result)
    assert not result.changed


def test_an_intermediate_output_of_the_graph_stays() -> None:
    model = build("c = Conv(x, w) y = Mul(c, s)", outputs="c y", w=W, s=S.reshape(5, 1, 1))
    after, result = fused(model)
    assert operators(after) == ["Conv", "Mul"]
    assert reasons(result) == ["the intermediate result is an output of the graph"]


def test_training_mode_is_left() -> None:
    model = build("c = Conv(x, w) y, rm, rv = BatchNormalization<training_mode=1>(c, g, b, m, v)", w=W, **BN)
    result = Fuse().run(model, CONTEXT)
    assert not result.changed
    assert "the BatchNormalization is in training mode" in reasons(result)


def test_a_weight_that_callers_may_override_is_left() -> None:
    model = build("c = Conv(x, w) y = Mul(c, s)", w=W, s=S.reshape(5, 1, 1))
    model.graph.inputs.append(model.graph.initializers["w"])
    result = Fuse().run(model, CONTEXT)
    assert not result.changed
    assert reasons(result) == ["the weight is not constant"]


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


@pytest.mark.parametrize(
    "body, constants, expected",
    [
        ("p = Pad(x, a) y = Conv(p, w)", {"a": np.array([0, 0, 1, 2, 0, 0, 3, 0]), "w": W}, ["Conv"]),
        (
            "p = Pad(x, a, z, ax) y = Conv<pads=[1,0,0,1]>(p, w)",
            {"a": np.array([1, 2]), "z": [0.0], "ax": np.array([-1]), "w": W},
            ["Conv"],
        ),
        (
            "p = Pad(x, a) y = AveragePool<kernel_shape=[3,3]>(p)",
            {"a": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
            ["AveragePool"],
        ),
        (
            "r = Relu(x) p = Pad(r, a) y = MaxPool<kernel_shape=[3,3], strides=[2,2]>(p)",
            {"a": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
            ["Relu", "MaxPool"],
        ),
        (
            "p = Pad(x, a, z) y = MaxPool<kernel_shape=[3,3]>(p)",
            {"a": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "z": [-np.inf]},
            ["MaxPool"],
        ),
        (
            "p = Pad(x, a) y = MaxPool<kernel_shape=[3,3]>(p)",
            {"a": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
            ["Pad", "MaxPool"],
        ),
        (
            "p = Pad(x, a) y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(p)",
            {"a": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
            ["Pad", "AveragePool"],
        ),
        (
            "p = Pad(x, a) y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(p)",
            {"a": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
            ["AveragePool"],
        ),
        (
            "p = Pad(x, a) y = AveragePool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>(p)",
            {"a": np.array([0, 0, 1, 1, 0, 0, 0, 0])},
            ["Pad", "AveragePool"],
        ),
        (
            'p = Pad<mode="reflect">(x, a) y = Conv(p, w)',
            {"a": np.array([0, 0, 1, 2, 0, 0, 3, 0]), "w": W},
            ["Pad", "Conv"],
        ),
        (
            "p = Pad(x, a, z) y = Conv(p, w)",
            {"a": np.array([0, 0, 1, 2, 0, 0, 3, 0]), "w": W, "z": [1.0]},
            ["Pad", "Conv"],
        ),
        ("p = Pad(x, a) y = Conv(p, w)", {"a": np.array([0, 0, -1, 0, 0, 0, 0, 0]), "w": W}, ["Pad", "Conv"]),
        (
            "p = Pad(x, a) y = Conv(p, w)",
            {"a": np.array([0, 1, 0, 0, 0, 1, 0, 0]), "w": numbers(5, 6, 3, 3)},
            ["Pad", "Conv"],
        ),
    ],
)
def test_padding(body: str, constants: dict, expected: list[str]) -> None:
    after, result = fused(build(body, **constants))
    assert operators(after) == expected
    assert bool(result.refusals) == ("Pad" in expected)


@pytest.mark.parametrize(
    "body, expected",
    [
        ("a = Relu(x) y = Relu(a)", ["Relu"]),
        ("a = Relu(x) y = Clip(a, z, six)", ["Clip"]),
        ("a = Clip(x, m, six) y = Relu(a)", ["Clip"]),
        ("a = Clip(x, , six) y = Clip(a, m)", ["Clip"]),
        ("a = Clip(x, six) y = Clip(a, m, z)", ["Clip"]),
        ("a = Clip(x, z) y = Relu(a)", ["Relu"]),
        ("a = Clip(x, m, six) b = Clip(a, z) c = Relu(b) y = Clip(c, , six)", ["Clip"]),
    ],
)
def test_bounds_compose(body: str, expected: list[str]) -> None:
    held = {"z": np.float32(0), "six": np.float32(0.6), "m": np.float32(-0.3)}
    used = {
        name: np.asarray(value)
        for name, value in held.items()
        if name in body.replace(",", " ").replace(")", " ").split()
    }
    after, _ = fused(build(body, **used))
    assert operators(after) == expected


@pytest.mark.parametrize(
    "body, constants, expected",
    [
        (
            "r = Relu(x) a = Mul(r, s) b = Mul(a, s) y = Div(b, t)",
            {"s": [2.0], "t": numbers(4, 1, 1, low=1, high=2)},
            ["Relu", "Mul"],
        ),
        (
            "r = Relu(x) a = Add(r, s) b = Mul(a, s) c = Sub(b, s) y = Exp(c)",
            {"s": [2.0]},
            ["Relu", "Mul", "Add", "Exp"],
        ),
        (
            "r = Relu(x) a = Sub(r, m) b = Mul(a, s) y = Add(b, t)",
            {"m": numbers(4, 1, 1), "s": numbers(4, 1, 1), "t": numbers(4, 1, 1)},
            ["Relu", "BatchNormalization"],
        ),
        (
            "r = Relu(x) a = Mul(r, s) y = Add(a, t)",
            {"s": numbers(8), "t": numbers(8)},
            ["Relu", "Mul", "Add"],
        ),
        (
            "r = Relu(x) f = Flatten<axis=2>(r) u = Unsqueeze(f, one) a = Mul(u, s) b = Add(a, t) y = Exp(b)",
            {"one": np.array([1]), "s": [2.0], "t": [3.0]},
            ["Relu", "Flatten", "Unsqueeze", "Mul", "Add", "Exp"],
        ),
        (
            "r = Relu(x) u = Unsqueeze(r, last) a = Mul(u, s) y = Add(a, t)",
            {"last": np.array([-1]), "s": numbers(4, 1, 1, 1), "t": [3.0]},
            ["Relu", "Unsqueeze", "BatchNormalization"],
        ),
        (
            "r = ReduceMean<keepdims=0>(x, last) a = Mul(r, s) y = Add(a, t)",
            {"last": np.array([-1]), "s": numbers(4, 1), "t": [3.0]},
            ["ReduceMean", "BatchNormalization"],
        ),
        # along different axes: nothing to merge
        (
            "r = Relu(x) a = Mul(r, s) y = Mul(a, t)",
            {"s": numbers(8), "t": numbers(4, 1, 1)},
            ["Relu", "Mul", "Mul"],
        ),
    ],
)
def test_chains_with_nothing_to_fold_into(body: str, constants: dict, expected: list[str]) -> None:
    after, _ = fused(build(body, **constants))
    assert operators(after) == expected


def normalisation(end: str, square: str = "Mul(d, d)", quotient: str = "Div(d, r)") -> str:
    return f"""m = ReduceMean<keepdims=1>(x, axes) d = Sub(x, m) q = {square} v = ReduceMean<keepdims=1>(q, axes)
               e = Add(v, eps) r = Sqrt(e) {"i = Reciprocal(r)" if "(i" in quotient else ""} n = {quotient} {end}"""


@pytest.mark.parametrize(
    "body, expected",
    [
        (normalisation("a = Mul(n, g) y = Add(a, b)"), ["LayerNormalization"]),
        (normalisation("a = Mul(g, n) y = Relu(a)", square="Pow(d, two)"), ["LayerNormalization", "Relu"]),
        (normalisation("y = Add(b, n)", quotient="Mul(i, d)"), ["LayerNormalization"]),
        (normalisation("y = Relu(n)"), ["LayerNormalization", "Relu"]),
    ],
)
def test_layer_normalisation_written_out(body: str, expected: list[str]) -> None:
    known = {"eps": [1e-3], "g": numbers(6), "b": numbers(6, seed=1), "two": np.float32(2), "axes": np.array([-1])}
    used = {name: np.asarray(array) for name, array in known.items() if re.search(rf"[(, ]{name}[,)]", body)}
    used["eps"] = used["eps"].astype(np.float32)
    after, _ = fused(build(body, x="float[N,3,6] x", **used))
    assert operators(after) == expected


@pytest.mark.parametrize(
    "body, axes",
    [
        (normalisation("y = Relu(n)"), [1]),
        (normalisation("y = Add(n, d)"), [-1]),
        (normalisation("y = Relu(n)", square="Mul(x, x)"), [-1]),
    ],
)
def test_what_only_looks_like_layer_normalisation_is_left(body: str, axes: list[int]) -> None:
    model = build(body, x="float[N,3,6] x", axes=np.array(axes), eps=[5.0])
    after, _ = fused(model)
    assert operators(after) == operators(model)


def test_a_mean_that_drops_the_axis_is_no_part_of_a_normalisation() -> None:
    """One number is its own mean: behind the mean nothing is left, whose sum with a row has the row's size again."""
    body = """z = ReduceMean<keepdims=0>(x, axes) m = ReduceMean<keepdims=1>(z, axes) d = Sub(z, m) s = Mul(d, d)
              v = ReduceMean<keepdims=1>(s, axes) e = Add(v, eps) r = Sqrt(e) n = Div(d, r)
              a = Mul(n, g) y = Add(a, b)"""
    model = build(body, x="float[N,6,6] x", axes=np.array([-1]), eps=[1e-2], g=numbers(6), b=numbers(6, seed=1))
    after, _ = fused(model)
    assert "ReduceMean" in operators(after)


def test_the_scale_of_an_rms_normalisation_stays_with_it() -> None:
    body = """q = Mul(x, x) v = ReduceMean<keepdims=1>(q, axes) e = Add(v, eps) r = Sqrt(e) i = Reciprocal(r)
              n = Mul(x, i) a = Mul(n, g) p = MatMul(a, w) y = Relu(p)"""
    model = build(body, x=ROWS, axes=np.array([-1]), eps=[1e-5], g=numbers(6), w=M)
    after, result = fused(model)
    assert operators(after) == operators(model)
    assert "the scale belongs to a normalisation, which runtimes compute as a whole" in reasons(result)


ROOT, HALF_PI = np.float32(np.sqrt(2)), np.float32(np.sqrt(2 / np.pi))
CUBIC = np.float32(0.044715)


@pytest.mark.parametrize(
    "body, constants, expected",
    [
        ("d = Div(x, r) e = Erf(d) a = Add(e, o) m = Mul(x, a) y = Mul(m, h)", {"r": ROOT, "o": 1, "h": 0.5}, ["Gelu"]),
        (
            "d = Mul(i, x) e = Erf(d) a = Add(o, e) f = Mul(h, x) y = Mul(a, f)",
            {"i": 1 / ROOT, "o": 1, "h": 0.5},
            ["Gelu"],
        ),
        ("d = Div(x, r) e = Erf(d) a = Add(e, o) m = Mul(a, h) y = Mul(x, m)", {"r": ROOT, "o": 1, "h": 0.5}, ["Gelu"]),
        (
            "c = Pow(x, k) p = Mul(c, f) s = Add(x, p) z = Mul(s, g) t = Tanh(z) u = Add(t, o) m = Mul(x, h) "
            "y = Mul(m, u)",
            {"k": 3, "f": CUBIC, "g": HALF_PI, "o": 1, "h": 0.5},
            ["Gelu"],
        ),
        (
            "q = Mul(x, x) p = Mul(q, f) s = Add(p, o) z = Mul(x, g) w = Mul(z, s) t = Tanh(w) u = Add(t, o) "
            "m = Mul(x, h) y = Mul(m, u)",
            {"f": CUBIC, "g": HALF_PI, "o": 1, "h": 0.5},
            ["Gelu"],
        ),
        ("a = Add(x, k) c = Clip(a, z, s) m = Mul(x, c) y = Div(m, s)", {"k": 3, "z": 0, "s": 6}, ["HardSwish"]),
        ("h = HardSigmoid<alpha=0.16666667, beta=0.5>(x) y = Mul(x, h)", {}, ["HardSwish"]),
        ("a = Add(x, k) c = Clip(a, z, s) d = Div(c, s) y = Exp(d)", {"k": 3, "z": 0, "s": 6}, ["HardSigmoid", "Exp"]),
        ("s = Softplus(x) t = Tanh(s) y = Mul(t, x)", {}, ["Mish"]),
        # nearly, but not
        (
            "d = Div(x, r) e = Erf(d) a = Add(e, o) m = Mul(x, a) y = Mul(m, h)",
            {"r": 1.5, "o": 1, "h": 0.5},
            ["Div", "Erf", "Add", "Mul", "Mul"],
        ),
        (
            "a = Add(x, k) c = Clip(a, z, s) m = Mul(x, c) y = Div(m, s)",
            {"k": 2, "z": 0, "s": 6},
            ["Add", "Clip", "Mul", "Div"],
        ),
        ("e = Erf(x) y = Mul(x, e)", {}, ["Erf", "Mul"]),
    ],
)
def test_functions_of_one_number(body: str, constants: dict, expected: list[str]) -> None:
    after, _ = fused(build(body, **{name: np.asarray(number, np.float32) for name, number in constants.items()}))
    assert operators(after) == expected


def test_a_function_whose_parts_are_read_elsewhere_is_left() -> None:
    body = "d = Div(x, r) e = Erf(d) a = Add(e, o) m = Mul(x, a) g = Mul(m, h) y = Add(g, e)"
    model = build(body, r=np.asarray(ROOT), o=np.asarray(np.float32(1)), h=np.asarray(np.float32(0.5)))
    after, _ = fused(model)
    assert operators(after) == operators(model)


def test_branches_with_weights_of_the_outer_graph() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[N,4,9,8] x, bool k) => (float y) {
      y = If (k) <then_branch = a () => (float u) { c = Conv(x, w) u = Mul(c, s) },
                  else_branch = b () => (float o) { d = Conv(x, w) o = Relu(d) }> }"""
    model = ir.from_onnx_text(text)
    model.graph.outputs[0].shape = None
    for sub in model.graph.subgraphs():
        sub.outputs[0].shape = None
    for name, array in (("w", W), ("s", S.reshape(5, 1, 1))):
        value = ir.Value(
            name=name,
            const_value=ir.tensor(array, name=name),
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        model.graph.register_initializer(value)
        for node in edit.nodes(model):
            for i, old in enumerate(node.inputs):
                if old is not None and old.name == name and old is not value:
                    node.replace_input_with(i, value)
    after = model.clone()
    assert Fuse().run(after, CONTEXT).changes == ["Mul folded into the Conv before it"]
    for condition in (True, False):
        inputs = {"x": numbers(2, 4, 9, 8), "k": np.array(condition)}
        one, two = (runtime.session(m, optimise=False).run(inputs)["y"] for m in (model, after))
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_inside_local_functions_constants_stay_nodes() -> None:
    text = """<ir_version: 10, opset_import: ["": 21, "f": 1]>
      g (float[N,6] x) => (float[N,2] y) { y = f.lin(x) }
      <domain: "f", opset_import: ["": 21]> lin (u) => (o) {
        w = Constant<value = float[6,2] {1,2,3,4,5,6,7,8,9,10,11,12}>() s = Constant<value = float[2] {2,3}>()
        p = MatMul(u, w) o = Mul(p, s) }"""
    model = ir.from_onnx_text(text)
    after, _ = fused(model)
    assert sorted(operators(after)) == ["Constant", "MatMul", "lin"]


def test_attributes_given_by_the_caller_of_a_function_are_left() -> None:
    text = """<ir_version: 10, opset_import: ["": 21, "f": 1]>
      g (float[N,6] x) => (float[N,2] y) { y = f.lin<beta=2.0>(x) }
      <domain: "f", opset_import: ["": 21]> lin <beta> (u) => (o) {
        w = Constant<value = float[6,2] {1,2,3,4,5,6,7,8,9,10,11,12}>() s = Constant<value = float[2] {2,3}>()
        p = Gemm<beta: float = @beta>(u, w, s) o = Mul(p, s) }"""
    model = ir.from_onnx_text(text)
    after, result = fused(model)
    assert operators(after) == operators(model)
    assert "an attribute is given by the caller of the function" in reasons(result)


def test_the_documentation_names_every_rule() -> None:
    for name, sentence in ((n, t) for stage in fuse.STAGES for rule in stage for n, t in rule.names.items()):
        assert f"- ``{name}``: {sentence}" in " ".join((Fuse.__doc__ or "").split()), name


def test_options() -> None:
    rules = [name for stage in fuse.STAGES for rule in stage for name in rule.names]
    assert sorted(rules) == sorted(typing.get_args(fuse.RuleName))
    model = build("c = Conv(x, w) d = BatchNormalization(c, g, b, m, v) y = Mul(d, s)", w=W, s=[2.0], **BN)
    assert operators(fused(model, only=("conv-bn",))[0]) == ["Conv", "Mul"]
    assert operators(fused(model, skip=("conv-bn", "batchnorm-arithmetic"))[0]) == [
        "Conv",
        "BatchNormalization",
        "Mul",
    ]
    recipe = Recipe.parse("fuse{only=conv-bn}")
    assert recipe.passes == (Fuse(only=("conv-bn",)),) and Recipe.parse(recipe.text()) == recipe
    with pytest.raises(BadInput, match="conv-bn"):
        Recipe.parse("fuse{only=conv-nb}")


def test_old_opsets_are_left_with_a_reason() -> None:
    model = build("c = Conv(x, w) y = Mul(c, s)", opset=9, w=W, s=[2.0])
    result = Fuse().run(model, CONTEXT)
    assert not result.changed
    assert "opset 9" in reasons(result)[0]


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.data())
def test_any_row_of_affine_maps_around_a_linear_map(data: st.DataObject) -> None:
    """Whatever stands around a convolution or product, the model computes the same and no node is added."""
    draw = data.draw
    is_conv = draw(st.booleans())
    lines, constants, name = [], {}, "x"

    def affines(channels: int, count: int) -> None:
        nonlocal name
        for _ in range(count):
            op = draw(st.sampled_from(["Add", "Sub", "Mul", "Div", "BatchNormalization", "Relu"]))
            new, tail = f"v{len(lines)}", (1, 1) if is_conv else ()
            if op == "Relu":
                lines.append(f"{new} = Relu({name})")
            elif op == "BatchNormalization":
                keys = [f"{new}_{k}" for k in "gbmv"]
                constants.update(
                    {k: numbers(channels, seed=len(lines) + i, low=0.5, high=1.5) for i, k in enumerate(keys)}
                )
                lines.append(f"{new} = BatchNormalization({name}, {', '.join(keys)})")
            else:
                shape = draw(st.sampled_from([(1,), (channels, *tail), (1, channels, *tail)]))
                constants[f"{new}_c"] = numbers(*shape, seed=len(lines), low=0.5, high=1.5)
                first, second = (
                    draw(st.permutations([name, f"{new}_c"])) if op in ("Add", "Mul", "Sub") else (name, f"{new}_c")
                )
                lines.append(f"{new} = {op}({first}, {second})")
            name = new

    channels_in = 4 if is_conv else 6
    affines(channels_in, draw(st.integers(0, 3)))
    lines.append(
        f"l = Conv<pads=[{draw(st.integers(0, 1))},0,0,0]>({name}, w)" if is_conv else f"l = MatMul({name}, w)"
    )
    constants["w"] = numbers(5, 4, 3, 3) if is_conv else M
    name = "l"
    affines(5, draw(st.integers(0, 3)))
    model = build(" ".join(lines) + f" y = Identity({name})", x=IMAGE if is_conv else ROWS, **constants)
    after, _ = fused(model)
    assert len(operators(after)) <= len(operators(model))
