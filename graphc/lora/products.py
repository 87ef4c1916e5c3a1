"""Products with constant weights, read as one kind of thing: MatMul, Gemm, Conv and Gather."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array, attribute, is_op
from graphc.rewrites.base import FLOATS, dims
from graphc.rewrites.weights import reading

Kind = Literal["rows", "columns", "image", "table"]
"""How a product reads its data: rows of channels, columns (Gemm's transA), an image (Conv), or indices of rows."""

OVERRIDABLE = "the weights can be overridden by the caller"
INPUT = "the weights are an input of the graph"
QUANTIZED = "the weight is quantized: dequantize first"


@dataclass(frozen=True)
class Weight:
    """A constant behind Transpose, Identity and Cast.

    Attributes:
        value: The constant itself, or what stands in its place.
        held: Its tensor; None where ``problem`` says why there is none.
        transposed: Whether it is read transposed.
        casts: The dtypes that it is cast to, in order.
        problem: Why it cannot be folded; empty if it can.
    """

    value: ir.Value
    held: ir.TensorProtocol | None
    transposed: bool = False
    casts: tuple[ir.DataType, ...] = ()
    problem: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as it is read; empty if it is not known."""
        if self.held is None:
            return ()
        return dims(self.held)[::-1] if self.transposed else dims(self.held)

    def array(self) -> Array:
        """What is read, as float64."""
        assert self.held is not None
        with reading(self.held) as stored:
            array = stored
            for dtype in self.casts:
                array = array.astype(dtype.numpy())
            array = array.astype(np.float64)
            del stored
        return array.T if self.transposed else array


@dataclass(frozen=True)
class Product:
    """MatMul, Gemm, Conv or Gather with constant weights, without its bias.

    Attributes:
        node: The node.
        kind: How it reads its data.
        data: What is multiplied.
        weight: The weight: (channels in, channels out), kernels for ``image``.
        scale: What the product is multiplied by.
        bias: What is added to it.
    """

    node: ir.Node
    kind: Kind
    data: ir.Value
    weight: Weight
    scale: float = 1.0
    bias: ir.Value | None = None

    @property
    def channels(self) -> tuple[int, int]:
        """Channels in and out; zeros if they are not known."""
        shape = self.weight.shape
        if len(shape) < 2:
            return 0, 0
        return (shape[1], shape[0]) if self.kind == "image" else (shape[0], shape[1])


def weight(value: ir.Value | None) -> Weight | None:
    """Read a value as weights; None if it is computed by the graph."""
    transposed, casts = False, list[ir.DataType]()
    while value is not None:
        node = value.producer()
        if node is None or is_op(node, "Constant"):
            break
        if is_op(node, "DequantizeLinear"):
            return Weight(value, None, problem=QUANTIZED)
        if is_op(node, "Transpose"):
            if attribute(node, "perm", (1, 0)) != (1, 0):
                return None
            transposed = not transposed
        elif is_op(node, "Cast"):
            casts.insert(0, ir.DataType(attribute(node, "to")))
        elif not is_op(node, "Identity"):
            return None
        value = node.inputs[0]
    if value is None:
        return None
    held = edit.tensor(value)
    if held is None:
        if not value.is_graph_input():
            return None
        return Weight(value, None, problem=OVERRIDABLE if value.is_initializer() else INPUT)
    if held.dtype not in FLOATS or not FLOATS.issuperset(casts) or len(held.shape) < 2:
        return None
    if (len(held.shape) != 2 and transposed) or 0 in dims(held):
        return None
    return Weight(value, held, transposed, tuple(casts))


def product(node: ir.Node | None) -> Product | None:
    """Read a node as a product with weights; None if it is none."""
    if node is None or len(node.inputs) < 2:
        return None
    if node.op_type == "MatMulNBits" and node.domain == "com.microsoft":
        return _product(node, "rows", node.inputs[0], Weight(node.inputs[1], None, problem=QUANTIZED))  # type: ignore[arg-type]
    if node.domain or node.op_type not in ("MatMul", "Gemm", "Conv", "Gather"):
        return None
    if node.op_type == "Gather":
        read = weight(node.inputs[0])
        return _product(node, "table", node.inputs[1], read) if attribute(node, "axis", 0) == 0 else None
    read = weight(node.inputs[1])
    if read is None:
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    match node.op_type:
        case "MatMul":
            return _product(node, "rows", node.inputs[0], read)
        case "Gemm":
            if attribute(node, "transB", 0):
                read = replace(read, transposed=not read.transposed)
            kind: Kind = "columns" if attribute(node, "transA", 0) else "rows"
            return _product(node, kind, node.inputs[0], read, attribute(node, "alpha", 1.0), bias)
    return _product(node, "image", node.inputs[0], read, bias=bias)


def _product(
    node: ir.Node,
    kind: Kind,
    data: ir.Value | None,
    read: Weight | None,
    scale: float = 1.0,
    bias: ir.Value | None = None,
) -> Product | None:
    if data is None or read is None or (read.shape and (len(read.shape) > 2) != (kind == "image")):
        return None
    return Product(node, kind, data, read, scale, bias)
