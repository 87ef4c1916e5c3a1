"""Quantized weights, read and written on the same kind of grid: DequantizeLinear of any granularity, MatMulNBits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array, attribute, is_op
from graphc.rewrites.base import FLOATS, dims

Tensors = dict[int, ir.TensorProtocol]
"""New constants by the input of the node that reads them."""


class Grid(Protocol):
    """How a weight is quantized."""

    @property
    def what(self) -> str:
        """What reports call it, e.g. ``"int4 in blocks of 32"``."""
        ...

    def values(self) -> Array:
        """What the stored integers stand for, float32, in the shape of the weight."""
        ...

    def rounded(self, values: Array) -> tuple[Array, Tensors]:
        """New values on a grid of the same kind with scales of its own.

        Returns:
            What the new integers stand for, and the constants that hold them.
        """
        ...


def grid(value: ir.Value) -> tuple[ir.Node, Grid] | str | None:
    """The node that dequantizes a constant, and how; None if it is not quantized; or why it cannot be written again."""
    held = edit.tensor(value)
    assert held is not None
    readers = [use for use in value.uses() if use.idx == 0 and is_op(use.node, "DequantizeLinear")]
    packed = [use for use in value.uses() if use.idx == 1 and is_op(use.node, "MatMulNBits", domain="com.microsoft")]
    if not readers and not packed:
        return None if held.dtype in FLOATS else f"the weight is stored as {held.dtype.name.lower()}"
    if len(value.uses()) > 1:
        return "the quantized weight has several readers"
    node = (readers or packed)[0].node
    constants = [edit.tensor(v) for v in node.inputs[2 if packed else 1 : 4 if packed else 3]]
    given = [v for v in node.inputs[2 if packed else 1 :] if v is not None]
    if any(len(v.uses()) > 1 for v in given if v.is_initializer()):
        return "the scale of the quantized weight has other readers"
    if len(given) > len([c for c in constants if c is not None]):
        return "the scale of the quantized weight is no constant, or its columns are in another order"
    scale = constants[0]
    zero = constants[1] if len(constants) > 1 else None
    if scale is None or scale.dtype not in FLOATS:
        return "the scale of the quantized weight is no constant"
    if packed:
        if attribute(node, "bits", 4) not in (4, 8) or (zero is not None and zero.dtype != ir.DataType.UINT8):
            return "its MatMulNBits has a layout that is not known"
        return node, Packed(node, held, scale, zero)
    if not (held.dtype.is_integer() and held.dtype.bitwidth <= 8):
        return f"the weight is quantized to {held.dtype.name.lower()}"
    return node, Linear(node, held, scale, zero)


def _scales(
    low: Array, high: Array, reach: tuple[int, int], symmetric: bool, old: Array, dtype: np.dtype[np.generic]
) -> tuple[Array, Array]:
    """Scales and zero points that cover values from ``low`` to ``high`` with codes from ``reach``.

    Args:
        low: The smallest value of each group, at most 0.
        high: The largest, at least 0.
        reach: The smallest and largest code, relative to the zero point where that is fixed.
        symmetric: Whether the zero point is fixed.
        old: The scales as they were; those of groups that are all zero are kept.
        dtype: In which scales are stored.
    """
    if symmetric:
        scale = np.maximum(high / max(reach[1], 1), -low / max(-reach[0], 1))
        zero = np.zeros_like(scale)
    else:
        scale = (high - low) / (reach[1] - reach[0])
        zero = reach[0] - low / np.where(scale > 0, scale, 1)
    scale = np.where(scale > 0, scale, old).astype(dtype).astype(np.float64)
    return np.where(scale > 0, scale, 1.0), np.clip(np.rint(zero), *reach)


@dataclass(frozen=True)
class Linear:
    """DequantizeLinear with one scale, one for each index of an axis, or one for each block along it.

    Attributes:
        node: The node.
        held: The integers.
        scale: Their scales.
        zero: Their zero points, None for zeros.
    """

    node: ir.Node
    held: ir.TensorProtocol
    scale: ir.TensorProtocol
    zero: ir.TensorProtocol | None

    @property
    def block(self) -> int:
        """Elements that share a scale along the axis; 0 if it is not blocked."""
        return int(attribute(self.node, "block_size", 0))

    @property
    def axis(self) -> int:
        """Along which scales differ."""
        return int(attribute(self.node, "axis", 1)) % max(len(self.held.shape), 1)

    @property
    def what(self) -> str:
        how = f"in blocks of {self.block}" if self.block else "per channel" if self.scale.size > 1 else "per tensor"
        return f"{self.held.dtype.name.lower()} {how}"

    def _spread(self, array: Array) -> Array:
        """Scales or zero points, one for each element or so that they broadcast."""
        if self.block:
            return np.repeat(array, self.block, self.axis).take(range(dims(self.held)[self.axis]), self.axis)
        if array.size == 1:
            return array.reshape(())
        shape = [1] * len(self.held.shape)
        shape[self.axis] = -1
        return array.reshape(shape)

    def _codes(self) -> tuple[Array, Array]:
        codes = self.held.numpy().astype(np.int32)
        edit.release(self.held)
        if self.zero is None:
            return codes, np.zeros(dims(self.scale), np.int32)
        return codes, self.zero.numpy().astype(np.int32)

    def values(self) -> Array:
        codes, zero = self._codes()
        return (codes - self._spread(zero)) * self._spread(self.scale.numpy().astype(np.float32))

    def rounded(self, values: Array) -> tuple[Array, Tensors]:
        codes, zero = self._codes()
        symmetric = bool((zero == zero.reshape(-1)[0]).all())
        centre = int(zero.reshape(-1)[0]) if symmetric else 0
        reach = int(codes.min()) - centre, int(codes.max()) - centre
        limits = int(self.held.dtype.min) - centre, int(self.held.dtype.max) - centre
        if symmetric and max(-reach[0], reach[1]) > 1:  # as much of the range as was used
            most = max(-reach[0], reach[1])
            reach = max(-most, limits[0]), min(most, limits[1])
        else:
            reach = limits
        low, high = self._reduced(values, np.min), self._reduced(values, np.max)
        old = self.scale.numpy()
        scale, offset = _scales(np.minimum(low, 0), np.maximum(high, 0), reach, symmetric, old, old.dtype)
        new = np.clip(np.rint(values / self._spread(scale)) + self._spread(offset), *reach)
        stands = (new - self._spread(offset)) * self._spread(scale)
        tensors: Tensors = {
            0: _typed(new + centre, self.held),
            1: _typed(scale.reshape(dims(self.scale)), self.scale),
        }
        if self.zero is not None and not symmetric:
            tensors[2] = _typed(offset.reshape(dims(self.zero)), self.zero)
        return stands, tensors

    def _reduced(self, values: Array, how: object) -> Array:
        """The smallest or largest value of each group, in the shape of the scales."""
        assert callable(how)
        if self.block:
            count = dims(self.scale)[self.axis]
            short = count * self.block - values.shape[self.axis]
            if short:
                last = [(0, 0)] * values.ndim
                last[self.axis] = (0, short)
                values = np.pad(values, last)
            shape = (*values.shape[: self.axis], count, self.block, *values.shape[self.axis + 1 :])
            return np.asarray(how(values.reshape(shape), axis=self.axis + 1))
        if self.scale.size == 1:
            return np.asarray(how(values)).reshape(dims(self.scale))
        return np.asarray(how(values, axis=tuple(i for i in range(values.ndim) if i != self.axis)))


def _typed(array: Array, like: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.Tensor(np.ascontiguousarray(array.astype(like.dtype.numpy())), dtype=like.dtype, name=like.name)


@dataclass(frozen=True)
class Packed:
    """MatMulNBits: unsigned integers of 4 or 8 bits in blocks along the inputs, packed, low half first.

    Attributes:
        node: The node.
        held: (outputs, blocks, bytes of a block).
        scale: (outputs, blocks), flat in older models.
        zero: Packed like the weights; None for the middle of the range.
    """

    node: ir.Node
    held: ir.TensorProtocol
    scale: ir.TensorProtocol
    zero: ir.TensorProtocol | None

    @property
    def what(self) -> str:
        return f"MatMulNBits of {self._bits} bits in blocks of {self._block}"

    @property
    def _bits(self) -> int:
        return int(attribute(self.node, "bits", 4))

    @property
    def _block(self) -> int:
        return int(attribute(self.node, "block_size"))

    @property
    def _size(self) -> tuple[int, int, int]:
        """Outputs, inputs, and blocks."""
        inputs = int(attribute(self.node, "K"))
        return int(attribute(self.node, "N")), inputs, -(-inputs // self._block)

    def _unpacked(self, array: Array) -> Array:
        if self._bits == 8:
            return array
        return np.stack([array & 15, array >> 4], axis=-1).reshape(*array.shape[:-1], -1)

    def _packed(self, array: Array) -> Array:
        array = array.astype(np.uint8)
        if self._bits == 8:
            return array
        if array.shape[-1] % 2:
            array = np.concatenate([array, np.zeros_like(array[..., :1])], axis=-1)
        return np.asarray(array[..., 0::2] | (array[..., 1::2] << 4))

    def _zeros(self) -> Array:
        outputs, _, blocks = self._size
        if self.zero is None:
            return np.full((outputs, blocks, 1), 1 << (self._bits - 1), np.int32)
        packed = self.zero.numpy().reshape(outputs, -1)
        return self._unpacked(packed)[:, :blocks].astype(np.int32)[..., None]

    def values(self) -> Array:
        outputs, inputs, blocks = self._size
        codes = self._unpacked(self.held.numpy().reshape(outputs, blocks, -1)).astype(np.int32)
        edit.release(self.held)
        scale = self.scale.numpy().astype(np.float32).reshape(outputs, blocks, 1)
        found: Array = ((codes - self._zeros()) * scale).reshape(outputs, -1)[:, :inputs]
        return found

    def rounded(self, values: Array) -> tuple[Array, Tensors]:
        outputs, inputs, blocks = self._size
        padded = np.pad(values, ((0, 0), (0, blocks * self._block - inputs))).reshape(outputs, blocks, self._block)
        zeros, top, middle = self._zeros(), (1 << self._bits) - 1, 1 << (self._bits - 1)
        symmetric = bool((zeros == middle).all())
        low, high = np.minimum(padded.min(-1), 0), np.maximum(padded.max(-1), 0)
        old = self.scale.numpy().reshape(outputs, blocks)
        reach = (-middle, middle - 1) if symmetric else (0, top)
        scale, offset = _scales(low, high, reach, symmetric, old, old.dtype)
        centre = middle if symmetric else 0
        new = np.clip(np.rint(padded / scale[..., None]) + offset[..., None], *reach)
        stands = ((new - offset[..., None]) * scale[..., None]).reshape(outputs, -1)[:, :inputs]
        tensors: Tensors = {
            1: _typed(self._packed(new + centre).reshape(dims(self.held)), self.held),
            2: _typed(scale.reshape(dims(self.scale)), self.scale),
        }
        if self.zero is not None and not symmetric:
            tensors[3] = _typed(self._packed(offset).reshape(dims(self.zero)), self.zero)
        return stands, tensors
