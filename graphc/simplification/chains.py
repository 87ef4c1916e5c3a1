"""Rows of layout operators, written as one: Transpose, Reshape, Cast, Slice, Concat, Squeeze and Unsqueeze."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import attribute, is_op
from graphc.moves import RESHAPES
from graphc.shapes import Shape
from graphc.shapes.symbolic import positive
from graphc.shapes.tensor_rules import axes_of, slice_parameters
from graphc.simplification.rules import Become, Forward, Outcome, Refuse, Rules, kept_attributes

if TYPE_CHECKING:
    from graphc.simplification.sweep import Sweep

RULES = Rules()


def _producer(node: ir.Node, *operators: str, index: int = 0) -> ir.Node | None:
    value = node.inputs[index] if len(node.inputs) > index else None
    producer = None if value is None else value.producer()
    return producer if is_op(producer, *operators) else None


@RULES.add("Transpose")
def _transposes(node: ir.Node, sweep: Sweep) -> Outcome:
    before = _producer(node, "Transpose")
    if before is None:
        return None
    rank = sweep.facts(node.inputs[0]).rank
    first, second = attribute(before, "perm"), attribute(node, "perm")
    if rank is None:
        rank = len(first or second or ())
    if not rank:
        return None
    reverse = tuple(reversed(range(rank)))
    perm = [(first or reverse)[axis] for axis in second or reverse]
    if perm == sorted(perm) and before.inputs[0] is not None:
        return Forward(before.inputs[0], "inverse Transposes removed")
    return Become([before.inputs[0]], {"perm": perm}, "Transposes merged")


def target(before: Shape, after: Shape, rest: int | None) -> Sequence[int] | str:
    """The constant target that makes Reshape turn ``before`` into ``after`` for every size; or why there is none.

    A 0 copies the dim at the same place. One dim that is not known may be -1, but a -1 beside a dim that is 0 at run
    time fails: where the others may be 0, it is used only in the place where the model itself has it (``rest``).
    """
    sizes: list[int] = []
    unknown: list[int] = []
    for i, dim in enumerate(after):
        if isinstance(dim, int):
            if dim == 0 and not (i < len(before) and before[i] == 0):
                return "the target has a dim of size 0"
            sizes.append(dim)
        elif i < len(before) and before[i] == dim:
            sizes.append(0)
        else:
            sizes.append(-1)
            unknown.append(i)
    if len(unknown) > 1:
        return "the target shape depends on two unknown dims"
    if unknown and unknown != [rest]:
        others = [dim for i, dim in enumerate(after) if i not in unknown]
        if not all(positive(dim) for dim in others):
            return "a -1 in the target would fail where another dim is 0"
    return sizes


def _rest(node: ir.Node, sweep: Sweep) -> int | None:
    """The axis that the target of a Reshape gives as -1."""
    items = sweep.facts(node.inputs[1]).items if node.op_type == "Reshape" and len(node.inputs) > 1 else None
    return items.index(-1) if items is not None and -1 in items else None


@RULES.add("Reshape")
def _constant_target(node: ir.Node, sweep: Sweep) -> Outcome:
    x, y = sweep.facts(node.inputs[0]), sweep.facts(node.outputs[0])
    if len(node.inputs) < 2 or x.shape is None or y.shape is None or edit.tensor(node.inputs[1]) is not None:
        return None
    sizes = target(x.shape, y.shape, _rest(node, sweep))
    if isinstance(sizes, str):
        return Refuse(sizes)
    return Become([node.inputs[0], np.array(sizes, np.int64)], {}, "Reshape target made constant")


@RULES.add("Expand")
def _constant_expand(node: ir.Node, sweep: Sweep) -> Outcome:
    x, y = sweep.facts(node.inputs[0]), sweep.facts(node.outputs[0])
    if x.shape is None or y.shape is None or edit.tensor(node.inputs[1]) is not None:
        return None
    own: Shape = (*[1] * (len(y.shape) - len(x.shape)), *x.shape)
    # In Expand a 1 keeps the dim.
    sizes = [dim if isinstance(dim, int) else 1 for dim in y.shape]
    if any(not isinstance(dim, int) and dim != kept for dim, kept in zip(y.shape, own, strict=True)):
        return None
    return Become([node.inputs[0], np.array(sizes, np.int64)], {}, "Expand target made constant")


def _moves_nothing(node: ir.Node, sweep: Sweep) -> bool:
    """Whether a Transpose only moves axes of size 1, and hence no element."""
    shape, perm = sweep.facts(node.inputs[0]).shape, attribute(node, "perm")
    if shape is None or perm is None:
        return False
    moved = [axis for axis in perm if shape[axis] != 1]
    return moved == sorted(moved)


@RULES.add(*RESHAPES, "Transpose")
def _reshapes(node: ir.Node, sweep: Sweep) -> Outcome:
    before = _producer(node, *RESHAPES, "Transpose")
    if before is None or before.inputs[0] is None:
        return None
    if any(each.op_type == "Transpose" and not _moves_nothing(each, sweep) for each in (before, node)):
        return None
    x, y = sweep.facts(before.inputs[0]), sweep.facts(node.outputs[0])
    if x.shape is None or y.shape is None:
        return None
    if x.shape == y.shape:
        return Forward(before.inputs[0], "inverse Reshapes removed")
    source = before.inputs[0]
    axes = _ones_left_out(x.shape, y.shape)
    if axes is not None and sweep.facts.version >= 13:
        return Become([source, np.array(axes, np.int64)], {}, "Reshapes merged", "Squeeze")
    axes = _ones_left_out(y.shape, x.shape)
    if axes is not None and sweep.facts.version >= 13:
        return Become([source, np.array(axes, np.int64)], {}, "Reshapes merged", "Unsqueeze")
    sizes = target(x.shape, y.shape, _rest(node, sweep))
    if isinstance(sizes, str):
        return None
    return Become([source, np.array(sizes, np.int64)], {}, "Reshapes merged", "Reshape")


def _ones_left_out(longer: Shape, shorter: Shape) -> Sequence[int] | None:
    """The axes of size 1 without which ``longer`` is ``shorter``; None if there are none such."""
    axes, at = [], 0
    for axis, dim in enumerate(longer):
        if at < len(shorter) and dim == shorter[at]:
            at += 1
        elif dim == 1:
            axes.append(axis)
        else:
            return None
    return axes if at == len(shorter) and axes else None


_REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
)  # fmt: skip


@RULES.add("Gather")
def _drops_moved_axis(node: ir.Node, sweep: Sweep) -> Outcome:
    before = _producer(node, "Transpose")
    perm = None if before is None else attribute(before, "perm")
    if before is None or perm is None or sweep.facts(node.inputs[1]).rank != 0:
        return None
    axis = attribute(node, "axis", 0) % len(perm)
    rest = [a for i, a in enumerate(perm) if i != axis]
    if rest != sorted(rest):
        return None
    return Become([before.inputs[0], node.inputs[1]], {"axis": perm[axis]}, "Transpose before a Gather removed")


@RULES.add(*_REDUCTIONS)
def _reduces_moved_axes(node: ir.Node, sweep: Sweep) -> Outcome:
    before = _producer(node, "Transpose")
    perm = None if before is None else attribute(before, "perm")
    if before is None or perm is None or attribute(node, "keepdims", 1):
        return None
    axes = axes_of(node, [sweep.facts(v) for v in node.inputs], 1, len(perm))
    if not axes:
        return None
    rest = [a for i, a in enumerate(perm) if i not in axes]
    if rest != sorted(rest):
        return None
    moved = sorted(perm[axis] for axis in axes)
    what = "Transpose before a reduction removed"
    if len(node.inputs) > 1:
        return Become([before.inputs[0], np.array(moved, np.int64)], kept_attributes(node), what)
    return Become([before.inputs[0]], kept_attributes(node, axes=moved), what)


_INTEGER_BITS = {
    ir.DataType.INT8: (7, True), ir.DataType.INT16: (15, True),
    ir.DataType.INT32: (31, True), ir.DataType.INT64: (63, True),
    ir.DataType.UINT8: (8, False), ir.DataType.UINT16: (16, False),
    ir.DataType.UINT32: (32, False), ir.DataType.UINT64: (64, False),
}  # fmt: skip
"""Bits for the magnitude, and whether there is a sign."""
_FLOAT_BITS = {
    ir.DataType.FLOAT16: 11,
    ir.DataType.BFLOAT16: 8,
    ir.DataType.FLOAT: 24,
    ir.DataType.DOUBLE: 53,
}
_WIDER_FLOATS = {
    ir.DataType.FLOAT16: (ir.DataType.FLOAT, ir.DataType.DOUBLE),
    ir.DataType.BFLOAT16: (ir.DataType.FLOAT, ir.DataType.DOUBLE),
    ir.DataType.FLOAT: (ir.DataType.DOUBLE,),
}


def preserves(source: ir.DataType, to: ir.DataType) -> bool:
    """Whether a cast from ``source`` to ``to`` keeps every value exactly."""
    if source == to:
        return True
    if source == ir.DataType.BOOL:
        return to in _INTEGER_BITS or to in _FLOAT_BITS
    if source in _INTEGER_BITS:
        bits, signed = _INTEGER_BITS[source]
        if to in _INTEGER_BITS:
            return _INTEGER_BITS[to][0] >= bits and (_INTEGER_BITS[to][1] or not signed)
        # Only float32 and wider have exponents to spare.
        return to in (ir.DataType.FLOAT, ir.DataType.DOUBLE) and _FLOAT_BITS[to] >= bits
    return to in _WIDER_FLOATS.get(source, ())


@RULES.add("CastLike")
def _known_dtype(node: ir.Node, sweep: Sweep) -> Outcome:
    like = node.inputs[1]
    dtype = None if like is None else sweep.facts(like).dtype
    if dtype is None:
        return None
    return Become([node.inputs[0]], kept_attributes(node, to=int(dtype)), "CastLike made a Cast", "Cast")


@RULES.add("Cast")
def _casts(node: ir.Node, sweep: Sweep) -> Outcome:
    before = _producer(node, "Cast")
    if before is None or before.inputs[0] is None:
        return None
    source, middle = sweep.facts(before.inputs[0]).dtype, sweep.facts(before.outputs[0]).dtype
    if source is None or middle is None or not preserves(source, middle):
        return None
    to = ir.DataType(attribute(node, "to"))
    if to not in _INTEGER_BITS and to not in _FLOAT_BITS and to != ir.DataType.BOOL:
        # Text shows whether it was a float.
        return None
    if to == source:
        return Forward(before.inputs[0], "inverse Casts removed")
    return Become([before.inputs[0]], kept_attributes(node), "Casts merged")


@RULES.add("Concat")
def _nested(node: ir.Node, sweep: Sweep) -> Outcome:
    rank = sweep.facts(node.outputs[0]).rank
    if rank is None:
        return None
    axis = attribute(node, "axis") % rank
    inputs: list[ir.Value | None] = []
    merged = False
    for value in node.inputs:
        inner = None if value is None else value.producer()
        alone = value is not None and len(value.uses()) == 1 and not value.is_graph_output()
        same = alone and is_op(inner, "Concat") and inner is not None and inner.graph is node.graph
        if same and inner is not None and attribute(inner, "axis") % rank == axis:
            inputs.extend(inner.inputs)
            merged = True
        else:
            inputs.append(value)
    return Become(inputs, {"axis": axis}, "nested Concats merged") if merged else None


@RULES.add("Concat")
def _of_split(node: ir.Node, sweep: Sweep) -> Outcome:
    split = _producer(node, "Split")
    rank = sweep.facts(node.outputs[0]).rank
    if split is None or rank is None or split.inputs[0] is None or len(node.inputs) != len(split.outputs):
        return None
    if any(a is not b for a, b in zip(node.inputs, split.outputs, strict=True)):
        return None
    if attribute(split, "axis", 0) % rank != attribute(node, "axis") % rank:
        return None
    return Forward(split.inputs[0], "Concat of a Split removed")


@RULES.add("Slice")
def _slices(node: ir.Node, sweep: Sweep) -> Outcome:
    before = _producer(node, "Slice")
    if before is None or sweep.facts.version < 10:
        return None
    x = sweep.facts(before.inputs[0])
    if x.shape is None:
        return None
    merged: list[tuple[int, int, int, int]] = []
    for each in (before, node):
        found = slice_parameters(each, [sweep.facts(v) for v in each.inputs], len(x.shape))
        if found is None:
            return None
        for start, end, axis, step in zip(*found, strict=True):
            # On different axes slices commute; on one axis they would have to be composed.
            if not isinstance(start, int) or not isinstance(end, int) or axis in [m[2] for m in merged]:
                return None
            merged.append((start, end, axis, step))
    columns = [np.array(column, np.int64) for column in zip(*merged, strict=True)]
    return Become([before.inputs[0], *columns], {}, "Slices merged")


@RULES.add("SequenceAt")
def _item_of_parts(node: ir.Node, sweep: Sweep) -> Outcome:
    """One part of a split into a sequence, as exporters write ``torch.split``."""
    split, index = _producer(node, "SplitToSequence"), sweep.facts.scalar(node.inputs[1])
    shape = None if split is None else sweep.facts(split.inputs[0]).shape
    if split is None or shape is None or index is None:
        return None
    axis = attribute(split, "axis", 0) % len(shape)
    whole = shape[axis]
    sizes = sweep.facts.array(split.inputs[1]) if len(split.inputs) > 1 else np.array(1)
    if not isinstance(whole, int) or sizes is None or (len(split.inputs) < 2 and not attribute(split, "keepdims", 1)):
        return None
    if not sizes.ndim:
        sizes = np.diff([*range(0, whole, int(sizes)), whole])
    if not -len(sizes) <= index < len(sizes) or int(sizes.sum()) != whole:
        return None
    bounds = np.concatenate([[0], np.cumsum(sizes)])[index % len(sizes) :][:2]
    begin, end, at = (np.array([n], np.int64) for n in (*bounds, axis))
    return Become([split.inputs[0], begin, end, at], {}, "SequenceAt of parts made a Slice", "Slice")
