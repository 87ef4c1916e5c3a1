"""Sites: the places where the axis of a group vanishes, because it is summed, averaged or compared along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from graphc import edit
from graphc.axes.algebra import Axis, leaves
from graphc.axes.groups import Group, Groups, unit_map
from graphc.edit import Array

RECURRENT = ("LSTM", "GRU", "RNN")


@dataclass(frozen=True)
class Site:
    """A place where a group's axis vanishes.

    Attributes:
        node: The operator.
        operand: Its input that has the axis.
        axis: The operand's axis; -1 where the group runs through several and it is not clear which one is meant.
        what: ``"summed"``: contracted. ``"~"``: averaged. ``"^"``: compared along the axis.
    """

    node: ir.Node
    operand: ir.Value
    axis: int
    what: str


PICKING = frozenset(
    ["Slice", "Split", "SplitToSequence", "Gather", "GatherND", "GatherElements", "Shape", "Size", "SequenceAt"]
)
"""Operators behind which an axis may vanish because nobody reads its indices any more."""


class Sites:
    """All sites of a model's groups, by group."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self._trace = groups.trace
        self._owner = {leaf: group.name for group in groups for leaf in (group.leaf, *(group.numbers or ()))}
        self._by_group: dict[str, list[Site]] = {group.name: [] for group in groups}
        for fact in self._trace.facts:
            if fact.what not in ("summed", "~", "^") or fact.source is None or fact.operand is None:
                continue
            if fact.what != "summed" or fact.source.op_type not in PICKING:
                for name in self._groups_of(fact.axis):
                    at = self._position(fact.source, fact.operand, fact.axis, groups[name])
                    self._by_group[name].append(Site(fact.source, fact.operand, at, fact.what))
        seen = {(site.node, name) for name, sites in self._by_group.items() for site in sites}
        for node in groups.model.graph:
            if edit.is_op(node, *RECURRENT):
                self._feedback(node)
            elif node.op_type not in PICKING:
                self._vanishing(node, seen)

    def of(self, group: Group) -> list[Site]:
        """Where the units of a group are read together."""
        return self._by_group[group.name]

    def indices(self, site: Site, leaf: Axis, ties: Mapping[Axis, int] | None = None) -> list[Array | None]:
        """For each axis of a site's operand, the index along ``leaf`` of every position, -1 for none.

        Args:
            site: A site.
            leaf: A group's leaf, or that of one of its blocks.
            ties: ``Group.numbers`` of a leaf with index ties.

        Returns:
            None for axes that do not run through the leaf.
        """
        result: list[Array | None] = []
        for axis in self._trace.at(site.operand, site.node) or ():
            found = isinstance(axis.size, int) and any(x is leaf or x in (ties or {}) for x in leaves(axis))
            result.append(unit_map(axis, leaf, dict(ties) if ties else None) if found else None)
        return result

    def _groups_of(self, axis: Axis) -> set[str]:
        return {self._owner[leaf] for leaf in leaves(axis) if leaf in self._owner}

    def _position(self, node: ir.Node, operand: ir.Value, wanted: Axis, group: Group) -> int:
        """Which axis of an operand a fact is about."""
        axes = self._trace.at(operand, node) or ()
        through = [i for i, axis in enumerate(axes) if group.name in self._groups_of(axis)]
        if len(through) == 1:
            return through[0]
        same = [i for i in through if axes[i] is wanted]
        return same[0] if len(same) == 1 else -1

    def _feedback(self, node: ir.Node) -> None:
        """The state of a recurrent layer is fed back: it meets the columns of R in every step."""
        weight = node.inputs[2]
        axes = (self._trace.at(weight, node) if weight is not None else None) or ()
        for name in self._groups_of(axes[-1]) if axes else ():
            assert weight is not None
            self._by_group[name].append(Site(node, weight, len(axes) - 1, "summed"))

    def _vanishing(self, node: ir.Node, seen: set[tuple[ir.Node, str]]) -> None:
        """Groups that no output of a node has, although its rule did not say what it does to them."""
        kept = {
            name for out in node.outputs for axis in self._trace.axes.get(out) or () for name in self._groups_of(axis)
        }
        for operand in node.inputs:
            if operand is None:
                continue
            for i, axis in enumerate(self._trace.at(operand, node) or ()):
                for name in self._groups_of(axis) - kept:
                    if (node, name) not in seen:
                        self._by_group[name].append(Site(node, operand, i, "summed"))
