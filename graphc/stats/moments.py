"""Streaming moments of the channels that a contraction reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphc.stats.base import Array, Request, Statistic, Valid
from graphc.stats.rows import PLAIN, Rows, collect


@dataclass
class Moments(Statistic):
    """Moments of every channel, float64, merged after Chan, Golub and LeVeque (1979).

    Shapes are ``(channels,)``, or ``(groups, channels)`` where rows fall into groups; ``count`` is then ``(groups,)``.

    Attributes:
        count: Rows seen.
        mean: Mean.
        deviations: Sum of squared deviations from the mean.
        absolute: Sum of absolute values.
        low, high: Smallest and largest value; infinite where nothing was seen.
    """

    count: Array
    mean: Array
    deviations: Array
    absolute: Array
    low: Array
    high: Array

    @staticmethod
    def of(rows: Array) -> Moments:
        """Of rows ``(rows, channels)``."""
        count, width = rows.shape
        wide = rows.astype(np.float64)
        if not count:
            zero = np.zeros(width)
            return Moments(np.zeros(()), zero, zero.copy(), zero.copy(), zero + np.inf, zero - np.inf)
        mean = wide.mean(axis=0)
        return Moments(
            np.asarray(float(count)),
            mean,
            np.square(wide - mean).sum(axis=0),
            np.abs(wide).sum(axis=0),
            wide.min(axis=0),
            wide.max(axis=0),
        )

    def merge(self, other: Moments) -> None:
        count = self.count + other.count
        share = (other.count / np.maximum(count, 1))[..., None]
        step = other.mean - self.mean
        self.deviations = self.deviations + other.deviations + np.square(step) * self.count[..., None] * share
        self.mean = self.mean + step * share
        self.count = count
        self.absolute = self.absolute + other.absolute
        self.low = np.minimum(self.low, other.low)
        self.high = np.maximum(self.high, other.high)

    @property
    def variance(self) -> Array:
        """Population variance."""
        return np.asarray(self.deviations / np.maximum(self.count, 1)[..., None])

    @property
    def squares(self) -> Array:
        """Sum of squares."""
        return np.asarray(self.deviations + self.count[..., None] * np.square(self.mean))

    @property
    def rms(self) -> Array:
        """Root of the mean square."""
        return np.sqrt(self.squares / np.maximum(self.count, 1)[..., None])

    @property
    def largest(self) -> Array:
        """Largest absolute value; 0 where nothing was seen."""
        return np.maximum(np.maximum(self.high, -self.low), 0.0)


@dataclass(frozen=True)
class MomentsOf(Request[Moments]):
    """Moments of a value's channels.

    Attributes:
        value: The value's name.
        rows: How it is read as rows of channels.
    """

    statistic = Moments

    value: str
    rows: Rows = PLAIN

    def values(self) -> tuple[str, ...]:
        return (self.value, *filter(None, (self.rows.by,)))

    def of(self, arrays: Sequence[Array], valid: Valid) -> Moments:
        return collect(self.rows, arrays, self.value, valid, Moments.of)

    def nbytes(self, sizes: Sequence[Sequence[int | None]]) -> int:
        return 8 * 5 * self.rows.width(sizes[0])
