"""The values that a tensor takes: for the grids of quantized activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphc.stats.base import Array, Request, Statistic, Valid
from graphc.stats.rows import finite

BINS = 2048


@dataclass
class Range(Statistic):
    """A histogram of all elements over ``[-limit, limit]``; ``limit`` is a power of two, so that two merge exactly.

    Attributes:
        low, high: Smallest and largest value.
        limit: Half the width of the histogram.
        bins: Counts, ``(BINS,)``.
    """

    low: Array
    high: Array
    limit: Array
    bins: Array

    def merge(self, other: Range) -> None:
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        limit = np.maximum(self.limit, other.limit)
        self.bins = _widened(self.bins, self.limit, limit) + _widened(other.bins, other.limit, limit)
        self.limit = limit


def _widened(bins: Array, limit: Array, wanted: Array) -> Array:
    """The histogram over a range that is wider by a power of two."""
    for _ in range(round(float(np.log2(wanted / limit)))):
        narrow = bins.reshape(-1, 2).sum(axis=1)
        bins = np.zeros_like(bins)
        bins[BINS // 4 : BINS // 4 + BINS // 2] = narrow
    return bins


@dataclass(frozen=True)
class RangeOf(Request[Range]):
    """The range and the histogram of a value.

    Attributes:
        value: Its name.
    """

    statistic = Range

    value: str

    def values(self) -> tuple[str, ...]:
        return (self.value,)

    def of(self, arrays: Sequence[Array], valid: Valid) -> Range:
        x = finite(arrays[0], self.value)
        keep = valid.rows(x.shape[:-1]) if x.ndim > 1 else None
        x = x.reshape(-1, x.shape[-1])[keep] if keep is not None else x.reshape(-1)
        x = x.reshape(-1).astype(np.float64)
        largest = float(np.abs(x).max(initial=0.0))
        limit = 2.0 ** np.ceil(np.log2(max(largest, 2.0**-126)))
        at = np.minimum(((x + limit) * (BINS / (2 * limit))).astype(np.int64), BINS - 1)
        bins = np.bincount(at, minlength=BINS).astype(np.float64)
        return Range(np.asarray(x.min(initial=np.inf)), np.asarray(x.max(initial=-np.inf)), np.asarray(limit), bins)

    def nbytes(self, sizes: Sequence[Sequence[int | None]]) -> int:
        return 8 * BINS
