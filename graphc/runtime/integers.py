"""What sessions need to compute products of 8-bit integers right.

Without VNNI, ONNX Runtime adds pairs of products of uint8 and int8 in 16 bits, which saturate where weights are large.
``session.x64quantprecision`` makes it compute with uint8 weights instead, which it does when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from graphc import edit

OPTION = "session.x64quantprecision"

SAFE = 64
"""Up to this size of weights, pairs of their products with uint8 have room in 16 bits."""

_OPERATORS = {
    ("", "ConvInteger"): ((1,), 2),
    ("", "MatMulInteger"): ((1,), 2),
    ("", "QLinearConv"): ((3,), 2),
    ("", "QLinearMatMul"): ((3,), 2),
    ("com.microsoft", "DynamicQuantizeLSTM"): ((1, 2), None),
    ("com.microsoft", "DynamicQuantizeMatMul"): ((1,), None),
    ("com.microsoft", "MatMulIntegerToFloat"): ((1,), 4),
    ("com.microsoft", "QAttention"): ((1,), 6),
    ("com.microsoft", "QGemm"): ((3,), 2),
}
"""Operators on integers: the inputs that are weights, and the one that is the zero point of the activation, whose dtype
is that of its codes; None where they are always uint8."""

_SMALL = 1 << 16
"""Elements up to which a constant of 8 bits may be a zero point."""


def session_options(model: ir.Model) -> dict[str, str]:
    """What a session needs for a model to compute what it says."""
    return {OPTION: "1"} if any(_is_large(value) for node in edit.nodes(model) for value in _weights(node)) else {}


def part(model: ir.Model) -> None:
    """Give every reader its own zero points.

    With the option, ONNX Runtime 1.31 makes a uint8 one of each zero point of a weight, for each weight again and under
    the same name: a model in which two weights share one does not load.
    """
    names: edit.Names | None = None
    seen: set[ir.Value] = set()
    for node in list(edit.nodes(model)):
        if (node.domain, node.op_type) not in _OPERATORS and not edit.is_op(node, "DequantizeLinear"):
            continue
        for i, value in enumerate(node.inputs):
            held = edit.tensor(value)
            if value is None or held is None or held.size > _SMALL or held.dtype not in _BYTES:
                continue
            if value in seen:
                names = names or edit.Names(model)
                node.replace_input_with(i, edit.initializer(model.graph, held, names.fresh(f"{value.name}.copy")))
            seen.add(value)


_BYTES = (ir.DataType.INT8, ir.DataType.UINT8)


def _weights(node: ir.Node) -> Iterator[ir.Value]:
    """The weights that a node multiplies with activations of uint8, both in integers."""
    known = _OPERATORS.get((node.domain, node.op_type))
    if known is not None:
        places, zero = known
        point = node.inputs[zero] if zero is not None and zero < len(node.inputs) else None
        if point is None or point.dtype != ir.DataType.INT8:
            yield from (value for i in places if (value := node.inputs[i]) is not None)
    elif edit.is_op(node, "Conv", "Gemm", "MatMul"):
        sources = [_dequantized(value) for value in node.inputs[:2]]
        if None not in sources:
            # Either may be the weight.
            signed = [source is not None and _signed(source) for source in sources]
            if not all(signed):
                yield from (
                    source.inputs[0] for source in sources if source is not None and source.inputs[0] is not None
                )


def _dequantized(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that a value comes from, or None."""
    node = value.producer() if value is not None else None
    if node is not None and edit.is_op(node, "Transpose"):
        return _dequantized(node.inputs[0])
    return node if node is not None and edit.is_op(node, "DequantizeLinear") else None


def _signed(node: ir.Node) -> bool:
    """Whether the codes of a DequantizeLinear are int8."""
    point = node.inputs[2] if len(node.inputs) > 2 else None
    codes = node.inputs[0]
    dtype = point.dtype if point is not None else codes.dtype if codes is not None else None
    return dtype == ir.DataType.INT8


def _is_large(value: ir.Value) -> bool:
    """Whether int8 weights may be too large for sums in 16 bits; those that are computed may."""
    if value.dtype not in (None, ir.DataType.INT8):
        return False
    held = edit.tensor(value)
    if held is None:
        return value.dtype == ir.DataType.INT8
    array = held.numpy()
    found = bool(array.size) and bool(np.max(array) > SAFE or np.min(array) < -SAFE)
    edit.release(held)
    return found
