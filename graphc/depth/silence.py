"""Writing a branch's value to zero, in the constants that it ends with: its last projection, gain or norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes import cut
from graphc.moves import MOVES, PICKS, TURNS, VIEWS

PRODUCTS: Mapping[str, tuple[int, ...]] = {
    "MatMul": (1, 0),
    "FusedMatMul": (1, 0),
    "Gemm": (1, 0),
    "Conv": (1,),
    "FusedConv": (1,),
    "ConvTranspose": (1,),
    "Mul": (1, 0),
    "Div": (0,),
}
"""Operators that give zero where one of these operands is zero, the first tried first."""

ADDED: Mapping[str, tuple[int, ...]] = {
    "Gemm": (2,),
    "Conv": (2,),
    "FusedConv": (2,),
    "ConvTranspose": (2,),
}
"""Operands that are added to a product: they must be zero, too."""

NORMS: Mapping[str, tuple[int, ...]] = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "BatchNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "GroupNormalization": (1, 2),
}
"""Gain and offset of normalisations."""

KEEPING = frozenset(
    """
    Abs AveragePool Cast CastLike Dropout Elu Erf FastGelu Gelu GlobalAveragePool GlobalMaxPool HardSwish LeakyRelu
    MaxPool Mish Neg PRelu QuickGelu ReduceMax ReduceMean ReduceMin ReduceSum Relu Resize Round Sign Sin Softsign Sqrt
    Swish Tan Tanh ThresholdedRelu
    """.split()
).union(MOVES)
"""Operators that give zeros for zeros, in whatever order; what they add (an offset) is nothing."""

BEFORE = ("Cast", "DequantizeLinear", *VIEWS, *TURNS, *PICKS)
"""Operators behind which a weight may stand."""

SUMS = ("Add", "Sub", "Sum", "Concat", "Where")
"""Operators that give zero where all of their operands are zero."""


@dataclass
class Silencing:
    """What must become zero.

    Attributes:
        zeros: Constants with the node that reads them: zero for this reader.
        why: Why it cannot be done; empty if it can.
    """

    zeros: list[tuple[ir.Value, ir.Node]] = field(default_factory=list)
    why: str = ""

    @staticmethod
    def of(value: ir.Value, reader: ir.Node) -> Silencing:
        """What makes a value zero for one of its readers, found from its end, and leaves everything else alone.

        Args:
            value: The value.
            reader: The node that reads it; nobody else may.
        """
        found = Silencing()
        found.why = found._trace(value, reader, 0)
        return found

    def _trace(self, value: ir.Value, reader: ir.Node, depth: int) -> str:
        """Note what makes a value zero; why it cannot be done, or nothing."""
        if edit.tensor(value) is not None:
            self.zeros.append((value, reader))
            return ""
        node = value.producer()
        if node is None:
            return "it ends with an input of the model"
        if value.is_graph_output() or any(use.node is not reader for use in value.uses()):
            return "what it ends with is also read elsewhere"
        if depth > 64:
            return "it ends with too many operators"
        known = node.domain in ("", "ai.onnx", "com.microsoft")
        if known and node.op_type == "DequantizeLinear":
            return self._dequantized(node, depth)
        if known and node.op_type in NORMS:
            return self._all(node, [node.inputs[i] for i in NORMS[node.op_type] if i < len(node.inputs)], depth)
        if known and node.op_type in PRODUCTS:
            return self._product(node, depth)
        if known and node.op_type in SUMS:
            operands = node.inputs[1:] if node.op_type == "Where" else node.inputs
            return self._all(node, operands, depth)
        if known and node.op_type in KEEPING and node.inputs[0] is not None:
            return self._trace(node.inputs[0], node, depth + 1)
        return f"its last operator is {node.op_type}, which cannot be written to zero"

    def _dequantized(self, node: ir.Node, depth: int) -> str:
        """Quantized numbers stand for zero where they are their zero point."""
        offset = node.inputs[2] if len(node.inputs) > 2 else None
        if node.inputs[0] is None or edit.tensor(node.inputs[0]) is None:
            return "it ends with an activation that is quantized"
        if offset is not None and edit.constant(offset) is None:
            return "it ends with weights whose zero point is computed"
        return self._trace(node.inputs[0], node, depth + 1)

    def _all(self, node: ir.Node, operands: object, depth: int) -> str:
        for value in operands:  # type: ignore[attr-defined]
            if value is not None and (why := self._trace(value, node, depth + 1)):
                return why
        return ""

    def _product(self, node: ir.Node, depth: int) -> str:
        why = ""
        before = len(self.zeros)
        operands = [node.inputs[i] for i in PRODUCTS[node.op_type] if node.inputs[i] is not None]
        # A gain or a weight of one's own before a scalar that others may read, and before anything computed.
        operands.sort(key=_rank)
        for value in operands:
            assert value is not None
            why = self._trace(value, node, depth + 1)
            if not why:
                break
            del self.zeros[before:]
        else:
            return why or "nothing in it can be written to zero"
        added = [node.inputs[i] for i in ADDED.get(node.op_type, ()) if i < len(node.inputs)]
        return self._all(node, added, depth)

    def write(self, model: ir.Model) -> int:
        """Write the zeros; returns how many constants."""
        names = edit.Names(model)
        for value, reader in self.zeros:
            held = edit.tensor(value)
            assert held is not None
            cut.write(value, _zeros(held, reader), reader=reader, names=names)
        return len(self.zeros)


def _rank(value: ir.Value | None) -> int:
    """Which factor is written to zero: a constant of several elements, what is picked from one, others, a scalar."""
    held = edit.tensor(value)
    if held is not None:
        return 0 if held.size > 1 else 3
    while value is not None and (node := value.producer()) is not None and node.op_type in BEFORE:
        value = node.inputs[0]
        if edit.tensor(value) is not None:
            return 1
    return 2


def _zeros(held: ir.TensorProtocol, reader: ir.Node) -> ir.TensorProtocol:
    """What stands for zeros in the shape and dtype of a tensor, made when it is read."""
    shape = tuple(held.shape.numpy())
    dtype = held.dtype
    offset = _offset(reader, shape) if reader.op_type == "DequantizeLinear" else None

    def make() -> ir.TensorProtocol:
        array = np.zeros(shape, dtype=dtype.numpy())
        if offset is not None:
            array[...] = offset
        return ir.Tensor(array, dtype=dtype, name=held.name)

    if held.size <= edit.SMALL:
        return make()
    return ir.LazyTensor(make, dtype=dtype, shape=ir.Shape(shape), name=held.name, cache=False)


def _offset(node: ir.Node, shape: tuple[int, ...]) -> edit.Array | None:
    """The zero point of a DequantizeLinear, broadcast to its input."""
    zero = edit.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if zero is None or zero.ndim == 0:
        return zero
    axis = int(edit.attribute(node, "axis", 1)) % len(shape)
    if zero.ndim == 1:
        return zero.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    block = int(edit.attribute(node, "block_size", 0))
    return np.repeat(zero, block, axis=axis).take(range(shape[axis]), axis=axis)
