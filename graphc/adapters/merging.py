"""Task vectors made into one: the formulas of PEFT's ``add_weighted_adapter``, DELLA and STAR.

Arrays are stacked along a first axis, one for each adapter; everything is float64 and the randomness is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from graphc.edit import Array

Sign = Literal["total", "frequency"]
"""How the sign of an element is elected: by the sum of the values, or by the number of votes."""


def weighted(tasks: Array, weights: Array) -> Array:
    """``sum(weight * task)``; Ilharco et al., Editing Models with Task Arithmetic, 2022."""
    return np.asarray(np.einsum("a,a...->...", weights, tasks))


def largest(task: Array, density: float) -> Array:
    """The fraction ``density`` of the elements that is largest in magnitude; zeros elsewhere."""
    if density >= 1:
        return task
    flat = task.reshape(-1)
    kept = np.zeros_like(flat)
    count = int(density * flat.size)
    if count:
        chosen = np.argpartition(-np.abs(flat), count - 1)[:count]
        kept[chosen] = flat[chosen]
    return kept.reshape(task.shape)


def dropped(task: Array, density: float, rng: np.random.Generator) -> Array:
    """Each element with probability ``density``, divided by it; Yu et al., DARE, 2023, equation 2."""
    if density >= 1:
        return task
    return task * (rng.random(task.shape) < density) / density


def sampled(task: Array, density: float, epsilon: float, rng: np.random.Generator) -> Array:
    """Each element with a probability that grows with its rank in its row; Deep et al., DELLA, 2024, section 3.1.

    Probabilities go from ``density - epsilon`` for the smallest to ``density + epsilon`` for the largest magnitude.
    """
    count = task.shape[-1]
    order = np.argsort(np.argsort(np.abs(task), axis=-1, kind="stable"), axis=-1, kind="stable")
    keep = density - epsilon + 2 * epsilon * order / max(count - 1, 1)
    keep = np.clip(keep, 1e-12, 1.0)
    return np.asarray(task * (rng.random(task.shape) < keep) / keep)


def elected(tasks: Array, weights: Array, sign: Sign) -> Array:
    """The mean of the weighted values of the elected sign; Yadav et al., TIES-Merging, 2023, section 4.2."""
    signs = np.sign(tasks)
    votes = tasks.sum(axis=0) if sign == "total" else signs.sum(axis=0)
    agree = signs == np.where(votes >= 0, 1.0, -1.0)
    return np.asarray(weighted(tasks * agree, weights) / np.maximum(agree.sum(axis=0), 1))


def truncated(left: Array, right: Array, eta: float) -> tuple[Array, Array]:
    """The leading part of ``left @ right`` that has the share ``eta`` of its nuclear norm, scaled up to all of it.

    Lee et al., STAR: Spectral Truncation and Rescale for Model Merging, 2025, equations 4 and 5.

    Returns:
        Two factors: (rows, kept rank) and (kept rank, columns).
    """
    u, values, v = svd(left, right)
    total = values.sum()
    if total == 0:
        return u[:, :0], v[:0]
    rank = min(int(np.searchsorted(np.cumsum(values), eta * total)) + 1, len(values))
    kept = values[:rank] * (total / values[:rank].sum())
    return u[:, :rank] * kept, v[:rank]


def svd(left: Array, right: Array) -> tuple[Array, Array, Array]:
    """The singular value decomposition of ``left @ right``, from the small one of its rank."""
    if left.shape[1] > min(left.shape[0], right.shape[1]):
        return np.linalg.svd(left @ right, full_matrices=False)
    q, r = np.linalg.qr(left)
    p, s = np.linalg.qr(right.T)
    u, values, v = np.linalg.svd(r @ s.T, full_matrices=False)
    return q @ u, values, v @ p.T


def projected(dense: Array, rank: int) -> tuple[Array, Array]:
    """The two factors of the nearest matrix of a rank."""
    u, values, v = np.linalg.svd(dense, full_matrices=False)
    return u[:, :rank] * values[:rank], v[:rank]


def stacked(tasks: Sequence[Array]) -> Array:
    """Arrays of one shape as one array, float64."""
    return np.stack([np.asarray(task, np.float64) for task in tasks])
