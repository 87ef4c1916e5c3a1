"""What an adapter does to one weight, seen as a matrix.

A weight is seen in *canonical* form: (channels out, channels in) for products, (channels out, channels in x kernel) for
convolutions, (entries, width) for tables, (experts x rows, columns) for stacked experts, (n, 1) for vectors. However it
is stored, changes are computed on pieces of some rows, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol

import numpy as np

from graphc.edit import Array

Kind = Literal["linear", "table", "image", "stack", "plain"]
"""What a changed parameter is: the weight of a product, a lookup, a convolution, of stacked experts, or anything."""

Piece = tuple[slice, Array]
"""Some rows of the canonical matrix, float64."""


class Change(Protocol):
    """What is added to a weight."""

    @property
    def what(self) -> str:
        """What it is called in reports, e.g. ``"LoRA of rank 8"``."""
        ...

    def difference(self, base: Array, rows: slice) -> Array:
        """What is added to rows of the canonical matrix.

        Args:
            base: These rows of the weight as it was, float64.
            rows: Which they are.
        """
        ...

    def prepared(self, pieces: Callable[[], Iterable[Piece]]) -> Change:
        """The change when it has seen the whole weight, for those that need to."""
        ...


@dataclass(frozen=True)
class _Local:
    """A change whose rows do not depend on other rows of the weight."""

    def prepared(self, pieces: Callable[[], Iterable[Piece]]) -> Change:
        return self  # type: ignore[return-value]


@dataclass(frozen=True)
class LowRank(_Local):
    """``scale left @ right``; Hu et al., LoRA, 2021, equation 3.

    Attributes:
        left: (rows, rank); what PEFT calls B, or the transpose of an embedding's A.
        right: (rank, columns).
        scale: The factor, the weight of the adapter not included.
        name: What it is called.
    """

    left: Array
    right: Array
    scale: float
    name: str = "LoRA"

    @property
    def what(self) -> str:
        return f"{self.name} of rank {self.rank}"

    @property
    def rank(self) -> int:
        return int(self.right.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return int(self.left.shape[0]), int(self.right.shape[1])

    @cached_property
    def _right(self) -> Array:
        return self.right.astype(np.float64)

    def difference(self, base: Array, rows: slice) -> Array:
        found: Array = (self.scale * self.left[rows].astype(np.float64)) @ self._right
        return found

    def dense(self) -> Array:
        """The whole of it, float64."""
        return self.difference(np.empty(0), slice(None))


@dataclass(frozen=True)
class Dora:
    """The rows (or columns) of ``W + scale left @ right``, brought to learnt lengths.

    Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, 2024, equation 5.

    Attributes:
        low: The low-rank part.
        magnitude: A length for each row, or each column.
        axis: 0 for rows, 1 for columns (embeddings).
        norms: The lengths of the columns, once they are known.
    """

    low: LowRank
    magnitude: Array
    axis: int = 0
    norms: Array | None = None

    @property
    def what(self) -> str:
        return f"DoRA of rank {self.low.rank}"

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.low.shape

    def prepared(self, pieces: Callable[[], Iterable[Piece]]) -> Change:
        if self.axis == 0:
            return self
        total = np.zeros(self.shape[1])
        for rows, base in pieces():
            total += np.square(base + self.low.difference(base, rows)).sum(axis=0)
        return replace(self, norms=np.sqrt(total))

    def difference(self, base: Array, rows: slice) -> Array:
        new = base + self.low.difference(base, rows)
        if self.axis == 0:
            norms = np.linalg.norm(new, axis=1)
            return np.asarray(new * (self.magnitude[rows].astype(np.float64) / norms)[:, None] - base)
        assert self.norms is not None
        return new * (self.magnitude.astype(np.float64) / self.norms) - base


@dataclass(frozen=True)
class Stacked(_Local):
    """``scale left[e] @ right[e]`` for each expert ``e``.

    Attributes:
        left: (experts, rows, rank).
        right: (experts, rank, columns).
        scale: The factor.
    """

    left: Array
    right: Array
    scale: float

    @property
    def what(self) -> str:
        return f"LoRA of rank {self.right.shape[1]} on {len(self.left)} experts"

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of all experts, and columns."""
        return len(self.left) * self.left.shape[1], int(self.right.shape[2])

    def difference(self, base: Array, rows: slice) -> Array:
        start, stop, _ = rows.indices(self.shape[0])
        height, pieces = self.left.shape[1], []
        while start < stop:
            expert, first = divmod(start, height)
            last = min(height, first + stop - start)
            pieces.append((self.scale * self.left[expert, first:last].astype(np.float64)) @ self.right[expert])
            start += last - first
        return np.concatenate(pieces)


@dataclass(frozen=True)
class Scaled(_Local):
    """Rows or columns times learnt factors; Liu et al., IA3, 2022, section 3.3.

    Attributes:
        factors: One for each row; or for each column, or for each group of as many columns as a kernel has elements.
        axis: 0 for rows, 1 for columns.
    """

    factors: Array
    axis: int

    @property
    def what(self) -> str:
        return "IA3"

    def difference(self, base: Array, rows: slice) -> Array:
        if self.axis == 0:
            return base * (self.factors[rows].astype(np.float64) - 1)[:, None]
        factors = np.repeat(self.factors.astype(np.float64), base.shape[1] // len(self.factors))
        return base * (factors - 1)


@dataclass(frozen=True)
class Replaced(_Local):
    """Another weight in its place.

    Attributes:
        values: The canonical matrix.
    """

    values: Array

    @property
    def what(self) -> str:
        return "trained values"

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.values), int(self.values.shape[1])

    def difference(self, base: Array, rows: slice) -> Array:
        return self.values[rows].astype(np.float64) - base


@dataclass(frozen=True)
class Rows(_Local):
    """Some rows of a table replaced.

    Attributes:
        indices: Which.
        values: (indices, width).
    """

    indices: tuple[int, ...]
    values: Array

    @property
    def what(self) -> str:
        return f"{len(self.indices)} trained rows"

    def difference(self, base: Array, rows: slice) -> Array:
        found = np.zeros_like(base)
        start = rows.start or 0
        for index, value in zip(self.indices, self.values, strict=True):
            if start <= index < start + len(base):
                found[index - start] = value.astype(np.float64) - base[index - start]
        return found


@dataclass(frozen=True)
class Added(_Local):
    """A vector added to a bias.

    Attributes:
        values: (n, 1).
    """

    values: Array

    @property
    def what(self) -> str:
        return "bias of the adapter"

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.values), int(self.values.shape[1])

    def difference(self, base: Array, rows: slice) -> Array:
        return self.values[rows].astype(np.float64)


class Dense:
    """A matrix that is computed when it is needed, and again when it is needed again.

    Args:
        compute: Makes it, float64.
        what: What it is called.
        shape: Rows and columns.
    """

    def __init__(self, compute: Callable[[], Array], what: str, shape: tuple[int, int]) -> None:
        self.compute, self.what, self.shape = compute, what, shape

    def prepared(self, pieces: Callable[[], Iterable[Piece]]) -> Change:
        return Ready(self.compute(), self.what)

    def difference(self, base: Array, rows: slice) -> Array:
        return self.compute()[rows]


@dataclass(frozen=True)
class Ready(_Local):
    """A matrix that has been computed.

    Attributes:
        values: What is added.
        what: What it is called.
    """

    values: Array
    what: str = ""

    def difference(self, base: Array, rows: slice) -> Array:
        return self.values[rows]


@dataclass(frozen=True)
class Job:
    """What is done to some rows of a weight: ``base + sum(weight * change)``.

    Attributes:
        changes: Weights of adapters, and their changes.
        start: The first row.
        stop: The row after the last one.
    """

    changes: tuple[tuple[float, Change], ...]
    start: int
    stop: int

    def prepared(self, pieces: Callable[[], Iterable[Piece]]) -> Job:
        """The job when it has seen the whole weight."""

        def own() -> Iterator[Piece]:
            for rows, base in pieces():
                first, last = max(rows.start, self.start), min(rows.stop, self.stop)
                if first < last:
                    yield (
                        slice(first - self.start, last - self.start),
                        base[first - rows.start : last - rows.start],
                    )

        return replace(self, changes=tuple((w, c.prepared(own)) for w, c in self.changes))

    def add(self, base: Array, rows: slice, total: Array) -> None:
        """Add what belongs to ``rows``, whose old values are ``base``, to ``total``."""
        first, last = max(rows.start, self.start), min(rows.stop, self.stop)
        if first >= last:
            return
        here = slice(first - rows.start, last - rows.start)
        for weight, change in self.changes:
            total[here] += weight * change.difference(base[here], slice(first - self.start, last - self.start))


def chunks(rows: int, columns: int, elements: int) -> Sequence[slice]:
    """Rows of a matrix in pieces of about this many elements."""
    step = max(1, elements // max(columns, 1))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
