"""Elementwise operators, comparisons, activations and casts."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from graphc.fx.dtypes import torch_dtype
from graphc.fx.host import Host, Operator, broadcast


def _with_host(run: Callable[..., Any], on_number: Callable[..., Any]) -> Operator:
    return Operator(run, on_host=lambda *values: broadcast(on_number, values))


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _divide_number(a: Any, b: Any) -> Any:
    if isinstance(a, float | torch.SymFloat) or isinstance(b, float | torch.SymFloat):
        return a / b
    # Sizes are never negative; where a sign is known, division truncates.
    return -(-a // b) if isinstance(a, int) and isinstance(b, int) and (a < 0) != (b < 0) else a // b


def _mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def _clip(x: Tensor, low: Tensor | float | None = None, high: Tensor | float | None = None) -> Tensor:
    if isinstance(low, int | float) and isinstance(high, int | float) and x.is_floating_point():
        return torch.clamp(x, low, high)  # the upper bound wins where they cross, as it does below
    if low is not None:
        x = torch.clamp(x, low) if isinstance(low, int | float) else torch.maximum(x, low.to(x.dtype))
    if high is None:
        return x
    return torch.clamp(x, max=high) if isinstance(high, int | float) else torch.minimum(x, high.to(x.dtype))


def _cast(x: Tensor, *, to: int, **_: Any) -> Tensor:
    dtype = torch_dtype(to)
    if x.is_floating_point() and not dtype.is_floating_point and dtype not in (torch.bool, torch.int64):
        # A float beyond the range of a narrow integer wraps as it does through int64.
        return x.to(torch.int64).to(dtype)
    return x.to(dtype)


def _cast_host(x: Host, *, to: int, **_: Any) -> Any:
    kinds: dict[int, Callable[[Any], Any]] = {
        ir.DataType.INT64: lambda n: math.trunc(n) if isinstance(n, float) else int(n) if isinstance(n, bool) else n,
        ir.DataType.FLOAT: torch.sym_float,
        ir.DataType.BOOL: lambda n: n != 0,
    }
    return broadcast(kinds[to], [x]) if to in kinds else NotImplemented


def _shift(a: Tensor, b: Tensor, *, direction: str) -> Tensor:
    return torch.bitwise_left_shift(a, b) if direction == "LEFT" else torch.bitwise_right_shift(a, b)


def _is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    found = torch.zeros_like(x, dtype=torch.bool)
    if detect_negative:
        found = found | torch.isneginf(x)
    return found | torch.isposinf(x) if detect_positive else found


def _selu(x: Tensor, *, alpha: float = 1.6732632423543772, gamma: float = 1.0507009873554805) -> Tensor:
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(torch.clamp(x, max=0)))


def _celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.celu(x, alpha)


def _shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    zero = torch.zeros_like(x)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, zero)).to(x.dtype)


def _hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(alpha * x + beta, 0, 1)


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, slope * x, x)


def _fold(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *values: functools.reduce(function, values)


def _mean(*values: Tensor) -> Tensor:
    return functools.reduce(torch.add, values) / len(values)


def _where_host(condition: Host, a: Host, b: Host) -> Any:
    return broadcast(lambda c, x, y: x if c else y, [condition, a, b])


OPERATORS: dict[str, Operator] = {
    name: Operator(run)
    for name, run in {
        "Acos": torch.acos,
        "Acosh": torch.acosh,
        "Asin": torch.asin,
        "Asinh": torch.asinh,
        "Atan": torch.atan,
        "Atanh": torch.atanh,
        "BitwiseNot": torch.bitwise_not,
        "Cos": torch.cos,
        "Cosh": torch.cosh,
        "Erf": torch.erf,
        "Exp": torch.exp,
        "HardSwish": F.hardswish,
        "IsNaN": torch.isnan,
        "Log": torch.log,
        "Mish": F.mish,
        "Reciprocal": torch.reciprocal,
        "Relu": torch.relu,
        "Round": torch.round,
        "Sigmoid": torch.sigmoid,
        "Sign": torch.sign,
        "Sin": torch.sin,
        "Sinh": torch.sinh,
        "Softplus": lambda x: F.softplus(x, threshold=1e4),
        "Softsign": F.softsign,
        "Tan": torch.tan,
        "Tanh": torch.tanh,
    }.items()
} | {
    "Abs": _with_host(torch.abs, abs),
    "Add": _with_host(torch.add, operator.add),
    "And": _with_host(torch.logical_and, lambda a, b: a and b),
    "BitShift": Operator(_shift),
    "BitwiseAnd": Operator(torch.bitwise_and),
    "BitwiseOr": Operator(torch.bitwise_or),
    "BitwiseXor": Operator(torch.bitwise_xor),
    "Cast": Operator(_cast, on_host=_cast_host),
    "CastLike": Operator(lambda x, like, **_: x.to(like.dtype)),
    "Ceil": _with_host(torch.ceil, math.ceil),
    "Celu": Operator(_celu),
    "Clip": Operator(_clip, numbers=(1, 2), fixed=(1, 2)),
    "Div": _with_host(_divide, _divide_number),
    "Dropout": Operator(lambda x, *_, **__: (x, torch.ones_like(x, dtype=torch.bool)), fixed=(1,), many=True),
    "Elu": Operator(lambda x, alpha=1.0: F.elu(x, alpha)),
    "Equal": _with_host(torch.eq, operator.eq),
    "Floor": _with_host(torch.floor, lambda n: float(math.floor(n)) if isinstance(n, float) else n),
    "Gelu": Operator(lambda x, approximate="none": F.gelu(x, approximate=approximate)),
    "Greater": _with_host(torch.gt, operator.gt),
    "GreaterOrEqual": _with_host(torch.ge, operator.ge),
    "HardSigmoid": Operator(_hard_sigmoid),
    "Identity": Operator(lambda x: x, on_host=lambda x: x),
    "IsInf": Operator(_is_inf),
    "LeakyRelu": Operator(lambda x, alpha=0.01: F.leaky_relu(x, alpha)),
    "Less": _with_host(torch.lt, operator.lt),
    "LessOrEqual": _with_host(torch.le, operator.le),
    "Max": _with_host(_fold(torch.maximum), lambda *n: functools.reduce(torch.sym_max, n)),
    "Mean": Operator(_mean),
    "Min": _with_host(_fold(torch.minimum), lambda *n: functools.reduce(torch.sym_min, n)),
    "Mod": Operator(_mod, on_host=lambda a, b, **_: broadcast(operator.mod, [a, b])),
    "Mul": _with_host(torch.mul, operator.mul),
    "Neg": _with_host(torch.neg, operator.neg),
    "Not": _with_host(torch.logical_not, operator.not_),
    "Or": _with_host(torch.logical_or, lambda a, b: a or b),
    "PRelu": Operator(_prelu),
    "Pow": Operator(lambda a, b: torch.pow(a, b).to(a.dtype), numbers=(1,), fixed=(1,)),
    "Selu": Operator(_selu),
    "Shrink": Operator(_shrink),
    "Sqrt": _with_host(torch.sqrt, math.sqrt),
    "Sub": _with_host(torch.sub, operator.sub),
    "Sum": Operator(_fold(torch.add)),
    "Swish": Operator(lambda x, alpha=1.0: x * torch.sigmoid(alpha * x)),
    "ThresholdedRelu": Operator(lambda x, alpha=1.0: torch.where(x > alpha, x, torch.zeros_like(x))),
    "Where": Operator(torch.where, on_host=_where_host),
    "Xor": _with_host(torch.logical_xor, operator.ne),
}
