"""Orders: which unit of which group goes next. One function each; :mod:`graphc.pruning.orders` has the table.

An order gives every group a level for its first, second, ... unit to go; all levels of all groups are merged, and
units go from the lowest on until the budget is met. So each allocation is one rising sequence by group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes.groups import Group, Groups
from graphc.contract import Context, Needs
from graphc.edit import Array
from graphc.pruning import activations
from graphc.pruning.allocation import Limits
from graphc.pruning.consumers import Consumer, consumers
from graphc.pruning.probe import Probe
from graphc.stats import SimilarityOf

OUTLIER = 5.0
"""How many times the mean score an outlier of OWL has."""
SWING = 0.08
"""How far OWL's densities differ from the mean."""


@dataclass(frozen=True)
class Setting:
    """What an order may look at.

    Attributes:
        groups: All groups of the model.
        chosen: Those that are pruned.
        scores: Normalised scores of each, by name.
        unit_costs: What a unit of each costs, by name.
        context: Statistics.
        ratio: The part of the cost that goes.
        cost: What the model costs once each group lost so many units.
        limits: What each group must keep, by name.
        probe: Measures losses; None where the order needs none.
    """

    groups: Groups
    chosen: Sequence[Group]
    scores: Mapping[str, Array]
    unit_costs: Mapping[str, float]
    context: Context
    ratio: float
    cost: Callable[[Mapping[str, int]], float]
    limits: Mapping[str, Limits]
    probe: Probe | None = None


Levels = list[Array]
"""By chosen group: the level of its first, second, ... unit to go, rising, ``(size,)``."""


@dataclass(frozen=True)
class Order:
    """A way to spread a budget over groups.

    Attributes:
        levels: See ``Levels``.
        about: What it is, for the documentation.
        needs: What must have been collected before; None for nothing.
        probes: Whether it measures losses.
    """

    levels: Callable[[Setting], Levels]
    about: str
    needs: Callable[[Groups, Sequence[Group]], Needs] | None = None
    probes: bool = False


def _rising(scores: Array, size: int) -> Array:
    """A unit of a balanced group goes from every block at once: each block gives its lowest, then its next."""
    return np.asarray(np.sort(scores, axis=-1).reshape(-1, size).sum(axis=0))


def _left(size: int) -> Array:
    """The part of a group that is left around the moment when its first, second, ... unit goes."""
    return 1 - (np.arange(size) + 0.5) / size


def uniform(setting: Setting) -> Levels:
    """The same part of each group."""
    return [-_left(group.size) for group in setting.chosen]


def together(setting: Setting) -> Levels:
    """The lowest scores of all groups."""
    return [_rising(setting.scores[group.name], group.size) for group in setting.chosen]


def per_cost(setting: Setting) -> Levels:
    """The lowest scores by what a unit costs: right where scores are losses that add up."""
    return [
        _rising(setting.scores[group.name], group.size) / max(setting.unit_costs[group.name], 1e-30)
        for group in setting.chosen
    ]


def erk(setting: Setting) -> Levels:
    """Densities in proportion to the sum of a layer's sizes over their product; saturated layers stay whole."""
    return _in_proportion(setting, [_erdos_renyi(group) for group in setting.chosen])


def _erdos_renyi(group: Group) -> float:
    for place in group.places:
        held = edit.tensor(place.value)
        if place.role == "produces" and held is not None and len(held.shape) > 1:
            sizes = np.array(held.shape.numpy(), dtype=np.float64)
            return float(sizes.sum() / sizes.prod())
    return 1.0


def _in_proportion(setting: Setting, weights: Sequence[float]) -> Levels:
    """Densities that are in proportion to weights, as far as they stay below one."""
    return [-_left(group.size) / max(weight, 1e-30) for group, weight in zip(setting.chosen, weights, strict=True)]


def owl(setting: Setting) -> Levels:
    """Densities that follow the part of outliers among ``|W_ij| |x_j|`` (OWL)."""
    parts = []
    for group in setting.chosen:
        shares = [_outliers(each, setting.context) for each in consumers(group)]
        parts.append(float(np.mean(shares)) if shares else 0.0)
    found = np.array(parts)
    spread = found.max() - found.min()
    scaled = 2 * SWING * (found - found.min()) / spread if spread else np.zeros(len(found))
    shifts = scaled - scaled.mean()
    return [-(_left(group.size) - shift) for group, shift in zip(setting.chosen, shifts, strict=True)]


def _outliers(consumer: Consumer, context: Context) -> float:
    weight = consumer.matrices
    scores = activations.wanda(weight, activations.moments(consumer, context, weight.shape))
    return float((scores > OUTLIER * scores.mean()).mean())


def influence(setting: Setting) -> Levels:
    """Densities that follow how far a layer turns the residual stream (CFSP's coarse scores, standardised)."""
    angles: list[float | None] = []
    for group in setting.chosen:
        request = _branch(group)
        angles.append(None if request is None else setting.context.statistics[request].angle)
    known = np.array([angle for angle in angles if angle is not None])
    centre, spread = (known.mean(), known.std()) if len(known) else (0.0, 0.0)
    weights = [
        0.5 if angle is None or not spread else float(1 / (1 + np.exp(-(angle - centre) / spread))) for angle in angles
    ]
    return _in_proportion(setting, weights)


def influence_needs(groups: Groups, chosen: Sequence[Group]) -> Needs:
    """The residual stream before and after each layer."""
    return Needs(frozenset(found for group in chosen if (found := _branch(group)) is not None))


def _branch(group: Group) -> SimilarityOf | None:
    """The residual stream before and after what a group's consumer adds to it."""
    for each in consumers(group):
        value: ir.Value = each.contraction.node.outputs[0]
        for _ in range(8):
            uses = [use.node for use in value.uses()]
            if len(uses) != 1 or not uses[0].outputs:
                break
            node = uses[0]
            others = [v for v in node.inputs if v is not None and v is not value and edit.tensor(v) is None]
            if edit.is_op(node, "Add") and others:
                return SimilarityOf(others[0].name or "", node.outputs[0].name or "")
            if others:
                break
            value = node.outputs[0]
    return None
