"""What must be cut together, what cannot be cut, and why: the result of running the rules over a graph.

``analyse`` reads no weights, only shapes and small integer constants, and never changes the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc.axes.algebra import Axis, find, leaves
from graphc.axes.collect import Collector
from graphc.axes.group import Fixed, Group, Normaliser, Place, unit_map
from graphc.axes.trace import Fact, Trace

Array = np.ndarray[Any, np.dtype[Any]]


class Groups:
    """Everything ``analyse`` found.

    Attributes:
        model: The model that was analysed.
        groups: What can be cut, in the order of the first producing constant.
        fixed: What cannot, and why.
    """

    def __init__(self, model: ir.Model, trace: Trace) -> None:
        self.model = model
        self.trace = trace
        collected = Collector(trace)
        collected.run()
        self.groups = collected.groups
        self.fixed = collected.fixed
        self._reasons = collected.reasons
        self._by_name = {group.name: group for group in self.groups}

    def __getitem__(self, name: str) -> Group:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def of(self, value: ir.Value) -> list[tuple[Group, Place]]:
        """The groups that go through a constant, and where."""
        return [(g, p) for g in self.groups for p in g.places if p.value is value]

    def scores(self, group: Group, place: Place, array: Array) -> Array:
        """Sum an array shaped like a place's constant down to the units of a group.

        Args:
            group: The group.
            place: One of its places.
            array: A value for every element of the constant, e.g. its absolute value.

        Returns:
            Shape ``(size,)``, or ``(*blocks, size)`` for a group with blocks.
        """
        labels = self._labels(group, place, array.ndim)
        return _sum_by(array, labels, [*group.blocks, group.size])

    def labels(self, group: Group, place: Place, shape: tuple[int, ...]) -> Array:
        """The unit (its flat index over blocks) of every element of a place's constant; -1 where it has none.

        Args:
            group: The group.
            place: One of its places.
            shape: The constant's.

        Returns:
            An array that broadcasts to ``shape``.
        """
        total: Array = np.zeros((1,) * len(shape), dtype=np.int64)
        valid: Array = np.ones((1,) * len(shape), dtype=bool)
        for axis, label in enumerate(self._labels(group, place, len(shape))):
            if label is not None:
                view = label.reshape([-1 if j == axis else 1 for j in range(len(shape))])
                total = total + view
                valid = valid & (view >= 0)
        return np.where(valid, total, -1)

    def _labels(self, group: Group, place: Place, rank: int) -> list[Array | None]:
        """For each axis of a place's constant, what its indices add to the unit's flat number; None for nothing."""
        wanted = [*zip(group.outer, group.blocks, strict=True), (group.leaf, group.size)]
        labels: list[Array | None] = [None] * rank
        strides = np.cumprod([1, *[size for _, size in wanted[:0:-1]]])[::-1]
        for (leaf, _), stride in zip(wanted, strides, strict=True):
            axis, units = self._along(group, place, leaf)
            term = np.where(units < 0, -1, units * int(stride))
            held = labels[axis]
            labels[axis] = term if held is None else np.where((held < 0) | (term < 0), -1, held + term)
        return labels

    def _along(self, group: Group, place: Place, leaf: Axis) -> tuple[int, Array]:
        if leaf is group.leaf:
            return place.axis, place.units
        shared = None if place.reader is None else self.trace.at(place.value, place.reader)
        axes = shared or self.trace.axes[place.value] or ()
        order = [place.axis, *(i for i in range(len(axes)) if i != place.axis)]
        for axis in order:
            if any(found is leaf for found in leaves(axes[axis])):
                return axis, unit_map(axes[axis], leaf, None)
        raise AssertionError("a block's axis is in every place of its group")

    def explain(self, name: str) -> str:
        """What goes with a group, weight or node, or why it cannot be cut.

        Raises:
            BadInput: Nothing in the model has this name.
        """
        from graphc.axes.explain import explain

        return explain(self, name)

    def reason(self, leaf: Axis) -> Fact | None:
        """Why a leaf cannot be cut, or None if it can."""
        return self._reasons.get(find(leaf))


def _sum_by(array: Array, labels: list[Array | None], shape: list[int]) -> Array:
    """Sum ``array`` into ``shape``: element by element to the flat index that its axes' labels add up to."""
    used = [i for i, label in enumerate(labels) if label is not None]
    others = tuple(i for i in range(array.ndim) if i not in used)
    reduced = array.sum(axis=others) if others else array
    total: Array = np.zeros((), dtype=np.int64)
    valid: Array = np.ones((), dtype=bool)
    for k, i in enumerate(used):
        label = labels[i]
        assert label is not None
        view = label.reshape([-1 if j == k else 1 for j in range(len(used))])
        total = total + np.where(view < 0, 0, view)
        valid = valid & (view >= 0)
    total, valid = np.broadcast_to(total, reduced.shape), np.broadcast_to(valid, reduced.shape)
    flat = np.bincount(total[valid], weights=reduced[valid].astype(np.float64), minlength=math.prod(shape))
    return flat.reshape(shape)


def analyse(model: ir.Model, *, interface: bool = False) -> Groups:
    """Find what must be cut together.

    Args:
        model: Any model; it is not changed, and its weights are not read.
        interface: Whether static axes of graph inputs and outputs may be cut too.
    """
    return Groups(model, Trace(model, interface=interface))


__all__ = ["Fixed", "Group", "Groups", "Normaliser", "Place", "analyse", "unit_map"]
