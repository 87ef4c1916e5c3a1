"""The mask of an attention as the one operand that Attention takes: boolean, or added, with queries and keys whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.recognition.graph import Graph
from graphc.recognition.layout import Axes, Axis, Place, arrange, reachable, resolve, settled, size, sizes, trace
from graphc.recognition.scores import Mask, Scores, absorbs, extremes, lowest, nearly_lowest, never_empty, overflows
from graphc.recognition.triangles import is_lower_triangle
from graphc.rewrites.base import Refused
from graphc.shapes import symbolic
from graphc.shapes.symbolic import Dim
from graphc.simplification.chains import target

if TYPE_CHECKING:
    from graphc.recognition.operator import Heads

_INFINITE = -float("inf")


def build(
    scores: Scores,
    heads: Heads,
    places: Sequence[Place],
    guarded: bool,
    dtype: ir.DataType,
    before: ir.Node,
    graph: Graph,
) -> ir.Value | None:
    """The mask operand, made in front of a node; None where there is no mask.

    Args:
        scores: What is masked, and by what.
        heads: Which leaves are batch, heads and positions.
        places: Where the numbers of queries and of keys can be read.
        guarded: Whether the model gives 0 for a row that is masked as a whole, where a softmax gives NaN.
        dtype: Of queries, keys and values.
        before: The node in front of which new ones are put.
        graph: The graph.

    Raises:
        Refused: Attention would not compute the same.
    """
    found = scores.masks
    if not found:
        return None
    _check(found, guarded, dtype, graph)
    shape = (heads.batch, heads.heads, heads.queries, heads.keys)
    # Two masks of the lowest finite number add up to -inf.
    twice = sum(mask.fill is not None or bool(extremes(mask.value)) for mask in found) > 1
    nan = not guarded and (twice or any(_may_be_nan(mask) for mask in found))
    if not nan and len(found) == 1 and (condition := _condition(found[0])) is not None:
        value, keeps = condition
        if found[0].unsure:
            value = _lengthened(value, heads.keys, places, before, graph)
        placed = _placed(value, found[0].axes, shape, before, graph)
        if not keeps:
            placed = graph.make(before, "Not", [placed], like=placed, shape=graph.dims(placed))
        return _whole(placed, shape, places, before, graph)
    total: ir.Value | None = None
    for mask in found:
        value = _lengthened(mask.value, heads.keys, places, before, graph) if mask.unsure else mask.value
        placed = _placed(value, mask.axes, shape, before, graph)
        total = _applied(mask, placed, total, dtype, before, graph)
    assert total is not None
    if nan:
        total = _with_nan(total, before, graph)
    return _whole(total, shape, places, before, graph)


def causal(scores: Scores, heads: Heads, dtype: ir.DataType, graph: Graph) -> bool:
    """Whether the one mask certainly lets every query see the keys up to its own position, and no others."""
    if len(scores.masks) != 1 or size(heads.queries) != size(heads.keys):
        return False
    (mask,) = scores.masks
    axes = settled(mask.axes)
    if len(axes) < 2 or axes[-2:] != (resolve(heads.queries), resolve(heads.keys)) or any(axes[:-2]):
        return False
    if mask.fill is not None:
        hides = mask.fill == _INFINITE or absorbs(mask.fill, dtype)
        return hides and is_lower_triangle(mask.value, mask.keeps, graph)
    held = edit.constant(mask.value, 1 << 22)
    if held is not None:
        rows = held.reshape(held.shape[-2:]).astype(np.float64) * mask.factor
        lower = np.tri(*rows.shape, dtype=np.bool_)
        return bool((rows[lower] == 0).all() and (rows[np.logical_not(lower)] <= lowest(dtype) / 4).all())
    node = mask.value.producer()
    if mask.factor != 1.0 or not edit.is_op(node, "Where") or node is None or node.inputs[0] is None:
        return False
    values = [edit.scalar(v) for v in node.inputs[1:3]]
    for keeps in (True, False):
        kept, hidden = values if keeps else reversed(values)
        if kept == 0 and hidden is not None and absorbs(float(hidden), dtype):
            return is_lower_triangle(node.inputs[0], keeps, graph)
    return False


def _check(found: Sequence[Mask], guarded: bool, dtype: ir.DataType, graph: Graph) -> None:
    """Refuse masks with which Attention would compute something else."""
    for mask in found:
        if mask.fill is None:
            if graph.dtype(mask.value) != dtype:
                raise Refused("the mask has another dtype than queries and keys")
            low = extremes(mask.value)
            if guarded and _INFINITE in low and len(low) > 1:
                raise Refused("the mask mixes -inf with the lowest finite number")
        elif not absorbs(mask.fill, dtype) and not (mask.fill <= -1e4 and never_empty(mask.value, mask.keeps)):
            raise Refused(f"masked scores become {mask.fill:g}, which adding a mask does not give")


def _may_be_nan(mask: Mask) -> bool:
    """Whether a row may be masked by -inf as a whole."""
    if mask.fill is not None:
        return mask.fill == _INFINITE and not never_empty(mask.value, mask.keeps)
    if overflows(mask.value):
        return True
    if _INFINITE not in extremes(mask.value) or _rows_stay(mask.value):
        return False
    node = mask.value.producer()
    if not edit.is_op(node, "Where") or node is None or node.inputs[0] is None:
        return True
    return not never_empty(node.inputs[0], edit.scalar(node.inputs[1]) == 0)


def _rows_stay(value: ir.Value) -> bool:
    """Whether every row of a constant mask has a finite element."""
    held = edit.constant(value, 1 << 22)
    if held is not None:
        return bool(np.isfinite(held.astype(np.float64)).any(axis=-1).all())
    node = value.producer()
    if edit.is_op(node, "Trilu") and node is not None and edit.attribute(node, "upper", 1) == 1:
        shift = edit.scalar(node.inputs[1]) if len(node.inputs) > 1 else 0
        return shift is not None and int(shift) >= 1
    return False


def _condition(mask: Mask) -> tuple[ir.Value, bool] | None:
    """The boolean that a lone mask comes from, and whether true keeps the score; None if it must stay a number."""
    if mask.fill is not None:
        return (mask.value, mask.keeps) if mask.fill == _INFINITE else None
    node = mask.value.producer()
    if not edit.is_op(node, "Where") or node is None or node.inputs[0] is None:
        return None
    values = edit.scalar(node.inputs[1]), edit.scalar(node.inputs[2])
    if values == (0, _INFINITE):
        return node.inputs[0], True
    if values == (_INFINITE, 0):
        return node.inputs[0], False
    return None


def _applied(
    mask: Mask, placed: ir.Value, total: ir.Value | None, dtype: ir.DataType, before: ir.Node, graph: Graph
) -> ir.Value:
    """What is added to the scores in all, once a mask has been applied to what there was."""
    if mask.fill is None:
        value = _clamped(placed, dtype, before, graph)
        if mask.factor != 1.0:
            value = graph.make(before, "Mul", [value, _number(mask.factor, dtype, before, graph)], like=value)
        return value if total is None else _broadcast("Add", [value, total], before, graph)
    fill = mask.fill if mask.fill == _INFINITE else max(mask.fill, nearly_lowest(dtype))
    kept = total if total is not None else _number(0.0, dtype, before, graph)
    masked = _number(fill, dtype, before, graph)
    return _broadcast("Where", [placed, *((kept, masked) if mask.keeps else (masked, kept))], before, graph, like=kept)


def _clamped(value: ir.Value, dtype: ir.DataType, before: ir.Node, graph: Graph) -> ir.Value:
    """A mask without the lowest finite number, which ONNX Runtime takes for -inf."""
    low = extremes(value)
    if not low or _INFINITE in low or min(low) > lowest(dtype):
        return value
    key = ("clamped", value, before.graph)
    known = graph.made.get(key)
    if known is not None:
        return known
    node = value.producer()
    number = _number(nearly_lowest(dtype), dtype, before, graph)
    if edit.is_op(node, "Where") and node is not None and all(edit.scalar(v) is not None for v in node.inputs[1:3]):
        sides = [number if edit.scalar(v) <= lowest(dtype) else v for v in node.inputs[1:3]]  # type: ignore[operator]
        made = graph.make(before, "Where", [node.inputs[0], *sides], like=value, shape=graph.dims(value))
    elif overflows(value):
        # What became -inf stays so: it has no weight beside the lowest finite number.
        floor = _number(lowest(dtype), dtype, before, graph)
        same = graph.make(before, "Equal", [value, floor], like=value, shape=graph.dims(value))
        same.type = ir.TensorType(ir.DataType.BOOL)
        made = graph.make(before, "Where", [same, number, value], like=value, shape=graph.dims(value))
    else:
        made = graph.make(before, "Max", [value, number], like=value, shape=graph.dims(value))
    graph.made[key] = made
    return made


def _with_nan(value: ir.Value, before: ir.Node, graph: Graph) -> ir.Value:
    """The mask with NaN in rows that are -inf as a whole: there a softmax gives NaN, and Attention 0."""
    key = ("nan", value, before.graph)
    known = graph.made.get(key)
    if known is not None:
        return known
    dims = graph.dims(value)
    assert dims is not None
    axes = graph.ints(before, [-1])
    most = graph.make(before, "ReduceMax", [value, axes], {"keepdims": 1}, like=value, shape=(*dims[:-1], 1))
    # 0 for a finite number, NaN for an infinite one
    zero = graph.make(before, "Sub", [most, most], like=value, shape=(*dims[:-1], 1))
    made = graph.made[key] = graph.make(before, "Add", [value, zero], like=value, shape=dims)
    return made


def _broadcast(
    operator: str, inputs: Sequence[ir.Value], before: ir.Node, graph: Graph, like: ir.Value | None = None
) -> ir.Value:
    shape: list[Dim] = []
    for value in inputs:
        dims = graph.dims(value) or ()
        shape = [*(1 for _ in range(len(dims) - len(shape))), *shape]
        for i, dim in enumerate(dims):
            at = len(shape) - len(dims) + i
            shape[at] = symbolic.broadcast(shape[at], dim)
    return graph.make(before, operator, inputs, like=like or inputs[0], shape=shape)


def _number(number: float, dtype: ir.DataType, before: ir.Node, graph: Graph) -> ir.Value:
    return graph.array(before, np.asarray(number, dtype.numpy()), "graphc.number")


def _placed(value: ir.Value, axes: Axes, shape: Sequence[Axis], before: ir.Node, graph: Graph) -> ir.Value:
    """A mask of rank 4 whose axes are batch, heads, queries and keys, each whole or of size 1."""
    key = ("placed", value, settled(axes), tuple(shape), before.graph)
    known = graph.made.get(key)
    if known is not None:
        return known
    for place in reversed(list(trace(value, axes, graph))):
        if place.factor != 1.0 or place.picked:
            continue
        own = {leaf for axis in settled(place.axes) for leaf in axis}
        parts = [own & set(resolve(axis)) for axis in shape]
        if any(part and part != set(resolve(axis)) for part, axis in zip(parts, shape, strict=True)):
            continue
        wanted = tuple(axis if part else () for part, axis in zip(parts, shape, strict=True))
        if reachable(place, wanted, graph) is not None:
            made = graph.made[key] = arrange(place, wanted, before, graph)
            return made
    repeated = _repeated(value, axes, shape, before, graph)
    if repeated is None:
        raise Refused("a mask covers only a part of the batch or of the heads")
    graph.made[key] = repeated
    return repeated


def _repeated(value: ir.Value, axes: Axes, shape: Sequence[Axis], before: ir.Node, graph: Graph) -> ir.Value | None:
    """A mask of the inner part of the batch, as of the windows of an image, for all of it."""
    batch = resolve(shape[0])
    for place in reversed(list(trace(value, axes, graph))):
        if place.factor != 1.0 or place.picked or place.copied:
            continue
        own = {leaf for axis in settled(place.axes) for leaf in axis}
        parts = [own & set(resolve(axis)) for axis in shape]
        if not parts[0] or any(
            part and part != set(resolve(axis)) for part, axis in zip(parts[1:], shape[1:], strict=True)
        ):
            continue
        rest = tuple(axis if part else () for part, axis in zip(parts[1:], shape[1:], strict=True))
        wanted = (*((leaf,) if leaf in own else () for leaf in batch), *rest)
        full = (*(leaf.size for leaf in batch), *sizes(rest))
        numbers = target(full, (size(batch), *sizes(rest)), None)
        counts = tuple(1 if leaf in own else leaf.size for leaf in batch) + (1,) * len(rest)
        if isinstance(numbers, str) or not graph.readable(counts) or reachable(place, wanted, graph) is None:
            continue
        made = arrange(place, wanted, before, graph)
        made = graph.make(before, "Expand", [made, graph.sizes(before, counts)], like=value, shape=full)
        result = (size(batch), *sizes(rest))
        return graph.make(before, "Reshape", [made, graph.ints(before, numbers)], like=value, shape=result)
    return None


def _lengthened(value: ir.Value, keys: Axis, places: Sequence[Place], before: ir.Node, graph: Graph) -> ir.Value:
    """A mask with all keys of one that has all of them or one for all."""
    dims = graph.dims(value)
    assert dims is not None
    total = size(keys)
    key = ("lengthened", value, total, before.graph)
    known = graph.made.get(key)
    if known is not None:
        return known
    ones = graph.ints(before, [1] * (len(dims) - 1))
    count = _amount(total, resolve(keys), places, before, graph)
    target = graph.make(before, "Concat", [ones, count], {"axis": 0}, like=ones, shape=(len(dims),))
    made = graph.made[key] = graph.make(before, "Expand", [value, target], like=value, shape=(*dims[:-1], total))
    return made


def _whole(value: ir.Value, shape: Sequence[Axis], places: Sequence[Place], before: ir.Node, graph: Graph) -> ir.Value:
    """The mask with all queries and all keys, along which ONNX Runtime does not broadcast it."""
    dims = graph.dims(value)
    assert dims is not None
    wanted = (dims[0], dims[1], size(shape[2]), size(shape[3]))
    if dims == wanted:
        return value
    key = ("whole", value, wanted, before.graph)
    known = graph.made.get(key)
    if known is not None:
        return known
    counts = [graph.ints(before, [1]), graph.ints(before, [1])]
    for axis, have, want in zip(shape[2:], dims[2:], wanted[2:], strict=True):
        counts.append(counts[0] if have == want else _amount(want, resolve(axis), places, before, graph))
    if all(edit.tensor(count) is not None for count in counts):
        target = graph.ints(before, [int(edit.scalar(count) or 0) for count in counts])
    else:
        target = graph.make(before, "Concat", counts, {"axis": 0}, like=counts[0], shape=(4,))
    made = graph.made[key] = graph.make(before, "Expand", [value, target], like=value, shape=wanted)
    return made


def _amount(size: Dim, axis: Axis, places: Sequence[Place], before: ir.Node, graph: Graph) -> ir.Value:
    """A number of queries or keys, as a vector of one element."""
    if isinstance(size, int):
        return graph.ints(before, [size])
    like = graph.ints(before, [1])
    parts = [symbolic.symbol(atoms[0]) for atoms, factor in size.terms if len(atoms) == 1 and factor == 1]
    if len(parts) == len(size.terms) and graph.readable(tuple(parts)):
        total = graph.sizes(before, (parts[0],))
        for part in parts[1:]:
            total = graph.make(before, "Add", [total, graph.sizes(before, (part,))], like=like, shape=(1,))
        return total
    for place in reversed(places):
        for number, own in enumerate(settled(place.axes)):
            if own == axis:
                return graph.make(
                    before, "Shape", [place.value], {"start": number, "end": number + 1}, like=like, shape=(1,)
                )
    raise Refused("the number of queries or of keys cannot be read from one axis")
