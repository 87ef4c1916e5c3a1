"""A weight whose codes the session turns into numbers once, when it loads the model, in the place of a product with
codes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.lowering.site import Site
from graphc.lowering.steps import Step, between, constant, ints
from graphc.moves import VIEWS
from graphc.recognition.graph import Graph
from graphc.rewrites.base import Refused
from graphc.runtime import BIG

_CONVOLUTIONS = ("Conv", "ConvTranspose")
"""What the session decodes a weight for whenever it runs. Alone, without its neighbours, the faster layout that a
constant weight makes possible costs more than it brings, so that nothing can be timed."""

_READERS = (*_CONVOLUTIONS, "Gemm", "MatMul")

_MOVING = ("MaxPool", "Transpose", *VIEWS)
"""What the session moves behind products of integers."""

_CODES = {ir.DataType[f"{sign}INT{bits}"] for sign in ("", "U") for bits in (4, 8)}


def find(node: ir.Node, graph: Graph) -> Site | None:
    """DequantizeLinear of a constant that one product with float activations reads.

    ONNX Runtime keeps what DequantizeLinear reads as it is: it multiplies with codes, which suits few rows, or decodes
    a convolution's weight whenever it runs. What it computes from constants by other operators it computes once.
    """
    reader = _reader(node)
    codes, scale = node.inputs[:2]
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    held, scales = edit.tensor(codes), edit.constant(scale)
    if reader is None or codes is None or scale is None or held is None or scales is None:
        return None
    if held.dtype not in _CODES or scales.dtype != np.float32 or (zero is not None and edit.tensor(zero) is None):
        return None
    if _decoded(graph) > BIG:
        raise Refused(f"all weights together would take more than {BIG >> 20} MB in float32")
    shape, out = held.shape.numpy(), node.outputs[0]
    axis, block = edit.attribute(node, "axis", 1) % max(len(shape), 1), edit.attribute(node, "block_size", 0)
    # Numbers that share a scale get an axis of their own.
    split, place = list(shape), [1] * len(shape)
    if block:
        if shape[axis] % block:
            raise Refused("its last block is shorter than the others")
        split[axis : axis + 1] = [shape[axis] // block, block]
        place = [*scales.shape[: axis + 1], 1, *scales.shape[axis + 1 :]]
    elif scales.size > 1:
        place[axis] = scales.size
    wide = between(f"{out.name}.wide", ir.DataType.FLOAT, tuple(shape))
    steps, value = [Step("Cast", (codes,), (wide,), {"to": int(ir.DataType.FLOAT)})], wide
    if split != list(shape):
        value = between(f"{out.name}.blocks", ir.DataType.FLOAT, tuple(split))
        steps.append(Step("Reshape", (wide, ints(*split)), (value,)))
    if zero is not None:
        points = edit.constant(zero)
        assert points is not None
        away = between(f"{out.name}.around", ir.DataType.FLOAT, tuple(split))
        steps.append(Step("Sub", (value, _beside(zero, points, place)), (away,)))
        value = away
    product = out if split == list(shape) else between(f"{out.name}.scaled", ir.DataType.FLOAT, tuple(split))
    steps.append(Step("Mul", (value, _beside(scale, scales, place)), (product,)))
    if product is not out:
        steps.append(Step("Reshape", (product, ints(*shape)), (out,)))
    return Site(
        "decoded-weight",
        "Mul",
        (node,),
        (reader.inputs[0], *node.inputs),
        (out,),
        {},
        "",
        reader,
        steps=tuple(steps),
        known=edit.is_op(reader, *_CONVOLUTIONS),
    )


def _reader(node: ir.Node) -> ir.Node | None:
    """The product that alone reads what a node gives as its weight, if it is none of integers."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0].idx != 1 or node.outputs[0].is_graph_output() or node.graph is not uses[0].node.graph:
        return None
    reader = uses[0].node
    x = reader.inputs[0]
    if not edit.is_op(reader, *_READERS) or x is None or edit.tensor(x) is not None:
        return None
    made = x.producer()
    while made is not None and edit.is_op(made, *_MOVING) and made.inputs[0] is not None:
        made = made.inputs[0].producer()
    return None if edit.is_op(made, "DequantizeLinear") else reader


def _decoded(graph: Graph) -> int:
    """Bytes of all constants behind DequantizeLinear, as float32."""
    found = [edit.tensor(node.inputs[0]) for node in graph.model.graph if edit.is_op(node, "DequantizeLinear")]
    return sum(4 * held.size for held in found if held is not None)


def _beside(value: ir.Value, array: edit.Array, place: list[int]) -> ir.Value:
    """Scales or zero points as floats, with an axis for each of what they meet."""
    return constant(f"{value.name}.spread", ir.tensor(array.astype(np.float32).reshape(place)))
