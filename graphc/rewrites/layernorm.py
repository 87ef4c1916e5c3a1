"""Layer normalisation written out becomes LayerNormalization, which every runtime computes in one go."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.rewrites.base import FLOATS, Refused, Rewriter, Rule, dims, sole_reader


def recognise(node: ir.Node, rewriter: Rewriter) -> str | None:
    """Replace ``(x - mean(x)) / sqrt(mean((x - mean(x)) ** 2) + eps) * scale + bias`` around a Sqrt."""
    found = _statistics(node)
    if found is None:
        return None
    x, centred, nodes, eps, axis = found
    quotient = _quotient(node, centred, nodes)
    if quotient is None:
        return None
    inside = {*nodes, *quotient}
    for inner in inside - {quotient[-1]}:
        for value in inner.outputs:
            if value.is_graph_output() or any(use.node not in inside for use in value.uses()):
                raise Refused("a part of the layer normalisation is read elsewhere")
    shape = rewriter.shape(x)
    if shape is None or not isinstance(shape[-1], int):
        raise Refused("the size of the normalised axis is not known")
    if axis % len(shape) != len(shape) - 1:
        raise Refused("the normalised axis is not the last")
    size = shape[-1]
    end, scale, bias = _scale_and_bias(quotient[-1], size)
    dtype = rewriter.dtype(x)
    if dtype is None or dtype not in FLOATS:
        return None
    if scale is None:
        ones = ir.tensor(np.ones(size, dtype=dtype.numpy()), dtype=dtype)
        scale = rewriter.constant(end[-1], ones, f"{end[-1].outputs[0].name}.scale")
    last = end[-1]
    inputs = [x, _flat(scale, last, rewriter)]
    if bias is not None:
        inputs.append(_flat(bias, last, rewriter))
    rewriter.supersede(last, "LayerNormalization", inputs, {"axis": -1, "epsilon": eps})
    for each in dict.fromkeys((*reversed(end), *reversed(quotient), *nodes)):
        if each.graph is not None:
            rewriter.drop(each)
    return "LayerNormalization recognised"


def _statistics(root: ir.Node) -> tuple[ir.Value, ir.Value, list[ir.Node], float, int] | None:
    """From the Sqrt back: x, x - mean(x), the nodes that the result needs (last first), epsilon, the axis."""
    add = _producer(root.inputs[0], "Add")
    if add is None:
        return None
    eps, variance = _with_number(add)
    mean_of_squares = _producer(variance, "ReduceMean")
    if eps is None or mean_of_squares is None:
        return None
    squares = _producer(mean_of_squares.inputs[0], "Pow", "Mul")
    if squares is None:
        return None
    centred = squares.inputs[0]
    if squares.op_type == "Pow" and edit.scalar(squares.inputs[1]) != 2:
        return None
    if squares.op_type == "Mul" and squares.inputs[1] is not centred:
        return None
    subtract = _producer(centred, "Sub")
    if subtract is None or centred is None:
        return None
    x = subtract.inputs[0]
    mean = _producer(subtract.inputs[1], "ReduceMean")
    if mean is None or x is None or mean.inputs[0] is not x:
        return None
    axes = [_axis(mean), _axis(mean_of_squares)]
    if axes[0] is None or axes[0] != axes[1]:
        return None
    return x, centred, [root, add, mean_of_squares, squares, subtract, mean], eps, axes[0]


def _quotient(root: ir.Node, centred: ir.Value, nodes: list[ir.Node]) -> list[ir.Node] | None:
    """The Div of the centred value by the root, or the Mul with its Reciprocal, from the first node to the last."""
    try:
        reader = sole_reader(root.outputs[0])
        if edit.is_op(reader, "Div") and tuple(reader.inputs) == (centred, root.outputs[0]):
            return [reader]
        if edit.is_op(reader, "Reciprocal"):
            product = sole_reader(reader.outputs[0])
            if edit.is_op(product, "Mul") and set(product.inputs) == {centred, reader.outputs[0]}:
                return [reader, product]
    except Refused:
        return None
    return None


def _scale_and_bias(last: ir.Node, size: int) -> tuple[list[ir.Node], ir.Value | None, ir.Value | None]:
    """The nodes from ``last`` to the end of the normalisation, and its scale and bias where they follow."""
    nodes, found = [last], {}
    for operator in ("Mul", "Add"):
        try:
            reader = sole_reader(nodes[-1].outputs[0])
        except Refused:
            break
        constant = _vector(reader, operator, size)
        if constant is None:
            break
        nodes.append(reader)
        found[operator] = constant
    if "Mul" not in found and last.outputs[0].uses():
        try:
            reader = sole_reader(last.outputs[0])
        except Refused:
            return [last], None, None
        constant = _vector(reader, "Add", size)
        if constant is not None:
            return [last, reader], None, constant
    return nodes, found.get("Mul"), found.get("Add")


def _vector(node: ir.Node, operator: str, size: int) -> ir.Value | None:
    """The operand of a node that is a constant vector of this size."""
    if not edit.is_op(node, operator):
        return None
    for value in node.inputs:
        held = edit.tensor(value)
        if held is not None and held.size == size and held.shape and held.shape[-1] == size:
            return value
    return None


def _flat(value: ir.Value, before: ir.Node, rewriter: Rewriter) -> ir.Value:
    """The constant as a vector."""
    held = edit.tensor(value)
    if held is None or len(held.shape) == 1:
        return value
    flat = held.numpy().reshape(-1)
    return rewriter.constant(before, ir.Tensor(flat, dtype=held.dtype), f"{value.name}.flat")


def _producer(value: ir.Value | None, *operators: str) -> ir.Node | None:
    producer = value.producer() if value is not None else None
    return producer if edit.is_op(producer, *operators) else None


def _with_number(node: ir.Node) -> tuple[float | None, ir.Value | None]:
    """The constant number and the other operand of a node of two."""
    for value, other in (tuple(node.inputs[:2]), tuple(reversed(node.inputs[:2]))):
        held = edit.tensor(other)
        if held is not None and held.size == 1 and len(dims(held)) <= 1:
            return float(edit.scalar(other) or 0), value
    return None, None


def _axis(node: ir.Node) -> int | None:
    """The only axis of a ReduceMean that keeps it."""
    if edit.attribute(node, "keepdims", 1) != 1:
        return None
    axes = edit.attribute(node, "axes")  # up to opset 17
    if axes is None and len(node.inputs) > 1:
        found = edit.constant(node.inputs[1], limit=8)
        axes = None if found is None else tuple(int(a) for a in found.reshape(-1))
    return axes[0] if axes is not None and len(axes) == 1 else None


RULES = (Rule({"layer-norm": "Layer normalisation written out becomes LayerNormalization."}, ("Sqrt",), recognise),)
