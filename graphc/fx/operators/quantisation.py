"""Quantization to integers and back; gradients stop at the rounding."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from graphc.errors import BadInput
from graphc.fx.dtypes import torch_dtype
from graphc.fx.host import Operator
from graphc.fx.operators.windows import conv

_RANGES = {
    torch.int8: (-128, 127),
    torch.uint8: (0, 255),
    torch.int16: (-32768, 32767),
    torch.uint16: (0, 65535),
    torch.int32: (-(2**31), 2**31 - 1),
}


def _spread(parameter: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero point in a shape that broadcasts with ``x``: per tensor, per channel or per block."""
    if block_size:
        return parameter.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
    if parameter.dim() == 0 or parameter.numel() == 1:
        return parameter.reshape(())
    view = [1] * x.dim()
    view[axis] = -1
    return parameter.reshape(view)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
) -> Tensor:
    dtype = torch_dtype(output_dtype) if output_dtype else zero.dtype if zero is not None else torch.uint8
    y = torch.round(x / _spread(scale, x, axis, block_size))
    if zero is not None:
        y = y + _spread(zero, x, axis, block_size).to(y.dtype)
    if dtype not in _RANGES:
        raise BadInput(f"QuantizeLinear to {dtype} has no torch form")
    low, high = _RANGES[dtype]
    return y.clamp(low, high).to(torch.int32).to(dtype)


def dequantize(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = ir.DataType.UNDEFINED,
) -> Tensor:
    y = x.to(torch.int32) if not x.is_floating_point() else x.to(scale.dtype)
    if zero is not None:
        y = y - _spread(zero, x, axis, block_size).to(y.dtype)
    y = y.to(scale.dtype) * _spread(scale, x, axis, block_size)
    return y.to(torch_dtype(output_dtype)) if output_dtype else y


def dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    low, high = torch.minimum(x.amin(), zero), torch.maximum(x.amax(), zero)
    scale = (high - low) / 255
    point = torch.round(-low / scale).clamp(0, 255)
    return torch.round(x / scale + point).clamp(0, 255).to(torch.uint8), scale, point.to(torch.uint8)


def _qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    scale: Tensor,
    zero: Tensor,
) -> Tensor:
    left = dequantize(a, a_scale, a_zero, axis=-2)
    right = dequantize(b, b_scale, b_zero, axis=-1)
    return quantize(left.float() @ right.float(), scale.float(), zero, axis=-2)


def _qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    scale: Tensor,
    zero: Tensor,
    b: Tensor | None = None,
    **attributes: Any,
) -> Tensor:
    data, weight = dequantize(x, x_scale, x_zero), dequantize(w, w_scale, w_zero, axis=0)
    bias = None if b is None else b * (x_scale * w_scale)
    return quantize(conv(data, weight, bias, **attributes), scale, zero)


def _conv_integer(
    x: Tensor,
    w: Tensor,
    x_zero: Tensor | None = None,
    w_zero: Tensor | None = None,
    **attributes: Any,
) -> Tensor:
    # Exact: products of 16 bits summed in 53.
    one = torch.ones((), dtype=torch.float64, device=x.device)
    data, weight = dequantize(x, one, x_zero), dequantize(w, one, w_zero, axis=0)
    return conv(data, weight, **attributes).to(torch.int32)


OPERATORS: dict[str, Operator] = {
    "ConvInteger": Operator(_conv_integer),
    "DequantizeLinear": Operator(dequantize, fixed=(1, 2)),
    "DynamicQuantizeLinear": Operator(dynamic_quantize, many=True),
    "QLinearConv": Operator(_qlinear_conv, fixed=(1, 4, 6)),
    "QLinearMatMul": Operator(_qlinear_matmul, fixed=(1, 4, 6)),
    "QuantizeLinear": Operator(quantize, fixed=(1, 2)),
}
