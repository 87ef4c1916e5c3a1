"""Products, reductions, softmax and normalisations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from graphc.fx.dtypes import torch_dtype
from graphc.fx.host import Host, Operator, as_list


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    a, b = a.T if transA else a, b.T if transB else b
    if c is not None and alpha == beta == 1.0:
        return torch.addmm(c, a, b)
    y = a @ b if alpha == 1.0 else alpha * (a @ b)
    return y if c is None else y + (c if beta == 1.0 else beta * c)


def _matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    a, b = a.to(torch.int32), b.to(torch.int32)
    if a_zero is not None:
        a = a - (a_zero.to(torch.int32).unsqueeze(-1) if a_zero.dim() else a_zero.to(torch.int32))
    if b_zero is not None:
        b = b - b_zero.to(torch.int32)
    return a @ b


def _einsum(*values: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation, *values)


Reducer = Callable[[Tensor, list[int], bool], Tensor]


def _reduction(reduce: Reducer) -> Operator:
    def run(x: Tensor, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        dims = as_list(axes)
        if not dims:
            if noop_with_empty_axes:
                # No axis is reduced; what is done to each element still is.
                return reduce(x.unsqueeze(0), [0], False)
            dims = list(range(x.dim()))
        return reduce(x, dims, bool(keepdims)) if dims else reduce(x.unsqueeze(0), [0], False)

    return Operator(run, host=(1,))


def _prod(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    for axis in sorted((a % x.dim() for a in dims), reverse=True):
        x = torch.prod(x, axis, keepdim=keep, dtype=x.dtype)
    return x


def _sum(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return torch.sum(x, dims, keepdim=keep, dtype=x.dtype)


def _mean(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.mean(x, dims, keepdim=keep)
    return torch.mean(x.double(), dims, keepdim=keep).to(x.dtype)


def _l2(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return torch.sqrt(_sum(x * x, dims, keep)).to(x.dtype)


def _prod_host(x: Host, *_: Any, keepdims: int = 1, **__: Any) -> Host:
    return [math.prod(as_list(x))] if keepdims and isinstance(x, list | tuple) else math.prod(as_list(x))


def _sum_host(x: Host, *_: Any, keepdims: int = 1, **__: Any) -> Host:
    return [sum(as_list(x))] if keepdims and isinstance(x, list | tuple) else sum(as_list(x))


def _batch_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    **_: Any,
) -> tuple[Tensor, ...]:
    if not training_mode:
        kind = x.dtype if scale.dtype != x.dtype else scale.dtype
        y = F.batch_norm(x, mean.to(kind), var.to(kind), scale.to(kind), bias.to(kind), False, 0.0, epsilon)
        return (y,)
    axes = [0, *range(2, x.dim())]
    now_mean, now_var = x.mean(axes), x.var(axes, unbiased=False)
    y = F.batch_norm(x, now_mean, now_var, scale, bias, False, 0.0, epsilon)
    return y, mean * momentum + now_mean * (1 - momentum), var * momentum + now_var * (1 - momentum)


def _stash(stash_type: int) -> Any:
    return torch_dtype(stash_type) or torch.float32


def _layer_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = ir.DataType.FLOAT,
    outputs: int = 1,
) -> tuple[Tensor, ...]:
    shape = list(x.shape[axis:])
    if outputs == 1 and list(scale.shape) == shape and (bias is None or list(bias.shape) == shape):
        return (F.layer_norm(x, shape, scale, bias, epsilon),)
    dims = list(range(axis % x.dim(), x.dim()))
    wide = x.to(_stash(stash_type))
    mean = wide.mean(dims, keepdim=True)
    inverse = torch.rsqrt((wide - mean).square().mean(dims, keepdim=True) + epsilon)
    y = ((wide - mean) * inverse).to(x.dtype) * scale
    return (y if bias is None else y + bias), mean, inverse


def _rms_norm(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = ir.DataType.FLOAT
) -> Tensor:
    dims = list(range(axis % x.dim(), x.dim()))
    wide = x.to(_stash(stash_type))
    return (wide * torch.rsqrt(wide.square().mean(dims, keepdim=True) + epsilon)).to(x.dtype) * scale


def _instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


def _group_norm(x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, **_: Any) -> Tensor:
    return F.group_norm(x, num_groups, scale, bias, epsilon)


def _mean_variance(x: Tensor, *, axes: Any = (0, 2, 3)) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred / (torch.sqrt(centred.square().mean(axes, keepdim=True)) + 1e-9)


def _lp_norm(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


def _lrn(x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    squares = F.pad(x.square(), [0, 0] * (x.dim() - 2) + [(size - 1) // 2, size // 2])
    total = squares.unfold(1, size, 1).sum(-1)
    return x / (bias + alpha / size * total) ** beta


def _hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    best = torch.argmax(x, axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, best, 1)


OPERATORS: dict[str, Operator] = {
    "BatchNormalization": Operator(_batch_norm, fixed=(3, 4), many=True),
    "Det": Operator(torch.linalg.det),
    "Einsum": Operator(_einsum),
    "Gemm": Operator(gemm),
    "GroupNormalization": Operator(_group_norm),
    "Hardmax": Operator(_hardmax),
    "InstanceNormalization": Operator(_instance_norm),
    "LayerNormalization": Operator(_layer_norm, many=True, counted=True),
    "LogSoftmax": Operator(lambda x, axis=-1: F.log_softmax(x, axis)),
    "LpNormalization": Operator(_lp_norm),
    "LRN": Operator(_lrn),
    "MatMul": Operator(torch.matmul),
    "MatMulInteger": Operator(_matmul_integer),
    "MeanVarianceNormalization": Operator(_mean_variance),
    "RMSNormalization": Operator(_rms_norm),
    "ReduceL1": _reduction(lambda x, dims, keep: _sum(x.abs(), dims, keep)),
    "ReduceL2": _reduction(_l2),
    "ReduceLogSum": _reduction(lambda x, dims, keep: torch.log(_sum(x, dims, keep))),
    "ReduceLogSumExp": _reduction(lambda x, dims, keep: torch.logsumexp(x, dims, keepdim=keep)),
    "ReduceMax": _reduction(lambda x, dims, keep: torch.amax(x, dims, keepdim=keep)),
    "ReduceMean": _reduction(_mean),
    "ReduceMin": _reduction(lambda x, dims, keep: torch.amin(x, dims, keepdim=keep)),
    "ReduceProd": Operator(_reduction(_prod).run, on_host=_prod_host, host=(1,)),
    "ReduceSum": Operator(_reduction(_sum).run, on_host=_sum_host, host=(1,)),
    "ReduceSumSquare": _reduction(lambda x, dims, keep: _sum(x * x, dims, keep)),
    "Softmax": Operator(lambda x, axis=-1: F.softmax(x, axis)),
}
