"""Which constants of a model are codes of quantized weights, and which are their scales."""

from __future__ import annotations

import onnx_ir as ir

from graphc import edit
from graphc.moves import MOVES


def scales(model: ir.Model) -> dict[ir.Value, ir.Value]:
    """The codes of each scale of a weight that DequantizeLinear makes of constants.

    Both may be turned or looked up on their way there. Left out is what other constants were computed from: where a
    product reads quantized activations, the scale of its 32-bit bias is that of both operands.
    """
    found: dict[ir.Value, ir.Value] = {}
    bound: set[ir.Value] = set()
    for node in edit.nodes(model):
        if not edit.is_op(node, "DequantizeLinear"):
            continue
        codes, scale = (_constant(value) for value in node.inputs[:2])
        if codes is None or scale is None:
            continue
        found[scale] = codes
        if codes.dtype == ir.DataType.INT32 or _meets_activations(node.outputs[0]):
            bound.add(scale)
    return {scale: codes for scale, codes in found.items() if scale not in bound}


def _constant(value: ir.Value | None) -> ir.Value | None:
    """The constant that a value holds elements of."""
    while value is not None and edit.tensor(value) is None:
        node = value.producer()
        value = node.inputs[0] if node is not None and edit.is_op(node, *MOVES) else None
    return value


def _meets_activations(weight: ir.Value) -> bool:
    """Whether a dequantized weight, or a view of it, is multiplied with dequantized activations."""
    for node, _ in weight.uses():
        if edit.is_op(node, *MOVES):
            if any(map(_meets_activations, node.outputs)):
                return True
            continue
        for other in node.inputs:
            source = other.producer() if other is not None else None
            if source is not None and edit.is_op(source, "DequantizeLinear") and _constant(source.inputs[0]) is None:
                return True
    return False
