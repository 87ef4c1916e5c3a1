"""The rule ``rotary`` of ``recognise``: halves and pairs, tables made in every way, near misses."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc import edit
from graphc.passes.recognise import Recognise
from tests.recognised_models import CONTEXT, Writer, recognised
from tests.small_models import feeds, operators, reasons, run


def angles(w: Writer, doubled: str, count: int) -> tuple[str, str]:
    """Tables ``[1, S, width]`` of positions counted from the shape of ``x``."""
    positions = w("Range", np.int64(0), w("Squeeze", w("Shape", "x", start=1, end=2)), np.int64(1))
    column = w("Unsqueeze", w("Cast", positions, to=1), [0, 2])
    angle = w("Mul", column, (0.7 ** np.arange(count)).astype(np.float32))
    if doubled == "halves":
        angle = w("Concat", angle, angle, axis=-1)
    elif doubled == "pairs":
        wide = w("Expand", w("Unsqueeze", angle, [-1]), [1, 1, 1, 2])
        angle = w("Reshape", wide, [0, 0, 2 * count])
    elif doubled == "stacked":
        column = w("Unsqueeze", angle, [-1])
        angle = w("Reshape", w("Concat", column, column, axis=-1), [0, 0, 2 * count])
    return w("Cos", angle), w("Sin", angle)


@st.composite
def rotations(draw: st.DrawFn) -> tuple[ir.Model, dict[str, int]]:
    w = Writer()
    heads, d = draw(st.sampled_from([(1, 4), (3, 8), (2, 12)]))
    turned = draw(st.sampled_from([d, d // 2]))
    half = turned // 2
    kind = draw(st.sampled_from(["halves", "pairs"]))
    spelling = draw(st.sampled_from(["rotate", "complex"]))
    split_first = draw(st.booleans())
    w.input("x", f"float[B,S,{heads * d}]")
    x = w("Reshape", "x", [0, 0, heads, d])
    x = w("Transpose", x, perm=(0, 2, 1, 3)) if split_first else x
    head_axis = 1 if split_first else 2

    def part(value: str, start: int, end: int, step: int = 1) -> str:
        return w("Slice", value, [start], [end], [3], [step])

    rest = part(x, turned, d) if turned < d else ""
    t = part(x, 0, turned) if turned < d else x
    if kind == "halves":
        a, b = part(t, 0, half), part(t, half, turned)
    else:
        a, b = part(t, 0, 1 << 40, 2), part(t, 1, 1 << 40, 2)

    def join(p: str, q: str) -> str:
        if kind == "halves":
            return w("Concat", p, q, axis=-1)
        both = w("Concat", w("Unsqueeze", p, [-1]), w("Unsqueeze", q, [-1]), axis=-1)
        return w("Reshape", both, [0, heads, 0, turned] if split_first else [0, 0, heads, turned])

    doubled = "" if spelling == "complex" else draw(st.sampled_from(["pairs", "stacked"])) if kind == "pairs" else kind
    cos, sin = (w("Unsqueeze", table, [head_axis]) for table in angles(w, doubled, half))
    if spelling == "rotate":
        y = w("Add", w("Mul", t, cos), w("Mul", join(w("Neg", b), a), sin))
    else:
        real = w("Sub", w("Mul", a, cos), w("Mul", b, sin))
        y = join(real, w("Add", w("Mul", b, cos), w("Mul", sin, a)))
    y = w("Concat", y, rest, axis=-1) if rest else y
    return w.model(y), {
        "interleaved": int(kind == "pairs" and turned > 2),
        "rotary_embedding_dim": turned if turned < d else 0,
    }


@settings(max_examples=50, deadline=None)
@given(rotations(), st.integers(0, 99))
def test_every_spelling_becomes_one_operator(case: tuple[ir.Model, dict[str, int]], seed: int) -> None:
    model, wanted = case
    after = model.clone()
    result = Recognise().run(after, CONTEXT)
    assert result.changes == ["RotaryEmbedding recognised"], result.refusals
    (node,) = [n for n in edit.nodes(after) if n.op_type == "RotaryEmbedding"]
    assert not {"Neg", "Sub", "Add"} & set(operators(after))
    for name, value in wanted.items():
        assert edit.attribute(node, name, 0) == value
    for sizes in ({"B": 2, "S": 3}, {"B": 1, "S": 1}, {"B": 3, "S": 1}):
        inputs = feeds(model, seed, **sizes)
        np.testing.assert_allclose(run(after, inputs)["y"], run(model, inputs)["y"], rtol=0, atol=1e-5)


def test_tables_of_which_nothing_is_known_are_left() -> None:
    w = Writer()
    x = w("Reshape", w.input("x", "float[B,S,8]"), [0, 0, 2, 4])
    cos, sin = (w("Unsqueeze", w.input(name, "float[B,S,4]"), [2]) for name in ("cos", "sin"))
    a, b = (w("Slice", x, [i], [i + 2], [3]) for i in (0, 2))
    y = w("Add", w("Mul", x, cos), w("Mul", w("Concat", w("Neg", b), a, axis=-1), sin))
    model = w.model(y)
    after, result = recognised(model)
    assert operators(after) == operators(model)
    assert reasons(result) == ["the rotary table is not known to hold two equal halves"]


def test_a_rotation_the_other_way_round_is_left() -> None:
    w = Writer()
    x = w("Reshape", w.input("x", "float[B,S,8]"), [0, 0, 2, 4])
    cos, sin = (w("Unsqueeze", table, [2]) for table in angles(w, "halves", 2))
    a, b = (w("Slice", x, [i], [i + 2], [3]) for i in (0, 2))
    model = w.model(w("Add", w("Mul", x, cos), w("Mul", w("Concat", b, w("Neg", a), axis=-1), sin)))
    after, result = recognised(model)
    assert operators(after) == operators(model) and not result.changed


@pytest.mark.parametrize("kind", ["halves", "pairs"])
def test_cached_tables(kind: str) -> None:
    """A table of all positions, of which some are gathered."""
    w = Writer()
    x = w("Transpose", w("Reshape", w.input("x", "float[B,S,8]"), [0, 0, 2, 4]), perm=(0, 2, 1, 3))
    ids = w.input("ids", "bool[B,S]")
    angle = np.outer(np.arange(16), [1.0, 0.1])
    full = np.concatenate([angle, angle], -1) if kind == "halves" else np.repeat(angle, 2, -1)
    position = w("Cast", ids, to=7)
    cos, sin = (w("Unsqueeze", w("Gather", f(full), position), [1]) for f in (np.cos, np.sin))
    if kind == "halves":
        a, b = (w("Slice", x, [i], [i + 2], [3]) for i in (0, 2))
        turned = w("Concat", w("Neg", b), a, axis=-1)
    else:
        a, b = (w("Slice", x, [i], [4], [3], [2]) for i in (0, 1))
        both = w("Concat", w("Unsqueeze", w("Neg", b), [-1]), w("Unsqueeze", a, [-1]), axis=-1)
        turned = w("Reshape", both, [0, 2, 0, 4])
    _, result = recognised(w.model(w("Add", w("Mul", x, cos), w("Mul", turned, sin))))
    assert result.changes == ["RotaryEmbedding recognised"]
