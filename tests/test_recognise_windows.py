"""Attention in windows: a factor of each head on the scores, and masks of the windows for all images of a batch."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc.passes.recognise import Recognise
from graphc.passes.simplify import Simplify
from tests.recognised_models import CONTEXT
from tests.small_models import build, feeds, numbers, operators, reasons, run

ROWS = "float[B,2,S,4] q, float[B,2,T,4] k, float[B,2,T,4] v"


def scaled(gain: np.ndarray, *, swapped: bool = False, masked: bool = False, more: str = "") -> ir.Model:
    """Scores that are multiplied by a tensor."""
    given = "s = Mul(g, t)" if swapped else "s = Mul(t, g)"
    inputs = ROWS + (", float[B,1,S,T] m" if masked else "")
    body = f"b = Transpose<perm=[0,1,3,2]>(k) t = MatMul(q, b) {given} {more}"
    body += " u = Add(s, m)" if masked else " u = Identity(s)"
    return build(f"{body} p = Softmax<axis=-1>(u) y = MatMul(p, v)", x=inputs, g=gain)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([(2, 1, 1), (1, 2, 1, 1), (1, 1, 1, 1)]), st.booleans(), st.booleans(), st.integers(0, 99))
def test_a_factor_of_each_head_moves_to_the_queries(
    shape: tuple[int, ...], swapped: bool, masked: bool, seed: int
) -> None:
    gain = np.exp(numbers(*shape, seed=seed))
    model = scaled(gain, swapped=swapped, masked=masked)
    after = model.clone()
    result = Recognise().run(after, CONTEXT)
    moved = ["factor of each head moved to the queries"] if gain.size > 1 else []
    assert result.changes == [*moved, "Attention recognised"], result.refusals
    assert operators(after).count("Mul") == len(moved)
    for sizes in ({"B": 2, "S": 3, "T": 5}, {"B": 1, "S": 1, "T": 1}, {"B": 3, "S": 4, "T": 2}):
        inputs = feeds(model, seed, **sizes)
        np.testing.assert_allclose(run(after, inputs)["y"], run(model, inputs)["y"], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "model",
    [
        scaled(numbers(2, 3, 1)),
        scaled(numbers(1, 1, 5)),
        scaled(numbers(1, 2, 1, 1), more="z = ReduceSum(t) w = Identity(z)"),
        build(
            "t = MatMul(q, q2) s = Mul(t, g) y = Relu(s)", x="float[B,2,S,4] q, float[B,2,4,S] q2", g=numbers(2, 1, 1)
        ),
    ],
    ids=["of each query", "of each key", "scores read elsewhere", "no softmax"],
)
def test_other_factors_stay(model: ir.Model) -> None:
    after = model.clone()
    result = Recognise().run(after, CONTEXT)
    assert operators(after) == operators(model) and not result.changes


def windows(mask: np.ndarray, inner: str = "-1,3,2,4,4") -> ir.Model:
    """Three windows an image, and one mask for each window, added where images and windows are axes of their own."""
    body = (
        "a = Reshape(q, flat) b = Reshape(k, flat) c = Reshape(v, flat) d = Transpose<perm=[0,1,3,2]>(b) "
        "s = MatMul(a, d) e = Reshape(s, apart) f = Add(e, m) g = Reshape(f, together) p = Softmax<axis=-1>(g) "
        "o = MatMul(p, c) y = Identity(o)"
    )
    inputs = ", ".join(f"float[B,3,2,4,8] {name}" for name in "qkv")
    apart = np.array([int(n) for n in inner.split(",")])
    model = build(body, x=inputs, m=mask, flat=np.array([-1, 2, 4, 8]), apart=apart, together=np.array([-1, 2, 4, 4]))
    Simplify().run(model, CONTEXT)
    return model


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([(3, 1, 4, 4), (1, 3, 1, 4, 4), (3, 1, 1, 4), (3, 2, 4, 4)]), st.integers(0, 9))
def test_masks_of_windows_are_repeated_for_every_image(shape: tuple[int, ...], seed: int) -> None:
    model = windows(np.where(numbers(*shape, seed=seed) > 0.7, np.float32(-100), np.float32(0)))
    after = model.clone()
    result = Recognise().run(after, CONTEXT)
    assert "Attention recognised" in result.changes, result.refusals
    assert "Softmax" not in operators(after)
    for images in (1, 2, 5):
        inputs = feeds(model, seed, B=images)
        np.testing.assert_allclose(run(after, inputs)["y"], run(model, inputs)["y"], rtol=0, atol=1e-5)


def test_a_mask_of_half_the_heads_is_a_near_miss() -> None:
    """Its first axis counts images and windows together, two by two."""
    body = (
        "b = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, b) e = Reshape(s, apart) f = Add(e, m) "
        "g = Reshape(f, together) p = Softmax<axis=-1>(g) y = MatMul(p, v)"
    )
    inputs = ", ".join(f"float[B,4,3,8] {name}" for name in "qkv")
    arrays = {"apart": np.array([0, 2, 2, 3, 3]), "together": np.array([0, 4, 3, 3]), "m": numbers(2, 1, 3, 3)}
    model = build(body, x=inputs, **arrays)
    after = model.clone()
    result = Recognise().run(after, CONTEXT)
    assert operators(after) == operators(model)
    assert "a mask covers only a part of the batch or of the heads" in reasons(result)
