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


class Sites:
    """All sites of a model's groups, by group."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        key = {leaf: group.name for group in groups for leaf in (group.leaf, *(group.numbers or ()))}
        self._by_group: dict[str, list[Site]] = {group.name: [] for group in groups}
        for fact in groups.trace.facts:
            if fact.what == "fixed" or fact.source is None or fact.operand is None:
                continue
            for name in {key[leaf] for leaf in leaves(fact.axis) if leaf in key}:
                at = self._position(fact.operand, fact.axis, groups[name])
                self._by_group[name].append(Site(fact.source, fact.operand, at, fact.what))
        for node in groups.model.graph:
            # The state is fed back: it meets the columns of R in every step.
            if edit.is_op(node, *RECURRENT) and node.inputs[2] is not None:
                axes = groups.trace.axes.get(node.inputs[2]) or ()
                for name in {key[leaf] for leaf in leaves(axes[-1]) if leaf in key} if axes else ():
                    self._by_group[name].append(Site(node, node.inputs[2], len(axes) - 1, "summed"))

    def _position(self, operand: ir.Value, wanted: Axis, group: Group) -> int:
        """Which axis of an operand a fact is about."""
        axes = self.groups.trace.axes.get(operand) or ()
        same = [i for i, axis in enumerate(axes) if axis is wanted]
        ties = group.numbers or {}
        through = [i for i, axis in enumerate(axes) if any(x is group.leaf or x in ties for x in leaves(axis))]
        if len(through) == 1:
            return through[0]
        return same[0] if len(same) == 1 else -1

    def of(self, group: Group) -> list[Site]:
        """Where the units of a group are read together."""
        return self._by_group[group.name]

    def indices(self, value: ir.Value, leaf: Axis, ties: Mapping[Axis, int] | None = None) -> list[Array | None]:
        """For each axis of a value, the index along ``leaf`` of every position, -1 for none; None for other axes.

        Args:
            value: Any value of the model.
            leaf: A group's leaf, or that of one of its blocks.
            ties: ``Group.numbers`` of a leaf with index ties.
        """
        result: list[Array | None] = []
        for axis in self.groups.trace.axes[value] or ():
            found = isinstance(axis.size, int) and any(x is leaf or x in (ties or {}) for x in leaves(axis))
            result.append(unit_map(axis, leaf, dict(ties) if ties else None) if found else None)
        return result
