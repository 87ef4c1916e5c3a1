"""Mixtures of experts as MoE: settings in several spellings, near misses, and how they are counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphc import edit
from graphc.lowering import experts
from graphc.passes.lower import Lower
from graphc.passes.quantize import Quantize
from graphc.passes.simplify import Simplify
from graphc.recognition.census import mixtures
from tests.recognised_models import CONTEXT, Writer, always
from tests.small_models import feeds, numbers, operators, reasons, run

EXPERTS, WIDTH, HIDDEN, CHOSEN = 4, 6, 5, 2


def mixture(
    gate: str = "halves",
    normalised: bool = True,
    turned: bool = False,
    extra: bool = False,
    softmax: str = "before",
    width: int = WIDTH,
    hidden: int = HIDDEN,
    residual: bool = True,
) -> ir.Model:
    """Tokens, each sent to two of four experts.

    Args:
        gate: Where the gates of the first product are, or the activation where there are none.
        normalised: Whether the weights of the chosen experts are divided by their sum.
        turned: Whether stacks are ``(experts, in, out)``.
        extra: Whether experts read another input, too.
        softmax: Before the choice, or of what was chosen.
        width, hidden: Of tokens, and of what lies between the two products of an expert.
        residual: Whether the tokens are added to the result; if not, nobody reads them afterwards.
    """
    w = Writer()
    x = w.input("x", f"float[B,S,{width}]")
    rows = w("Reshape", x if residual else w("Tanh", x), [-1, width])
    logits = w("MatMul", rows, numbers(width, EXPERTS, seed=3))
    values = w("Softmax", logits, axis=-1) if softmax == "before" else logits
    w.body.append(f"best, index = TopK<axis=-1>({values}, {w.hold(np.array([CHOSEN]))})")
    weights = "best" if softmax == "before" else w("Softmax", "best", axis=-1)
    if normalised and softmax == "before":
        weights = w("Div", "best", w("ReduceSum", "best", [-1], keepdims=1))
    gated = gate in ("halves", "swapped", "pairs")
    wide = 2 * hidden if gated else hidden
    first, second = numbers(EXPERTS, wide, width, seed=1), numbers(EXPERTS, width, hidden, seed=2)
    flat = w("Reshape", "index", [-1])
    repeated = w("Reshape", w("Expand", w("Unsqueeze", rows, [1]), [1, CHOSEN, 1]), [-1, 1, width])

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
            starts, ends = ([0], [hidden]), ([hidden], [wide])
        g, u = (w("Slice", h, starts[i], ends[i], [2], [step]) for i in (low, high))
        h = w("Mul", w("Mul", g, w("Sigmoid", g)), u)
    else:
        h = w(gate, h)
    if extra:
        h = w("Add", h, w.input("z", f"float[{hidden}]"))
    out = w("Reshape", product(h, second), [-1, CHOSEN, width])
    total = w("ReduceSum", w("Mul", out, w("Unsqueeze", weights, [2])), [1], keepdims=0)
    return w.model(w("Add", total, rows) if residual else w("Tanh", total))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalised": False},
        {"normalised": False, "residual": False},
        {"residual": False},
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
    # Where the shares of the chosen ones do not add up to 1, their sum is taken apart.
    assert operators(after).count("TopK") == (not options.get("normalised", True))
    assert "Gather" not in operators(after)
    (node,) = [n for n in edit.nodes(after) if n.op_type == "MoE"]
    assert edit.attribute(node, "k") == CHOSEN
    for sizes in ({"B": 2, "S": 5}, {"B": 1, "S": 1}):
        inputs = feeds(model, **sizes)
        np.testing.assert_allclose(run(after, inputs)["y"], run(model, inputs)["y"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits, block, symmetric", [(8, 0, True), (4, 0, True), (4, 16, True), (4, 32, False)])
@pytest.mark.parametrize(
    "options", [{}, {"gate": "swapped", "turned": True}, {"gate": "Relu"}, {"normalised": False, "residual": False}]
)
def test_a_mixture_with_codes_becomes_one_operator(
    options: dict[str, object], bits: int, block: int, symmetric: bool
) -> None:
    model = mixture(**options, width=64, hidden=32)  # type: ignore[arg-type]
    Quantize(bits=bits, block=block, symmetric=symmetric, least=1000).run(model, CONTEXT)
    assert operators(model).count("DequantizeLinear") == 2
    after = model.clone()
    result = Lower(only=("qmoe",)).run(after, always(0.5))
    assert result.changes == ["QMoE written"], reasons(result)
    assert not {"DequantizeLinear", "Gather"} & set(operators(after))
    assert operators(after).count("TopK") == (not options.get("normalised", True))
    for sizes in ({"B": 2, "S": 5}, {"B": 1, "S": 1}):
        inputs = feeds(model, **sizes)
        want = run(model, inputs)["y"]
        np.testing.assert_allclose(run(after, inputs)["y"], want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"bits": 4, "block": 48}, "blocks of experts are no power of two from 16 on, or do not divide their inputs"),
        ({"bits": 8, "block": -1}, "codes of experts have no 4 or 8 bits, or their scales are no blocks in float32"),
    ],
)
def test_codes_that_qmoe_does_not_read_are_left(options: dict[str, int], reason: str) -> None:
    model = mixture(width=64, hidden=64)
    Quantize(**options, least=1000).run(model, CONTEXT)
    before = operators(model)
    result = Lower(only=("qmoe",)).run(model, always(0.5))
    assert operators(model) == before and reasons(result) == [reason]


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


@pytest.mark.parametrize("residual", [False, True])
def test_a_setting_that_is_wrong_where_memory_is_reused_is_not_taken(
    residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime 1.31 gives 0 without normalisation where it writes the result to the memory of the tokens."""
    really = experts.settings

    def unnormalised(*sizes: Any) -> Iterator[tuple[experts.Setting, tuple[int, int]]]:
        for setting, rows in really(*sizes):
            attributes = {**setting.attributes, "normalize_routing_weights": 0}
            yield dataclasses.replace(setting, attributes=attributes, shared=True), rows

    monkeypatch.setattr(experts, "settings", unnormalised)
    model = mixture(normalised=False, residual=residual)
    after = model.clone()
    result = Lower(only=("moe",)).run(after, always(0.5))
    assert result.changed or reasons(result) == ["no setting of MoE computes the same"]
    inputs = feeds(model)
    np.testing.assert_allclose(run(after, inputs)["y"], run(model, inputs)["y"], rtol=0, atol=1e-4)


def test_experts_that_compute_all_tokens_are_counted() -> None:
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
    reason = "experts compute tokens that did not choose them, and count as zero times what they give"
    assert mixtures(model, CONTEXT.target) == f"0 of 1 recognised (1: {reason})"
