"""One sweep over the columns of a weight, in which each column is given a new value and the later ones make up for it.

SparseGPT (2023), GPTQ (2023) and their mixtures differ only in what a column is projected to: to zeros at chosen
places, to a grid, or both. Let ``H`` be the Gram matrix of the inputs and ``U`` the upper Cholesky factor of its
inverse. When column ``i`` goes from ``w`` to ``q``, ``(w - q) / U_ii * U_i`` is taken from the columns after it, which
leaves the output as close as they can bring it. Columns are done in blocks, the rest of the matrix once a block.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from graphc.edit import Array
from graphc.errors import BadInput
from graphc.sparsity.pattern import Pattern

BLOCK = 128
"""Columns that are done before the rest of the matrix follows."""


class Projector(Protocol):
    """What the columns of a weight become."""

    def begin(self, start: int, weights: Array, diagonal: Array) -> None:
        """A block begins.

        Args:
            start: Its first column.
            weights: Its columns as they are now, ``(outputs, columns)``.
            diagonal: ``U_ii`` of its columns.
        """

    def column(self, index: int, weights: Array, diagonal: Array) -> Array:
        """What a column becomes.

        Args:
            index: Its number.
            weights: It and the columns of its block after it as they are now, ``(outputs, columns)``.
            diagonal: ``U_ii`` of these.
        """


def sweep(weight: Array, gram: Array, projector: Projector, *, damp: float = 0.01, block: int = BLOCK) -> Array:
    """Project the columns of a weight one after the other, each time letting the later ones make up for it.

    Matrices with leading axes are done at once, each with its own Gram matrix.

    Args:
        weight: ``(..., outputs, columns)``.
        gram: ``(..., columns, columns)``, sums or means of the products of the inputs.
        projector: What columns become.
        damp: What is added to the diagonal of the Gram matrix, as a part of its mean.
        block: Columns in a block.

    Returns:
        The new weight, in the weight's dtype. Columns whose input is always zero are zero.

    Raises:
        BadInput: The Gram matrix cannot be factorised with any reasonable damping.
    """
    dtype = np.promote_types(weight.dtype, np.float32)
    dead = np.diagonal(gram, axis1=-2, axis2=-1) == 0
    w = np.where(dead[..., None, :], 0, weight).astype(dtype)
    factor = inverse_factor(gram + dead[..., None] * np.eye(gram.shape[-1]), damp).astype(dtype)
    count = w.shape[-1]
    for start in range(0, count, block):
        end = min(start + block, count)
        part = np.ascontiguousarray(w[..., start:end])
        u = factor[..., start:end, start:end]
        diagonal = np.diagonal(u, axis1=-2, axis2=-1)
        projector.begin(start, part, diagonal)
        errors = np.empty_like(part)
        for i in range(end - start):
            new = projector.column(start + i, part[..., i:], diagonal[..., i:])
            errors[..., i] = (part[..., i] - new) / u[..., i, i, None]
            part[..., i:] -= errors[..., i, None] * u[..., i, None, i:]
            part[..., i] = new
        w[..., start:end] = part
        w[..., end:] -= errors @ factor[..., start:end, end:]
    return w


def inverse_factor(gram: Array, damp: float) -> Array:
    """The upper ``U`` with ``UT U`` the inverse of the damped Gram matrix; more is added where that is too little."""
    return np.asarray(np.linalg.inv(upper_factor(gram, damp)))


def upper_factor(gram: Array, damp: float) -> Array:
    """The upper ``U`` with ``U UT`` the damped Gram matrix; more is added where that is too little."""
    gram = np.asarray(gram, dtype=np.float64)
    mean = np.diagonal(gram, axis1=-2, axis2=-1).mean(axis=-1)[..., None, None]
    mean = np.where(mean > 0, mean, 1.0)
    eye = np.eye(gram.shape[-1])
    for more in (damp, 10 * damp, 100 * damp, 1.0):
        try:
            # It is the lower factor of the matrix turned around, turned back.
            return np.asarray(np.linalg.cholesky((gram + more * mean * eye)[..., ::-1, ::-1])[..., ::-1, ::-1])
        except np.linalg.LinAlgError:
            continue
    raise BadInput("the statistics of a layer's input cannot be used", why="their Gram matrix is not positive")


def no_worse(weight: Array, new: Array, gram: Array) -> Array:
    """A swept weight, with plain zeros at its places in the rows where these lose less.

    What a column hands on may go to columns that become zero later, so that a sweep alone is no guarantee.

    Args:
        weight: What was swept, ``(outputs, columns)``.
        new: What became of it, with zeros at the places that were chosen.
        gram: ``(columns, columns)``.
    """
    plain = np.where(new != 0, weight, 0.0)
    losses = [np.einsum("ij,ij->i", (weight - w) @ gram, weight - w) for w in (new, plain)]
    return np.where((losses[1] < losses[0])[:, None], plain, new)


class Masked:
    """Zeros at places that are given.

    Args:
        keep: Which weights stay, ``(outputs, columns)``.
    """

    def __init__(self, keep: Array) -> None:
        self._keep = keep

    def begin(self, start: int, weights: Array, diagonal: Array) -> None:
        """Nothing is chosen."""

    def column(self, index: int, weights: Array, diagonal: Array) -> Array:
        return np.where(self._keep[:, index], weights[:, 0], 0.0)


class Saliency:
    """Zeros where that costs least at the time, ``w^2 / U_ii^2``: the same part of each block, or N of M columns.

    Args:
        pattern: Where zeros may be; no tiles.
        ratio: The part that goes of each block.
        by_row: Whether each row of a block loses equally many.
    """

    def __init__(self, pattern: Pattern, ratio: float, *, by_row: bool) -> None:
        self._pattern, self._ratio, self._by_row = pattern, ratio, by_row
        self._keep: Array = np.empty(0)
        self._start = 0

    def begin(self, start: int, weights: Array, diagonal: Array) -> None:
        if not self._pattern.group:
            scores = np.square(weights / diagonal)
            self._keep, self._start = self._pattern.keep(scores, self._ratio, by_row=self._by_row), start

    def column(self, index: int, weights: Array, diagonal: Array) -> Array:
        group = self._pattern.group
        if group and index % group == 0:
            scores = np.square(weights[:, :group] / diagonal[:group])
            self._keep, self._start = self._pattern.keep(scores, 0.0, by_row=True), index
        return np.where(self._keep[:, index - self._start], weights[:, 0], 0.0)
