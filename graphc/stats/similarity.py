"""How far a run of blocks turns what goes through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphc.stats.base import Array, Request, Statistic, Valid
from graphc.stats.rows import finite


@dataclass
class Similarity(Statistic):
    """Sums over rows of the similarity of two values along their last axis, float64.

    Attributes:
        count: Rows seen, without those that are all zero in either value.
        cosines: Sum of the cosines.
        angles: Sum of ``arccos(cosine) / pi``, each in [0, 1].
        changes: Sum of ``|b - a|^2 / |a|^2``.
    """

    count: Array
    cosines: Array
    angles: Array
    changes: Array

    def merge(self, other: Similarity) -> None:
        for name, value in other.arrays().items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def cosine(self) -> float:
        """Mean cosine; 1 - it is the block influence of ShortGPT."""
        return float(self.cosines / max(float(self.count), 1.0))

    @property
    def angle(self) -> float:
        """Mean angular distance, in [0, 1]."""
        return float(self.angles / max(float(self.count), 1.0))

    @property
    def change(self) -> float:
        """Mean relative change."""
        return float(self.changes / max(float(self.count), 1.0))


@dataclass(frozen=True)
class SimilarityOf(Request[Similarity]):
    """The similarity of two values of one shape, row by row.

    Attributes:
        a, b: Their names: what goes into a block, and what comes out of it.
        axis: The axis of the channels that are compared.
    """

    statistic = Similarity

    a: str
    b: str
    axis: int = -1

    def values(self) -> tuple[str, ...]:
        return (self.a, self.b)

    def of(self, arrays: Sequence[Array], valid: Valid) -> Similarity:
        a, b = (finite(x, n) for x, n in zip(arrays, self.values(), strict=True))
        if a.shape != b.shape:
            raise ValueError(f"'{self.a}' has shape {a.shape} and '{self.b}' {b.shape}")
        a, b = (np.moveaxis(x, self.axis, -1) for x in (a, b))
        keep = valid.rows(a.shape[:-1])
        a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (a, b))
        norms = [np.linalg.norm(x, axis=1) for x in (a, b)]
        used = (norms[0] > 0) & (norms[1] > 0)
        if keep is not None:
            used &= keep
        a, b = a[used], b[used]
        cosines = np.clip((a * b).sum(axis=1) / (norms[0][used] * norms[1][used]), -1.0, 1.0)
        changes = np.square(b - a).sum(axis=1) / np.square(norms[0][used])
        sums = (float(used.sum()), cosines.sum(), np.arccos(cosines).sum() / np.pi, changes.sum())
        return Similarity(*(np.asarray(total, dtype=np.float64) for total in sums))
