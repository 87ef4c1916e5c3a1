"""Gradients of the loss: by weights, for Taylor expansions; by values, for their Gram matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphc.stats.base import Array, Request, Statistic, Valid
from graphc.stats.gram import Gram, GramOf
from graphc.stats.rows import PLAIN, Rows


@dataclass
class Gradients(Statistic):
    """Sums over samples of the loss's gradient by a constant, float32, in its shape.

    Attributes:
        count: Samples seen.
        total: Sum of the gradients.
        absolute: Sum of their absolute values.
        squares: Sum of their squares; by the count it is the empirical Fisher information.
    """

    count: Array
    total: Array
    absolute: Array
    squares: Array

    def merge(self, other: Gradients) -> None:
        self.count = self.count + other.count
        self.total += other.total
        self.absolute += other.absolute
        self.squares += other.squares


@dataclass(frozen=True)
class GradientsOf(Request[Gradients]):
    """The gradients by a constant.

    Attributes:
        constant: Its name.
    """

    statistic = Gradients
    backward = True

    constant: str

    def values(self) -> tuple[str, ...]:
        return (self.constant,)

    def of(self, arrays: Sequence[Array], valid: Valid) -> Gradients:
        gradient = arrays[0].astype(np.float32)
        if not np.isfinite(gradient).all():
            raise ValueError(f"the gradient by '{self.constant}' has NaN or infinity")
        return Gradients(np.ones(()), gradient.copy(), np.abs(gradient), np.square(gradient))

    def nbytes(self, sizes: Sequence[Sequence[int | None]]) -> int:
        return 12 * int(np.prod([size or 1 for size in sizes[0]], dtype=np.int64))


@dataclass(frozen=True)
class GradientGramOf(Request[Gram]):
    """The Gram matrix of the loss's gradient by a value's channels.

    Attributes:
        value: The value's name.
        rows: How it is read as rows of channels.
    """

    statistic = Gram
    backward = True

    value: str
    rows: Rows = PLAIN

    def values(self) -> tuple[str, ...]:
        return (self.value, *filter(None, (self.rows.by,)))

    def of(self, arrays: Sequence[Array], valid: Valid) -> Gram:
        return GramOf(self.value, self.rows).of(arrays, valid)

    def nbytes(self, sizes: Sequence[Sequence[int | None]]) -> int:
        return GramOf(self.value, self.rows).nbytes(sizes)
