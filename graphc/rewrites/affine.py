"""Operators that scale and shift a tensor by constants, read as ``y = x * scale + shift`` along one axis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array
from graphc.rewrites.base import FLOATS, Refused

OPERATORS = ("BatchNormalization", "Add", "Sub", "Mul", "Div", "Neg", "Sum")

LONGEST = 1 << 17
"""Elements of a constant beyond which it is certainly not one number per channel."""


@dataclass(frozen=True)
class Affine:
    """``y = x * scale + shift``, where both are constant and vary along at most one axis of ``x``.

    Attributes:
        node: The node that computes it.
        x: Its variable operand; ``y`` has the same shape.
        scale: float64, of shape ``()`` or ``(n,)``.
        shift: float64, of shape ``()`` or ``(n,)``.
        axis: The axis of ``x`` with ``n`` elements: counted from the first if positive, from the last if
            negative; None if both numbers are the same everywhere.
        rank: The least number of axes that ``x`` must have for ``y`` to have the same shape.
    """

    node: ir.Node
    x: ir.Value
    scale: Array
    shift: Array
    axis: int | None
    rank: int

    @property
    def is_batchnorm(self) -> bool:
        return self.node.op_type == "BatchNormalization"

    @property
    def size(self) -> int:
        return max(self.scale.size, self.shift.size)

    def axis_in(self, rank: int) -> int | None:
        """The axis counted from the first in a tensor of this rank.

        Raises:
            Refused: The tensor has fewer axes than the constant.
        """
        if rank < self.rank:
            raise Refused("the constant has more axes than the tensor")
        return None if self.axis is None else self.axis % rank


def affine(node: ir.Node) -> Affine | None:
    """Read a node as an affine map; None if it is something else, e.g. has no constant operand.

    Raises:
        Refused: It is an affine map, but not along one axis, or not a constant or finite one.
    """
    if node.domain or node.op_type not in OPERATORS:
        return None
    found = _batchnorm(node) if node.op_type == "BatchNormalization" else _arithmetic(node)
    if found is not None and not (np.isfinite(found.scale).all() and np.isfinite(found.shift).all()):
        raise Refused("the constants are not finite")
    return found


def _batchnorm(node: ir.Node) -> Affine | None:
    if edit.attribute(node, "training_mode", 0):
        raise Refused("the BatchNormalization is in training mode")
    if any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
        raise Refused("the statistics of the BatchNormalization are read")
    if edit.attribute(node, "spatial", 1) != 1:
        raise Refused("the BatchNormalization has statistics for every position")
    x, *parameters = node.inputs[:5]
    arrays = [edit.constant(value, limit=LONGEST) for value in parameters]
    if x is None or len(arrays) != 4 or any(a is None or a.ndim != 1 for a in arrays):
        raise Refused("a parameter of the BatchNormalization is not constant")
    gamma, beta, mean, variance = (np.asarray(a, dtype=np.float64) for a in arrays)
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(variance + edit.attribute(node, "epsilon", 1e-5))
        return Affine(node, x, scale, beta - mean * scale, axis=1, rank=2)


def _arithmetic(node: ir.Node) -> Affine | None:
    inputs = node.inputs
    if node.op_type == "Neg":
        x = inputs[0]
        if x is None or x.dtype not in (None, *FLOATS):
            return None
        return Affine(node, x, np.asarray(-1.0), np.asarray(0.0), None, 0)
    if len(inputs) != 2 or inputs[0] is None or inputs[1] is None:
        return None
    left, right = edit.tensor(inputs[0]), edit.tensor(inputs[1])
    if (left is None) == (right is None):
        return None
    x, held = (inputs[0], right) if left is None else (inputs[1], left)
    assert held is not None
    if held.dtype not in FLOATS or held.size == 0 or (node.op_type == "Div" and left is not None):
        return None
    long = [i - len(held.shape) for i, dim in enumerate(held.shape) if dim != 1]
    if len(long) > 1 or held.size > LONGEST:
        raise Refused("the constant varies along more than one axis")
    axis = long[0] if long else None
    c: Array = held.numpy().astype(np.float64).reshape(-1 if long else ())
    one, zero = np.asarray(1.0), np.asarray(0.0)
    scale: Array
    shift: Array
    with np.errstate(all="ignore"):
        match node.op_type:
            case "Add" | "Sum":
                scale, shift = one, c
            case "Sub":
                scale, shift = (one, -c) if left is None else (-one, c)
            case "Mul":
                scale, shift = c, zero
            case _:
                scale, shift = one / c, zero
    return Affine(node, x, np.asarray(scale), np.asarray(shift), axis, len(held.shape))
