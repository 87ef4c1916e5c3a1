"""Criteria that look at the activations of units where a weight consumes them; forward statistics are enough.

Each gives an element of the consumer's matrices ``W`` a share, from the moments of the channels ``x_j`` that it reads;
a unit's score is the sum of its elements, over all consumers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from graphc.axes.groups import Group, Groups
from graphc.contract import Context, Needs
from graphc.edit import Array
from graphc.pruning.consumers import Consumer, consumers, over
from graphc.stats import Moments

Share = Callable[[Array, Moments], Array]
"""``share(W, moments)``: ``W`` is ``(groups, outputs, channels)``, moments are ``(groups or 1, channels)``."""


def needs(groups: Groups, chosen: Sequence[Group]) -> Needs:
    """The moments of what all consumers read."""
    return Needs(frozenset(each.contraction.moments for group in chosen for each in consumers(group)))


def scored(share: Share) -> Callable[[Groups, Group, Context], Array | str]:
    """The criterion of a share."""

    def score(groups: Groups, group: Group, context: Context) -> Array | str:
        def part(each: Consumer) -> Array:
            weight = each.matrices
            return each.units(groups, group, share(weight, moments(each, context, weight.shape)))

        return over(group, part)

    return score


def moments(consumer: Consumer, context: Context, shape: tuple[int, ...]) -> Moments:
    """The moments of the channels that a consumer reads, spread over the kernel's elements: ``(groups, channels)``."""
    found = context.statistics[consumer.contraction.moments]
    groups, window = shape[0], consumer.contraction.window
    if found.mean.ndim == 1:
        found = Moments(**{name: array[None] for name, array in found.arrays().items()})
    if window > 1:
        parts = {name: a if name == "count" else np.repeat(a, window, axis=-1) for name, a in found.arrays().items()}
        found = Moments(**parts)
    if len(found.mean) not in (1, groups):
        raise AssertionError("statistics and weight have the same groups")
    return found


def _norms(found: Moments) -> Array:
    return np.sqrt(found.squares)[:, None, :]


def activation(weight: Array, found: Moments) -> Array:
    """``|x_j|``: what CFSP's fine score comes to."""
    return np.broadcast_to(_norms(found) / weight.shape[1], weight.shape)


def wanda(weight: Array, found: Moments) -> Array:
    """``|W_ij| |x_j|`` (Wanda)."""
    return np.asarray(np.abs(weight) * _norms(found))


def fluctuation(weight: Array, found: Moments) -> Array:
    """``var_j W_ij^2`` (FLAP): the error that is left once the mean went into a bias, were channels independent."""
    return np.asarray(found.variance[:, None, :] * np.square(weight))


def mean_absolute(weight: Array, found: Moments) -> Array:
    """``mean |x_j|``: AMP's score of a neuron."""
    count = np.maximum(found.count, 1)[:, None]
    return np.broadcast_to((found.absolute / count)[:, None, :] / weight.shape[1], weight.shape)


def flap(groups: Groups, group: Group, context: Context) -> Array | str:
    """FLAP as published: the fluctuation of each channel, squared for heads, z-scored over the layer, mean by unit."""

    def part(each: Consumer) -> Array:
        weight = each.matrices
        metric = fluctuation(weight, moments(each, context, weight.shape)).sum(axis=1, keepdims=True)
        if group.kind == "head":
            metric = np.square(metric)
        scaled = (metric - metric.mean()) / (metric.std() or 1.0)
        members = each.units(groups, group, np.full_like(weight, 1 / weight.shape[1]))
        spread = each.units(groups, group, np.broadcast_to(scaled / weight.shape[1], weight.shape))
        return spread / np.maximum(members, 1)

    return over(group, part)
