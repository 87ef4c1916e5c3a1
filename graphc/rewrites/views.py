"""Operators that leave numbers as they are and at most move axes, and where an axis goes through them."""

from __future__ import annotations

import onnx_ir as ir

from graphc import edit
from graphc.rewrites.base import FLOATS

OPERATORS = ("Transpose", "Squeeze", "Unsqueeze", "Cast")

_FLOATS = frozenset(dtype.value for dtype in FLOATS)


def is_view(node: ir.Node | None) -> bool:
    """Whether a node is one of them; a Cast is between floating-point types."""
    if not edit.is_op(node, *OPERATORS):
        return False
    assert node is not None
    return node.op_type != "Cast" or edit.attribute(node, "to") in _FLOATS


def forward(node: ir.Node, rank: int, axis: int) -> tuple[int, int] | None:
    """The rank and place that ``axis`` of the view's input has in its output; None if it is not known."""
    if node.op_type == "Cast":
        return rank, axis
    if node.op_type == "Transpose":
        perm = _perm(node, rank)
        return None if perm is None else (rank, perm.index(axis))
    where = _where(node)
    if where is None:
        return None
    if node.op_type == "Unsqueeze":
        rank += len(where)
        for inserted in sorted(a % rank for a in where):
            axis += inserted <= axis
        return rank, axis
    removed = {a % rank for a in where}
    return None if axis in removed else (rank - len(removed), axis - sum(a < axis for a in removed))


def backward(node: ir.Node, rank: int, axis: int) -> tuple[int, int] | None:
    """The rank and place that ``axis`` of the view's output has in its input; None if it is not known.

    A Cast is passed if it widens: what is computed before in a wider type would lose digits behind it.
    """
    if node.op_type == "Cast":
        source = node.inputs[0].dtype if node.inputs[0] is not None else None
        target = ir.DataType(edit.attribute(node, "to"))
        return (rank, axis) if source in FLOATS and source.bitwidth <= target.bitwidth else None
    if node.op_type == "Transpose":
        perm = _perm(node, rank)
        return None if perm is None else (rank, perm[axis])
    where = _where(node)
    if where is None:
        return None
    if node.op_type == "Unsqueeze":
        inserted = {a % rank for a in where}
        return None if axis in inserted else (rank - len(inserted), axis - sum(a < axis for a in inserted))
    rank += len(where)
    for removed in sorted(a % rank for a in where):
        axis += removed <= axis
    return rank, axis


def _perm(node: ir.Node, rank: int) -> tuple[int, ...] | None:
    perm: tuple[int, ...] = edit.attribute(node, "perm", tuple(reversed(range(rank))))
    return perm if len(perm) == rank else None


def _where(node: ir.Node) -> list[int] | None:
    """The axes of Squeeze and Unsqueeze; None where they are computed, or are all axes of one element."""
    found = edit.constant(node.inputs[1], limit=64) if len(node.inputs) > 1 else None
    return None if found is None else [int(a) for a in found.reshape(-1)]
