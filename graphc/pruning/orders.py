"""All ways to spread a budget over groups, in one table."""

from __future__ import annotations

from collections.abc import Sequence

from graphc.axes.groups import Group, Groups
from graphc.contract import Needs
from graphc.pruning import activations, density, search
from graphc.pruning.density import Order


def _samples(groups: Groups, chosen: Sequence[Group]) -> Needs:
    return Needs(calibration=True)


ORDERS: dict[str, Order] = {
    "uniform": Order(density.uniform, "the same part of each group"),
    "global": Order(density.together, "the units with the lowest scores of all groups"),
    "per-cost": Order(density.per_cost, "the units with the lowest scores by what they cost"),
    "erk": Order(density.erk, "layers keep what their sizes call for (Erdos-Renyi kernel)"),
    "owl": Order(density.owl, "layers with more outliers keep more (OWL)", activations.needs),
    "influence": Order(
        density.influence, "layers that turn the residual stream more keep more (CFSP)", density.influence_needs
    ),
    "knapsack": Order(search.knapsack, "the least sum of losses measured group by group", _samples, probes=True),
    "evolution": Order(search.evolution, "the least measured loss that evolution finds", _samples, probes=True),
}
