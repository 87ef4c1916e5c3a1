"""Experts that are applied one by one: random spellings, exported modules, near misses, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc import frontends
from graphc.axes import coupled_groups
from graphc.passes.lower import Lower
from graphc.passes.prune import Prune
from graphc.passes.recognise import Recognise
from graphc.passes.shrink import Shrink
from graphc.passes.simplify import Simplify
from graphc.recognition.census import mixtures
from tests.recognised_models import CONTEXT, Writer, always
from tests.small_models import feeds, numbers, operators, reasons, run

EXPORTED = sorted((Path(__file__).parent / "data" / "experts").glob("*.onnx"))
ONLY = Recognise(only=("experts",))

Way = dict[str, object]


class Loop:
    """A loop over experts, written out.

    Args:
        way: How it is spelt; what is not given has the value that comes first below.
    """

    def __init__(self, **way: object) -> None:
        self.way = way
        self.w = Writer()
        self.experts, self.slots = int(way.get("experts", 3)), int(way.get("slots", 2))  # type: ignore[call-overload]
        self.width, self.hidden = 6, 5

    def get(self, name: str, usual: str) -> str:
        return str(self.way.get(name, usual))

    def model(self) -> ir.Model:
        w = self.w
        x = w.input("x", f"float[B,S,{self.width}]")
        self.rows = w("Reshape", x, [-1, self.width])
        logits = w("MatMul", self.rows, numbers(self.width, self.experts, seed=3))
        shares = w("Softmax", logits, axis=-1)
        w.body.append(f"best, index = TopK<axis=-1>({shares}, {w.hold(np.array([self.slots]))})")
        self.weights = w("GatherElements", shares, "index", axis=1) if self.get("share", "best") == "read" else "best"
        if self.get("normalised", "yes") == "yes":
            self.weights = w("Div", self.weights, w("ReduceSum", self.weights, [-1], keepdims=1))
        zeros = w("ConstantOfShape", w("Shape", self.rows))
        total = self.rows if self.get("base", "zeros") == "tokens" else zeros
        for expert in range(int(self.get("applied", str(self.experts)))):
            total = self.add(total, zeros, expert)
        return w.model(w("Add", total, self.rows))

    def mask(self, expert: int) -> tuple[str, bool]:
        """Where an expert was chosen, and whether slots come first."""
        w = self.w
        match self.get("mask", "equal"):
            case "one-hot":
                depth = np.int64(self.experts + int(self.way.get("spare", 0)))  # type: ignore[call-overload]
                hot = w("OneHot", "index", depth, np.array([0, 1]), axis=-1)
                return w("Gather", w("Transpose", hot, perm=(2, 1, 0)), np.int64(expert), axis=0), True
            case "all":
                every = w("Equal", w("Unsqueeze", "index", [0]), np.arange(self.experts).reshape(-1, 1, 1))
                return w("Squeeze", w("Slice", every, [expert], [expert + 1], [0], [1]), [0]), False
            case _:
                return w("Equal", "index", np.int64(expert)), False

    def places(self, expert: int) -> tuple[str, str]:
        """The numbers of tokens and of slots, ``(places, 1)``."""
        w = self.w
        mask, first = self.mask(expert)
        found = w("NonZero", mask)
        if self.get("listed", "split") == "gather":
            parts = [w("Unsqueeze", w("Gather", found, np.int64(i), axis=0), [1]) for i in (0, 1)]
        else:
            rows = w("Transpose", found, perm=(1, 0))
            parts = [w("Slice", rows, [i], [i + 1], [1], [1]) for i in (0, 1)]
        return (parts[1], parts[0]) if first else (parts[0], parts[1])

    def made(self, rows: str, expert: int) -> str:
        """What an expert makes of rows."""
        w, seed = self.w, 10 * expert
        up = numbers(self.width, self.hidden, seed=seed + 10)
        down = numbers(self.hidden, self.width, seed=seed + 11)
        match self.get("expert", "gated"):
            case "gated":
                gate = w("MatMul", rows, numbers(self.width, self.hidden, seed=seed + 12))
                h = w("Mul", w("Mul", gate, w("Sigmoid", gate)), w("MatMul", rows, up))
                return w("MatMul", h, down)
            case "biased":
                h = w("Relu", w("Gemm", rows, up.T, numbers(self.hidden, seed=seed + 13), transB=1))
                return w("Add", w("MatMul", h, down), numbers(self.width, seed=seed + 14))
            case "halves":
                both = w("MatMul", rows, numbers(self.width, 2 * self.hidden, seed=seed + 15))
                gate, value = (w("Slice", both, [i * self.hidden], [(i + 1) * self.hidden], [1], [1]) for i in (0, 1))
                return w("MatMul", w("Mul", w("Mul", gate, w("Sigmoid", gate)), value), down)
            case "shared":
                scaled = w("Mul", w("MatMul", rows, up), numbers(self.hidden, seed=99))
                return w("MatMul", w("Tanh", scaled), down)
            case "normalised":
                norm = w("LayerNormalization", rows, numbers(self.width, seed=seed), axis=-1)
                return w("MatMul", w("Relu", w("MatMul", norm, up)), down)
            case other:
                return w("MatMul", w(other if expert else "Relu", w("MatMul", rows, up)), down)

    def add(self, total: str, zeros: str, expert: int) -> str:
        w = self.w
        token, slot = self.places(expert)
        flat = w("Squeeze", token, [1])
        match self.get("rows", "gather"):
            case "nd":
                rows = w("GatherND", self.rows, token)
            case "middle":
                view = w("Unsqueeze", self.rows, [0])
                rows = w("Reshape", w("Gather", view, flat, axis=1), [-1, self.width])
            case _:
                rows = w("Gather", self.rows, flat, axis=0)
        if self.get("weights", "flat") == "flat":
            place = w("Add", w("Mul", flat, np.int64(self.slots)), w("Squeeze", slot, [1]))
            share = w("Gather", w("Reshape", self.weights, [-1, 1]), place, axis=0)
        else:
            share = w("GatherND", w("Unsqueeze", self.weights, [2]), w("Concat", token, slot, axis=1))
        given = w("Mul", self.made(rows, expert), share)
        match self.get("sum", "nd-add"):
            case "nd-add":
                return w("ScatterND", total, token, given, reduction='"add"')
            case "nd-write":
                return w("ScatterND", total, token, w("Add", w("Gather", total, flat, axis=0), given))
            case "elements-add":
                wide = w("Expand", token, [1, self.width])
                return w("ScatterElements", total, wide, given, axis=0, reduction='"add"')
            case "lost":
                return w("ScatterND", total, token, given)
            case _:
                given = w("Expand", given, w("Shape", w("Slice", zeros, [0], [1], [0], [1])))
                wide = w("Expand", token, w("Shape", given))
                return w("Add", total, w("ScatterElements", zeros, wide, given, axis=0))


def assert_same(before: ir.Model, after: ir.Model, change: Callable[[np.ndarray], None] | None = None) -> None:
    for sizes in ({"B": 2, "S": 5}, {"B": 1, "S": 1}, {"B": 3, "S": 1}):
        inputs = feeds(before, **sizes)
        if change is not None:
            change(inputs["x"])
        wanted = run(before, inputs)["y"]
        np.testing.assert_allclose(run(after, inputs)["y"], wanted, rtol=1e-5, atol=1e-5)


WAYS = st.fixed_dictionaries(
    {
        "experts": st.integers(2, 4),
        "mask": st.sampled_from(["equal", "one-hot", "all"]),
        "listed": st.sampled_from(["split", "gather"]),
        "rows": st.sampled_from(["gather", "nd", "middle"]),
        "weights": st.sampled_from(["flat", "paired"]),
        "share": st.sampled_from(["best", "read"]),
        "normalised": st.sampled_from(["yes", "no"]),
        "sum": st.sampled_from(["nd-add", "nd-write", "elements-add", "elements-zeros"]),
        "base": st.sampled_from(["zeros", "tokens"]),
        "expert": st.sampled_from(["gated", "biased", "halves", "shared", "Relu"]),
        "spare": st.integers(0, 1),
    }
)


@settings(max_examples=15, deadline=None)
@given(WAYS, st.data())
def test_every_spelling_becomes_stacks(way: Way, data: st.DataObject) -> None:
    slots = data.draw(st.integers(1, int(way["experts"]) - 1))  # type: ignore[call-overload]
    model = Loop(**way, slots=slots).model()
    after = model.clone()
    result = ONLY.run(after, CONTEXT)
    assert result.changes == ["experts stacked"], reasons(result)
    assert not {"NonZero", "ScatterND", "ScatterElements"} & set(operators(after))
    assert_same(model, after)
    assert not ONLY.run(after, CONTEXT).changed


@settings(max_examples=8, deadline=None)
@given(WAYS)
def test_every_spelling_of_two_products_becomes_one_operator(way: Way) -> None:
    model = Loop(**{**way, "expert": "gated" if way["expert"] == "shared" else way["expert"]}).model()
    after = model.clone()
    result = Lower(only=("moe",)).run(after, always(0.5))
    # A router of two experts that gives both has no choice to make.
    if way["experts"] == 2:
        assert not result.changed
        return
    assert result.changes == ["MoE written"], reasons(result)
    # Where the shares of the chosen ones do not add up to 1, their sum is taken apart.
    assert "NonZero" not in operators(after)
    assert operators(after).count("TopK") <= (way["normalised"] == "no")
    assert_same(model, after)


@pytest.mark.parametrize("path", EXPORTED, ids=lambda path: path.stem)
def test_exported_loops(path: Path) -> None:
    model = frontends.load(path).model
    Simplify().run(model, CONTEXT)
    assert mixtures(model, CONTEXT.target) == "1 of 1 recognised"
    stacks = model.clone()
    assert ONLY.run(stacks, CONTEXT).changes == ["experts stacked"]
    assert mixtures(stacks, CONTEXT.target) == "1 of 1 recognised"
    whole = model.clone()
    assert Lower(only=("moe",)).run(whole, always(0.5)).changes == ["MoE written"]
    for after in (stacks, whole):
        assert_same(model, after)


def test_loops_become_stacks_only_if_asked_for() -> None:
    model = Loop().model()
    result = Recognise().run(model, CONTEXT)
    assert "NonZero" in operators(model) and not result.changed


@pytest.mark.parametrize(
    "way, reason",
    [
        ({"applied": 2}, "not every expert that can be chosen is applied"),
        ({"expert": "Tanh"}, "the experts do not all compute the same"),
        (
            {"expert": "normalised"},
            "an expert has LayerNormalization, which is not written for all experts at once",
        ),
        ({"sum": "lost"}, "what an expert gives takes the place of what was added before"),
    ],
)
def test_what_is_nearly_a_loop_is_left(way: Way, reason: str) -> None:
    model = Loop(**way).model()
    before = operators(model)
    result = ONLY.run(model, CONTEXT)
    assert operators(model) == before and reasons(result) == [reason]


@pytest.mark.parametrize(
    "way, reason",
    [
        ("sorted", "tokens are sorted by expert, and each expert is applied to its part of them"),
        ("met", "which experts are applied depends on the tokens, and how many on the example of the export"),
        ("dense", "experts compute tokens that did not choose them, and count as zero times what they give"),
    ],
)
def test_other_ways_to_apply_experts_are_named(way: str, reason: str) -> None:
    w = Writer()
    x = w.input("x", "float[S,6]")
    w.body.append(f"best, index = TopK<axis=-1>({w('MatMul', x, numbers(6, 3))}, {w.hold(np.array([2]))})")
    match way:
        case "sorted":
            flat = w("Reshape", "index", [-1])
            w.body.append(f"given, order = TopK<axis=-1, largest=0>({flat}, {w('Shape', flat)})")
            made = w("Reshape", w("Gather", x, w("Div", "order", np.int64(2))), [-1, 2, 6])
        case "met":
            hot = w("OneHot", "index", np.int64(3), np.array([0, 1]), axis=-1)
            some = w("Gather", w("NonZero", w("ReduceSum", hot, [0, 1], keepdims=0)), [0], axis=1)
            made = w("Gather", w("Transpose", hot, perm=(2, 0, 1)), w("Squeeze", some), axis=0)
            made = w("Unsqueeze", w("Cast", made, to=1), [2])
        case _:
            zeros = w("ConstantOfShape", w("Shape", w("MatMul", x, numbers(6, 3))))
            made = w("Unsqueeze", w("ScatterElements", zeros, "index", "best", axis=1), [2])
    model = w.model(w("ReduceSum", made, [1], keepdims=0))
    result = ONLY.run(model, CONTEXT)
    assert not result.changed and reasons(result) == [reason]
    assert mixtures(model, CONTEXT.target) == f"0 of 1 recognised (1: {reason})"


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_tokens_that_are_no_numbers_reach_their_own_rows_alone(number: float) -> None:
    def spoil(x: np.ndarray) -> None:
        x[0, 0, 2] = number

    model = Loop().model()
    after = model.clone()
    ONLY.run(after, CONTEXT)
    assert_same(model, after, spoil)


def test_an_expert_that_nobody_chose_has_no_part() -> None:
    """Its weights may be no numbers, in both forms."""
    loop = Loop()
    model = loop.model()
    router = next(v for v in model.graph.initializers.values() if list(v.shape) == [6, 3])
    router.const_value = ir.tensor(numbers(6, 3, seed=3) * np.float32([1, 1, 0]) - np.float32([0, 0, 9]))
    spoilt = next(
        v for v in model.graph.initializers.values() if np.array_equal(v.const_value.numpy(), numbers(6, 5, seed=30))
    )
    spoilt.const_value = ir.tensor(np.full((6, 5), np.nan, np.float32))
    after = model.clone()
    assert ONLY.run(after, CONTEXT).changed
    inputs = {"x": np.abs(feeds(model, B=2, S=4)["x"])}
    wanted = run(model, inputs)["y"]
    assert np.isfinite(wanted).all()
    np.testing.assert_allclose(run(after, inputs)["y"], wanted, rtol=1e-5, atol=1e-5)


def test_experts_are_pruned_from_stacks() -> None:
    model = Loop(experts=4).model()
    assert not [group for group in coupled_groups(model) if group.kind == "expert"]
    ONLY.run(model, CONTEXT)
    Simplify().run(model, CONTEXT)
    (group,) = [group for group in coupled_groups(model) if group.kind == "expert"]
    assert group.size == 4 and not group.blocks
    Prune(ratio=0.5, kinds=("expert",), criterion="l2").run(model, CONTEXT)
    zeroed = model.clone()
    assert Shrink().run(model, CONTEXT).changed
    assert {int(v.shape[0]) for v in model.graph.initializers.values() if len(v.shape) == 3} == {2}
    assert_same(zeroed, model)
