"""The rules of ``fuse`` for padding, bounds, chains, norms and functions of one number, each before and after."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.small_models import build, numbers, operators, reasons
from tests.test_fuse import ROWS, M, W, fused


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
