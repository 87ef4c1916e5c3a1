"""Facts of the operators that move elements about: layout, indexing, joining and splitting.

Semantics are those of the ONNX operator specification. Contents that are followed move along.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import attribute
from graphc.shapes import (
    INTEGERS,
    MAX_ITEMS,
    UNKNOWN,
    Fact,
    Facts,
    Items,
    Shape,
    items_array,
    rule,
    symbolic,
    with_items,
)
from graphc.shapes.symbolic import Dim

Facts_ = Sequence[Fact]


def broadcast_shapes(*shapes: Shape) -> Shape:
    """Multidirectional broadcasting of shapes."""
    rank = max(map(len, shapes))
    result: list[Dim] = [1] * rank
    for shape in shapes:
        for i, dim in enumerate(shape, rank - len(shape)):
            result[i] = symbolic.broadcast(result[i], dim)
    return tuple(result)


def axes_of(node: ir.Node, inputs: Facts_, index: int, rank: int) -> tuple[int, ...] | None:
    """The axes an operator works on, from input ``index`` (newer opsets) or its attribute, made non-negative.

    Returns:
        An empty tuple where they are absent; None where they are not known or out of range.
    """
    axes: Sequence[int] | None
    if len(node.inputs) > index and node.inputs[index] is not None:
        axes = inputs[index].known
    else:
        axes = attribute(node, "axes") or ()
    if axes is None or any(not -rank <= axis < rank for axis in axes):
        return None
    return tuple(axis % rank for axis in axes)


def dims_from(target: Fact, facts: Facts) -> Shape | None:
    """The shape that a tensor of sizes describes."""
    if target.items is not None:
        return tuple(
            facts.fresh() if item is None or (isinstance(item, int) and item < 0) else item for item in target.items
        )
    if target.shape is not None and len(target.shape) == 1 and isinstance(target.shape[0], int):
        return facts.freshen(target.shape[0])
    return None


@rule("Identity")
def _identity(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    return [inputs[0]]


@rule("Constant")
def _constant(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    held = edit.tensor(node.outputs[0])
    if held is None:
        return None
    known = facts.array(node.outputs[0])
    fact = Fact(held.dtype, tuple(held.shape.numpy()))
    if known is not None and held.dtype in INTEGERS and known.size <= MAX_ITEMS:
        fact = replace(fact, items=tuple(int(x) for x in known.reshape(-1).tolist()))
    return [fact]


def reshaped(shape: Shape, target: Items, allow_zero: bool, facts: Facts) -> Shape:
    """The shape that Reshape makes of ``shape``: 0 copies a dim unless ``allow_zero``, -1 is what is left over."""
    dims: list[Dim] = []
    hole: int | None = None
    for i, item in enumerate(target):
        if item is None:
            dims.append(facts.fresh())
        elif item == 0 and not allow_zero:
            dims.append(shape[i] if i < len(shape) else facts.fresh())
        elif item == -1:
            hole = i
            dims.append(1)
        elif isinstance(item, int) or symbolic.nonnegative(item):
            dims.append(item)
        elif i < len(shape) and symbolic.as_size(item) == shape[i]:
            # A size that the axis has is no -1, and a 0 copies it.
            dims.append(shape[i])
        else:
            # A size that may be 0 or -1 at run time would be read as a copy or as the rest.
            dims.append(facts.fresh())
    if hole is not None:
        rest = symbolic.exact_quotient(symbolic.product(shape), symbolic.product(tuple(dims)))
        dims[hole] = _cancel(list(shape), dims, facts) if rest is None else rest
    return tuple(dims)


def _cancel(numerator: list[Dim], denominator: list[Dim], facts: Facts) -> Dim:
    """The quotient of two products of dims after the equal ones are crossed out."""
    rest = []
    for dim in denominator:
        if dim in numerator:
            numerator.remove(dim)
        else:
            rest.append(dim)
    quotient = symbolic.floordiv(symbolic.product(tuple(numerator)), symbolic.product(tuple(rest)))
    return facts.fresh() if quotient is None else quotient


@rule("Reshape")
def _reshape(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    x = inputs[0]
    target = inputs[1] if len(inputs) > 1 else UNKNOWN
    if target.items is None:
        return [Fact(x.dtype, dims_from(target, facts))]
    if x.shape is None:
        dims = tuple(i if isinstance(i, int) and i > 0 else facts.fresh() for i in target.items)
        return [Fact(x.dtype, dims)]
    shape = reshaped(x.shape, target.items, bool(attribute(node, "allowzero", 0)), facts)
    return [Fact(x.dtype, shape, _kept(x, shape))]


def _kept(x: Fact, shape: Shape) -> Items | None:
    """The elements of ``x`` after a change of shape that keeps their order."""
    static = all(isinstance(dim, int) for dim in shape)
    return x.items if x.items is not None and static and math.prod(shape) == len(x.items) else None  # type: ignore[arg-type]


@rule("Flatten")
def _flatten(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    x = inputs[0]
    if x.shape is None:
        return [Fact(x.dtype, facts.freshen(2))]
    axis = attribute(node, "axis", 1)
    axis += len(x.shape) if axis < 0 else 0
    shape = (symbolic.product(x.shape[:axis]), symbolic.product(x.shape[axis:]))
    return [Fact(x.dtype, shape, _kept(x, shape))]


@rule("Squeeze")
def _squeeze(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    x = inputs[0]
    if x.shape is None:
        return [Fact(x.dtype)]
    axes = axes_of(node, inputs, 1, len(x.shape))
    if axes is None:
        return [Fact(x.dtype)]
    if not axes:
        if any(not isinstance(dim, int) for dim in x.shape):
            return [Fact(x.dtype)]
        shape = tuple(dim for dim in x.shape if dim != 1)
    else:
        shape = tuple(dim for i, dim in enumerate(x.shape) if i not in axes)
    return [Fact(x.dtype, shape, _kept(x, shape))]


@rule("Unsqueeze")
def _unsqueeze(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    x = inputs[0]
    given = attribute(node, "axes") if len(inputs) < 2 else inputs[1].known
    if x.shape is None or given is None:
        return [Fact(x.dtype)]
    rank = len(x.shape) + len(given)
    axes = {axis % rank for axis in given}
    if len(axes) != len(given):
        return None
    rest = iter(x.shape)
    shape = tuple(1 if i in axes else next(rest) for i in range(rank))
    return [Fact(x.dtype, shape, _kept(x, shape))]


@rule("Transpose")
def _transpose(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    x = inputs[0]
    if x.shape is None:
        perm = attribute(node, "perm")
        return [Fact(x.dtype, None if perm is None else facts.freshen(len(perm)))]
    perm = attribute(node, "perm") or tuple(reversed(range(len(x.shape))))
    if len(perm) != len(x.shape):
        return None
    fact = Fact(x.dtype, tuple(x.shape[i] for i in perm))
    array = items_array(x)
    return [fact if array is None else with_items(fact, array.transpose(perm))]


@rule("Concat")
def _concat(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    dtype = inputs[0].dtype
    shapes = [fact.shape for fact in inputs if fact.shape is not None]
    if not shapes:
        return [Fact(dtype)]
    rank = len(shapes[0])
    axis = attribute(node, "axis", 1)
    if not -rank <= axis < rank or any(len(shape) != rank for shape in shapes):
        return None
    axis %= rank
    if len(shapes) < len(inputs):
        return [Fact(dtype, facts.freshen(rank))]
    dims = []
    for i in range(rank):
        total: Dim = shapes[0][i]
        for shape in shapes[1:]:
            # Off the axis all are equal in a valid model: a number says more than a name.
            total = symbolic.add(total, shape[i]) if i == axis else total if isinstance(total, int) else shape[i]
        dims.append(total)
    fact = Fact(dtype, tuple(dims))
    if dtype not in INTEGERS or fact.static is None or math.prod(fact.static) > MAX_ITEMS:
        return [fact]
    arrays = []
    for x in inputs:
        array = items_array(x)
        if array is None:
            if x.static is None:
                return [fact]
            array = np.full(x.static, None, dtype=object)
        arrays.append(array)
    return [with_items(fact, np.concatenate(arrays, axis=axis))]


@rule("Split")
def _split(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    x, count = inputs[0], len(node.outputs)
    if x.shape is None:
        return [Fact(x.dtype)] * count
    axis = attribute(node, "axis", 0) % len(x.shape)
    size = x.shape[axis]
    parts: Sequence[Dim | None] | None = attribute(node, "split")
    if len(inputs) > 1 and node.inputs[1] is not None:
        parts = inputs[1].items or (None,) * count
    if parts is None:
        if isinstance(size, int):
            chunk = -(-size // count)
            parts = [max(min(chunk, size - i * chunk), 0) for i in range(count)]
        else:
            even = symbolic.exact_quotient(size, count)
            parts = [even] * count
    if len(parts) != count:
        return None
    found = []
    array, start = items_array(x), 0
    for part in parts:
        dim: Dim = facts.fresh() if part is None else part
        fact = Fact(x.dtype, (*x.shape[:axis], dim, *x.shape[axis + 1 :]))
        if array is not None and isinstance(part, int):
            fact = with_items(fact, np.take(array, range(start, start + part), axis=axis))
            start += part
        else:
            array = None
        found.append(fact)
    return found


def slice_parameters(
    node: ir.Node, inputs: Facts_, rank: int
) -> tuple[Items, Items, tuple[int, ...], tuple[int, ...]] | None:
    """``starts, ends, axes, steps`` of a Slice; axes are non-negative. None where axes or steps are not known."""
    if len(inputs) == 1:
        starts, ends = attribute(node, "starts", ()), attribute(node, "ends", ())
        axes, steps = attribute(node, "axes"), None
    else:
        found = [inputs[i].items if i < len(inputs) and node.inputs[i] is not None else () for i in range(1, 5)]
        if found[0] is None or found[1] is None or found[2] is None or found[3] is None:
            return None
        starts, ends = found[0], found[1]
        axes, steps = found[2] or None, found[3] or None
    on: tuple[Any, ...] = tuple(range(len(starts))) if axes is None else tuple(axes)
    by: tuple[Any, ...] = (1,) * len(starts) if steps is None else tuple(steps)
    if not len(starts) == len(ends) == len(on) == len(by):
        return None
    if not all(isinstance(x, int) for x in (*on, *by)) or any(not -rank <= axis < rank for axis in on):
        return None
    return starts, ends, tuple(axis % rank for axis in on), by


def _bound(at: Dim | None, size: Dim, step: int) -> Dim | None:
    """A start or an end of a Slice, counted from the front and clamped, for ``step > 0``; None if unknown."""
    if at is None or step < 0:
        return None
    if isinstance(at, int) and isinstance(size, int):
        return min(max(at + size if at < 0 else at, 0), size)
    if isinstance(at, int) and at >= 2**31 - 1:
        return size
    if symbolic.nonnegative(at):
        if at == 0:
            return 0
        return symbolic.minimum(at, size)
    if isinstance(at, int):
        return symbolic.maximum(symbolic.add(size, at), 0)
    back = symbolic.mul(at, -1)
    if back == size:
        return 0  # also where both are 0
    return symbolic.maximum(symbolic.sub(size, back), 0) if symbolic.positive(back) else None


def sliced(start: Dim | None, end: Dim | None, step: int, size: Dim) -> tuple[Dim | None, Dim | None]:
    """The first index and the number of elements that a Slice takes of an axis; None for what is not known."""
    if step < 0 and isinstance(end, int) and end >= 2**31 - 1:
        # By the specification this takes nothing or less; ONNX Runtime reads it as "up to the first".
        return None, None
    if isinstance(start, int) and isinstance(end, int) and isinstance(size, int):
        if step < 0:
            # Backwards, ONNX clamps a start to the first element, and an end to before it, which Python calls None.
            indices = range(size)[max(start, -size) : None if end < -size else end : step]
        else:
            indices = range(size)[start:end:step]
        return indices.start, len(indices)
    first, last = _bound(start, size, step), _bound(end, size, step)
    if first is None or last is None:
        return first, None
    extent = symbolic.sub(last, first)
    if not symbolic.nonnegative(extent):
        extent = symbolic.maximum(extent, 0)
    return first, symbolic.ceildiv(extent, step)


@rule("Slice")
def _slice(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    x = inputs[0]
    if x.shape is None:
        return [Fact(x.dtype)]
    parameters = slice_parameters(node, inputs, len(x.shape))
    if parameters is None:
        return [Fact(x.dtype, facts.freshen(len(x.shape)))]
    dims = list(x.shape)
    array = items_array(x)
    for start, end, axis, step in zip(*parameters, strict=True):
        if step == 0:
            return None
        first, length = sliced(start, end, step, dims[axis])
        dims[axis] = facts.fresh() if length is None else length
        if array is not None and isinstance(first, int) and isinstance(length, int):
            array = np.take(array, range(first, first + length * step, step), axis=axis)
        else:
            array = None
    fact = Fact(x.dtype, tuple(dims))
    return [fact if array is None else with_items(fact, array)]


@rule("Gather")
def _gather(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    x, index = inputs[0], inputs[1]
    if x.shape is None or not x.shape:
        return [Fact(x.dtype)]
    axis = attribute(node, "axis", 0) % len(x.shape)
    if index.shape is None:
        return [Fact(x.dtype)]
    fact = Fact(x.dtype, x.shape[:axis] + index.shape + x.shape[axis + 1 :])
    array, at = items_array(x), index.known
    if array is None or at is None or index.static is None:
        return [fact]
    size = array.shape[axis]
    if any(not -size <= i < size for i in at):
        return [fact]
    # The index keeps an axis while numpy works: of a 0-d result it would return the bare element.
    picked = np.take(array, np.array(at, dtype=np.int64), axis=axis)
    return [with_items(fact, picked.reshape(array.shape[:axis] + index.static + array.shape[axis + 1 :]))]


@rule("GatherElements")
def _gather_elements(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    return [Fact(inputs[0].dtype, inputs[1].shape)]


@rule("Expand")
def _expand(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    x = inputs[0]
    target = dims_from(inputs[1], facts)
    if x.shape is None or target is None:
        return [Fact(x.dtype)]
    fact = Fact(x.dtype, broadcast_shapes(x.shape, target))
    array, static = items_array(x), fact.static
    if array is None or static is None or math.prod(static) > MAX_ITEMS:
        return [fact]
    return [with_items(fact, np.broadcast_to(array, static))]


@rule("Tile")
def _tile(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    x, repeats = inputs[0], inputs[1].items
    if x.shape is None or repeats is None or len(repeats) != len(x.shape):
        return [Fact(x.dtype, None if x.shape is None else facts.freshen(len(x.shape)))]
    dims = tuple(
        facts.fresh() if times is None else symbolic.mul(dim, times)
        for dim, times in zip(x.shape, repeats, strict=True)
    )
    fact = Fact(x.dtype, dims)
    array = items_array(x)
    if array is None or fact.static is None or math.prod(fact.static) > MAX_ITEMS:
        return [fact]
    return [with_items(fact, np.tile(array, [int(t) for t in repeats]))]  # type: ignore[arg-type]


@rule("Pad")
def _pad(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    x = inputs[0]
    if x.shape is None:
        return [Fact(x.dtype)]
    rank = len(x.shape)
    pads: Items | None = attribute(node, "pads") if len(inputs) < 2 else inputs[1].items
    axes: tuple[int, ...] | None = tuple(range(rank))
    if len(inputs) > 3 and node.inputs[3] is not None:
        axes = axes_of(node, inputs, 3, rank)
    if pads is None or axes is None or len(pads) != 2 * len(axes):
        return [Fact(x.dtype, facts.freshen(rank))]
    dims = list(x.shape)
    for i, axis in enumerate(axes):
        before, after = pads[i], pads[i + len(axes)]
        if before is None or after is None:
            dims[axis] = facts.fresh()
        else:
            dims[axis] = symbolic.as_size(symbolic.add(dims[axis], symbolic.add(before, after)))
    return [Fact(x.dtype, tuple(dims))]
