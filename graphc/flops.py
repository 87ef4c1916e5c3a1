"""Floating-point operations of a model, by node: two per multiply-accumulate, one per element otherwise.

Shapes come from inference with dynamic dimensions bound to numbers. What has no known shape counts as zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx_ir as ir

from graphc import edit

MOVES = frozenset(
    """
    Cast Concat Constant ConstantOfShape DepthToSpace Expand Flatten Gather GatherElements GatherND Identity If Loop
    Pad Reshape Scan ScatterElements ScatterND Shape Size Slice SpaceToDepth Split Squeeze Tile Transpose Unsqueeze
    """.split()
)
"""Operators that compute nothing, or whose bodies are counted by their own nodes."""


def bind(model: ir.Model, sizes: Mapping[str, int] | None = None, default: int = 1) -> ir.Model:
    """A clone with every dynamic input dimension a number, and shapes inferred from that.

    Args:
        model: Any model; it is not changed.
        sizes: Numbers by dimension name.
        default: The number of all other dynamic dimensions.
    """
    from graphc import shapes

    clone = model.clone()
    for value in clone.graph.inputs:
        if value.shape is not None:
            dims = [d if isinstance(d, int) else (sizes or {}).get(d.value or "", default) for d in value.shape]
            value.shape = ir.Shape(dims)
    for value in clone.graph.outputs:
        value.shape = None
    shapes.infer(clone)
    return clone


def node_flops(node: ir.Node) -> int:
    """FLOPs of one node whose values have static shapes; 0 where a shape is not known."""
    if node.op_type in MOVES:
        return 0
    out = _size(node.outputs[0] if node.outputs else None)
    inputs = [_dims(v) for v in node.inputs]
    first = inputs[0] if inputs else None
    second = inputs[1] if len(inputs) > 1 else None
    match node.op_type:
        case "Conv" | "FusedConv" | "ConvInteger" | "QLinearConv":
            weight = inputs[3] if node.op_type == "QLinearConv" else second
            return 2 * out * math.prod(weight[1:]) if weight else 0
        case "ConvTranspose":
            return 2 * math.prod(first) * math.prod(second[1:]) if first and second else 0
        case "MatMul" | "MatMulInteger" | "FusedMatMul":
            return 2 * out * first[-1] if first else 0
        case "Gemm" | "FusedGemm":
            inner = first[0 if edit.attribute(node, "transA", 0) else 1] if first else 0
            return 2 * out * inner
        case "Einsum":
            return _einsum(node, inputs)
        case "LSTM" | "GRU" | "RNN":
            # Every step multiplies the input and the state with W and R (directions, gates * hidden, ...).
            recurrent = inputs[2] if len(inputs) > 2 else None
            if not first or not second or not recurrent:
                return 0
            return 2 * first[0] * first[1] * (math.prod(second) + math.prod(recurrent))
        case "Attention" if node.domain in ("", "ai.onnx"):
            return _attention(inputs, node)
        case "MatMulNBits":
            return 2 * out * int(edit.attribute(node, "K", 0))
    return out


def _attention(inputs: list[tuple[int, ...] | None], node: ir.Node) -> int:
    """Q K^T and P V for ``(batch, heads, length, dim)`` or ``(batch, length, heads * dim)`` operands."""
    if len(inputs) < 3 or not inputs[0] or not inputs[1] or not inputs[2]:
        return 0
    query, keys, values = inputs[0], inputs[1], inputs[2]
    if len(query) == 4:
        return 2 * math.prod(query[:3]) * keys[2] * (query[3] + values[3])
    heads, kv_heads = (
        int(edit.attribute(node, "q_num_heads", 1)),
        int(edit.attribute(node, "kv_num_heads", 1)),
    )
    return 2 * query[0] * query[1] * keys[1] * (query[2] + heads * (values[2] // max(kv_heads, 1)))


def _einsum(node: ir.Node, inputs: list[tuple[int, ...] | None]) -> int:
    """The product of all index sizes, twice."""
    left = str(edit.attribute(node, "equation", "")).replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for letters, dims in zip(left, inputs, strict=False):
        if dims is None or "." in letters or len(letters) != len(dims):
            return 0
        sizes.update(zip(letters, dims, strict=True))
    return 2 * math.prod(sizes.values())


def _dims(value: ir.Value | None) -> tuple[int, ...] | None:
    if value is None or value.shape is None:
        return None
    dims = [d for d in value.shape if isinstance(d, int)]
    return tuple(dims) if len(dims) == len(value.shape) else None


def _size(value: ir.Value | None) -> int:
    dims = _dims(value)
    return math.prod(dims) if dims is not None else 0
