"""The keep algebra: which indices of which axis survive, as a function of the axis trees.

``keep(product) = outer product of the digits' keeps``, ``keep(sum) = concatenation of the parts'``. A *ragged*
leaf keeps other indices in each block, equally many: then blocks are gathered one by one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from graphc.axes.algebra import Axis, Kind, find, leaves
from graphc.axes.size import Size

if TYPE_CHECKING:
    from graphc.axes.groups import Group, Groups

Array = np.ndarray[Any, np.dtype[Any]]
Masks = Mapping[str, Array]
Assignment = dict[Axis, int]


def problems(groups: Groups, keep: Masks) -> list[str]:
    """Why these masks are not allowed: unknown names, wrong shapes, unequal blocks, too few units; [] if they are."""
    found = []
    for name, mask in keep.items():
        if name not in groups:
            found.append(f"there is no group '{name}'")
            continue
        group = groups[name]
        array = np.asarray(mask)
        shapes = [(group.size,), *([(*group.blocks, group.size)] if group.blocks else [])]
        if array.dtype != np.bool_:
            found.append(f"the mask of '{name}' has dtype {array.dtype}, not bool")
        elif array.shape not in shapes:
            allowed = " or ".join(map(str, shapes))
            found.append(f"the mask of '{name}' has shape {array.shape}, not {allowed}")
        else:
            found += _counts(groups, group, array, keep)
    return found


def _counts(groups: Groups, group: Group, mask: Array, keep: Masks) -> list[str]:
    if mask.ndim > 1:
        counts = mask.sum(axis=-1)
        alive = np.ones(group.blocks, dtype=bool)
        for axis, name in enumerate(group.block_groups):
            outer = np.asarray(keep[name]) if name in keep else None
            if outer is not None and outer.shape == (group.blocks[axis],):
                alive &= outer.reshape([-1 if i == axis else 1 for i in range(len(group.blocks))])
        present = np.unique(counts[alive])
        if len(present) > 1:
            return [f"the blocks of '{group.name}' keep unequally many: {present.tolist()}"]
        count = int(present[0]) if len(present) else 0
    else:
        count = int(mask.sum())
    if mask.ndim == 1 and any(not mask[sorted(units)].any() for units in group.subsets):
        return [f"'{group.name}' would leave an axis of single positions empty"]
    if count < group.min_keep:
        return [f"'{group.name}' would keep {count} of {group.size}, at least {group.min_keep} must remain"]
    if count < group.size and count % group.multiple_of:
        return [f"'{group.name}' would keep {count}, which is no multiple of {group.multiple_of}"]
    return []


@dataclass
class Selection:
    """Masks by leaf.

    Attributes:
        flat: Which indices of a leaf survive.
        ragged: The leaves whose units are the blocks of a leaf, and which indices survive in each block.
        units: Whether a single position survives.
    """

    flat: dict[Axis, Array] = field(default_factory=dict)
    ragged: dict[Axis, tuple[tuple[Axis, ...], Array]] = field(default_factory=dict)
    units: dict[Axis, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, groups: Groups, keep: Masks) -> Selection:
        """The leaves of masks that ``problems`` finds nothing wrong with."""
        made = cls()
        for name, mask in keep.items():
            group, array = groups[name], np.asarray(mask)
            if array.all():
                continue
            if group.numbers is not None:
                made.units |= {unit: bool(array[number]) for unit, number in group.numbers.items()}
            elif array.ndim == 1:
                made.flat[group.leaf] = array
            else:
                rows = array.reshape(-1, group.size)
                alive = rows[rows.any(axis=1)]
                if (alive == alive[0]).all():
                    made.flat[group.leaf] = alive[0]
                else:
                    made.ragged[group.leaf] = (group.outer, array)
        return made

    def touches(self, axis: Axis) -> bool:
        """Whether an axis loses indices."""
        return any(leaf in self.flat or leaf in self.ragged or not self.units.get(leaf, True) for leaf in leaves(axis))

    def size(self, axis: Axis) -> Size:
        """How many indices of an axis survive."""
        node = find(axis)
        if node.kind is Kind.LEAF:
            if node in self.flat:
                return int(self.flat[node].sum())
            if node in self.ragged:
                return int(self.ragged[node][1].sum(axis=-1).max())
            return node.size if self.units.get(node, True) else 0
        result: Size = 0 if node.kind is Kind.SUM else 1
        for part in node.parts:
            size = self.size(part)
            result = result + size if node.kind is Kind.SUM else result * size
        return result

    def mask(self, axis: Axis) -> Array:
        """Which positions of an axis survive; for ragged leaves all their blocks must lie on this axis."""
        wanted = self._outer([axis])
        if not wanted:
            return self._mask(axis, {})
        total: Array = np.zeros(int(find(axis).size), dtype=bool)  # type: ignore[arg-type]
        for assignment in self._assignments(wanted):
            total |= self._mask(axis, assignment, local=True)
        return total

    def take(self, axes: Sequence[Axis], array: Array) -> Array:
        """What survives of a constant with these axes."""
        across = self._across(axes)
        if not across:
            for i, axis in enumerate(axes):
                if self.touches(axis):
                    array = np.compress(self.mask(axis), array, axis=i)
            return array
        shape = [int(self.size(axis)) for axis in axes]  # type: ignore[arg-type]
        result = np.empty(shape, dtype=array.dtype)
        for source, target in self._blocks(axes, across):
            result[np.ix_(*target)] = array[np.ix_(*source)]
        return result

    def dead(self, axes: Sequence[Axis], array: Array, only: Iterable[Axis] | None = None) -> Array:
        """A copy of a constant with zeros at what does not survive along ``only`` these axes (default all)."""
        chosen = list(axes) if only is None else list(only)
        across = self._across(axes)
        if not across:
            array = array.copy()
            for i, axis in enumerate(axes):
                if axis in chosen and self.touches(axis):
                    index: list[Any] = [slice(None)] * array.ndim
                    index[i] = ~self.mask(axis)
                    array[tuple(index)] = 0
            return array
        result = np.zeros_like(array)
        for source, _ in self._blocks(axes, across):
            result[np.ix_(*source)] = array[np.ix_(*source)]
        return result

    def _outer(self, axes: Iterable[Axis]) -> list[Axis]:
        """The leaves whose units are the blocks of ragged leaves on these axes."""
        return list(
            dict.fromkeys(
                outer for axis in axes for leaf in leaves(axis) if leaf in self.ragged for outer in self.ragged[leaf][0]
            )
        )

    def _across(self, axes: Sequence[Axis]) -> list[Axis]:
        """Block leaves that lie on another axis than the ragged leaf; [] if there are none."""
        for axis in axes:
            own = set(leaves(axis))
            if any(outer not in own for outer in self._outer([axis])):
                return self._outer(axes)
        return []

    def _assignments(self, wanted: Sequence[Axis]) -> Iterator[Assignment]:
        alive = [
            np.flatnonzero(self.flat[leaf]) if leaf in self.flat else np.arange(int(leaf.size))  # type: ignore[arg-type]
            for leaf in wanted
        ]
        for units in itertools.product(*(a.tolist() for a in alive)):
            yield dict(zip(wanted, units, strict=True))

    def _blocks(self, axes: Sequence[Axis], wanted: Sequence[Axis]) -> Iterator[tuple[list[Array], list[Array]]]:
        """Positions before and after, block by block."""
        union = []
        for axis in axes:
            own = set(leaves(axis))
            moving = [leaf for leaf in wanted if leaf in own]
            total: Array | None = None
            if moving:
                total = np.zeros(int(find(axis).size), dtype=bool)  # type: ignore[arg-type]
                for assignment in self._assignments(wanted):
                    total |= self._mask(axis, assignment)
            union.append(total)
        for assignment in self._assignments(wanted):
            source, target = [], []
            for axis, total in zip(axes, union, strict=True):
                positions = np.flatnonzero(self._mask(axis, assignment))
                source.append(positions)
                target.append(np.arange(len(positions)) if total is None else np.cumsum(total)[positions] - 1)
            yield source, target

    def _mask(self, axis: Axis, assignment: Assignment, *, local: bool = False) -> Array:
        """The positions of an axis that survive in one block; with ``local``, only where it has a ragged leaf."""
        node = find(axis)
        if local and assignment and not any(leaf in self.ragged for leaf in leaves(node)):
            assignment = {}
        if node.kind is Kind.LEAF:
            if node in self.units:
                return np.array([self.units[node]])
            assert isinstance(node.size, int)
            if node in self.ragged:
                outer, array = self.ragged[node]
                mask: Array = array[tuple(assignment[o] for o in outer)]
            else:
                mask = self.flat.get(node, np.ones(node.size, dtype=bool))
            if node in assignment:
                mask = mask & (np.arange(node.size) == assignment[node])
            return mask
        if node.kind is Kind.SUM:
            return np.concatenate([self._mask(part, assignment, local=local) for part in node.parts])
        masks = [self._mask(part, assignment) for part in node.parts]
        shape = [len(m) for m in masks]
        total = np.ones(math.prod(shape), dtype=bool).reshape(shape)
        for i, m in enumerate(masks):
            total = total & m.reshape([-1 if j == i else 1 for j in range(len(masks))])
        return total.reshape(-1)
