"""Gradients of the loss: by weights, for Taylor expansions; by values, for their Gram matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphc.stats.base import Array, Request, Statistic, Valid
from graphc.stats.gram import Gram, GramOf
from graphc.stats.rows import PLAIN, Rows, finite


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


@dataclass(frozen=True)
class GuidedGramOf(Request[Gram]):
    """The Gram matrix of what a product reads, each row as heavy as the loss is steep in what is made of it.

    With the mean square ``s`` of the loss's gradient by a row's outputs, ``sum of s x xT``: what errors of a weight do
    to the loss, to second order, if the outputs of a row count alike (GuidedQuant, Kim et al. 2025, with one group).

    Attributes:
        value: What is read.
        output: What is made of it.
        axis, output_axis: The axes of the channels; all others are rows, the same in both.
    """

    statistic = Gram
    backward = True

    value: str
    output: str
    axis: int = -1
    output_axis: int = -1

    def values(self) -> tuple[str, ...]:
        return (self.value, self.output)

    def given(self) -> tuple[str, ...]:
        return (self.value,)

    def of(self, arrays: Sequence[Array], valid: Valid) -> Gram:
        x = np.moveaxis(finite(arrays[0], self.value), self.axis, -1)
        slope = np.moveaxis(finite(arrays[1], self.output), self.output_axis, -1)
        if x.shape[:-1] != slope.shape[:-1]:
            raise ValueError(f"'{self.value}' has shape {x.shape} and '{self.output}' {slope.shape}")
        # The loss is a mean over rows: their number makes the squares independent of how many there are.
        weight = np.sqrt(np.square(slope, dtype=np.float64).mean(axis=-1)) * (x.size // x.shape[-1])
        rows = (x * weight[..., None]).reshape(-1, x.shape[-1])
        if np.abs(rows).max(initial=0) < np.finfo(x.dtype).max:
            rows = rows.astype(x.dtype)
        keep = valid.rows(x.shape[:-1])
        return Gram.of(rows if keep is None else rows[keep])

    def nbytes(self, sizes: Sequence[Sequence[int | None]]) -> int:
        return 8 * Rows(axis=self.axis).width(sizes[0]) ** 2
