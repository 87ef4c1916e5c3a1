"""Layouts: which leaf sizes the axes of a value are made of, followed through views, copies and choices.

Heads are split and merged in many ways: ``b s (h d) -> b h s d`` may be two reshapes, three transposes and a batch that
is multiplied by the heads. Here every axis is a row of *leaves*, outer first, and a view only arranges them anew. A
reshape refines leaves in place, so that everyone who holds one sees its parts. Sizes of 1 have no leaf.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import onnx_ir as ir

from graphc import edit
from graphc.moves import RESHAPES
from graphc.recognition.graph import Graph
from graphc.shapes import Shape
from graphc.shapes.symbolic import Dim, exact_quotient, product
from graphc.simplification.chains import target


class Leaf:
    """A part of an axis that no view has split so far."""

    __slots__ = ("parts", "size")

    def __init__(self, size: Dim) -> None:
        self.size = size
        self.parts: tuple[Leaf, ...] = ()

    def __repr__(self) -> str:
        return f"({' '.join(map(repr, self.parts))})" if self.parts else str(self.size)


Axis = tuple[Leaf, ...]
Axes = tuple[Axis, ...]


def resolve(axis: Iterable[Leaf]) -> Axis:
    """The leaves of an axis as they are now."""
    return tuple(part for leaf in axis for part in (resolve(leaf.parts) if leaf.parts else (leaf,)))


def settled(axes: Axes) -> Axes:
    """All axes, resolved."""
    return tuple(resolve(axis) for axis in axes)


def fresh(size: Dim) -> Axis:
    """An axis of its own of this size."""
    return () if size == 1 else (Leaf(size),)


def size(axis: Axis) -> Dim:
    """The number of indices of an axis."""
    return product(tuple(leaf.size for leaf in resolve(axis)))


def sizes(axes: Axes) -> Shape:
    """The shape that axes have."""
    return tuple(size(axis) for axis in axes)


def regroup(axes: Axes, dims: Shape) -> Axes | None:
    """The axes after a reshape to ``dims``; None if the dims are no products of leaves or parts of them."""
    queue = list(resolve(leaf for axis in axes for leaf in axis))
    result: list[Axis] = []
    for dim in dims:
        rest, group = dim, []
        while rest != 1:
            if not queue:
                return None
            leaf = queue.pop(0)
            quotient = exact_quotient(rest, leaf.size)
            if quotient is not None:
                group.append(leaf)
                rest = quotient
                continue
            inner = exact_quotient(leaf.size, rest)
            if inner is None:
                return None
            leaf.parts = (Leaf(rest), Leaf(inner))
            group.append(leaf.parts[0])
            queue.insert(0, leaf.parts[1])
            rest = 1
        result.append(tuple(group))
    return None if queue else tuple(result)


def moved(node: ir.Node, axes: Axes, graph: Graph) -> Axes | None:
    """The axes of the output of a view or a transpose, from those of its input."""
    if edit.is_op(node, "Transpose"):
        perm = edit.attribute(node, "perm") or tuple(reversed(range(len(axes))))
        return tuple(axes[i] for i in perm) if len(perm) == len(axes) else None
    if edit.is_op(node, *RESHAPES):
        dims = graph.dims(node.outputs[0])
        return None if dims is None else regroup(axes, dims)
    return axes if edit.is_op(node, "Identity") else None


@dataclass(frozen=True)
class Place:
    """A value on the way back from another one, and how that one is made from it.

    Attributes:
        value: The value.
        axes: Its axes.
        factor: The numbers that it is multiplied by on the way.
        copied: Leaves of the last value along which this one is repeated.
        picked: Leaves of this value of which one index is taken.
        turns: How many transposes lie on the way.
    """

    value: ir.Value
    axes: Axes
    factor: float = 1.0
    copied: frozenset[Leaf] = frozenset()
    picked: Mapping[Leaf, int] = field(default_factory=dict)
    turns: int = 0

    def copies(self) -> frozenset[Leaf]:
        return frozenset(resolve(self.copied))

    def picks(self) -> dict[Leaf, int]:
        return {leaf: index for leaf, index in self.picked.items() if not leaf.parts}


def trace(value: ir.Value, axes: Axes, graph: Graph) -> Iterator[Place]:
    """The value itself, then what it is a view, a copy, a part or a multiple of, on and on."""
    place: Place | None = Place(value, axes)
    while place is not None:
        yield place
        place = _behind(place, graph)


def _behind(place: Place, graph: Graph) -> Place | None:
    node = place.value.producer()
    if node is None or node.domain not in ("", "ai.onnx") or not node.inputs or node.inputs[0] is None:
        return None
    source = node.inputs[0]
    axes = settled(place.axes)
    factor, copied, picked, turns = place.factor, place.copied, dict(place.picked), place.turns
    dims = graph.dims(source)
    before: Axes | None = None
    if node.op_type in ("Mul", "Div"):
        for number, other in ((node.inputs[1], source), (source, node.inputs[1])):
            held = edit.scalar(number)
            if held is None or other is None or graph.dims(other) != graph.dims(place.value):
                continue
            if node.op_type == "Div" and (number is source or held == 0):
                continue
            factor *= float(held) if node.op_type == "Mul" else 1 / float(held)
            return Place(other, axes, factor, copied, picked, turns)
        return None
    if dims is None:
        return None
    match node.op_type:
        case "Identity":
            before = axes
        case "Transpose":
            perm = edit.attribute(node, "perm") or tuple(reversed(range(len(axes))))
            before = tuple(axes[perm.index(i)] for i in range(len(axes)))
            turns += 1
        case "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze":
            before = regroup(axes, dims)
        case "Expand":
            before, more = _unexpanded(axes, dims)
            copied |= more
        case "Tile":
            before, more = _untiled(axes, dims, node)
            copied |= more
        case "Gather" | "Split" | "Slice":
            found = _choice(node, place.value, dims, graph)
            if found is None:
                return None
            axis, count, index, kept = found
            leaf = Leaf(count)
            picked[leaf] = index
            before = (*axes[:axis], (leaf, *(axes[axis] if kept else ())), *axes[axis + kept :])
    return None if before is None else Place(source, before, factor, copied, picked, turns)


def _unexpanded(axes: Axes, dims: Shape) -> tuple[Axes | None, frozenset[Leaf]]:
    """The axes in front of an Expand, and the leaves along which it copies."""
    added = len(axes) - len(dims)
    if added < 0:
        return None, frozenset()
    copied = set(resolve(leaf for axis in axes[:added] for leaf in axis))
    before: list[Axis] = []
    for axis, dim in zip(axes[added:], dims, strict=True):
        if dim == size(axis):
            before.append(axis)
        elif dim == 1:
            copied.update(axis)
            before.append(())
        else:
            return None, frozenset()
    return tuple(before), frozenset(copied)


def _untiled(axes: Axes, dims: Shape, node: ir.Node) -> tuple[Axes | None, frozenset[Leaf]]:
    """The axes in front of a Tile, and the leaves along which it copies: the outer part of each axis."""
    repeats = edit.constant(node.inputs[1], len(axes)) if len(node.inputs) > 1 else None
    if repeats is None:
        return None, frozenset()
    copied: set[Leaf] = set()
    before: list[Axis] = []
    for axis, dim, times in zip(axes, dims, repeats.reshape(-1).tolist(), strict=True):
        parts = regroup((axis,), (int(times), dim)) if times > 1 else ((), axis)
        if parts is None:
            return None, frozenset()
        copied.update(resolve(parts[0]))
        before.append(parts[1])
    return tuple(before), frozenset(copied)


def _choice(node: ir.Node, value: ir.Value, dims: Shape, graph: Graph) -> tuple[int, int, int, int] | None:
    """Axis, number of equal parts, and which of them a node takes; whether the axis stays (1) or goes (0)."""
    if node.op_type == "Gather":
        axis = edit.attribute(node, "axis", 0) % len(dims)
        index, held = edit.scalar(node.inputs[1]), edit.tensor(node.inputs[1])
        count = dims[axis]
        if index is None or held is None or len(held.shape) or not isinstance(count, int) or count < 2:
            return None
        return axis, count, int(index) % count, 0
    if node.op_type == "Split":
        axis = edit.attribute(node, "axis", 0) % len(dims)
        parts = [graph.dims(v) for v in node.outputs]
        if any(p is None or p[axis] != parts[0][axis] for p in parts if parts[0] is not None):
            return None
        return axis, len(node.outputs), list(node.outputs).index(value), 1
    axes, starts, steps = (edit.constant(node.inputs[i], 1) if len(node.inputs) > i else None for i in (3, 1, 4))
    if axes is None or starts is None or axes.size != 1 or (steps is not None and int(steps.reshape(-1)[0]) != 1):
        return None
    axis, start = int(axes.reshape(-1)[0]) % len(dims), int(starts.reshape(-1)[0])
    out = graph.dims(value)
    part, whole = None if out is None else out[axis], dims[axis]
    if not isinstance(part, int) or not isinstance(whole, int) or not part or whole % part or part == whole:
        return None
    start += whole if start < 0 else 0
    return None if start % part else (axis, whole // part, start // part, 1)


def reachable(place: Place, wanted: Axes, graph: Graph) -> int | None:
    """How many transposes it takes from a place to axes; None if it is not possible with sizes that can be read.

    Leaves along which the place is copied must not be wanted.
    """
    plan = _plan(place, settled(wanted))
    if plan is None or not all(graph.readable(shape) for _, numbers, shape in plan if numbers is None):
        return None
    return sum(step[0] == "Transpose" for step in plan)


def arrange(place: Place, wanted: Axes, before: ir.Node, graph: Graph) -> ir.Value:
    """The value with these axes, made from a place in front of a node. ``reachable`` must hold."""
    plan = _plan(place, settled(wanted))
    assert plan is not None
    value = place.value
    for operator, numbers, shape in plan:
        if numbers is None:
            value = graph.make(before, operator, [value, graph.sizes(before, shape)], like=value, shape=shape)
        elif operator == "Transpose":
            value = graph.make(before, operator, [value], {"perm": list(numbers)}, like=value, shape=shape)
        elif operator in ("Reshape", "Squeeze", "Unsqueeze"):
            value = graph.make(before, operator, [value, graph.ints(before, numbers)], like=value, shape=shape)
        else:
            start, end, axis = ([n] for n in numbers)
            bounds = [graph.ints(before, part) for part in (start, end, axis)]
            value = graph.make(before, operator, [value, *bounds], like=value, shape=shape)
    return value


_Step = tuple[str, Sequence[int] | None, Shape]
"""An operator, its numbers (None: the sizes of its result, which no constant says), and the shape of its result."""


def _plan(place: Place, wanted: Axes) -> list[_Step] | None:
    """The operators that turn a place into axes: slices of what is picked, a reshape, a transpose, a reshape."""
    steps: list[_Step] = []
    axes = settled(place.axes)
    picks = place.picks()
    for number, axis in enumerate(axes):
        chosen = [leaf for leaf in axis if leaf in picks]
        if not chosen:
            continue
        # Only a picked leaf that is outermost leaves one contiguous part.
        if axis[: len(chosen)] != tuple(chosen):
            return None
        inner, outer = size(axis[len(chosen) :]), 0
        for leaf in chosen:
            if not isinstance(leaf.size, int):
                return None
            outer = outer * leaf.size + picks[leaf]
        if not isinstance(inner, int):
            return None
        axes = (*axes[:number], axis[len(chosen) :], *axes[number + 1 :])
        steps.append(("Slice", (outer * inner, (outer + 1) * inner, number), sizes(axes)))
    if axes == wanted:
        return steps
    have, want = [leaf for axis in axes for leaf in axis], [leaf for axis in wanted for leaf in axis]
    if len(have) != len(want) or set(have) != set(want):
        return None
    if have == want:
        return _reshaped(steps, axes, wanted)
    split = tuple(_atoms(axes, wanted))
    order = sorted(range(len(split)), key=lambda i: want.index(split[i][0]))
    if len(axes) == len(wanted):
        # Axes of size 1 are carried along: a transpose alone may do.
        perm = _permutation(axes, wanted)
        if perm is not None:
            steps.append(("Transpose", perm, sizes(wanted)))
            return steps
    done = _reshaped(steps, axes, split)
    turned = tuple(split[i] for i in order)
    done.append(("Transpose", tuple(order), sizes(turned)))
    return _reshaped(done, turned, wanted)


def _permutation(axes: Axes, wanted: Axes) -> tuple[int, ...] | None:
    left = list(range(len(axes)))
    perm = []
    for axis in wanted:
        found = next((i for i in left if axes[i] == axis), None)
        if found is None:
            return None
        left.remove(found)
        perm.append(found)
    return tuple(perm)


def _reshaped(steps: list[_Step], axes: Axes, wanted: Axes) -> list[_Step]:
    if axes == wanted:
        return steps
    for operator, more, fewer in (("Unsqueeze", wanted, axes), ("Squeeze", axes, wanted)):
        ones = _ones(more, fewer)
        if ones is not None:
            return [*steps, (operator, ones, sizes(wanted))]
    numbers = target(sizes(axes), sizes(wanted), None)
    return [*steps, ("Reshape", None if isinstance(numbers, str) else tuple(numbers), sizes(wanted))]


def _ones(more: Axes, fewer: Axes) -> tuple[int, ...] | None:
    """The axes of size 1 without which ``more`` is ``fewer``."""
    rest, ones = list(fewer), []
    for number, axis in enumerate(more):
        if rest and rest[0] == axis:
            rest.pop(0)
        elif not axis:
            ones.append(number)
        else:
            return None
    return None if rest else tuple(ones)


def _atoms(axes: Axes, wanted: Axes) -> list[Axis]:
    """The longest runs of leaves that lie together in one axis of both."""
    after: dict[Leaf, Leaf] = {}
    for axis in wanted:
        after.update(pairwise(axis))
    atoms: list[Axis] = []
    for axis in axes:
        run: list[Leaf] = []
        for leaf in axis:
            if run and after.get(run[-1]) is not leaf:
                atoms.append(tuple(run))
                run = []
            run.append(leaf)
        if run:
            atoms.append(tuple(run))
    return atoms
