"""Which part of its weights each layer loses, when it is not the same for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc.contract import Context
from graphc.depth.structure import find
from graphc.edit import Array
from graphc.sparsity import pattern, weights
from graphc.sparsity.curve import Curve, shared_threshold
from graphc.sparsity.layers import Layer
from graphc.sparsity.weights import How


def by_shape(layers: Sequence[Layer], ratio: float) -> list[float]:
    """ERK: see :func:`graphc.sparsity.pattern.erk`."""
    shapes = [(each.group * each.shape[0], each.shape[1] // each.kernel, each.kernel) for each in layers]
    return pattern.erk(shapes, ratio)


def by_threshold(
    model: ir.Model, layers: Sequence[Layer], ratio: float, most: float, how: How, ctx: Context, *, lamp: bool
) -> list[float]:
    """What one threshold for the scores of all layers, or for LAMP's normalisation of them, takes of each."""
    curves = [Curve.of(scores, lamp=lamp) for scores in _each(model, layers, how, ctx)]
    return shared_threshold(curves, ratio, most)


def by_outliers(
    model: ir.Model, layers: Sequence[Layer], ratio: float, spread: float, times: float, ctx: Context
) -> list[float]:
    """OWL: blocks whose Wanda scores have more outliers lose less; layers outside of blocks are on their own."""
    of: dict[str, int] = {}
    for i, block in enumerate(find(model).blocks):
        of |= {value.name or "": i for value in block.constants}
    members: dict[object, list[int]] = {}
    counts = []
    for i, scores in enumerate(_each(model, layers, How(pattern.Pattern(), "wanda"), ctx)):
        counts.append(int(np.count_nonzero(scores > times * scores.mean(dtype=np.float64))))
        members.setdefault(of.get(layers[i].name, layers[i].name), []).append(i)
    rows = list(members.values())
    sizes = [sum(layers[i].size for i in row) for row in rows]
    shares = [sum(counts[i] for i in row) / size for row, size in zip(rows, sizes, strict=True)]
    parts = pattern.outliers(shares, sizes, ratio, spread)
    found = [0.0] * len(layers)
    for row, part in zip(rows, parts, strict=True):
        for i in row:
            found[i] = part
    return found


def by_curves(
    model: ir.Model, layers: Sequence[Layer], ratio: float, levels: int, most: float, how: How, ctx: Context
) -> list[float]:
    """What a dynamic programme over measured errors says (rate-distortion layer-adaptive pruning, 2023).

    Of each layer alone, several parts are written to zero and the squared error of the outputs is measured. The errors
    are taken to add up; the parts are chosen so that their sum is least while enough goes of the whole.
    """
    parts = np.linspace(0.0, most, levels + 1)
    statistics = ctx.collect(model, asked) if (asked := weights.requests(layers, how)) else {}
    measured = _distortions(model, ctx)
    costs = np.zeros((len(layers), levels + 1))
    for i, layer in enumerate(layers):
        original = layer.held
        for k in range(1, levels + 1):
            ctx.progress("measuring layers", i * levels + k, len(layers) * levels)
            layer.write(weights.sparse(layer, float(parts[k]), how, statistics)[0])
            costs[i, k] = measured(model)
            layer.write(original)
    return knapsack([layer.size for layer in layers], parts, costs, ratio)


BUCKETS = 2000
"""Into how many equal parts the budget of weights is divided."""


def knapsack(sizes: Sequence[int], parts: Array, costs: Array, ratio: float) -> list[float]:
    """One of several parts for each layer, so that together they lose ``ratio`` at the least total cost.

    Args:
        sizes: Weights of each layer.
        parts: The parts that may be chosen, ascending.
        costs: ``(layers, parts)``.
        ratio: The part of all weights that must go at least, up to the rounding to buckets.
    """
    total = sum(sizes)
    goal = round(ratio * BUCKETS)
    best = np.full(goal + 1, np.inf)
    best[0] = 0.0
    choices = np.zeros((len(sizes), goal + 1), dtype=np.int64)
    came = np.zeros((len(sizes), goal + 1), dtype=np.int64)
    for i, size in enumerate(sizes):
        after = np.full(goal + 1, np.inf)
        for k, part in enumerate(parts):
            step = round(float(part) * size / total * BUCKETS)
            # What is more than the goal counts as the goal.
            to = np.minimum(np.arange(goal + 1) + step, goal)
            reached = best + costs[i, k]
            for target in np.unique(to):
                sources = np.flatnonzero(to == target)
                source = sources[np.argmin(reached[sources])]
                if reached[source] < after[target]:
                    after[target], choices[i, target], came[i, target] = reached[source], k, source
        best = after
    if not np.isfinite(best[goal]):
        return [float(parts[-1])] * len(sizes)
    found, at = [0.0] * len(sizes), goal
    for i in range(len(sizes) - 1, -1, -1):
        found[i], at = float(parts[choices[i, at]]), int(came[i, at])
    return found


def _distortions(model: ir.Model, ctx: Context) -> Callable[[ir.Model], float]:
    """Measures the mean squared error of a model's floating-point outputs against this one's."""
    from graphc import runtime

    def outputs(of: ir.Model) -> list[dict[str, Any]]:
        big = runtime.constants_nbytes(of) > runtime.BIG
        session = runtime.session(of, optimise=not big, frugal=big)
        found = [session.run(sample) for sample in ctx.calibration]
        session.close()
        return found

    wanted = outputs(model)

    def measure(candidate: ir.Model) -> float:
        error, count = 0.0, 0
        for want, got in zip(wanted, outputs(candidate), strict=True):
            for name, array in want.items():
                if array.dtype.kind == "f":
                    error += float(np.square(got[name].astype(np.float64) - array).sum())
                    count += array.size
        return error / max(count, 1)

    return measure


def _each(model: ir.Model, layers: Sequence[Layer], how: How, ctx: Context) -> Any:
    """The scores of each layer, one at a time; magnitudes where a criterion only ranks in its sweep."""
    ranked = How(how.pattern, "magnitude") if how.criterion == "sparsegpt" else how
    statistics = ctx.collect(model, asked) if (asked := weights.requests(layers, ranked)) else {}
    for i, layer in enumerate(layers):
        ctx.progress("ranking weights", i, len(layers))
        yield weights.scores(layer, layer.matrices(), ranked, statistics)
