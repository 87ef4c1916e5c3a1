"""The best low-rank approximation of a weight for the inputs that it sees.

``y = W x`` with ``W`` of shape ``(m, n)`` becomes ``y = B (A x)`` with ``B`` ``(m, r)`` and ``A`` ``(r, n)``. Of all
of rank ``r``, the expected ``|W x - B A x|^2`` is least for ``B A = U_r U_r^T W``, where ``U_r`` are the first left
singular vectors of ``W T`` with ``T T^T = H = E[x x^T]`` (Eckart and Young 1936; SVD-LLM, Wang et al. 2024: any such
``T`` gives the same).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphc.edit import Array

_NOISE = 1e-12
"""Parts of the largest eigenvalue below which one is rounding."""


@dataclass(frozen=True)
class Spectrum:
    """A weight's factors at full rank, the most important column first.

    Attributes:
        left: ``B``, ``(m, k)``, orthonormal columns.
        right: ``A``, ``(k, n)``.
        energy: What each rank contributes to the output's sum of squares, ``(k,)``, descending, float64.
        total: The sum over all ranks, those that were not kept, too.
    """

    left: Array
    right: Array
    energy: Array
    total: float

    def lost(self, rank: int) -> float:
        """The part of the output's sum of squares that is lost when the first ``rank`` columns stay."""
        return max(0.0, 1.0 - float(self.energy[:rank].sum()) / self.total) if self.total > 0 else 0.0


def spectrum(weight: Array, inputs: Array | None, most: int) -> Spectrum:
    """The factors of a weight.

    Args:
        weight: ``W``, ``(m, n)``.
        inputs: ``H`` as a matrix ``(n, n)``, its diagonal ``(n,)``, or None for all inputs alike.
        most: The ranks to keep.
    """
    wide = weight.astype(np.float64)
    rows, columns = wide.shape
    if rows <= columns:
        weighted = wide if inputs is None else wide * inputs if inputs.ndim == 1 else wide @ inputs
        energy, vectors = _eigen(weighted @ wide.T)
        count = min(most, _kept(energy))
        left = vectors[:, :count]
    else:
        # The same from the smaller side: with M = W T, U = M V / sigma.
        scaled = wide if inputs is None else wide * np.sqrt(inputs) if inputs.ndim == 1 else wide @ _root(inputs)
        energy, vectors = _eigen(scaled.T @ scaled)
        count = min(most, _kept(energy))
        left = np.linalg.qr(scaled @ vectors[:, :count])[0]
    return Spectrum(left, left.T @ wide, energy[:count], float(energy.sum()))


def _eigen(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues, none negative, in descending order, and their vectors as columns."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]


def _kept(energy: Array) -> int:
    return max(1, int(np.count_nonzero(energy > _NOISE * energy[0])))


def _root(matrix: Array) -> Array:
    """A ``T`` with ``T T^T`` the matrix, also where it is singular."""
    values, vectors = _eigen(matrix)
    return np.asarray(vectors * np.sqrt(values))
