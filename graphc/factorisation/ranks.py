"""How many ranks each weight keeps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphc.edit import Array

_HALVINGS = 100
"""Steps of the bisection for the price of a parameter; float64 has no more."""


def even(shape: tuple[int, int]) -> int:
    """The highest rank at which two factors of ``(m, n)`` have no more parameters than it: ``mn / (m + n)``."""
    rows, columns = shape
    return rows * columns // (rows + columns)


def uniform(shapes: Sequence[tuple[int, int]], ratio: float, multiple: int) -> list[int]:
    """Each weight loses the same part: ``(1 - ratio) mn / (m + n)``, down to a multiple where there is one below."""
    return [_down(int((1 - ratio) * m * n / (m + n)), multiple) for m, n in shapes]


def by_energy(
    shapes: Sequence[tuple[int, int]], energies: Sequence[Array], totals: Sequence[float], ratio: float, multiple: int
) -> list[int]:
    """The ranks at which the relative losses of all outputs have the least sum while enough parameters go.

    A weight keeps ``r`` ranks for ``r (m + n)`` parameters, or stays for ``mn`` at no loss. One price of a parameter
    for all weights settles each by itself; it is bisected until the budget holds (Lagrange relaxation: optimal for
    the budget that it uses).

    Args:
        shapes: ``(m, n)`` of each weight.
        energies: What each rank is worth, descending.
        totals: Their sums, all ranks included.
        ratio: The part of all parameters that must go at least.
        multiple: What ranks are multiples of.

    Returns:
        The rank of each weight; 0 for one that stays.
    """
    options = [_options(*each, multiple) for each in zip(shapes, energies, totals, strict=True)]
    budget = (1 - ratio) * sum(m * n for m, n in shapes)

    def chosen(price: float) -> list[int]:
        return [int(np.argmin(losses + price * costs)) for _, costs, losses in options]

    def spent(picks: Sequence[int]) -> float:
        return sum(float(costs[pick]) for (_, costs, _), pick in zip(options, picks, strict=True))

    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(chosen(middle)) <= budget else (middle, high)
    return [int(ranks[pick]) for (ranks, _, _), pick in zip(options, chosen(high), strict=True)]


def _options(shape: tuple[int, int], energy: Array, total: float, multiple: int) -> tuple[Array, Array, Array]:
    """Ranks, their parameters and losses; rank 0 stands for the weight as it is, and comes first."""
    rows, columns = shape
    highest = min(even(shape), len(energy))
    ranks = np.arange(multiple, highest + 1, multiple) if highest >= multiple else np.arange(1, highest + 1)
    losses = np.maximum(0.0, 1 - np.cumsum(energy)[ranks - 1] / total) if total > 0 else np.zeros(len(ranks))
    costs = ranks * float(rows + columns)
    return np.append(0, ranks), np.append(float(rows * columns), costs), np.append(0.0, losses)


def _down(rank: int, multiple: int) -> int:
    return rank // multiple * multiple if rank >= multiple else max(1, rank)
