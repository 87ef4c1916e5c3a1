"""Convolutions and products with a constant weight, read as one kind of thing: ``y = weight(x) + bias``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array
from graphc.rewrites.base import FLOATS, Refused, Rewriter, dims
from graphc.rewrites.weights import check_rounded, check_scaled, reading, rounded, scaled

OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

_PIECE = 1 << 20
"""Elements of a weight that are summed at a time."""


@dataclass(frozen=True)
class Linear:
    """One such node.

    Attributes:
        node: Conv, ConvTranspose, Gemm or MatMul.
        weight: Its weight, a constant.
        held: The tensor of the weight.
        bias: Its bias, if it has one; it may not be constant.
        channels: How many output channels there are.
        channels_in: How many input channels there are.
        rank: How many axes input and output have; None if the operator does not say.
    """

    node: ir.Node
    weight: ir.Value
    held: ir.TensorProtocol
    bias: ir.Value | None
    channels: int
    channels_in: int
    rank: int | None

    @property
    def is_conv(self) -> bool:
        return self.node.op_type in ("Conv", "ConvTranspose")

    @property
    def takes_bias(self) -> bool:
        return self.node.op_type != "MatMul"

    @property
    def axis(self) -> int:
        """The axis of the output channels: from the first for convolutions, from the last for products."""
        return 1 if self.is_conv else -1

    @property
    def axis_in(self) -> int:
        """The axis of the input channels, likewise."""
        if self.is_conv:
            return 1
        return -2 if edit.attribute(self.node, "transA", 0) else -1

    @property
    def _groups(self) -> int:
        return int(edit.attribute(self.node, "group", 1))

    @property
    def _transposed(self) -> bool:
        """Whether a product's weight is stored as (out, in)."""
        return bool(edit.attribute(self.node, "transB", 0))

    def factor_out(self, scale: Array) -> Array:
        """What to multiply the weight with to scale outputs by ``scale``, shape () or (channels,)."""
        if scale.ndim == 0:
            return scale
        tail = (1,) * (len(self.held.shape) - 2)
        match self.node.op_type:
            case "Conv":
                return scale.reshape(-1, 1, *tail)
            case "ConvTranspose":  # weight (groups * in, out, ...): rows of a group scale its own outputs
                rows = self.channels_in // self._groups
                return np.repeat(scale.reshape(self._groups, -1), rows, axis=0).reshape(self.channels_in, -1, *tail)
            case _:
                return scale.reshape(-1, 1) if self._transposed else scale.reshape(1, -1)

    def factor_in(self, scale: Array) -> Array:
        """What to multiply the weight with to scale inputs by ``scale``, shape () or (channels_in,)."""
        if scale.ndim == 0:
            return scale
        tail = (1,) * (len(self.held.shape) - 2)
        match self.node.op_type:
            case "Conv":  # weight (groups * out, in, ...): filters of a group read its own inputs
                rows = self.channels // self._groups
                return np.repeat(scale.reshape(self._groups, -1), rows, axis=0).reshape(self.channels, -1, *tail)
            case "ConvTranspose":
                return scale.reshape(-1, 1, *tail)
            case _:
                return scale.reshape(1, -1) if self._transposed else scale.reshape(-1, 1)

    def shift_out(self, shift: Array) -> Array:
        """What a ``shift`` of the input adds to the outputs, shape (channels,), where there is no padding."""
        first, second = dims(self.held)[:2]
        tail = (1,) * (len(self.held.shape) - 2)
        shifts = np.broadcast_to(self.factor_in(shift), (first, second, *tail)).reshape(first, second)
        by_row = self.is_conv or self._transposed
        total = np.zeros(first if by_row else second)
        with reading(self.held) as array:
            step = max(1, _PIECE * first // array.size)
            for i in range(0, first, step):
                piece = array[i : i + step].reshape(-1, second, array.size // (first * second))
                products = piece.sum(axis=2, dtype=np.float64) * shifts[i : i + step]
                if by_row:
                    total[i : i + step] = products.sum(axis=1)
                else:
                    total += products.sum(axis=0)
            del array, piece
        return np.asarray(total * edit.attribute(self.node, "alpha", 1.0))

    def unpadded(self) -> bool:
        """Whether every output sees only true inputs."""
        if not self.is_conv:
            return True
        if self.node.op_type == "ConvTranspose":
            return False
        if edit.attribute(self.node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return False
        return not any(edit.attribute(self.node, "pads", ()))

    def check_bias(self) -> None:
        """See that the bias can be changed.

        Raises:
            Refused: It is computed, or is one number per row.
        """
        if self.bias is None:
            return
        held = edit.tensor(self.bias)
        if held is None:
            raise Refused("the bias is not constant")
        if not self.is_conv and held.size != 1 and dims(held) not in ((self.channels,), (1, self.channels)):
            raise Refused("the bias differs between rows")

    def new_bias(self, scale: Array, shift: Array) -> Array:
        """``bias * scale + shift`` in float64, shape (channels,)."""
        held = edit.tensor(self.bias)
        old = np.zeros(()) if held is None else held.numpy().astype(np.float64).reshape(-1)
        if self.node.op_type == "Gemm":
            old = old * edit.attribute(self.node, "beta", 1.0)
        return np.asarray(np.broadcast_to(old * scale + shift, (self.channels,)))

    def check(self, factor: Array, bias: Array | None) -> None:
        """See that the new weight and bias keep their precision.

        Raises:
            Refused: They do not.
        """
        if not _is_one(factor):
            check_scaled(self.held, factor)
        if bias is not None:
            check_rounded(bias, self.held.dtype)

    def change(self, rewriter: Rewriter, factor: Array, bias: Array | None) -> None:
        """Multiply the weight by ``factor`` and set the bias; ``check`` comes first."""
        if not _is_one(factor):
            held = self.held
            key = repr(factor.shape).encode() + factor.tobytes()
            new = rewriter.derived(self.node, self.weight, key, lambda name: scaled(held, factor, name))
            self._set(rewriter, 1, new)
        if bias is None:
            return
        dtype = self.held.dtype
        if self.bias is not None:
            new = rewriter.derived(self.node, self.bias, bias.tobytes(), lambda name: rounded(bias, dtype, name))
        else:
            hint = f"{(self.weight.name or '').removesuffix('.weight')}.bias"
            new = rewriter.constant(self.node, rounded(bias, dtype, hint), hint)
        self._set(rewriter, 2, new)
        if self.node.op_type == "Gemm" and edit.attribute(self.node, "beta", 1.0) != 1.0:
            self.node.attributes.pop("beta")

    def _set(self, rewriter: Rewriter, index: int, value: ir.Value) -> None:
        if len(self.node.inputs) <= index:
            self.node.resize_inputs(index + 1)
        old = self.node.inputs[index]
        if old is value:
            return
        self.node.replace_input_with(index, value)
        if old is not None:
            rewriter.drop_unread(old)


def linear(node: ir.Node) -> Linear:
    """Read a node, one of ``OPERATORS``, as a linear map.

    Raises:
        Refused: Its weight is not a constant matrix or kernel of floats.
    """
    weight = node.inputs[1]
    held = edit.tensor(weight)
    if weight is None or held is None:
        producer = weight.producer() if weight is not None else None
        raise Refused(f"the weight is computed by {producer.op_type}" if producer else "the weight is not constant")
    if held.dtype not in FLOATS:
        raise Refused(f"the weight is {held.dtype.name.lower()}")
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    shape = dims(held)
    if len(shape) < 2 or 0 in shape:
        raise Refused("the weight is a vector or empty")
    match node.op_type:
        case "Conv":
            groups = int(edit.attribute(node, "group", 1))
            return Linear(node, weight, held, bias, shape[0], shape[1] * groups, len(shape))
        case "ConvTranspose":
            groups = int(edit.attribute(node, "group", 1))
            return Linear(node, weight, held, bias, shape[1] * groups, shape[0], len(shape))
    if len(shape) != 2:
        raise Refused("the weight is a stack of matrices")
    rows, columns = reversed(shape) if edit.attribute(node, "transB", 0) else shape
    return Linear(node, weight, held, bias, columns, rows, 2 if node.op_type == "Gemm" else None)


def _is_one(factor: Array) -> bool:
    return bool((factor == 1).all())
