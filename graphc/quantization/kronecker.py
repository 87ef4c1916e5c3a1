"""Codes of a layer of which errors of inputs and of outputs make up for each other.

Let ``E`` be the error of a weight ``(outputs, columns)``, ``H`` the Gram matrix of its inputs and ``G`` that of the
loss's gradient by its outputs. To second order the loss grows by about ``tr(G E H ET)``: the curvature's Kronecker
factors (K-FAC, 2015; for rounding, YAQA, 2025). With ``H = (U+I) D (U+I)T`` and ``G = (V+I) D' (V+I)T``, ``U`` and
``V`` strictly upper triangular, it is the weighted sum of the squares of ``F = (V+I)T E (U+I)``. Each entry of ``F``
is that of ``E`` and what the entries before it, of earlier columns and outputs, have left: it is rounded away as far as
a code can. With ``G`` the identity this is GPTQ.
"""

from __future__ import annotations

import numpy as np

from graphc.edit import Array
from graphc.quantization.grid import Grid
from graphc.sparsity.sweep import upper_factor

TILE = 64
"""Columns and outputs of a tile. Entries of a tile are done by antidiagonals, which depend on earlier ones only."""

SHRUNK = 0.3
"""What is added to the diagonal of ``G``, as a part of its mean: it is known less well than ``H``, from one gradient
a row. With 1 instead, a small language model came out as near to the original on held-out text."""

STEPS = 16
"""Of conjugate gradients, for scales."""


def refined(
    weights: Array,
    products: Array,
    slopes: Array,
    grid: Grid,
    codes: Array,
    scales: Array,
    zeros: Array,
    labels: Array | None,
    rounds: int,
    *,
    order: bool,
) -> tuple[Array, Array]:
    """Better codes and scales than given ones.

    Args:
        weights: ``(outputs, columns)``; what is zero stays so.
        products: ``H``, positive.
        slopes: ``G``.
        grid: Of integers.
        codes: To begin with, in the shape of the weights.
        scales, zeros: Scales and zero points, in that shape.
        labels: The group of each column, see :func:`graphc.quantization.refinement.labels`; None: scales stay.
        rounds: How often codes and scales are changed.
        order: Whether columns with the largest inputs come first, and outputs with the largest gradients.
    """
    slopes = (_even(slopes) + SHRUNK * np.eye(len(slopes))).astype(np.float32)
    products = _even(products).astype(np.float32)
    best = _loss(weights - (codes - zeros) * scales, products, slopes)
    for _ in range(rounds):
        new = _swept(weights, products, slopes, grid, scales, zeros, order)
        found = _loss(weights - (new - zeros) * scales, products, slopes)
        if found >= best:
            break
        codes, best = new, found
        if labels is not None:
            scales = _rescaled(weights, products, slopes, codes - zeros, scales, labels)
            best = _loss(weights - (codes - zeros) * scales, products, slopes)
    return codes, scales


def _even(gram: Array) -> Array:
    """A Gram matrix whose diagonal has a mean of 1."""
    return np.asarray(gram / max(float(np.diagonal(gram).mean()), 1e-300))


def _loss(error: Array, products: Array, slopes: Array) -> float:
    """``tr(G E H ET)``."""
    return float(((slopes @ (error @ products)) * error).sum(dtype=np.float64))


def _swept(
    weights: Array, products: Array, slopes: Array, grid: Grid, scales: Array, zeros: Array, order: bool
) -> Array:
    """Codes of all entries, one after the other, float32."""
    turns = [np.argsort(-np.diagonal(m), kind="stable") if order else np.arange(len(m)) for m in (slopes, products)]
    place = np.ix_(*turns)
    v, u = (_unit(upper_factor(m[np.ix_(turn, turn)], 0)) for m, turn in zip((slopes, products), turns, strict=True))
    w, s, z = (np.ascontiguousarray(each[place], dtype=np.float32) for each in (weights, scales, zeros))
    codes, errors = np.empty_like(w), np.zeros_like(w)
    rows, columns = w.shape
    for left in range(0, columns, TILE):
        across = slice(left, min(left + TILE, columns))
        handed = errors[:, :left] @ u[:left, across]
        done = np.zeros_like(handed)
        for top in range(0, rows, TILE):
            down = slice(top, min(top + TILE, rows))
            tile = _Tile(w[down, across], s[down, across], z[down, across], grid)
            tile.run(handed[down], v[:top, down].T @ done[:top], v[down, down], u[across, across])
            codes[down, across], errors[down, across], done[down] = tile.codes, tile.errors, tile.done
    found = np.empty_like(codes)
    found[place] = codes
    return found


def _unit(factor: Array) -> Array:
    """``U``, strictly upper, of a factor ``(U+I) D^1/2``."""
    return np.asarray(np.triu(factor / np.diagonal(factor), 1), dtype=np.float32)


class _Tile:
    """Entries of some outputs and columns, each rounded with what the entries before it have left.

    Attributes:
        codes, errors: Of each entry.
        done: ``E (U+I)`` of each entry.
    """

    def __init__(self, weights: Array, scales: Array, zeros: Array, grid: Grid) -> None:
        self._weights, self._scales, self._zeros = (np.ascontiguousarray(each) for each in (weights, scales, zeros))
        self._keep = self._weights != 0
        self._reach = grid.reach
        self.codes, self.errors, self.done = (np.empty_like(self._weights) for _ in range(3))

    def run(self, columns: Array, outputs: Array, v: Array, u: Array) -> None:
        """Round all entries.

        Args:
            columns: What earlier columns have left, in the tile's shape.
            outputs: What earlier outputs have left, in the tile's shape.
            v, u: The factors' parts of the tile.
        """
        height, width = self._weights.shape
        columns, outputs = np.array(columns, order="C"), np.array(outputs, order="C")
        given = [self._weights, self._scales, self._zeros, self._keep, columns, outputs]
        known, made = ([a.reshape(-1) for a in each] for each in (given, [self.codes, self.errors, self.done]))
        for diagonal in range(height + width - 1):
            first, last = max(0, diagonal - width + 1), min(height, diagonal + 1)
            # Entries (i, diagonal - i) lie width - 1 apart.
            start, step = first * (width - 1) + diagonal, max(width - 1, 1)
            at = slice(start, start + (last - first - 1) * step + 1, step)
            weight, scale, zero, keep, left, above = (a[at] for a in known)
            code = np.where(keep, np.clip(np.rint((weight + left + above) / scale + zero), *self._reach), zero)
            error = weight - (code - zero) * scale
            whole = error + left
            for held, new in zip(made, (code, error, whole), strict=True):
                held[at] = new
            span = slice(diagonal - last + 1, diagonal - first + 1)
            columns[first:last] += error[:, None] * u[span][::-1]
            outputs[:, span] += (v[first:last].T * whole)[:, ::-1]


def _rescaled(weights: Array, products: Array, slopes: Array, steps: Array, scales: Array, labels: Array) -> Array:
    """Scales with which codes, less zero points, lose least: by conjugate gradients from given ones."""
    member = (labels[:, None] == np.arange(labels.max() + 1)).astype(np.float32)
    first = np.unique(labels, return_index=True)[1]

    def pulled(error: Array) -> Array:
        return np.asarray(((slopes @ (error @ products)) * steps) @ member)

    groups = [np.flatnonzero(labels == group) for group in range(member.shape[1])]
    own = np.stack([((steps[:, c] @ products[np.ix_(c, c)]) * steps[:, c]).sum(axis=1) for c in groups], axis=1)
    bend = np.maximum(own * np.diagonal(slopes)[:, None], 1e-30)
    held = scales[:, first].astype(np.float32)
    rest = pulled(weights - steps * scales)
    ready = rest / bend
    along, size = ready, float((rest * ready).sum(dtype=np.float64))
    for _ in range(STEPS):
        image = pulled(steps * along[:, labels])
        curve = float((along * image).sum(dtype=np.float64))
        if curve <= 0 or size <= 0:
            break
        held = held + along * np.float32(size / curve)
        rest = rest - image * np.float32(size / curve)
        ready = rest / bend
        after = float((rest * ready).sum(dtype=np.float64))
        along, size = ready + along * np.float32(after / size), after
    # Of a group without a code other than zero no scale is better than another.
    usable = (own > 0) & np.isfinite(held) & (held != 0)
    return np.where(usable, held, scales[:, first])[:, labels].astype(np.float32)
