"""Criteria from gradients: what the loss changes by when a unit becomes zero, by Taylor expansion.

They are summed over everything that a unit holds, as LLM-Pruner does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from graphc import edit
from graphc.axes.groups import Group, Groups, Place
from graphc.contract import Context, Needs
from graphc.edit import Array
from graphc.pruning.activations import moments
from graphc.pruning.consumers import Consumer, consumers, over
from graphc.stats import Gradients, GradientsOf

Saliency = Callable[[Array, Gradients], Array]
"""``saliency(w, gradients)`` by element."""


def needs(groups: Groups, chosen: Sequence[Group]) -> Needs:
    """The gradients by every constant that units live in."""
    names = {place.value.name or "" for group in chosen for place in _places(group)}
    return Needs(frozenset(GradientsOf(name) for name in names))


def _places(group: Group) -> list[Place]:
    found = []
    for place in group.places:
        held = edit.tensor(place.value)
        if place.role != "carries" and held is not None and held.dtype.is_floating_point():
            found.append(place)
    return found


def first(weight: Array, found: Gradients) -> Array:
    """``|w g|`` (param_first)."""
    return np.asarray(np.abs(weight * found.total))


def second(weight: Array, found: Gradients) -> Array:
    """``w^2 E[g^2]`` (param_second), from the diagonal of the empirical Fisher information."""
    return np.asarray(np.square(weight) * found.squares / np.maximum(found.count, 1))


def mixed(weight: Array, found: Gradients) -> Array:
    """``|w g - w^2 E[g^2] / 2|`` (param_mix)."""
    return np.asarray(np.abs(weight * found.total - second(weight, found) / 2))


def signed(weight: Array, found: Gradients) -> Array:
    """``w g``, whose sum over a unit is its first-order change of the loss (vectorize)."""
    return np.asarray(weight * found.total)


def scored(saliency: Saliency, *, whole: bool = False) -> Callable[[Groups, Group, Context], Array | str]:
    """The criterion of a saliency; with ``whole`` the absolute value is taken of a unit's sum."""

    def score(groups: Groups, group: Group, context: Context) -> Array | str:
        total: Array = np.zeros((*group.blocks, group.size))
        for place in _places(group):
            held = edit.tensor(place.value)
            assert held is not None
            weight = held.numpy().astype(np.float64)
            found = context.statistics[GradientsOf(place.value.name or "")]
            total = total + groups.scores(group, place, saliency(weight, found))
            edit.release(held)
        return np.abs(total) if whole else total

    return score


def heapr_needs(groups: Groups, chosen: Sequence[Group]) -> Needs:
    """Moments of what consumers read, and the Gram matrices of the gradients by what they give."""
    found = [each.contraction for group in chosen for each in consumers(group)]
    return Needs(frozenset([*(c.moments for c in found), *(c.output_gradients for c in found)]))


def heapr(groups: Groups, group: Group, context: Context) -> Array | str:
    """``E[x_j^2] w_jT G w_j`` with the mean Gram matrix ``G`` of the gradient by the consumer's output (HEAPr)."""
    return over(group, lambda each: each.units(groups, group, heapr_elements(each, context)))


def heapr_elements(consumer: Consumer, context: Context) -> Array:
    """The share that each element of a consumer's matrices has in HEAPr's score, in their shape."""
    weight = consumer.matrices
    seen = moments(consumer, context, weight.shape)
    gradient = context.statistics[consumer.contraction.output_gradients]
    products = gradient.products if gradient.products.ndim == 3 else gradient.products[None]
    mean = products / np.maximum(np.atleast_1d(gradient.count), 1)[:, None, None]
    energy = np.square(seen.rms)[:, None, :]
    # The share of element (i, j) of w_jT G w_j is w_ij (G w_j)_i.
    return np.asarray(energy * weight * np.matmul(mean, weight))
