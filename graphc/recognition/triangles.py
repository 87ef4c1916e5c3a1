"""Conditions that are a lower triangle: true, or false, where a key does not come after a query."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array
from graphc.moves import MOVES, VIEWS
from graphc.recognition.graph import Graph

_EARLIER = {"LessOrEqual": (1, 0), "GreaterOrEqual": (0, 1)}
"""Comparisons that hold where the key comes not after the query: which operand is the query, which the key."""

_LATER = {"Less": (0, 1), "Greater": (1, 0)}
"""Comparisons that hold where the key comes after the query."""

_LARGEST = 1 << 22
_DEEPEST = 12


def is_lower_triangle(value: ir.Value, keeps: bool, graph: Graph) -> bool:
    """Whether a condition equals ``keeps`` in the lower triangle of its last two axes, and only there.

    It must be the same along all other axes. The two axes are as long as each other, which the caller checks.
    """
    for _ in range(_DEEPEST):
        held = edit.constant(value, _LARGEST)
        if held is not None:
            if held.ndim < 2 or held.size != held.shape[-1] * held.shape[-2]:
                return False
            rows = held.reshape(held.shape[-2:]).astype(bool)
            lower: Array = np.tri(*rows.shape, dtype=bool)
            return bool((rows == (lower == keeps)).all())
        node = value.producer()
        if node is None or not node.inputs or node.inputs[0] is None:
            return False
        if edit.is_op(node, "Slice"):
            # The upper left corner of a triangle is one.
            starts = edit.constant(node.inputs[1], 8) if len(node.inputs) > 1 else None
            steps = edit.constant(node.inputs[4], 8) if len(node.inputs) > 4 else None
            if starts is None or starts.any() or (steps is not None and (steps != 1).any()):
                return False
        elif edit.is_op(node, "Trilu"):
            upper = edit.attribute(node, "upper", 1)
            shift = edit.scalar(node.inputs[1]) if len(node.inputs) > 1 else 0
            return shift == upper and keeps != bool(upper) and _all_true(node.inputs[0])
        elif edit.is_op(node, "Not"):
            keeps = not keeps
        elif edit.is_op(node, "And"):
            other = _beside_all_true(node)
            if other is None:
                return False
            value = other
            continue
        elif not edit.is_op(node, "Identity", "Cast") and not _adds_axes_in_front(node, graph):
            return _compares(node, keeps, graph)
        value = node.inputs[0]
    return False


def _beside_all_true(node: ir.Node) -> ir.Value | None:
    """The operand of an And whose other one is true everywhere."""
    for one, other in (tuple(node.inputs), tuple(reversed(node.inputs))):
        if other is not None and _all_true(one):
            return other
    return None


def _all_true(value: ir.Value | None) -> bool:
    """Whether no element of a value is 0."""
    node = value.producer() if value is not None else None
    if edit.is_op(node, "ConstantOfShape") and node is not None:
        filled = node.attributes.get("value")
        return filled is not None and bool(filled.as_tensor().numpy().all())
    if edit.is_op(node, "Cast", *MOVES) and node is not None:
        return _all_true(node.inputs[0])
    held = edit.constant(value, _LARGEST)
    return held is not None and bool(held.all())


def _adds_axes_in_front(node: ir.Node, graph: Graph) -> bool:
    """Whether a view keeps the last two axes as they are."""
    before, after = graph.dims(node.inputs[0]), graph.dims(node.outputs[0])
    if not edit.is_op(node, "Unsqueeze", "Reshape", "Expand") or before is None or after is None or len(before) < 2:
        return False
    return before[-2:] == after[-2:] and all(dim == 1 for dim in before[:-2])


def _compares(node: ir.Node, keeps: bool, graph: Graph) -> bool:
    """Whether positions are compared with the same positions, turned."""
    sides = (_EARLIER if keeps else _LATER).get(node.op_type)
    if sides is None or len(node.inputs) != 2:
        return False
    query, key = (node.inputs[i] for i in sides)
    columns, rows = graph.dims(query), graph.dims(key)
    if not columns or not rows or len(columns) < 2 or columns[-1] != 1 or columns[-2] == 1:
        return False
    if rows[-1] == 1 or any(dim != 1 for dim in (*rows[:-1], *columns[:-2])):
        return False
    counted = _counted(query), _counted(key)
    return counted[0] is not None and counted[0] is counted[1]


def _counted(value: ir.Value | None) -> ir.Value | None:
    """The Range that a value is a view of."""
    for _ in range(_DEEPEST):
        node = value.producer() if value is not None else None
        if node is None or edit.is_op(node, "Range"):
            return value if node is not None else None
        if not edit.is_op(node, "Cast", *VIEWS):
            return None
        value = node.inputs[0]
    return None
