"""How many bits each layer gets, when it is not the same for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from graphc.pruning.search import solve
from graphc.quantization.granularity import Granularity
from graphc.quantization.grid import Grid
from graphc.quantization.sites import Site

Way = tuple[Grid, Granularity]
"""How a weight is quantized."""


def nbytes(site: Site, way: Way | None) -> int:
    """Bytes of a weight in a way, scales included; None is its own type."""
    held = site.held
    if way is None:
        return held.nbytes
    grid, granularity = way
    groups = granularity.reduced(np.broadcast_to(np.zeros((), np.int8), site.shape), np.min).size
    zeros = 0 if grid.symmetric else groups * grid.dtype.bitwidth / 8
    return int(held.size * grid.dtype.bitwidth / 8 + groups * held.dtype.bitwidth / 8 + zeros)


def steps(start: int, count: int) -> list[int]:
    """How many of some layers are kept: one after the other at first, then in steps of a third."""
    found, step = [], start
    while step < max(count, start + 1):
        found.append(step)
        step += max(1, step // 3)
    return found


def share(
    found: Sequence[Site],
    ways: Sequence[Way | None],
    choices: Sequence[Sequence[Way | None]],
    losses: Sequence[Sequence[float]],
    costs: Sequence[Sequence[float]],
    limit: float,
) -> tuple[list[Way | None], str]:
    """A way for each layer so that errors add up to the least within a budget (a multiple-choice knapsack).

    Args:
        found: The layers.
        ways: How those without choices are quantized.
        choices: Ways to choose from, none for those that have no say.
        losses: What each choice loses, taken to add up.
        costs: What each choice costs: bytes, say, or time.
        limit: What all choices may cost together.

    Returns:
        The ways, and what was chosen in words.
    """
    own = [i for i, each in enumerate(choices) if each]
    most = [max(costs[i]) for i in own]
    curves = [
        [(k, top - cost, loss) for k, (cost, loss) in enumerate(zip(costs[i], losses[i], strict=True))]
        for i, top in zip(own, most, strict=True)
    ]
    new = list(ways)
    for i, k in zip(own, solve(curves, sum(most) - limit), strict=True):
        new[i] = choices[i][k]
    counts = Counter(f"{way[0].bits} bits" if (way := new[i]) else "their own type" for i in own)
    size = sum(found[i].held.size for i in own)
    spent = 8 * sum(nbytes(found[i], new[i]) for i in own) / max(size, 1)
    shares = ", ".join(f"{n} layers {label}" for label, n in sorted(counts.items()))
    return new, f"{spent:.2f} bits per weight: {shares}"
