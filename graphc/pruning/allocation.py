"""How many units, and which, to take from each group for a given total: one order, one threshold.

Units are taken in an order (see :mod:`graphc.pruning.density`) until the wanted part of the model's units,
parameters, bytes or FLOPs is gone. What two groups share (a weight between them) is counted once, and shrinks with
both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes.groups import Group, Groups
from graphc.edit import Array
from graphc.moves import VIEWS
from graphc.pruning.weightless import Weightless

Measure = Literal["units", "params", "bytes", "flops"]
Keep = dict[str, Array]
"""By group name: which units stay, boolean, ``(size,)`` or ``(*blocks, size)``."""


@dataclass(frozen=True)
class Limits:
    """What a group must keep.

    Attributes:
        least: Units that stay at least.
        multiple: The number of units that stay is a multiple of this, where the group has that many.
    """

    least: int = 1
    multiple: int = 1

    def kept(self, size: int, wanted: int) -> int:
        """The smallest allowed number of units that is at least ``wanted``."""
        kept = max(wanted, self.least, 1)
        return min(size, math.ceil(kept / self.multiple) * self.multiple)

    def below(self, kept: int) -> int:
        """The largest allowed number of units that is less than ``kept``; 0 for none."""
        less = (kept - 1) // self.multiple * self.multiple
        return less if less >= max(self.least, 1) else 0


class Cost:
    """What a model costs as a function of the units that are kept, in one measure.

    Parameters and bytes are those of all constants; FLOPs those of all operators, at batch and sequence size 1, each in
    proportion to what is left of its weight or, without one, of its axes.

    Args:
        model: The model.
        analysis: Its groups.
        groups: Those that may be cut.
        measure: What is counted. Units are counted over these groups only.
    """

    def __init__(self, model: ir.Model, analysis: Groups, groups: Sequence[Group], measure: Measure) -> None:
        self._groups = {group.name: group for group in groups}
        self._measure = measure
        self._places: dict[ir.Value, dict[int, list[tuple[str, Array]]]] = {}
        for group in groups:
            for place in group.places:
                axes = self._places.setdefault(place.value, {})
                axes.setdefault(place.axis, []).append((group.name, np.asarray(place.units)))
        self._weights = {} if measure == "units" else _weights(model, measure)
        self._weightless: Callable[[Mapping[str, int]], float] = lambda removed: 0.0
        if measure == "flops":
            by_weight, rest = _flops(model)
            self._weights = {value: (shape, by_weight.get(value, 0.0)) for value, (shape, _) in self._weights.items()}
            self._weightless = Weightless(analysis, groups, rest)

    def __call__(self, removed: Mapping[str, int]) -> float:
        """The cost once each group lost so many of its units (any of them: only the number matters)."""
        if self._measure == "units":
            return float(sum(_unit_count(g) - _blocks(g) * removed.get(n, 0) for n, g in self._groups.items()))
        total = self._weightless(removed)
        for value, (shape, weight) in self._weights.items():
            left = weight
            for axis, places in self._places.get(value, {}).items():
                kept = np.ones(shape[axis], dtype=bool)
                for name, units in places:
                    kept &= (units < 0) | (units >= removed.get(name, 0))
                left *= float(np.count_nonzero(kept)) / shape[axis]
            total += left
        return total


def _blocks(group: Group) -> int:
    return int(np.prod(group.blocks, dtype=np.int64))


def _unit_count(group: Group) -> int:
    return group.size * _blocks(group)


def _weights(model: ir.Model, measure: Measure) -> dict[ir.Value, tuple[tuple[int, ...], float]]:
    """Shape and elements, or bytes, of every constant."""
    found: dict[ir.Value, tuple[tuple[int, ...], float]] = {}
    for graph in edit.graphs(model):
        constants = [*graph.initializers.values(), *(out for node in graph for out in node.outputs)]
        for value in constants:
            held = edit.tensor(value)
            if held is None or held.size == 0:
                continue
            cost = held.nbytes if measure == "bytes" else held.size
            found[value] = (tuple(held.shape.numpy()), float(cost))
    return found


def _flops(model: ir.Model) -> tuple[dict[ir.Value, float], dict[ir.Node, int]]:
    """FLOPs of nodes by the largest constant that they compute with, and those of each other node."""
    from graphc import flops

    bound = flops.bind(model)
    counts = {node.outputs[0].name: flops.node_flops(node) for node in edit.nodes(bound) if node.outputs}
    found: dict[ir.Value, float] = {}
    rest: dict[ir.Node, int] = {}
    for node in edit.nodes(model):
        if not node.outputs or not (count := counts.get(node.outputs[0].name, 0)):
            continue
        sources = [s for value in node.inputs if (s := _source(value)) is not None]
        largest = max(sources, key=_size, default=None)
        if largest is not None:
            found[largest] = found.get(largest, 0.0) + count
        else:
            rest[node] = count
    return found, rest


def _size(value: ir.Value) -> int:
    held = edit.tensor(value)
    return 0 if held is None else held.size


def _source(value: ir.Value | None) -> ir.Value | None:
    """The constant that a value is, up to a cast, a dequantization or a transposition."""
    while value is not None and edit.tensor(value) is None:
        node = value.producer()
        if node is None or node.op_type not in ("Cast", "CastLike", "DequantizeLinear", "Transpose", *VIEWS):
            return None
        value = node.inputs[0]
    return value


def unit_costs(groups: Sequence[Group], cost: Callable[[Mapping[str, int]], float]) -> dict[str, float]:
    """What the first unit of each group that goes takes with it."""
    whole = cost({})
    return {group.name: whole - cost({group.name: 1}) for group in groups}


def allocate(
    groups: Sequence[Group],
    levels: Sequence[Array],
    ratio: float,
    cost: Callable[[Mapping[str, int]], float],
    limits: Mapping[str, Limits],
) -> dict[str, int]:
    """Choose how many units each group loses so that ``ratio`` of the cost goes, as far as the limits allow.

    Args:
        groups: The groups to take from.
        levels: For each group, the level of its first, second, ... unit to go, ``(size,)``; the lowest go first.
        ratio: The part of the cost to remove, in [0, 1).
        cost: What the model costs.
        limits: By group name.
    """
    if not groups:
        return {}
    order = np.argsort(np.concatenate(list(levels)), kind="stable")
    owner = np.repeat(np.arange(len(groups)), [g.size for g in groups])[order]

    def removed(count: int) -> dict[str, int]:
        """How many units each group loses when the first ``count`` of the order go, as far as its limits allow."""
        wanted = np.bincount(owner[:count], minlength=len(groups)).tolist()
        return {g.name: g.size - limits[g.name].kept(g.size, g.size - n) for g, n in zip(groups, wanted, strict=True)}

    target = cost({}) * (1 - ratio)
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if cost(removed(middle)) <= target * (1 + 1e-9):
            high = middle
        else:
            low = middle + 1
    chosen = removed(low)
    if low:
        short = removed(low - 1)
        steps = [_step(g, short[g.name], limits[g.name], np.flatnonzero(owner == i)) for i, g in enumerate(groups)]
        for _, name, count in sorted(step for step in steps if step is not None):
            if cost(short | {name: count}) >= target * (1 - 1e-9):
                short[name] = count
        if abs(cost(short) - target) < abs(cost(chosen) - target):
            # One more unit overshoots by more than this falls short.
            chosen = short
    return chosen


def _step(group: Group, removed: int, limits: Limits, turns: Array) -> tuple[int, str, int] | None:
    """The next step of a group that goes in several units at once: when it is complete, whose, how many are gone then.

    Multiples round up what is kept, so that a budget is missed by up to a step of each group.
    """
    kept = limits.below(group.size - removed)
    return (int(turns[group.size - kept - 1]), group.name, group.size - kept) if kept and limits.multiple > 1 else None


def masks(groups: Sequence[Group], scores: Mapping[str, Array], removed: Mapping[str, int]) -> Keep:
    """For every group that loses something, the mask that drops its lowest scores."""
    return {g.name: lowest_removed(scores[g.name], removed[g.name]) for g in groups if removed.get(g.name)}


def lowest_removed(scores: Array, count: int) -> Array:
    """A mask that drops the ``count`` lowest scores along the last axis; of equal ones, the later go first."""
    order = np.argsort(scores[..., ::-1], axis=-1, kind="stable")
    order = scores.shape[-1] - 1 - order
    keep = np.ones(scores.shape, dtype=bool)
    np.put_along_axis(keep, order[..., :count], False, axis=-1)
    return keep
