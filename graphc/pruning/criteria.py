"""Criteria: how much each unit of a group matters. One function each, in one table.

A criterion gives a score per unit, shaped ``(size,)`` or, where every block of a group chooses for itself,
``(*blocks, size)``. Higher is more important; only the order within a group and, after normalisation, between
groups counts. A criterion that needs statistics declares them in ``needs``; the runner collects them and they
arrive in ``Context.statistics``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes.groups import Group, Groups, Place
from graphc.contract import Context, Needs
from graphc.edit import Array
from graphc.errors import BadInput, nearest


@dataclass(frozen=True)
class Criterion:
    """A way to score units.

    Attributes:
        score: Scores of one group's units, float64, ``(size,)`` or ``(*blocks, size)``.
        needs: What must have been collected before, given the model and its groups; None for nothing.
    """

    score: Callable[[Groups, Group, Context], Array]
    needs: Callable[[ir.Model, Groups], Needs] | None = None


def criterion(name: str) -> Criterion:
    """The criterion of this name.

    Raises:
        BadInput: There is none; the message has the nearest name.
    """
    if name not in CRITERIA:
        raise BadInput(f"there is no criterion '{name}'", hint=nearest(name, CRITERIA))
    return CRITERIA[name]


def magnitude(order: int) -> Callable[[Groups, Group, Context], Array]:
    """The L1 or L2 norm of everything that a unit's weights hold, where they produce and where they consume it.

    Scales, variances, rotary tables and other constants that are only carried along do not count.
    """

    def score(groups: Groups, group: Group, context: Context) -> Array:
        total: Array | None = None
        for place in group.places:
            held = edit.tensor(place.value)
            array = None if place.role == "carries" or held is None else _numbers(place.value, held)
            if array is None or held is None:
                continue
            part = _norm(groups, group, place, array, order)
            del array
            edit.release(held)
            if not np.isfinite(part).all():
                raise BadInput(
                    "a weight holds NaN or infinity; its units cannot be ranked",
                    where=str(place.value.name),
                    hint="repair the weight, or exclude its groups",
                )
            total = part if total is None else total + part
        if total is None:
            return np.zeros((*group.blocks, group.size))
        return np.sqrt(total) if order == 2 else total

    return score


CHUNK = 1 << 22
"""Elements of a weight that are looked at together, so that no copy of a large weight is made."""


def _numbers(value: ir.Value, held: ir.TensorProtocol) -> Array | None:
    """What a constant stands for: its elements, or what a DequantizeLinear makes of them; None for other integers."""
    if held.dtype.is_floating_point():
        return held.numpy()
    node = next((use.node for use in value.uses() if edit.is_op(use.node, "DequantizeLinear") and use.idx == 0), None)
    scale = None if node is None else edit.constant(node.inputs[1])
    if node is None or scale is None:
        return None
    array = held.numpy().astype(np.float32)
    axis, block = edit.attribute(node, "axis", 1), edit.attribute(node, "block_size", 0)

    def spread(given: Array) -> Array:
        if given.ndim == array.ndim and block:
            return np.repeat(given, block, axis)
        return given.reshape([-1 if a == axis % array.ndim else 1 for a in range(array.ndim)]) if given.ndim else given

    zero = edit.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if zero is not None:
        array -= spread(zero.astype(np.float32))
    return np.asarray(array * spread(scale.astype(np.float32)))


def _norm(groups: Groups, group: Group, place: Place, array: Array, order: int) -> Array:
    """Sums of absolute values or squares of one weight, by unit."""
    if group.blocks:
        return np.asarray(groups.scores(group, place, _powers(array, order)), dtype=np.float64)
    along = np.zeros(array.shape[place.axis])
    others = tuple(axis for axis in range(array.ndim) if axis != place.axis)
    step = max(1, CHUNK // max(1, array.size // max(1, array.shape[0])))
    for start in range(0, array.shape[0], step):
        part = _powers(array[start : start + step], order).sum(axis=others, dtype=np.float64)
        if place.axis == 0:
            along[start : start + step] = part
        else:
            along += part
    used = place.units >= 0
    return np.bincount(place.units[used], weights=along[used], minlength=group.size)


def _powers(array: Array, order: int) -> Array:
    array = array.astype(np.float32, copy=False)
    return np.abs(array) if order == 1 else np.square(array)


def random(groups: Groups, group: Group, context: Context) -> Array:
    """Uniform in [0, 1), from the run's seed and the group's name: the baseline that every criterion must beat."""
    generator = np.random.default_rng((context.seed, zlib.crc32(group.name.encode())))
    return generator.random((*group.blocks, group.size))


CRITERIA: dict[str, Criterion] = {
    "l1": Criterion(magnitude(1)),
    "l2": Criterion(magnitude(2)),
    "random": Criterion(random),
}
