"""Mixtures of experts as MoE: settings in several spellings, near misses, and how they are counted."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphc import edit
from graphc.passes.lower import Lower
from graphc.passes.simplify import Simplify
from graphc.recognition.census import mixtures
from tests.test_fuse import numbers, operators, reasons
from tests.test_lower import always
from tests.test_recognise import CONTEXT, feeds, run
from tests.test_recognise_attention import Writer

EXPERTS, WIDTH, HIDDEN, CHOSEN = 4, 6, 5, 2


def mixture(
    gate: str = "halves", normalised: bool = True, turned: bool = False, extra: bool = False, softmax: str = "before"
) -> ir.Model:
    """Tokens, each sent to two of four experts.

    Args:
        gate: Where the gates of the first product are, or the activation where there are none.
        normalised: Whether the weights of the chosen experts are divided by their sum.
        turned: Whether stacks are ``(experts, in, out)``.
        extra: Whether experts read another input, too.
        softmax: Before the choice, or of what was chosen.
    """
    w = Writer()
    x = w.input("x", f"float[B,S,{WIDTH}]")
    rows = w("Reshape", x, [-1, WIDTH])
    logits = w("MatMul", rows, numbers(WIDTH, EXPERTS, seed=3))
    values = w("Softmax", logits, axis=-1) if softmax == "before" else logits
    w.body.append(f"best, index = TopK<axis=-1>({values}, {w.hold(np.array([CHOSEN]))})")
    weights = "best" if softmax == "before" else w("Softmax", "best", axis=-1)
    if normalised and softmax == "before":
        weights = w("Div", "best", w("ReduceSum", "best", [-1], keepdims=1))
    gated = gate in ("halves", "swapped", "pairs")
    wide = 2 * HIDDEN if gated else HIDDEN
    first, second = numbers(EXPERTS, wide, WIDTH, seed=1), numbers(EXPERTS, WIDTH, HIDDEN, seed=2)
    flat = w("Reshape", "index", [-1])
    repeated = w("Reshape", w("Expand", w("Unsqueeze", rows, [1]), [1, CHOSEN, 1]), [-1, 1, WIDTH])

    def product(left: str, stack: np.ndarray) -> str:
        if turned:
            return w("MatMul", left, w("Gather", stack.transpose(0, 2, 1), flat))
        return w("MatMul", left, w("Transpose", w("Gather", stack, flat), perm=(0, 2, 1)))

    h = product(repeated, first)
    if gated:
        low, high = {"halves": (0, 1), "swapped": (1, 0), "pairs": (0, 1)}[gate]
        step = 2 if gate == "pairs" else 1
        starts, ends = ([0], [1]), ([wide], [wide])
        if gate != "pairs":
            starts, ends = ([0], [HIDDEN]), ([HIDDEN], [wide])
        g, u = (w("Slice", h, starts[i], ends[i], [2], [step]) for i in (low, high))
        h = w("Mul", w("Mul", g, w("Sigmoid", g)), u)
    else:
        h = w(gate, h)
    if extra:
        h = w("Add", h, w.input("z", f"float[{HIDDEN}]"))
    out = w("Reshape", product(h, second), [-1, CHOSEN, WIDTH])
    total = w("ReduceSum", w("Mul", out, w("Unsqueeze", weights, [2])), [1], keepdims=0)
    return w.model(w("Add", total, rows))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalised": False},
        {"gate": "swapped", "turned": True},
        {"gate": "pairs"},
        {"gate": "Relu"},
        {"softmax": "after"},
    ],
)
def test_a_mixture_becomes_one_operator(options: dict[str, object]) -> None:
    model = mixture(**options)  # type: ignore[arg-type]
    assert mixtures(model, CONTEXT.target) == "1 of 1 recognised"
    after = model.clone()
    result = Lower(only=("moe",)).run(after, always(0.5))
    assert result.changes == ["MoE written"], reasons(result)
    assert "TopK" not in operators(after) and "Gather" not in operators(after)
    (node,) = [n for n in edit.nodes(after) if n.op_type == "MoE"]
    assert edit.attribute(node, "k") == CHOSEN
    for sizes in ({"B": 2, "S": 5}, {"B": 1, "S": 1}):
        inputs = feeds(model, **sizes)
        np.testing.assert_allclose(run(after, inputs)["y"], run(model, inputs)["y"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"extra": True}, "the experts read something besides tokens and router"),
        ({"gate": "Tanh"}, "no setting of MoE computes the same"),
    ],
)
def test_what_is_nearly_a_mixture_is_left(options: dict[str, object], reason: str) -> None:
    model = mixture(**options)  # type: ignore[arg-type]
    after = model.clone()
    result = Lower(only=("moe",)).run(after, always(0.5))
    assert operators(after) == operators(model) and reasons(result) == [reason]


def test_experts_that_are_applied_one_by_one_are_counted() -> None:
    w = Writer()
    x = w.input("x", f"float[S,{WIDTH}]")
    values = w("Softmax", w("MatMul", x, numbers(WIDTH, EXPERTS, seed=3)), axis=-1)
    w.body.append(f"best, index = TopK<axis=-1>({values}, {w.hold(np.array([CHOSEN]))})")
    total = x
    for expert in range(EXPERTS):
        mine = w("Cast", w("Equal", "index", np.int64(expert)), to=1)
        share = w("ReduceSum", w("Mul", "best", mine), [1], keepdims=1)
        total = w("Add", total, w("Mul", w("MatMul", x, numbers(WIDTH, WIDTH, seed=expert)), share))
    model = w.model(total)
    Simplify().run(model, CONTEXT)
    words = "0 of 1 recognised (1: each expert is applied by itself, to the tokens that chose it)"
    assert mixtures(model, CONTEXT.target) == words
