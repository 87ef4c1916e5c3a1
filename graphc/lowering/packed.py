"""Codes as ``com.microsoft`` packs them: unsigned, several in a byte, the first in the lowest bits."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array


def pack(codes: Array, bits: int) -> Array:
    """Unsigned codes of some bits in bytes, along the last axis, which is filled up with zeros.

    Args:
        codes: Any shape, at least one axis; each element in ``[0, 2**bits)``.
        bits: 2, 4 or 8.

    Returns:
        uint8, the last axis divided by the codes in a byte.
    """
    each = 8 // bits
    wide = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % each)])
    out = np.zeros((*wide.shape[:-1], wide.shape[-1] // each), np.uint8)
    for i in range(each):
        out |= (wide[..., i::each] << (bits * i)).astype(np.uint8)
    return out


def unsigned(codes: Array, dtype: ir.DataType) -> Array:
    """Codes of a dtype with a sign moved up so that the least is 0; others as they are; uint8."""
    if dtype in (ir.DataType.INT2, ir.DataType.INT4, ir.DataType.INT8):
        return (codes.astype(np.int16) + (1 << (dtype.bitwidth - 1))).astype(np.uint8)
    return codes.astype(np.uint8)


def blocks(held: ir.TensorProtocol, *, turned: bool, block: int) -> ir.LazyTensor:
    """The weight that MatMulNBits reads, uint8 ``(outputs, blocks, bytes of a block)``.

    Args:
        held: The codes, a matrix.
        turned: Whether it is ``(inputs, outputs)``.
        block: Inputs in a block; the last one is filled up.
    """
    bits = held.dtype.bitwidth
    depth, width = held.shape.numpy()[:: 1 if turned else -1]
    count = -(-depth // block)

    def make() -> ir.TensorProtocol:
        codes = unsigned(held.numpy(), held.dtype)
        codes = codes.T if turned else codes
        packed = pack(np.pad(codes, [(0, 0), (0, count * block - depth)]), bits)
        edit.release(held)
        return ir.tensor(packed.reshape(width, count, -1))

    return ir.LazyTensor(
        make, dtype=ir.DataType.UINT8, shape=ir.Shape([width, count, block * bits // 8]), name=held.name, cache=False
    )
