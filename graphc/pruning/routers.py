"""Criteria for experts: what a router gives them, and which of them its rows can hardly tell apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes.algebra import leaves
from graphc.axes.groups import Group, Groups
from graphc.contract import Context, Needs
from graphc.edit import Array
from graphc.stats import RoutingOf

NO_ROUTER = "no TopK chooses among the units: it is no group of experts"


def choice(groups: Groups, group: Group) -> ir.Node | None:
    """The TopK that chooses among the units of a group."""
    own = {group.leaf, *(group.numbers or ())}
    for fact in groups.trace.facts:
        node = fact.source
        if fact.what == "^" and edit.is_op(node, "TopK") and not own.isdisjoint(leaves(fact.axis)):
            return node
    return None


def routing(groups: Groups, group: Group) -> RoutingOf | None:
    """The request for what the router of a group of experts does; None where no TopK chooses among its units."""
    node = choice(groups, group)
    return None if node is None else RoutingOf(node.outputs[1].name or "", group.size, _weights(node))


def _weights(node: ir.Node) -> str:
    """The value with the weights of the chosen: after a softmax over them, or before the choice; "" if neither is."""
    softmaxed = [use.node for use in node.outputs[0].uses() if edit.is_op(use.node, "Softmax")]
    if softmaxed:
        return softmaxed[0].outputs[0].name or ""
    scores = node.inputs[0]
    while scores is not None and edit.is_op(scores.producer(), "Cast", "Identity", "Add"):
        producer = scores.producer()
        assert producer is not None
        scores = producer.inputs[0]
    positive = scores is not None and edit.is_op(scores.producer(), "Softmax", "Sigmoid")
    return (node.outputs[0].name or "") if positive else ""


def needs(groups: Groups, chosen: Sequence[Group]) -> Needs:
    """What the routers of all groups do."""
    return Needs(frozenset(found for group in chosen if (found := routing(groups, group)) is not None))


def _statistic(name: str) -> Callable[[Groups, Group, Context], Array | str]:
    def score(groups: Groups, group: Group, context: Context) -> Array | str:
        request = routing(groups, group)
        if request is None:
            return NO_ROUTER
        return np.asarray(getattr(context.statistics[request], name))

    return score


frequency = _statistic("chosen")
mass = _statistic("mass")


def distance(groups: Groups, group: Group, context: Context) -> Array | str:
    """How far an expert's row of the router is from the nearest other one (STUN): of two alike, the later goes."""
    for place in group.places:
        held = edit.tensor(place.value)
        if place.role == "produces" and held is not None and len(held.shape) == 2 and not group.blocks:
            rows = np.moveaxis(held.numpy().astype(np.float64), place.axis, 0)[: group.size]
            apart = np.linalg.norm(rows[:, None] - rows[None], axis=2)
            # The first of a pair is told apart by the earlier ones only.
            apart[np.triu_indices(group.size)] = np.inf
            nearest = apart.min(axis=1)
            nearest[0] = nearest[1:].max(initial=0.0) + 1
            return np.asarray(nearest)
    return NO_ROUTER
