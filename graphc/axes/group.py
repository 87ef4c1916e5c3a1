"""What the analysis says: places, groups of them, and what is fixed."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc.axes.algebra import Axis, Kind, find

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Place:
    """Where a group occurs in a constant.

    Attributes:
        value: The constant: an initializer, or the output of a Constant or ConstantOfShape node.
        axis: Which of its axes.
        reader: The node whose own copy of a shared constant this is; None if all readers are meant.
        role: ``"produces"``: zeros here make the unit zero. ``"consumes"``: zeros here make the reader ignore it.
            ``"carries"``: it is cut along, but its zeros mean nothing (variances, divisors, scales, tables).
        offset, stride, outer: Unit ``u`` lies at ``offset + o * size * stride + u * stride + i`` for ``o < outer``
            and ``i < stride``; of the first occurrence, and meaningless where indices are reordered.
        tree: The axis tree, for the algebra of cuts.
    """

    value: ir.Value
    axis: int
    role: str
    offset: int
    stride: int
    outer: int
    tree: Axis
    reader: ir.Node | None
    _numbers: dict[Axis, int] | None
    _leaf: Axis

    @cached_property
    def units(self) -> Array:
        """The unit of every position along the axis; -1 where it belongs to no unit of this group. Shape (dim,)."""
        return unit_map(self.tree, self._leaf, self._numbers)

    def indices(self, unit: int) -> Array:
        """The positions along the axis that belong to a unit."""
        return np.flatnonzero(self.units == unit)


@dataclass(frozen=True)
class Normaliser:
    """A node that divides by a count along the axis of a group.

    Attributes:
        node: The node.
        kind: ``"mean"`` and ``"rms"`` can be kept exact by a cut; ``"layer"``, ``"group"``, ``"instance"`` and
            ``"batch"`` cannot.
    """

    node: ir.Node
    kind: str


@dataclass(frozen=True, eq=False)
class Group:
    """The places that must keep the same indices.

    Attributes:
        name: First producing initializer, axis, and part of the axis if it has several.
        size: Number of units.
        kind: ``channel``, ``head``, ``head_dim``, ``neuron``, ``width``, ``expert`` or ``rank``.
        places: Where it occurs in constants, in the order of their first use.
        blocks: Not empty where the units are digits inside blocks that may each keep other units, equally many
            ("balanced"): the sizes of the blocks' axes. A mask then has shape ``(size,)`` or ``(*blocks, size)``.
        block_groups: The groups whose units the blocks are; "" where the blocks are fixed.
        params, bytes: Elements and bytes of constants that one unit carries, over all blocks.
        min_keep: How many units must remain.
        multiple_of: What the number of remaining units must be a multiple of.
        constraints: All constraints in words.
        normalisers: Nodes that divide by a count of the units.
        neutral: What a removed unit must have carried where units compete: 0, or -inf for experts.
        exact: Whether a cut of dead units computes the same.
        reads: Activations at which the unit itself must be zero, because no weight of the reader masks it.
    """

    name: str
    size: int
    kind: str
    places: tuple[Place, ...]
    blocks: tuple[int, ...] = ()
    block_groups: tuple[str, ...] = ()
    params: int = 0
    bytes: int = 0
    min_keep: int = 1
    multiple_of: int = 1
    constraints: tuple[str, ...] = ()
    normalisers: tuple[Normaliser, ...] = ()
    neutral: float = 0.0
    exact: bool = True
    reads: tuple[ir.Value, ...] = ()
    leaf: Axis = field(repr=False, default_factory=lambda: Axis(0))
    outer: tuple[Axis, ...] = field(repr=False, default=())
    numbers: dict[Axis, int] | None = field(repr=False, default=None)
    subsets: tuple[frozenset[int], ...] = field(repr=False, default=())


@dataclass(frozen=True)
class Fixed:
    """A part of an axis of a constant that cannot be cut.

    Attributes:
        value, axis: The constant and its axis.
        size: Number of indices.
        reason: Why, in plain words.
        node: The node that says so; "" for the model's interface.
    """

    value: ir.Value
    axis: int
    size: int
    reason: str
    node: str


def unit_map(tree: Axis, leaf: Axis, numbers: dict[Axis, int] | None) -> Array:
    """The index along ``leaf`` of every position of an axis, -1 where the position has none.

    Args:
        tree: The axis, of static size.
        leaf: A leaf of it.
        numbers: For a leaf with index ties, the unit of each of its single positions.
    """
    node = find(tree)
    assert isinstance(node.size, int)
    if node.kind is Kind.LEAF:
        if numbers is not None:
            return np.full(node.size, numbers.get(node, -1), dtype=np.int64)
        return np.arange(node.size) if node is leaf else np.full(node.size, -1)
    if node.kind is Kind.SUM:
        return np.concatenate([unit_map(part, leaf, numbers) for part in node.parts])
    result = np.zeros(1, dtype=np.int64) - 1
    for part in node.parts:
        own = unit_map(part, leaf, numbers)
        result = np.maximum(np.repeat(result, len(own)), np.tile(own, len(result)))
    return result
