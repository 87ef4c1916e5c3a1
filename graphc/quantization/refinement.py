"""Codes and scales of a layer, in turn, each the best for what the other is.

For a row ``w`` of a weight let ``q`` be its codes less their zero points, ``s`` the scales of its groups and ``H`` the
Gram matrix of its inputs. The error ``(w - sq) H (w - sq)T`` is quadratic in the scales: for given codes the best ones
solve a linear system with an unknown for each group of the row. For given scales a code is changed to where its
coordinate's parabola is least, one column after the other, until the sweep is over (coordinate descent, as in QuantEase
2023, which starts from what GPTQ has found). Neither step can make a row worse.
"""

from __future__ import annotations

import numpy as np

from graphc.edit import Array
from graphc.quantization.grid import Grid
from graphc.sparsity.sweep import BLOCK

SMALL = 1e-6
"""What is added to the diagonal of a row's system, as a part of its mean: groups may hold zeros alone."""


def refined(
    weights: Array,
    products: Array,
    grid: Grid,
    codes: Array,
    scales: Array,
    zeros: Array,
    labels: Array | None,
    rounds: int,
) -> tuple[Array, Array]:
    """Better codes and scales than given ones.

    Args:
        weights: ``(outputs, columns)``.
        products: ``(columns, columns)``, positive.
        grid: Of integers.
        codes: Those to begin with, in the shape of the weights.
        scales: In that shape.
        zeros: Zero points, in that shape.
        labels: The group of each column, see :func:`labels`; None: scales stay.
        rounds: How often scales and codes are changed.

    Returns:
        Codes and scales; codes of weights that are zero stay.
    """
    codes, scales = codes.astype(np.float32), scales.astype(np.float32)
    products = (products / max(float(np.diagonal(products).mean()), 1e-300)).astype(np.float32)
    for _ in range(rounds):
        if labels is not None:
            scales = _scaled(weights, products, codes - zeros, scales, labels)
        codes = _moved(weights, products, grid, codes, scales, zeros)
    return codes, scales


def labels(groups: Array) -> Array | None:
    """The group of each column, from 0 on; None if rows are not cut alike, or share groups.

    Args:
        groups: The number of the group that shares a scale, ``(outputs, columns)``.
    """
    found = np.unique(groups[0], return_inverse=True)[1].reshape(-1)
    firsts = groups[:, np.unique(found, return_index=True)[1]]
    alike = bool((groups == firsts[:, found]).all()) and len(np.unique(firsts)) == firsts.size
    return found if alike else None


def _scaled(weights: Array, products: Array, steps: Array, scales: Array, labels: Array) -> Array:
    """The best scales of codes, in rows that gain by them; those of groups without a code other than zero stay."""
    count = int(labels.max()) + 1
    system = np.zeros((len(weights), count, count))
    wanted = np.zeros((len(weights), count))
    member = (labels[:, None] == np.arange(count)).astype(np.float32)
    for group in range(count):
        columns = np.flatnonzero(labels == group)
        sums = steps[:, columns] @ products[columns]
        system[:, group] = (sums * steps) @ member
        wanted[:, group] = (sums * weights).sum(axis=1)
    held = scales[:, np.unique(labels, return_index=True)[1]].astype(np.float64)
    diagonal = np.diagonal(system, axis1=1, axis2=2)
    mean = np.maximum(diagonal.mean(axis=1), 1e-30)[:, None]
    # Towards the present scales, so that a group of zeros keeps its own.
    added = np.where(diagonal > 0, SMALL, 1.0) * mean
    found = np.linalg.solve(system + added[:, None] * np.eye(count), (wanted + added * held)[..., None])[..., 0]
    before, after = (np.einsum("rb,rbc,rc->r", s, system, s) - 2 * (s * wanted).sum(axis=1) for s in (held, found))
    usable = (after < before) & np.isfinite(found).all(axis=1) & (found != 0).all(axis=1)
    return np.where(usable[:, None], found, held)[:, labels].astype(np.float32)


def _moved(weights: Array, products: Array, grid: Grid, codes: Array, scales: Array, zeros: Array) -> Array:
    """Codes after one sweep of coordinate descent."""
    # Columns lie in a row each, which is how they are read.
    codes, scales, stay = (np.ascontiguousarray(each.T) for each in (codes, scales, weights == 0))
    pull = products @ (np.ascontiguousarray(weights.T) - (codes - zeros.T) * scales)
    for start in range(0, len(codes), BLOCK):
        near, local = products[start : start + BLOCK, start : start + BLOCK], pull[start : start + BLOCK].copy()
        shifts = np.zeros_like(local)
        for i in range(len(local)):
            if near[i, i] <= 0:
                continue
            old, scale = codes[start + i], scales[start + i]
            wish = np.rint(old + local[i] / (near[i, i] * scale))
            new = np.where(stay[start + i], old, np.clip(wish, *grid.reach))
            shifts[i] = (new - old) * scale
            codes[start + i] = new
            local[i + 1 :] -= near[i + 1 :, i, None] * shifts[i]
        pull[start + BLOCK :] -= products[start + BLOCK :, start : start + BLOCK] @ shifts
    return np.ascontiguousarray(codes.T)
