"""What a router does: which experts it picks, how much it gives them, which ones together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphc.stats.base import Array, Request, Statistic, Valid


@dataclass
class Routing(Statistic):
    """Sums over tokens, float64.

    Attributes:
        count: Tokens seen.
        chosen: How often each expert was chosen, ``(experts,)``.
        mass: Sum of the weights that each got, ``(experts,)``.
        together: How often two were chosen for the same token, ``(experts, experts)``; ``chosen`` on the diagonal.
    """

    count: Array
    chosen: Array
    mass: Array
    together: Array

    def merge(self, other: Routing) -> None:
        for name, value in other.arrays().items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class RoutingOf(Request[Routing]):
    """The choices of a router.

    Attributes:
        indices: The value with the chosen experts, ``(..., k)`` (the second output of TopK).
        experts: How many experts there are.
        weights: The value with the weights of the chosen, shaped alike; "" counts each as 1.
    """

    statistic = Routing

    indices: str
    experts: int
    weights: str = ""

    def values(self) -> tuple[str, ...]:
        return (self.indices, *filter(None, (self.weights,)))

    def of(self, arrays: Sequence[Array], valid: Valid) -> Routing:
        indices = arrays[0]
        k = indices.shape[-1]
        keep = valid.rows(indices.shape[:-1])
        chosen = indices.reshape(-1, k)
        weights = arrays[1].astype(np.float64) if self.weights else np.ones(chosen.shape)
        if weights.size != chosen.size:
            raise ValueError(f"'{self.weights}' has {weights.size} weights for {chosen.size} choices")
        weights = weights.reshape(-1, k)
        if keep is not None:
            chosen, weights = chosen[keep], weights[keep]
        picked = np.zeros((len(chosen), self.experts))
        np.put_along_axis(picked, chosen, 1.0, axis=1)
        mass = np.bincount(chosen.reshape(-1), weights=weights.reshape(-1), minlength=self.experts)
        return Routing(np.asarray(float(len(chosen))), picked.sum(axis=0), mass, picked.T @ picked)
