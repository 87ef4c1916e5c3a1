"""Nodes that return their input as it is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from graphc.edit import Array, attribute
from graphc.shapes import fold, symbolic
from graphc.shapes.tensor_rules import axes_of, slice_parameters
from graphc.simplification.rules import Forward, Outcome, Rules

if TYPE_CHECKING:
    from graphc.simplification.sweep import Sweep

RULES = Rules()

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def _forward(node: ir.Node, what: str | None = None) -> Outcome:
    value = node.inputs[0]
    return None if value is None else Forward(value, what or f"{node.op_type} without effect removed")


def _same_shape(node: ir.Node, sweep: Sweep, index: int = 0) -> bool:
    """Whether the output certainly has the shape and dtype of input ``index``."""
    x, y = sweep.facts(node.inputs[index]), sweep.facts(node.outputs[0])
    return x.shape is not None and x.shape == y.shape and x.dtype is not None and x.dtype == y.dtype


@RULES.add("Identity")
def _identity(node: ir.Node, sweep: Sweep) -> Outcome:
    return _forward(node, "Identity removed")


@RULES.add("Dropout")
def _dropout(node: ir.Node, sweep: Sweep) -> Outcome:
    mask_used = len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output())
    if mask_used or fold.may_train(node) or (sweep.facts.version < 7 and not attribute(node, "is_test", 0)):
        return None
    return _forward(node, "Dropout removed")


@RULES.add("Cast", "CastLike")
def _cast(node: ir.Node, sweep: Sweep) -> Outcome:
    x, y = sweep.facts(node.inputs[0]), sweep.facts(node.outputs[0])
    return _forward(node) if x.dtype is not None and x.dtype == y.dtype else None


@RULES.add("Sum", "Max", "Min", "Mean", "Concat")
def _of_one(node: ir.Node, sweep: Sweep) -> Outcome:
    return _forward(node, f"{node.op_type} of one input removed") if len(node.inputs) == 1 else None


@RULES.add("Reshape", "Flatten", "Expand")
def _keeps_shape(node: ir.Node, sweep: Sweep) -> Outcome:
    return _forward(node) if _same_shape(node, sweep) else None


@RULES.add("Squeeze", "Unsqueeze")
def _no_axes(node: ir.Node, sweep: Sweep) -> Outcome:
    # The same shape does not suffice: [1, 1] may lose and keep either axis, but then nothing moves.
    return _forward(node) if _same_shape(node, sweep) else None


@RULES.add("Transpose")
def _keeps_order(node: ir.Node, sweep: Sweep) -> Outcome:
    x = sweep.facts(node.inputs[0])
    perm = attribute(node, "perm")
    if perm is None:
        return _forward(node) if x.rank is not None and x.rank < 2 else None
    if x.shape is None or len(x.shape) != len(perm):
        return _forward(node) if list(perm) == sorted(perm) else None
    # Axes of size 1 may move anywhere without moving an element.
    moved = [axis for axis in perm if x.shape[axis] != 1]
    return _forward(node) if moved == sorted(moved) and _same_shape(node, sweep) else None


@RULES.add("Slice")
def _takes_all(node: ir.Node, sweep: Sweep) -> Outcome:
    x = sweep.facts(node.inputs[0])
    if x.shape is None:
        return None
    parameters = slice_parameters(node, [sweep.facts(v) for v in node.inputs], len(x.shape))
    if parameters is None or any(step != 1 for step in parameters[3]):
        return None
    # With step 1, as many elements as there are can only be all of them.
    return _forward(node) if _same_shape(node, sweep) else None


@RULES.add("Pad")
def _pads_nothing(node: ir.Node, sweep: Sweep) -> Outcome:
    pads = attribute(node, "pads") if len(node.inputs) < 2 else sweep.facts(node.inputs[1]).known
    return _forward(node) if pads is not None and not any(pads) else None


@RULES.add("Tile")
def _tiles_once(node: ir.Node, sweep: Sweep) -> Outcome:
    repeats = sweep.facts(node.inputs[1]).known if len(node.inputs) == 2 else None
    return _forward(node) if repeats is not None and all(times == 1 for times in repeats) else None


@RULES.add("Resize", "Upsample")
def _keeps_size(node: ir.Node, sweep: Sweep) -> Outcome:
    x = sweep.facts(node.inputs[0])
    if attribute(node, "coordinate_transformation_mode") == "tf_crop_and_resize" or x.shape is None:
        return None
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        return _forward(node) if _same_shape(node, sweep) else None
    scales = sweep.facts.array(node.inputs[-1]) if len(node.inputs) in (2, 3) else None
    return _forward(node) if scales is not None and scales.size and np.all(scales == 1) else None


@RULES.add("Add", "Sub", "Mul", "Div", "Pow", "Sum", "And", "Or")
def _neutral(node: ir.Node, sweep: Sweep) -> Outcome:
    if len(node.inputs) != 2:
        return None
    for index in (0, 1):
        if index == 0 and node.op_type in ("Sub", "Div", "Pow"):
            continue
        other = node.inputs[1 - index]
        if other is None or not _same_shape(node, sweep, 1 - index):
            continue
        operand = sweep.facts.array(node.inputs[index])
        if operand is not None and operand.size and _is_neutral(node.op_type, operand):
            what = f"{node.op_type} with a neutral constant removed"
            return Forward(other, what)
    return None


def _is_neutral(operator: str, operand: Array) -> bool:
    """Whether ``operator`` with this operand returns every number bit for bit (a NaN stays a NaN)."""
    whole = operand.dtype.kind in "iub"
    if not whole:
        # Dtypes that numpy does not know itself (bfloat16) need not know what a sign bit is.
        operand = operand.astype(np.float64)
    match operator:
        case "Mul" | "Div" | "Pow":
            return bool(np.all(operand == 1))
        case "Add" | "Sum":
            # -0.0 + 0.0 is +0.0: only -0.0 is neutral for floats.
            return bool(np.all(operand == 0)) and (whole or bool(np.all(np.signbit(operand))))
        case "Sub":
            return bool(np.all(operand == 0)) and (whole or not bool(np.any(np.signbit(operand))))
        case "And":
            return bool(np.all(operand))
    return operator == "Or" and not bool(np.any(operand))


@RULES.add("Clip")
def _no_bounds(node: ir.Node, sweep: Sweep) -> Outcome:
    low, high = attribute(node, "min"), attribute(node, "max")
    floating = sweep.facts(node.inputs[0]).dtype in _FLOATS
    if low is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        low = sweep.facts.scalar(node.inputs[1])
        if low is None:
            return None
    if high is None and len(node.inputs) > 2 and node.inputs[2] is not None:
        high = sweep.facts.scalar(node.inputs[2])
        if high is None:
            return None
    # A missing bound is the dtype's largest finite number: it changes infinities.
    bounded = (low, high) != (-math.inf, math.inf) if floating else (low, high) != (None, None)
    return None if bounded else _forward(node, "Clip without bounds removed")


@RULES.add("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum")
def _reduces_nothing(node: ir.Node, sweep: Sweep) -> Outcome:
    x = sweep.facts(node.inputs[0])
    if x.shape is None or not attribute(node, "keepdims", 1):
        return None
    axes = axes_of(node, [sweep.facts(v) for v in node.inputs], 1, len(x.shape))
    if axes is None:
        return None
    if not axes:
        return _forward(node) if attribute(node, "noop_with_empty_axes", 0) else None
    return _forward(node) if all(x.shape[axis] == 1 for axis in axes) else None


@RULES.add("Where")
def _chooses_always(node: ir.Node, sweep: Sweep) -> Outcome:
    test = sweep.facts.array(node.inputs[0])
    if test is not None and test.size:
        for index, verdict in ((1, np.all(test)), (2, not np.any(test))):
            value = node.inputs[index]
            if verdict and value is not None and _same_shape(node, sweep, index):
                return Forward(value, "Where with a constant condition removed")
    if node.inputs[1] is node.inputs[2] and node.inputs[1] is not None and _same_shape(node, sweep, 1):
        return Forward(node.inputs[1], "Where with equal branches removed")
    return None


@RULES.add("Split")
def _splits_nothing(node: ir.Node, sweep: Sweep) -> Outcome:
    return _forward(node) if len(node.outputs) == 1 and _same_shape(node, sweep) else None


@RULES.add("Gather")
def _gathers_all(node: ir.Node, sweep: Sweep) -> Outcome:
    x, index = sweep.facts(node.inputs[0]), sweep.facts(node.inputs[1])
    if x.shape is None or not x.shape or index.rank != 1 or index.known is None:
        return None
    size = x.shape[attribute(node, "axis", 0) % len(x.shape)]
    return _forward(node) if size == len(index.known) and index.known == tuple(range(len(index.known))) else None


@RULES.add("Abs", "Relu", "Ceil", "Floor", "Round", "Sign", "Not", "Neg")
def _of_itself(node: ir.Node, sweep: Sweep) -> Outcome:
    value = node.inputs[0]
    producer = None if value is None else value.producer()
    if producer is None or producer.domain not in ("", "ai.onnx") or value is None:
        return None
    if node.op_type in ("Not", "Neg"):
        if producer.op_type == node.op_type and producer.inputs[0] is not None:
            return Forward(producer.inputs[0], f"double {node.op_type} removed")
        return None
    if producer.op_type == node.op_type:
        return Forward(value, f"repeated {node.op_type} removed")
    x = sweep.facts(value)
    sizes = [item for item in x.items or () if item is not None]
    if node.op_type == "Abs" and sizes and len(sizes) == len(x.items or ()) and all(map(symbolic.nonnegative, sizes)):
        return _forward(node)
    return None
