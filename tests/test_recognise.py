"""The pass ``recognise``: every operator in several spellings, near misses with their reasons, exported models."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc import edit
from graphc.contract import Capabilities, Context
from graphc.passes.recognise import Recognise
from tests.recognised_models import recognised
from tests.small_models import build, feeds, numbers, operators, reasons, run

X = "float[N,3,6] x"
KNOWN = {
    "eps": np.asarray([1e-3], np.float32),
    "two": np.float32(2),
    "half": np.float32(0.5),
    "minus": np.float32(-0.5),
    "axes": np.array([-1]),
    "last": np.array([2]),
    "count": np.float32(6),
    "g": numbers(6, low=0.5, high=2),
    "b": numbers(6, seed=1),
    "wide": numbers(1, 1, 6, seed=2),
}


def norm(body: str, x: str = X, **more: object) -> ir.Model:
    known = {**KNOWN, **more}
    used = {name: array for name, array in known.items() if any(f"{c}{name}{e}" in body for c in "( " for e in ",)")}
    return build(body, x=x, **used)


SQUARES = ["Mul(x, x)", "Pow(x, two)"]
ROOTS = [
    "r = Sqrt(e) n = Div(x, r)",
    "r = Sqrt(e) i = Reciprocal(r) n = Mul(i, x)",
    "i = Pow(e, minus) n = Mul(x, i)",
    "r = Pow(e, half) n = Div(x, r)",
]


@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("gain", ["y = Mul(n, g)", "y = Mul(wide, n)", "y = Relu(n)"])
def test_rms_norm_in_every_spelling(square: str, root: str, gain: str) -> None:
    body = f"q = {square} v = ReduceMean<keepdims=1>(q, axes) e = Add(v, eps) {root} {gain}"
    after, result = recognised(norm(body))
    assert operators(after) == ["RMSNormalization"] + (["Relu"] if "Relu" in gain else [])
    assert result.changes == ["RMSNormalization recognised"]


@pytest.mark.parametrize(
    "body, expected",
    [
        # a sum, divided
        (
            "q = Mul(x, x) s = ReduceSum<keepdims=1>(q, last) v = Div(s, count) e = Add(eps, v) r = Sqrt(e) "
            "n = Div(x, r) y = Mul(n, g)",
            ["RMSNormalization"],
        ),
        (
            "s = ReduceSumSquare<keepdims=1>(x, last) v = Div(s, count) e = Add(eps, v) r = Sqrt(e) "
            "n = Div(x, r) y = Mul(n, g)",
            ["RMSNormalization"],
        ),
        # the gain first, and what is normalised is itself a sum that others read
        (
            "h = Add(x, x) q = Mul(h, h) v = ReduceMean<keepdims=1>(q, axes) e = Add(v, eps) r = Sqrt(e) "
            "i = Reciprocal(r) w = Mul(i, g) n = Mul(h, w) y = Add(n, h)",
            ["Add", "RMSNormalization", "Add"],
        ),
        # TensorFlow: the scale goes to the mean, too
        (
            "m = ReduceMean<keepdims=1>(x, axes) d = Sub(x, m) q = Mul(d, d) v = ReduceMean<keepdims=1>(q, axes) "
            "e = Add(v, eps) r = Sqrt(e) i = Reciprocal(r) s = Mul(i, g) a = Mul(x, s) c = Mul(m, s) "
            "o = Sub(b, c) y = Add(a, o)",
            ["LayerNormalization"],
        ),
        # the mean of squares less the square of the mean
        (
            "m = ReduceMean<keepdims=1>(x, axes) q = Mul(x, x) v = ReduceMean<keepdims=1>(q, axes) "
            "f = Mul(m, m) u = Sub(v, f) e = Add(u, eps) r = Sqrt(e) d = Sub(x, m) n = Div(d, r) y = Mul(n, g)",
            ["LayerNormalization"],
        ),
        # two axes at once
        (
            "m = ReduceMean<keepdims=1>(x, both) d = Sub(x, m) q = Mul(d, d) v = ReduceMean<keepdims=1>(q, both) "
            "e = Add(v, eps) r = Sqrt(e) n = Div(d, r) p = Mul(n, plane) y = Add(p, b)",
            ["LayerNormalization"],
        ),
    ],
)
def test_norms_written_otherwise(body: str, expected: list[str]) -> None:
    model = norm(body, both=np.array([1, 2]), plane=numbers(3, 6))
    after, _ = recognised(model)
    assert operators(after) == expected


RMS = "q = Mul(x, x) v = ReduceMean<keepdims=1>(q, axes) e = Add(v, eps) r = Sqrt(e) n = Div(x, r) y = Mul(n, g)"


@pytest.mark.parametrize(
    "body, more, reason",
    [
        (RMS, {"axes": np.array([1]), "g": np.float32(1)}, "the normalised axis is not the last"),
        (RMS.replace("y =", "z =") + " y = Add(z, v)", {}, "a part of the normalisation is read elsewhere"),
        (RMS.replace("Mul(x, x)", "Abs(x)"), {}, None),
        (RMS.replace("Div(x, r)", "Mul(x, r)"), {}, None),
        # the variance is that of a sample, not of all
        (
            "m = ReduceMean<keepdims=1>(x, axes) d = Sub(x, m) q = Mul(d, d) s = ReduceSum<keepdims=1>(q, axes) "
            "v = Div(s, count) e = Add(v, eps) r = Sqrt(e) n = Div(d, r) y = Mul(n, g)",
            {"count": np.float32(5)},
            None,
        ),
    ],
)
def test_what_is_nearly_a_norm_is_left(body: str, more: dict, reason: str | None) -> None:
    model = norm(body, **more)
    after, result = recognised(model)
    assert operators(after) == operators(model)
    assert reasons(result) == ([reason] if reason else [])


@settings(max_examples=25, deadline=None)
@given(
    width=st.integers(2, 40),
    epsilon=st.sampled_from([1e-12, 1e-6, 1e-5, 1e-2]),
    half=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_width_epsilon_and_dtype(width: int, epsilon: float, half: bool, seed: int) -> None:
    x, n = ("h", "k") if half else ("x", "n")
    body = (
        f"q = Pow({x}, two) v = ReduceMean<keepdims=1>(q, axes) e = Add(v, eps) r = Sqrt(e) n = Div({x}, r) "
        f"{'k = Cast<to=10>(n)' if half else ''} y = Mul(g, {n})"
    )
    gain = numbers(width, seed=seed).astype(np.float16 if half else np.float32)
    model = norm(
        ("h = Cast<to=1>(x) " if half else "") + body,
        x=f"float{'16' if half else ''}[N,{width}] x",
        eps=np.asarray([epsilon], np.float32),
        g=gain,
    )
    after, _ = recognised(model, seed)
    assert operators(after) == ["RMSNormalization"]
    (node,) = edit.nodes(after)
    assert edit.attribute(node, "epsilon") == pytest.approx(epsilon, rel=1e-6)


def test_a_target_without_the_operator_keeps_what_it_had() -> None:
    model = norm(RMS)
    old = Context(target=Capabilities("old", 10, {"": 22}))
    result = Recognise().run(model, old)
    assert not result.changed and reasons(result) == ["old loads opsets up to 22; the operators are of opset 23"]
    bare = Context(target=Capabilities("bare", 10, {"": 23}, kernels=frozenset({("", "Add", "CPUExecutionProvider")})))
    result = Recognise().run(model, bare)
    assert not result.changed and "bare has no kernel for RMSNormalization" in reasons(result)


@pytest.mark.parametrize(
    "body, alpha",
    [
        ("s = Sigmoid(x) y = Mul(x, s)", 1.0),
        ("c = Mul(two, x) s = Sigmoid(c) y = Mul(s, x)", 2.0),
        ("s = Sigmoid(x) y = Mul(s, s)", None),
        ("c = Mul(x, x) s = Sigmoid(c) y = Mul(s, x)", None),
    ],
)
def test_swish_where_the_target_has_it(body: str, alpha: float | None) -> None:
    model = norm(body)
    able = Context(target=Capabilities("able", 10, {"": 24}))
    result = Recognise().run(after := model.clone(), able)
    assert operators(after) == (["Swish"] if alpha else operators(model)) and bool(result.changed) == bool(alpha)
    if alpha:
        assert [edit.attribute(node, "alpha") for node in edit.nodes(after)] == [alpha]
        inputs = feeds(model)
        np.testing.assert_allclose(run(after, inputs)["y"], run(model, inputs)["y"], rtol=0, atol=1e-6)
        _, result = recognised(model)
        assert "has no kernel for Swish, or the model is of an older opset" in reasons(result)[0]
