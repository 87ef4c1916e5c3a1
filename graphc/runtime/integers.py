"""What sessions need to compute products of 8-bit integers right.

Without VNNI, ONNX Runtime adds pairs of products of uint8 and int8 in 16 bits, which saturate where weights are large
(:mod:`graphc.runtime.pairs`).
``session.x64quantprecision`` makes it compute with uint8 weights instead, which it does when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from graphc import edit
from graphc.edit import Array
from graphc.runtime import pairs

OPTION = "session.x64quantprecision"

PIECE = 1 << 22
"""Weights that are looked at at once."""

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
    large = any(_is_large(node, *weight) for node in edit.nodes(model) for weight in _weights(node))
    return {OPTION: "1"} if large else {}


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


def _weights(node: ir.Node) -> Iterator[tuple[ir.Value, bool | None]]:
    """The weights that a node multiplies with activations of uint8, both in integers.

    With each goes whether matrices lie as (outputs, inputs); None if that is not known.
    """
    turned = bool(edit.attribute(node, "transB", 0))
    known = _OPERATORS.get((node.domain, node.op_type))
    if known is not None:
        places, zero = known
        point = node.inputs[zero] if zero is not None and zero < len(node.inputs) else None
        if point is None or point.dtype != ir.DataType.INT8:
            yield from ((value, turned) for i in places if (value := node.inputs[i]) is not None)
    elif edit.is_op(node, "Conv", "Gemm", "MatMul"):
        sources = [_dequantized(value, False) for value in node.inputs[:2]]
        # Either may be the weight.
        if None not in sources and not all(source is not None and _signed(source[0]) for source in sources):
            for i, source in enumerate(sources):
                if source is not None and source[0].inputs[0] is not None:
                    flipped = None if i == 0 or source[1] is None else source[1] != turned
                    yield source[0].inputs[0], flipped


def _dequantized(value: ir.Value | None, flipped: bool | None) -> tuple[ir.Node, bool | None] | None:
    """The DequantizeLinear that a value comes from, and whether a matrix is turned on the way; None if from nothing."""
    node = value.producer() if value is not None else None
    if node is not None and edit.is_op(node, "Transpose"):
        plain = edit.attribute(node, "perm", (1, 0)) == (1, 0)
        return _dequantized(node.inputs[0], not flipped if plain and flipped is not None else None)
    return (node, flipped) if node is not None and edit.is_op(node, "DequantizeLinear") else None


def _signed(node: ir.Node) -> bool:
    """Whether the codes of a DequantizeLinear are int8."""
    point = node.inputs[2] if len(node.inputs) > 2 else None
    codes = node.inputs[0]
    dtype = point.dtype if point is not None else codes.dtype if codes is not None else None
    return dtype == ir.DataType.INT8


def _is_large(node: ir.Node, value: ir.Value, flipped: bool | None) -> bool:
    """Whether int8 weights may be too large for sums in 16 bits; those that are computed may."""
    if value.dtype not in (None, ir.DataType.INT8):
        return False
    held = edit.tensor(value)
    if held is None:
        return value.dtype == ir.DataType.INT8
    found = bool(_largest(node, held.numpy(), flipped) > pairs.MOST)
    edit.release(held)
    return found


def _largest(node: ir.Node, codes: Array, flipped: bool | None) -> int:
    """What two weights may come to whose products a node adds in 16 bits."""
    if not codes.size:
        return 0
    if flipped is None or codes.ndim < 2:
        return 2 * max(int(codes.max()), -int(codes.min()))
    ordered = pairs.rows(node, codes, flipped=flipped)
    if ordered is None:
        return 0
    step = max(1, PIECE * len(ordered) // codes.size)
    return max(int(pairs.largest(ordered[i : i + step]).max()) for i in range(0, len(ordered), step))
