"""Which weights of a matrix stay: patterns of zeros, and how their places are chosen by scores.

Matrices are ``(outputs, columns)``, the columns being what is contracted. Scores are shaped alike; the lowest go.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from graphc.edit import Array
from graphc.errors import BadInput


@dataclass(frozen=True)
class Pattern:
    """Where zeros may be.

    Attributes:
        kept: Of every ``group`` consecutive columns of a row, how many stay; 0 if any weight may go.
        group: See ``kept``.
        tile: Rows and columns of the tiles that go as a whole; (1, 1) for single weights.
    """

    kept: int = 0
    group: int = 0
    tile: tuple[int, int] = (1, 1)

    @staticmethod
    def parse(text: str) -> Pattern:
        """``free``; ``N:M``, at most N of M consecutive weights stay; ``RxC``, tiles of R outputs and C columns.

        Raises:
            BadInput: It is none of these.
        """
        if text == "free":
            return Pattern()
        for sign in (":", "x"):
            left, found, right = text.partition(sign)
            if found and left.isdigit() and right.isdigit():
                a, b = int(left), int(right)
                if sign == ":" and 0 < a < b:
                    return Pattern(a, b)
                if sign == "x" and a > 0 and b > 0:
                    return Pattern(tile=(a, b))
        raise BadInput(f"there is no pattern '{text}'", hint="free, N:M as in 2:4, or tiles as in 4x4")

    def problem(self, shape: tuple[int, int]) -> str:
        """Why a matrix of this shape cannot have the pattern, or nothing."""
        if self.group and shape[1] % self.group:
            return f"its contracted axis is no multiple of {self.group}"
        if shape[0] % self.tile[0] or shape[1] % self.tile[1]:
            return f"it cannot be cut into tiles of {self.tile[0]} by {self.tile[1]}"
        return ""

    def keep(self, scores: Array, ratio: float, *, by_row: bool) -> Array:
        """Which weights stay, boolean, in the shape of the scores.

        Args:
            scores: ``(outputs, columns)``.
            ratio: The part that goes, which ``N:M`` says itself.
            by_row: Whether each row loses equally many, instead of the matrix as a whole.
        """
        if self.group:
            return n_of_m(scores, self.kept, self.group)
        if self.tile != (1, 1):
            rows, columns = self.tile
            tiles = scores.reshape(scores.shape[0] // rows, rows, scores.shape[1] // columns, columns)
            kept = lowest_gone(tiles.sum(axis=(1, 3), dtype=np.float64), ratio, by_row=by_row)
            return np.repeat(np.repeat(kept, rows, axis=0), columns, axis=1)
        return lowest_gone(scores, ratio, by_row=by_row)


def n_of_m(scores: Array, kept: int, group: int) -> Array:
    """The ``kept`` highest of every ``group`` consecutive scores of a row; of equal ones, the first."""
    grouped = scores.reshape(scores.shape[0], -1, group)
    order = np.argsort(-grouped, axis=-1, kind="stable")
    keep = np.zeros(grouped.shape, dtype=bool)
    np.put_along_axis(keep, order[..., :kept], True, axis=-1)
    return keep.reshape(scores.shape)


def lowest_gone(scores: Array, ratio: float, *, by_row: bool) -> Array:
    """A mask without the lowest scores, ``round(ratio * size)`` of each row or of the whole."""
    shape = scores.shape
    flat = scores if by_row else scores.reshape(1, -1)
    count = min(round(ratio * flat.shape[1]), flat.shape[1])
    keep = np.ones(flat.shape, dtype=bool)
    if count:
        # A partition is linear in time; ties at its edge fall as they do, the same way each time.
        np.put_along_axis(keep, np.argpartition(flat, count - 1, axis=1)[:, :count], False, axis=1)
    return keep.reshape(shape)


def erk(shapes: list[tuple[int, int, int]], ratio: float) -> list[float]:
    """Erdos-Renyi kernel ratios: a layer's density is in proportion to the sum of its sizes by their product.

    Layers that would be more than dense stay dense, and the others give what is left (Evci and others, 2020).

    Args:
        shapes: (outputs, inputs, kernel elements) of each layer.
        ratio: The part of all weights that goes.
    """
    sizes = np.array([math.prod(shape) for shape in shapes], dtype=np.float64)
    raw = np.array([(o + i + (k if k > 1 else 0)) / (o * i * k) for o, i, k in shapes])
    dense = np.zeros(len(shapes), dtype=bool)
    budget = (1 - ratio) * sizes.sum()
    while not dense.all():
        scale = max(budget - sizes[dense].sum(), 0.0) / (raw * sizes)[~dense].sum()
        over = ~dense & (scale * raw > 1)
        if not over.any():
            return [0.0 if d else float(1 - scale * r) for d, r in zip(dense, raw, strict=True)]
        dense |= over
    return [0.0] * len(shapes)


def outliers(shares: list[float], sizes: list[int], ratio: float, spread: float) -> list[float]:
    """OWL (2024): layers with more outliers lose less, within ``spread`` of the ratio, which the whole still loses.

    Args:
        shares: The share of outliers of each layer.
        sizes: Their numbers of weights.
        ratio: The part of all weights that goes.
        spread: How far a layer may be from it.
    """
    share = np.array(shares, dtype=np.float64)
    low, high = share.min(), share.max()
    scaled = 2 * spread * (share - low) / (high - low) if high > low else np.zeros_like(share)
    weights = np.array(sizes, dtype=np.float64)
    return [float(r) for r in np.clip(ratio - (scaled - np.average(scaled, weights=weights)), 0.0, 1.0)]
