"""How many weights each layer loses when all layers are compared with each other: one threshold for all scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphc.edit import Array

POINTS = 4096
"""Points of a layer's distribution of scores; of smaller layers every score is one."""


@dataclass(frozen=True)
class Curve:
    """A layer's sorted scores, at evenly spaced ranks.

    Attributes:
        ranks: Ranks, from 0 to ``size - 1``.
        scores: The scores at these ranks, ascending.
        size: How many scores there are.
    """

    ranks: Array
    scores: Array
    size: int

    @staticmethod
    def of(scores: Array, *, lamp: bool = False) -> Curve:
        """Of a layer's scores in any order, none negative.

        Args:
            scores: The scores.
            lamp: Divide each square by the sum of the squares that are not smaller (LAMP, Lee and others, 2021): what
                is left of the layer's energy when all that is smaller is gone.
        """
        flat = np.sort(scores, axis=None).astype(np.float64)
        if lamp:
            squares = np.square(flat)
            rest = np.cumsum(squares[::-1])[::-1]
            flat = squares / np.maximum(rest, np.finfo(np.float64).tiny)
        ranks = np.unique(np.linspace(0, flat.size - 1, min(POINTS, flat.size)).astype(np.int64))
        return Curve(ranks, flat[ranks], flat.size)

    def below(self, threshold: float) -> float:
        """About how many scores are below a threshold."""
        if threshold <= self.scores[0]:
            return 0.0
        if threshold > self.scores[-1]:
            return float(self.size)
        at = int(np.searchsorted(self.scores, threshold, side="left"))
        low, high = self.scores[at - 1], self.scores[at]
        part = (threshold - low) / (high - low) if high > low else 1.0
        return float(self.ranks[at - 1] + 1 + part * (self.ranks[at] - self.ranks[at - 1] - 1))


def shared_threshold(curves: list[Curve], ratio: float, most: float) -> list[float]:
    """The part that each layer loses so that together they lose ``ratio``, none more than ``most``."""
    total = sum(curve.size for curve in curves)
    wanted = round(ratio * total)
    limits = [int(most * curve.size) for curve in curves]

    def counts(threshold: float) -> list[float]:
        return [min(curve.below(threshold), limit) for curve, limit in zip(curves, limits, strict=True)]

    levels = np.unique(np.concatenate([curve.scores for curve in curves]))
    low, high = 0, len(levels)
    while low < high:
        middle = (low + high) // 2
        if sum(counts(float(levels[middle]))) >= wanted:
            high = middle
        else:
            low = middle + 1
    above = float(levels[low]) if low < len(levels) else np.inf
    before, after = counts(float(levels[low - 1]) if low else -np.inf), counts(above)
    span = sum(after) - sum(before)
    part = min((wanted - sum(before)) / span, 1.0) if span > 0 else 0.0
    gone = [int(b + part * (a - b)) for a, b in zip(after, before, strict=True)]
    for i in np.argsort([-curve.size for curve in curves]):
        # What rounding left is taken from the largest layers.
        step = min(max(wanted - sum(gone), -gone[i]), limits[i] - gone[i])
        gone[i] += step
    return [count / curve.size for count, curve in zip(gone, curves, strict=True)]
