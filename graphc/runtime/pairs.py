"""Which products of 8-bit integers ONNX Runtime adds in 16 bits, on CPUs without VNNI.

There ``vpmaddubsw`` multiplies uint8 with int8 and adds each two neighbours with saturation: inputs ``2j`` and
``2j + 1`` of an output, of a convolution all channels of a kernel element before the next element's (MLAS: Qgemm, Qgemv
and ConvSym for AVX2 and AVX-512). As ``255 * 128 < 2**15``, two weights of one sign may come to 128 together, and two
of different signs are as large as they want. A depthwise convolution multiplies element by element in 32 bits.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array

MOST = 128
"""What two weights of one sign, whose products are added in 16 bits, may come to."""


def rows(node: ir.Node, weight: Array, *, flipped: bool = False) -> Array | None:
    """The weight of a product as ``(..., depth)`` in the order in which products are added; None if all are exact.

    Args:
        node: A convolution, or a product of matrices.
        weight: Its weight; of matrices ``(..., inputs, outputs)``.
        flipped: Whether matrices are ``(..., outputs, inputs)``.
    """
    if _convolves(node):
        if weight.shape[1] == 1 and edit.attribute(node, "group", 1) == weight.shape[0]:
            return None
        return np.moveaxis(weight, 1, -1).reshape(len(weight), -1)
    return weight if flipped else np.swapaxes(weight, -1, -2)


def largest(ordered: Array) -> Array:
    """What two neighbours of one sign come to at most, without the sign: ``(..., depth)`` becomes ``(...)``."""
    first, second = _halves(ordered)
    sums = np.maximum(np.maximum(first, 0) + np.maximum(second, 0), -np.minimum(first, 0) - np.minimum(second, 0))
    return np.asarray(sums.max(axis=-1, initial=0))


def summable(node: ir.Node, codes: Array, *, flipped: bool = False) -> Array:
    """Codes with which no sum of two products saturates: where one would, the larger of the two becomes smaller.

    Args:
        node, flipped: See :func:`rows`.
        codes: The codes of the weight.
    """
    ordered = rows(node, codes, flipped=flipped)
    if ordered is None:
        return codes
    first, second = _halves(ordered)
    over = np.maximum(np.abs(first + second) - MOST, 0) * (first * second > 0)
    if not over.any():
        return codes
    less, larger = np.sign(first) * over, np.abs(first) >= np.abs(second)
    both = np.stack([first - less * larger, second - less * ~larger], axis=-1).astype(codes.dtype)
    found = both.reshape(*ordered.shape[:-1], -1)[..., : ordered.shape[-1]]
    if _convolves(node):
        return np.moveaxis(found.reshape(len(codes), *codes.shape[2:], codes.shape[1]), -1, 1)
    return found if flipped else np.swapaxes(found, -1, -2)


def _convolves(node: ir.Node) -> bool:
    return node.op_type in ("Conv", "ConvInteger", "QLinearConv")


def _halves(ordered: Array) -> tuple[Array, Array]:
    """Every first and every second of the last axis, a zero standing where there is no second; wide enough to add."""
    kind = np.int32 if ordered.dtype.kind in "iu" else ordered.dtype
    odd = ordered.shape[-1] % 2
    padded = np.pad(ordered.astype(kind), [(0, 0)] * (ordered.ndim - 1) + [(0, odd)])
    return padded[..., ::2], padded[..., 1::2]
