"""Gram matrices: which channels that a contraction reads vary together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphc.stats.base import Array, Request, Statistic, Valid
from graphc.stats.rows import PLAIN, Rows, collect, finite

SMALL, LARGE = 1e-12, 1e16
"""Between these, squares of the largest numbers, and sums of them, are exact enough in float32."""


@dataclass
class Gram(Statistic):
    """The Gram matrix ``H = sum of x xT`` of rows ``x``, kept around the mean, float64.

    Shapes have a leading axis of groups where rows fall into groups.

    Attributes:
        count: Rows seen, ``()`` or ``(groups,)``.
        mean: ``(channels,)``.
        centred: ``sum of (x - mean)(x - mean)T``, ``(channels, channels)``.
    """

    count: Array
    mean: Array
    centred: Array

    @staticmethod
    def of(rows: Array) -> Gram:
        """Of rows ``(rows, channels)``. Products are made in float32 where they fit, around their mean."""
        count, width = rows.shape
        if not count:
            return Gram(np.zeros(()), np.zeros(width), np.zeros((width, width)))
        far = max(abs(float(rows.max())), abs(float(rows.min())))
        if not SMALL < far < LARGE:
            rows = rows.astype(np.float64)
        elif rows.dtype.itemsize < 4:
            rows = rows.astype(np.float32)
        mean = rows.mean(axis=0, dtype=np.float64)
        around = (rows - mean).astype(rows.dtype)
        # What rounding the mean's part away leaves is a shift of the rows, which is taken back exactly.
        rest = around.mean(axis=0, dtype=np.float64)
        centred = (around.T @ around).astype(np.float64) - count * np.outer(rest, rest)
        return Gram(np.asarray(float(count)), mean, centred)

    def merge(self, other: Gram) -> None:
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        step = other.mean - self.mean
        weight = (self.count * share)[..., None, None]
        self.centred += other.centred
        self.centred += weight * step[..., :, None] * step[..., None, :]
        self.mean = self.mean + step * share[..., None]
        self.count = count

    @property
    def products(self) -> Array:
        """``H``, the sum of ``x xT``."""
        outer = self.mean[..., :, None] * self.mean[..., None, :]
        return np.asarray(self.centred + self.count[..., None, None] * outer)


@dataclass
class Cross(Statistic):
    """Products of two values' channels, ``sum of (a - mean a)(b - mean b)T``, float64: for fitting b from a.

    Attributes:
        count: Rows seen.
        mean_a, mean_b: ``(channels of a,)``, ``(channels of b,)``.
        centred: ``(channels of a, channels of b)``.
    """

    count: Array
    mean_a: Array
    mean_b: Array
    centred: Array

    def merge(self, other: Cross) -> None:
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        step_a, step_b = other.mean_a - self.mean_a, other.mean_b - self.mean_b
        self.centred = self.centred + other.centred + self.count * share * np.outer(step_a, step_b)
        self.mean_a, self.mean_b = self.mean_a + step_a * share, self.mean_b + step_b * share
        self.count = count


@dataclass(frozen=True)
class GramOf(Request[Gram]):
    """The Gram matrix of a value's channels.

    Attributes:
        value: The value's name.
        rows: How it is read as rows of channels.
    """

    statistic = Gram

    value: str
    rows: Rows = PLAIN

    def values(self) -> tuple[str, ...]:
        return (self.value, *filter(None, (self.rows.by,)))

    def of(self, arrays: Sequence[Array], valid: Valid) -> Gram:
        return collect(self.rows, arrays, self.value, valid, Gram.of)

    def nbytes(self, sizes: Sequence[Sequence[int | None]]) -> int:
        groups = max(self.rows.groups, self.rows.size, 1)
        return 8 * groups * self.rows.width(sizes[0]) ** 2


@dataclass(frozen=True)
class CrossOf(Request[Cross]):
    """Products of the last axes of two values with the same leading axes.

    Attributes:
        a, b: Their names.
    """

    statistic = Cross

    a: str
    b: str

    def values(self) -> tuple[str, ...]:
        return (self.a, self.b)

    def of(self, arrays: Sequence[Array], valid: Valid) -> Cross:
        a, b = (finite(x, n) for x, n in zip(arrays, self.values(), strict=True))
        if a.shape[:-1] != b.shape[:-1]:
            raise ValueError(f"'{self.a}' has shape {a.shape} and '{self.b}' {b.shape}")
        keep = valid.rows(a.shape[:-1])
        a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (a, b))
        if keep is not None:
            a, b = a[keep], b[keep]
        if not len(a):
            return Cross(np.zeros(()), np.zeros(a.shape[1]), np.zeros(b.shape[1]), np.zeros((a.shape[1], b.shape[1])))
        mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
        return Cross(np.asarray(float(len(a))), mean_a, mean_b, (a - mean_a).T @ (b - mean_b))

    def nbytes(self, sizes: Sequence[Sequence[int | None]]) -> int:
        widths = [(s[-1] or 0) if s else 0 for s in sizes]
        return 8 * widths[0] * widths[1]
