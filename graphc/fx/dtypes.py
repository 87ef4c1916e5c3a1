"""Numbers and arrays between ONNX, numpy and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

_TORCH = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    ir.DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
}

_UNPACKED = {
    ir.DataType.INT2: torch.int8,
    ir.DataType.UINT2: torch.uint8,
    ir.DataType.INT4: torch.int8,
    ir.DataType.UINT4: torch.uint8,
}
"""Constants of packed integers are held one a byte; nothing computes in them."""

TRAINABLE = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
"""The dtypes of weights that gradients can flow to."""


def torch_dtype(code: int) -> Any:
    """The torch dtype of an ONNX dtype; None where torch has none."""
    return _TORCH.get(ir.DataType(code))


def held_dtype(code: int) -> Any:
    """The torch dtype that holds a constant of an ONNX dtype; None where there is none."""
    return _TORCH.get(ir.DataType(code), _UNPACKED.get(ir.DataType(code)))


def to_tensor(held: ir.TensorProtocol) -> Tensor:
    """A tensor with a copy of an ONNX tensor's elements."""
    array = np.array(held.numpy(), order="C")
    dtype = held_dtype(held.dtype)
    if held.dtype in _UNPACKED:
        array = array.astype(np.int8 if dtype == torch.int8 else np.uint8)
    elif array.dtype.kind == "V" or array.dtype.name.startswith(("bfloat", "float8")):
        bits = array.view(np.uint8 if array.dtype.itemsize == 1 else np.int16)
        return torch.from_numpy(bits).view(dtype)
    return torch.from_numpy(array)


def to_ir(value: Tensor, like: ir.TensorProtocol) -> ir.TensorProtocol:
    """An ONNX tensor of a torch tensor, in the dtype of another one and under its name."""
    host = value.detach().cpu().to(held_dtype(like.dtype)).contiguous()
    if like.dtype in _UNPACKED:
        return ir.tensor(host.numpy().astype(like.dtype.numpy()), dtype=like.dtype, name=like.name)
    bits = host.view(torch.int16) if host.dtype == torch.bfloat16 else host
    return ir.tensor(bits.numpy().view(like.dtype.numpy()).copy(), dtype=like.dtype, name=like.name)
