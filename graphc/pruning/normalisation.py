"""Normalisations: how the scores of different groups are made comparable. One function each, in one table."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from graphc.edit import Array


def none(scores: Array) -> Array:
    """As they are."""
    return scores


def mean(scores: Array) -> Array:
    """Divided by the group's mean."""
    size = float(np.mean(np.abs(scores)))
    return scores / size if size else scores


def zscore(scores: Array) -> Array:
    """Minus the group's mean, divided by its standard deviation (FLAP)."""
    spread = float(scores.std())
    return (scores - scores.mean()) / spread if spread else np.zeros_like(scores)


def l2(scores: Array) -> Array:
    """Divided by the group's Euclidean norm."""
    size = float(np.linalg.norm(scores))
    return scores / size if size else scores


def minmax(scores: Array) -> Array:
    """Stretched to [0, 1]."""
    spread = float(scores.max() - scores.min())
    return (scores - scores.min()) / spread if spread else np.zeros_like(scores)


def rank(scores: Array) -> Array:
    """The part of the group that has a lower score, in [0, 1); of equal ones, the earlier rank higher."""
    flat = scores.reshape(-1)
    order = np.argsort(flat[::-1], kind="stable")
    ranks = np.empty(flat.size)
    ranks[flat.size - 1 - order] = np.arange(flat.size)
    return (ranks / max(flat.size, 1)).reshape(scores.shape)


def lamp(scores: Array) -> Array:
    """Divided by the sum of all scores of the group that are not lower (LAMP, with scores for squared weights)."""
    flat = scores.reshape(-1)
    order = np.argsort(flat, kind="stable")
    rest = np.cumsum(flat[order][::-1])[::-1]
    result = np.zeros(flat.size)
    result[order] = np.divide(flat[order], rest, out=np.zeros(flat.size), where=rest > 0)
    return result.reshape(scores.shape)


NORMALISATIONS: dict[str, Callable[[Array], Array]] = {
    "none": none,
    "mean": mean,
    "zscore": zscore,
    "l2": l2,
    "minmax": minmax,
    "rank": rank,
    "lamp": lamp,
}
