"""FLOPs of operators without a weight, such as attention's products: how they fall when groups lose units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from graphc.axes.algebra import Axis, Kind, find
from graphc.axes.groups import Group, Groups


class Weightless:
    """The FLOPs of nodes in proportion to what is left of the axes of what they compute with.

    Args:
        groups: All groups of the model.
        chosen: Those that may be cut.
        counts: The FLOPs of each node while nothing is cut.
    """

    def __init__(self, groups: Groups, chosen: Sequence[Group], counts: Mapping[ir.Node, int]) -> None:
        # Positions that are tied one by one have no axis of their own that could be followed.
        self._leaves = {group.name: (find(group.leaf), group.size) for group in chosen if group.numbers is None}
        known = {leaf for leaf, _ in self._leaves.values()}
        self._fixed = 0.0
        self._nodes: list[tuple[float, list[Axis]]] = []
        for node, count in counts.items():
            axes = [axis for axis in _axes(groups, node) if _holds(axis, known)]
            if axes:
                self._nodes.append((float(count), axes))
            else:
                self._fixed += count

    def __call__(self, removed: Mapping[str, int]) -> float:
        """FLOPs once each group lost so many of its units."""
        left = {leaf: 1 - removed.get(name, 0) / size for name, (leaf, size) in self._leaves.items()}
        return self._fixed + sum(count * math.prod(_left(axis, left) for axis in axes) for count, axes in self._nodes)


def _axes(groups: Groups, node: ir.Node) -> list[Axis]:
    """The axes over which a node loops: those of its output, and of a product the one that it sums over."""
    axes = groups.trace.axes
    first = node.inputs[0]
    read = (axes.get(first) or ()) if first is not None else ()
    if node.op_type == "Attention":
        return list(read)
    return [*(axes.get(node.outputs[0]) or ()), *(read[-1:] if node.op_type == "MatMul" else ())]


def _holds(axis: Axis, leaves: set[Axis]) -> bool:
    axis = find(axis)
    return axis in leaves or (axis.kind is not Kind.LEAF and any(_holds(part, leaves) for part in axis.parts))


def _left(axis: Axis, left: Mapping[Axis, float]) -> float:
    """The part of an axis that is left, given that of leaves."""
    axis = find(axis)
    if axis in left:
        return left[axis]
    if axis.kind is Kind.PROD:
        return math.prod(_left(part, left) for part in axis.parts)
    sizes = [part.size for part in axis.parts]
    if axis.kind is Kind.SUM and all(isinstance(size, int) for size in sizes):
        whole = [float(size) for size in sizes if isinstance(size, int)]
        return sum(size * _left(part, left) for size, part in zip(whole, axis.parts, strict=True)) / max(sum(whole), 1)
    return 1.0
