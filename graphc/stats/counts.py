"""How often each row of a table is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphc.stats.base import Array, Request, Statistic, Valid


@dataclass
class Counts(Statistic):
    """How often each row was read.

    Attributes:
        rows: ``(rows of the table,)``, float64.
    """

    rows: Array

    def merge(self, other: Counts) -> None:
        self.rows = self.rows + other.rows


@dataclass(frozen=True)
class CountsOf(Request[Counts]):
    """How often indices name each row.

    Attributes:
        indices: The value with the indices; negative ones count from the end.
        size: How many rows there are.
    """

    statistic = Counts

    indices: str
    size: int

    def values(self) -> tuple[str, ...]:
        return (self.indices,)

    def of(self, arrays: Sequence[Array], valid: Valid) -> Counts:
        indices = arrays[0]
        keep = valid.rows(indices.shape)
        read = indices.reshape(-1) if keep is None else indices.reshape(-1)[keep]
        if read.size and not -self.size <= int(read.min()) <= int(read.max()) < self.size:
            raise ValueError(f"'{self.indices}' names rows outside of the {self.size} there are")
        return Counts(np.bincount(read % self.size, minlength=self.size).astype(np.float64))

    def nbytes(self, sizes: Sequence[Sequence[int | None]]) -> int:
        return 8 * self.size
