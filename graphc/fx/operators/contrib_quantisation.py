"""Quantized operators of ONNX Runtime (``com.microsoft``): packed weights, and integers around float arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphc.errors import BadInput
from graphc.fx.host import Operator, as_list
from graphc.fx.operators.quantisation import dequantize, dynamic_quantize, quantize


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """Unsigned integers of 2, 4 or 8 bits that share the bytes of the last axis, the first in the lowest bits."""
    if bits not in (2, 4, 8):
        raise BadInput(f"weights of {bits} bits have no torch form")
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=packed.device)
    spread = (packed.to(torch.int32).unsqueeze(-1) >> shifts) & (2**bits - 1)
    return spread.flatten(-2)


def _matmul_nbits(
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    order: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    K: int,
    N: int,
    bits: int = 4,
    block_size: int,
    accuracy_level: int = 0,
    weight_prepacked: int = 0,
) -> Tensor:
    blocks = -(-K // block_size)
    w = unpacked(b.reshape(N, blocks, -1), bits).to(scales.dtype)[..., :block_size]
    scale = scales.reshape(N, blocks, 1)
    if zeros is None:
        zero: Any = 2 ** (bits - 1)
    elif zeros.is_floating_point():
        zero = zeros.reshape(N, blocks, 1)
    else:
        zero = unpacked(zeros.reshape(N, -1), bits)[:, :blocks].reshape(N, blocks, 1).to(scales.dtype)
    if order is not None:
        at = order.long()
        flat = w.reshape(N, -1)[:, :K]
        zero = zero.expand(N, blocks, 1)[:, at, 0] if isinstance(zero, Tensor) else zero
        dense = (flat - zero) * scale[:, at, 0]
    else:
        dense = ((w - zero) * scale).reshape(N, -1)[:, :K]
    return F.linear(a, dense.to(a.dtype), bias)


def _gather_block_quantized(
    x: Tensor,
    indices: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int = 4,
    block_size: int = 128,
    gather_axis: int = 0,
    quantize_axis: int = 1,
) -> Tensor:
    axis = quantize_axis % x.dim()
    if x.dtype == torch.uint8 and x.shape[axis] * 2 > scales.shape[axis] * block_size:
        bits = 8  # unpacked when it was loaded, or never packed
    if x.dtype == torch.uint8 and bits < 8 and x.shape[axis] <= scales.shape[axis] * block_size * bits // 8:
        x = unpacked(x.movedim(axis, -1), bits).movedim(-1, axis)
        zeros = None if zeros is None else unpacked(zeros.movedim(axis, -1), bits).movedim(-1, axis)
    if zeros is None and x.dtype == torch.uint8:
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    dense = dequantize(x, scales, zeros, axis=axis, block_size=block_size)
    axis, at = gather_axis % x.dim(), indices.long()
    at = torch.where(at < 0, at + dense.shape[axis], at)
    return dense.index_select(axis, at.reshape(-1)).reshape([*dense.shape[:axis], *at.shape, *dense.shape[axis + 1 :]])


def _dynamic_quantize_matmul(
    a: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    y = dequantize(*dynamic_quantize(a)) @ _columns(b, b_scale, b_zero)
    return y if bias is None else y + bias


def _matmul_integer_to_float(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None = None,
    b_zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    y = dequantize(a, a_scale, a_zero) @ _columns(b, b_scale, b_zero)
    return y if bias is None else y + bias


def _columns(b: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The right operand of a product, its scale one number or one a column."""
    return dequantize(b, scale, zero, axis=-1)


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def run(
        a: Tensor, a_scale: Tensor, a_zero: Tensor | None, b: Tensor, b_scale: Tensor, b_zero: Tensor | None,
        scale: Tensor, zero: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return quantize(function(dequantize(a, a_scale, a_zero), dequantize(b, b_scale, b_zero)), scale, zero)

    return Operator(run, fixed=(1, 2, 4, 5, 6, 7))


def _unary(function: Callable[..., Tensor]) -> Operator:
    def run(
        x: Tensor, x_scale: Tensor, x_zero: Tensor | None, scale: Tensor, zero: Tensor | None = None, **attributes: Any
    ) -> Tensor:
        return quantize(function(dequantize(x, x_scale, x_zero), **attributes), scale, zero)

    return Operator(run, fixed=(1, 2, 3, 4))


def _global_average(x: Tensor, *, channels_last: int = 0) -> Tensor:
    return x.mean(tuple(range(1, x.dim() - 1) if channels_last else range(2, x.dim())), keepdim=True)


def _concat(scale: Tensor, zero: Tensor, *parts: Tensor, axis: int) -> Tensor:
    items = [dequantize(*parts[i : i + 3]) for i in range(0, len(parts), 3)]
    return quantize(torch.cat(items, axis), scale, zero)


def _softmax(
    x: Tensor, x_scale: Tensor, x_zero: Tensor | None, scale: Tensor, zero: Tensor | None = None, *, axis: int = -1,
    opset: int = 13,
) -> Tensor:  # fmt: skip
    return quantize(F.softmax(dequantize(x, x_scale, x_zero), axis), scale, zero)


def _reduce_mean(
    x: Tensor, x_scale: Tensor, x_zero: Tensor, scale: Tensor, zero: Tensor, *, axes: Any, keepdims: int = 1
) -> Tensor:
    return quantize(dequantize(x, x_scale, x_zero).mean(as_list(axes), keepdim=bool(keepdims)), scale, zero)


OPERATORS: dict[str, Operator] = {
    "DynamicQuantizeMatMul": Operator(_dynamic_quantize_matmul, fixed=(2, 3)),
    "GatherBlockQuantized": Operator(_gather_block_quantized, fixed=(2, 3)),
    "MatMulIntegerToFloat": Operator(_matmul_integer_to_float, fixed=(2, 3, 4, 5)),
    "MatMulNBits": Operator(_matmul_nbits, fixed=(2, 3)),
    "QLinearAdd": _binary(torch.add),
    "QLinearConcat": Operator(_concat),
    "QLinearGlobalAveragePool": _unary(_global_average),
    "QLinearLeakyRelu": _unary(lambda x, alpha=0.01: F.leaky_relu(x, alpha)),
    "QLinearMul": _binary(torch.mul),
    "QLinearReduceMean": Operator(_reduce_mean),
    "QLinearSigmoid": _unary(torch.sigmoid),
    "QLinearSoftmax": Operator(_softmax),
}
