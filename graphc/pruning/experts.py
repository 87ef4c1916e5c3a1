"""Experts: which ones a router can hardly tell apart, what stands for them, and neurons in their own order.

STUN (2024) clusters the rows of a router by complete linkage: two clusters merge while all of their pairs are near. A
cluster is then one expert, the one nearest to the mean of the members' weights, or that mean itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes import cut
from graphc.axes.groups import Group, Groups, Place
from graphc.contract import Context
from graphc.edit import Array
from graphc.moves import VIEWS
from graphc.pruning.routers import NO_ROUTER, choice

EXPERT = "expert"


def rows(group: Group) -> Array | None:
    """The router's row of each expert, ``(experts, width)``, float64; None where there is no such weight."""
    for place in group.places:
        held = edit.tensor(place.value)
        if place.role == "produces" and held is not None and len(held.shape) == 2 and not group.blocks:
            return np.moveaxis(held.numpy().astype(np.float64), place.axis, 0)[: group.size]
    return None


def links(distances: Array) -> Iterator[tuple[float, list[int], list[int]]]:
    """Complete-linkage agglomeration: the height and both clusters of each merge, until one cluster is left.

    Args:
        distances: ``(n, n)``, symmetric.
    """
    clusters = [[i] for i in range(len(distances))]
    between = distances.astype(np.float64).copy()
    np.fill_diagonal(between, np.inf)
    while len(clusters) > 1:
        a, b = divmod(int(between.argmin()), len(clusters))
        a, b = min(a, b), max(a, b)
        yield float(between[a, b]), clusters[a], clusters[b]
        farthest = np.maximum(between[a], between[b])
        between[a], between[:, a] = farthest, farthest
        between[a, a] = np.inf
        between = np.delete(np.delete(between, b, axis=0), b, axis=1)
        clusters[a] = clusters[a] + clusters[b]
        del clusters[b]


def stun(groups: Groups, group: Group, context: Context) -> Array | str:
    """The height at which an expert's cluster is taken over by another one's representative.

    Of two clusters that merge, the representative stays that is nearer to the mean of all members' weights.
    """
    router = rows(group)
    if router is None:
        return NO_ROUTER
    apart = np.linalg.norm(router[:, None] - router[None], axis=2)
    near = _products(group)
    scores = np.full(group.size, np.inf)
    represents = list(range(group.size))
    for height, a, b in links(apart):
        members = [*a, *b]
        one, other = represents[a[0]], represents[b[0]]
        # |w_i - mean|^2 up to what is the same for all members.
        off = [near[i, i] - 2 * near[i, members].mean() for i in (one, other)]
        stays, goes = (one, other) if off[0] <= off[1] else (other, one)
        scores[goes] = height
        represents[a[0]] = represents[b[0]] = stays
    finite = scores[np.isfinite(scores)]
    return np.where(np.isfinite(scores), scores, 2 * finite.max(initial=1.0))


def _products(group: Group) -> Array:
    """Inner products of all weights of each pair of experts."""
    total = np.zeros((group.size, group.size))
    for place in _held(group):
        held = edit.tensor(place.value)
        assert held is not None
        flat = _by_unit(held.numpy(), group, place).astype(np.float32)
        total += (flat @ flat.T).astype(np.float64)
        edit.release(held)
    return total


def _held(group: Group) -> list[Place]:
    """Where the experts' numbers are: each constant once."""
    found: dict[tuple[ir.Value, ir.Node | None], Place] = {}
    for place in group.places:
        held = edit.tensor(place.value)
        if held is not None and held.dtype.is_floating_point():
            found.setdefault((place.value, place.reader), place)
    return list(found.values())


def _by_unit(array: Array, group: Group, place: Place) -> Array:
    """A constant's elements by unit, ``(size, ...)`` flat."""
    order = np.concatenate([place.indices(unit) for unit in range(group.size)])
    return np.asarray(np.moveaxis(array, place.axis, 0)[order].reshape(group.size, -1))


def merged(groups: Groups, group: Group, keep: Array) -> str:
    """Let every expert that stays be the mean of itself and of those that go and are nearest to it, router rows too.

    Returns:
        Why it cannot be done; nothing then changed.
    """
    router = rows(group)
    if router is None or keep.ndim != 1:
        return NO_ROUTER
    apart = np.linalg.norm(router[:, None] - router[None], axis=2)
    kept = np.flatnonzero(keep)
    owner = np.where(keep, np.arange(group.size), kept[apart[:, kept].argmin(axis=1)])
    names = edit.Names(groups.model)
    for place in _held(group):
        held = edit.tensor(place.value)
        assert held is not None
        change = partial(_averaged, held, group, place, owner)
        lazy = ir.LazyTensor(change, dtype=held.dtype, shape=ir.Shape(held.shape.numpy()), name=held.name, cache=False)
        cut.write(place.value, lazy, reader=place.reader, names=names)
    return ""


def _averaged(held: ir.TensorProtocol, group: Group, place: Place, owner: Array) -> ir.TensorProtocol:
    array = np.moveaxis(np.array(held.numpy()), place.axis, 0)
    positions = [place.indices(unit) for unit in range(group.size)]
    for unit in np.unique(owner):
        members = np.flatnonzero(owner == unit)
        if len(members) > 1:
            mean = np.mean([array[positions[m]].astype(np.float64) for m in members], axis=0)
            array[positions[unit]] = mean.astype(array.dtype)
    edit.release(held)
    return ir.Tensor(np.ascontiguousarray(np.moveaxis(array, 0, place.axis)), dtype=held.dtype, name=held.name)


def shares_out(groups: Groups, group: Group) -> bool:
    """Whether the weights of the chosen experts are brought to a sum of 1, so that an expert nobody chose changes none.

    A softmax over all experts before the choice, with nothing after it, gives what is removed to all others.
    """
    node = choice(groups, group)
    if node is None:
        return True
    todo, seen = [node.outputs[0]], 0
    while todo and seen < 32:
        value = todo.pop()
        seen += 1
        for use in value.uses():
            if edit.is_op(use.node, "Softmax") or (edit.is_op(use.node, "Div") and use.idx == 0):
                return True
            if edit.is_op(use.node, "Cast", *VIEWS):
                todo.append(use.node.outputs[0])
    return False


@dataclass(frozen=True)
class Nested:
    """Neurons inside of stacked experts: each expert may have them in an order of its own.

    Attributes:
        group: The neurons.
        experts: The number of experts.
        places: Where the neurons are, with the axis of the experts in the same constant.
    """

    group: Group
    experts: int
    places: tuple[tuple[Place, int], ...]

    @staticmethod
    def of(groups: Groups, group: Group) -> Nested | str:
        """The neurons of a group as neurons of experts; else why they are none."""
        if group.kind != "neuron" or group.blocks:
            return "it is no plain group of neurons"
        size = None
        places = []
        for place in group.places:
            owners = [
                (other, p)
                for other, p in groups.of(place.value)
                if other.kind == EXPERT and p.axis != place.axis and p.reader is place.reader
            ]
            if len(owners) != 1:
                return "its weights are not stacked by experts"
            other, p = owners[0]
            if size not in (None, other.size) or not np.array_equal(p.units, np.arange(other.size)):
                return "its weights are stacked in different ways"
            size = other.size
            places.append((place, p.axis))
        return Nested(group, size, tuple(places)) if size else "it has no weights"

    def sums(self, elements: Array, place: Place, axis: int) -> Array:
        """A value for every element of a place's constant, summed to ``(experts, neurons)``."""
        others = tuple(a for a in range(elements.ndim) if a not in (axis, place.axis))
        flat = elements.sum(axis=others, dtype=np.float64)
        flat = flat if axis < place.axis else flat.T
        used = place.units >= 0
        result = np.zeros((self.experts, self.group.size))
        np.add.at(result.T, place.units[used], flat.T[used])
        return result

    def reorder(self, order: Array, names: edit.Names) -> None:
        """Put neuron ``order[e, u]`` of each expert in place ``u``, in all of its weights: nothing else changes.

        Args:
            order: ``(experts, neurons)``, a permutation in each row.
            names: For copies of constants that others read.
        """
        for place, axis in self.places:
            held = edit.tensor(place.value)
            assert held is not None
            index = np.tile(np.arange(len(place.units)), (self.experts, 1))
            positions = np.stack([place.indices(unit) for unit in range(self.group.size)])
            for e in range(self.experts):
                index[e, positions] = positions[order[e]]
            change = partial(_reordered, held, index, axis, place.axis)
            lazy = ir.LazyTensor(
                change, dtype=held.dtype, shape=ir.Shape(held.shape.numpy()), name=held.name, cache=False
            )
            cut.write(place.value, lazy, reader=place.reader, names=names)


def _reordered(held: ir.TensorProtocol, index: Array, experts: int, neurons: int) -> ir.TensorProtocol:
    array = held.numpy()
    where = index if experts < neurons else index.T
    shape = [array.shape[a] if a in (experts, neurons) else 1 for a in range(array.ndim)]
    made = np.take_along_axis(array, np.broadcast_to(where.reshape(shape), array.shape), axis=neurons)
    del array
    edit.release(held)
    return ir.Tensor(made, dtype=held.dtype, name=held.name)
