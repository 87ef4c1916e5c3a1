"""Optimal brain surgery for units: its losses are those of the best refit."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphc.axes.groups import analyse
from graphc.collection import Collector
from graphc.contract import Context
from graphc.pruning import curvature
from graphc.pruning.curvature import Problem
from graphc.stats import Statistics
from tests.test_compensation import MODELS, TARGET, parse

Array = np.ndarray[Any, np.dtype[Any]]


def refit_loss(weight: Array, gram: Array, gone: Array, sensitivity: Array) -> float:
    """``tr(G D H DT)`` of the best ``D`` whose removed columns are those of ``-W``."""
    kept = ~gone
    change = -weight * gone
    change[:, kept] = np.linalg.solve(gram[np.ix_(kept, kept)], gram[np.ix_(kept, gone)] @ weight[:, gone].T).T
    return float(np.trace(sensitivity @ change @ gram @ change.T))


@pytest.mark.parametrize("width", [1, 3])
def test_losses_are_those_of_the_best_refit(width: int) -> None:
    rng = np.random.default_rng(width)
    weight = rng.standard_normal((5, 6 * width))
    x = rng.standard_normal((100, 6 * width)) @ rng.standard_normal((6 * width, 6 * width))
    gram = x.T @ x
    owner = rng.permutation(np.repeat(np.arange(6), width))
    problem = Problem(weight, np.linalg.inv(gram), owner)
    units = np.arange(6)
    found = problem.losses(units)
    wanted = [refit_loss(weight, gram, owner == unit, np.eye(5)) for unit in units]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    # What the next one costs, once two are gone, is what is lost by all three, less what was lost by two.
    problem.remove(np.array([1, 4]))
    two = refit_loss(weight, gram, np.isin(owner, [1, 4]), np.eye(5))
    for unit, more in zip((0, 2, 3, 5), problem.losses(np.array([0, 2, 3, 5])), strict=True):
        three = refit_loss(weight, gram, np.isin(owner, [1, 4, unit]), np.eye(5))
        assert more == pytest.approx(three - two, rel=1e-6)


def test_units_without_columns_cost_nothing() -> None:
    problem = Problem(np.ones((2, 3)), np.eye(3), np.array([0, -1, 2]))
    np.testing.assert_allclose(problem.losses(np.array([0, 1, 2])), [2, 0, 2])
    problem.remove(np.array([1]))
    assert problem.weight.shape == (2, 3)


@pytest.mark.parametrize("name", ["matmul", "left", "gemm", "conv", "grouped conv", "two readers"])
def test_surgeon_is_the_loss_of_the_refit_under_the_gradients(name: str) -> None:
    pytest.importorskip("torch")
    model = parse(MODELS[name])
    rng = np.random.default_rng(0)
    shape = {"conv": (5, 3, 6, 6), "grouped conv": (5, 4, 6, 6), "left": (6, 50)}.get(name, (50, 6))
    groups = analyse(model)
    (group,) = [g for g in groups if g.kind in ("channel", "neuron")][:1]
    collector = Collector([{"x": rng.standard_normal(shape).astype(np.float32)}])
    statistics = collector.collect(model, curvature.surgeon_needs(groups, [group]).statistics)
    scores = curvature.surgeon(groups, group, Context(TARGET, statistics=statistics))
    assert not isinstance(scores, str)
    wanted = 0.0
    cheapest = int(scores.reshape(-1).argmin())
    for each in curvature.consumers(group):
        gram, gradients = statistics[each.contraction.gram], statistics[each.contraction.output_gradients]
        owners = curvature.column_owners(groups, group, each)
        for g, weight in enumerate(each.matrices):
            centred = curvature.damped(gram.centred[g] if gram.centred.ndim == 3 else gram.centred)
            grouped = gradients.products.ndim == 3
            sensitivity = (gradients.products[g] if grouped else gradients.products) / np.atleast_1d(gradients.count)[0]
            wanted += refit_loss(weight, centred, owners[g] == cheapest, sensitivity)
    assert scores.reshape(-1)[cheapest] == pytest.approx(wanted, rel=1e-5)


def test_surgeon_takes_what_the_loss_does_not_see() -> None:
    """Two layers of equal statistics; the loss sees one of them a hundred times more."""
    pytest.importorskip("torch")
    model = parse("""(float[N,6] x) => (float[N,4] y) <float[6,12] a, float[12,4] b, float[6,12] c, float[12,4] d,
        float[1] k> { g = MatMul(x,a) h = Relu(g) p = MatMul(h,b) i = MatMul(x,c) j = Relu(i) q = MatMul(j,d)
        s = Mul(q,k) y = Add(p,s) }""")
    model.graph.initializers["k"].const_value = ir.tensor(np.float32([0.01]), name="k")
    groups = analyse(model)
    chosen = [g for g in groups if g.size == 12]
    collector = Collector([{"x": np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)}])
    statistics: Statistics = collector.collect(model, curvature.surgeon_needs(groups, chosen).statistics)
    context = Context(TARGET, statistics=statistics)
    seen, ignored = (np.asarray(curvature.surgeon(groups, group, context)) for group in chosen)
    assert ignored.max() < 0.01 * seen.max()
    plain, also = (np.asarray(curvature.obs(groups, group, context)) for group in chosen)
    assert also.max() > 0.1 * plain.max()
