"""How budgets are spread over groups: searched allocations, measured losses, normalisations."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compensation import outputs, parse, pruned

from graphc.axes.groups import analyse
from graphc.contract import Capabilities, Context
from graphc.errors import BadInput
from graphc.passes.prune import Prune
from graphc.pruning.density import Setting, uniform
from graphc.pruning.normalisation import NORMALISATIONS
from graphc.pruning.search import BUCKETS, solve, towards

CONTEXT = Context(Capabilities("portable", 10, {"": 21}))

TWO = """(float[N,6] x) => (float[N,6] y) <float[6,16] a, float[16,6] b, float[6,16] c, float[16,6] d> {
    h = MatMul(x,a) r = Relu(h) m = MatMul(r,b) z = Add(x,m)
    g = MatMul(z,c) s = Relu(g) n = MatMul(s,d) y = Add(z,n) }"""


def uneven() -> ir.Model:
    """The second layer hardly matters to the output, although its weights are as large as the first's."""
    model = parse(TWO)
    for name, factor in (("c", 1e-2), ("d", 1e-2), ("a", 1.0), ("b", 1.0)):
        held = model.graph.initializers[name].const_value
        assert held is not None
        model.graph.initializers[name].const_value = ir.tensor(held.numpy() * np.float32(factor), name=name)
    return model


def lost(model: ir.Model) -> list[int]:
    arrays = [model.graph.initializers[n].const_value.numpy() for n in ("a", "c")]  # type: ignore[union-attr]
    return [int((~array.any(axis=0)).sum()) for array in arrays]


@pytest.mark.parametrize("allocate", ["knapsack", "evolution"])
def test_measured_losses_spare_what_matters(allocate: str) -> None:
    model = uneven()
    x = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
    wanted = outputs(model, x)
    even, _ = pruned(model, x, ratio=0.25)
    found, _ = pruned(model, x, ratio=0.25, allocate=allocate)
    first, second = lost(found)
    assert abs(first + second - 8) <= 1 and second > first
    errors = [np.square(outputs(m, x) - wanted).sum() for m in (even, found)]
    assert errors[1] < errors[0] / 2


def test_the_loss_of_each_unit_is_measured() -> None:
    model = parse(TWO)
    b = model.graph.initializers["b"].const_value.numpy().copy()  # type: ignore[union-attr]
    b[[3, 8]] = 0
    model.graph.initializers["b"].const_value = ir.tensor(b, name="b")
    x = np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32)
    found, _ = pruned(model, x, ratio=1 / 8, criterion="loss", include=("a",))
    gone = np.flatnonzero(~found.graph.initializers["a"].const_value.numpy().any(axis=0))  # type: ignore[union-attr]
    assert gone.tolist() == [3, 8]


def test_latency_is_a_cost() -> None:
    model = parse(TWO.replace("16", "512"))
    x = np.random.default_rng(0).standard_normal((256, 6)).astype(np.float32)
    found, refusals = pruned(model, x, ratio=0.2, of="latency")
    assert sum(lost(found)) > 0 or any("can go" in reason for reason in refusals)


@pytest.mark.parametrize("seed", range(3))
def test_the_knapsack_keeps_to_its_limit_however_many_there_are(seed: int) -> None:
    """210 layers of three sizes in 4 or 8 bits, or as they are: their limit is met, and used up."""
    rng = np.random.default_rng(seed)
    sizes, bits = rng.choice([110_592, 331_776, 884_736], 210), (4.25, 8.25, 32.0)
    losses = rng.lognormal(0, 2, 210)
    options = [
        [
            (k, float(size * (32 - b)), float(loss * part))
            for k, (b, part) in enumerate(zip(bits, (1, 0.004, 0), strict=True))
        ]
        for size, loss in zip(sizes, losses, strict=True)
    ]
    for wanted in (4.3, 4.75, 5.5):
        chosen = solve(options, float(sizes.sum() * (32 - wanted)))
        spent = sum(size * bits[k] for size, k in zip(sizes, chosen, strict=True)) / sizes.sum()
        assert wanted - 0.02 < spent <= wanted * (1 + 1e-9)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=4), min_size=1, max_size=4
    ),
    st.floats(0, 1),
)
def test_the_knapsack_is_as_good_as_trying_everything(items: list[list[tuple[int, int]]], part: float) -> None:
    options = [[(i, float(s), float(loss)) for i, (s, loss) in enumerate([(0, 0), *item])] for item in items]
    target = part * sum(max(s for _, s, _ in curve) for curve in options)
    chosen = solve(options, target)
    picked = [next(o for o in curve if o[0] == what) for curve, what in zip(options, chosen, strict=True)]
    saved, paid = sum(s for _, s, _ in picked), sum(loss for *_, loss in picked)
    # Costs are rounded down to buckets, each item by one at most.
    slack = len(options) * max(target, 1) / BUCKETS + 1e-9
    assert saved >= target - slack
    enough = [each for each in itertools.product(*options) if sum(s for _, s, _ in each) >= target + slack]
    assert not enough or paid <= min(sum(loss for *_, loss in each) for each in enough) + 1e-9


def test_levels_reach_all_counts_together() -> None:
    groups = analyse(parse(TWO))
    chosen = [g for g in groups if g.kind == "neuron"]
    levels = towards([4, 12], chosen)
    assert [int((level < 1).sum()) for level in levels] == [4, 12]
    assert all((np.diff(level) > 0).all() for level in levels)
    assert [len(level) for level in uniform(Setting(groups, chosen, {}, {}, CONTEXT, 0.5, lambda r: 1.0, {}))] == [
        16
    ] * 2


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_normalisation_keeps_the_order(name: str) -> None:
    scores: Any = np.random.default_rng(0).random(20)
    found = NORMALISATIONS[name](scores)
    np.testing.assert_array_equal(np.argsort(found), np.argsort(scores))
    if name != "none":
        np.testing.assert_allclose(NORMALISATIONS[name](1000 * scores), found, rtol=1e-9)
    assert np.isfinite(NORMALISATIONS[name](np.zeros(5))).all()


def test_lamp() -> None:
    np.testing.assert_allclose(NORMALISATIONS["lamp"](np.array([1.0, 3.0, 2.0])), [1 / 6, 1.0, 2 / 5])


def test_measuring_needs_data() -> None:
    with pytest.raises(BadInput, match="no calibration data"):
        Prune(ratio=0.3, allocate="knapsack").run(parse(TWO), CONTEXT)
