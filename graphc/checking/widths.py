"""Symbolic dimensions that have only one size with which a model runs: that of a weight they are multiplied with."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from graphc import edit

_SAME = (
    "Abs",
    "Cast",
    "CastLike",
    "Clip",
    "Identity",
    "LayerNormalization",
    "Neg",
    "Relu",
    "Sigmoid",
    "Softmax",
    "Tanh",
)
_BOTH = ("Add", "Div", "Max", "Min", "Mul", "Sub")


def fixed(model: ir.Model) -> dict[str, int]:
    """The sizes that weights demand of the symbolic dimensions of the inputs, by name: often the channels of pictures.

    They are read off the first readers of each input; what later readers demand is not seen.
    """
    found: dict[str, int] = {}
    for value in model.graph.inputs:
        if value.is_initializer() or value.shape is None:
            continue
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, ir.SymbolicDim) and dim.value and dim.value not in found:
                size = _demanded(value, axis, len(value.shape))
                if size is not None:
                    found[dim.value] = size
    return found


def _demanded(value: ir.Value, axis: int, rank: int) -> int | None:
    """The size of an axis that a reader of a value demands."""
    work, seen = [(value, axis)], {value}
    while work:
        carrier, at = work.pop()
        for node, position in carrier.uses():
            size = _of(node, position, at, rank)
            if size is not None:
                return size
            for after, new in _onwards(node, position, at, rank):
                if after not in seen:
                    seen.add(after)
                    work.append((after, new))
    return None


def _of(node: ir.Node, position: int, axis: int, rank: int) -> int | None:
    """The size that one reader demands of an axis of one of its inputs."""
    if edit.is_op(node, "Conv", "ConvTranspose") and position == 0 and axis == 1:
        shape = _sizes(node.inputs[1])
        if shape is None:
            return None
        return shape[0] if node.op_type == "ConvTranspose" else shape[1] * int(edit.attribute(node, "group", 1))
    if edit.is_op(node, "MatMul") and axis == rank - 1 and position == 0:
        shape = _sizes(node.inputs[1])
        return shape[-2] if shape is not None and len(shape) > 1 else None
    if edit.is_op(node, "Gemm") and position == 0 and axis == 1 - edit.attribute(node, "transA", 0):
        shape = _sizes(node.inputs[1])
        return None if shape is None else shape[edit.attribute(node, "transB", 0)]
    if edit.is_op(node, *_BOTH):
        shape = _sizes(node.inputs[1 - position])
        place = axis - rank if shape is not None and rank - axis <= len(shape) <= rank else None
        if shape is not None and place is not None and shape[place] > 1:
            return shape[place]
    return None


def _onwards(node: ir.Node, position: int, axis: int, rank: int) -> Iterator[tuple[ir.Value, int]]:
    """The results that have an axis as it is, and where."""
    if edit.is_op(node, *_SAME) and position == 0:
        yield node.outputs[0], axis
    elif edit.is_op(node, "Transpose"):
        perm = edit.attribute(node, "perm") or tuple(reversed(range(rank)))
        yield node.outputs[0], perm.index(axis)
    elif edit.is_op(node, *_BOTH):
        shape = _sizes(node.inputs[1 - position])
        if shape is not None and len(shape) <= rank:
            yield node.outputs[0], axis


def _sizes(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a constant, or of what has only numbers as its shape and is computed."""
    held = edit.tensor(value)
    if held is not None:
        return tuple(held.shape.numpy())
    if value is None or value.is_graph_input() or value.shape is None or not value.shape.is_static():
        return None
    return tuple(value.shape.numpy())
