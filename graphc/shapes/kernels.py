"""Operators on constants in numpy, with the semantics of the ONNX specification to the letter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc.edit import Array, attribute

Inputs = Sequence["Array | None"]
"""Arrays of a node's inputs; None for an omitted optional one."""
Kernel = Callable[[ir.Node, Inputs, int], "Sequence[Array] | None"]
"""``kernel(node, inputs, opset version)`` gives the outputs, or None to leave these inputs to the runtime."""


class CannotFold(Exception):
    """The node is not computed; the message is the reason, in plain words."""


DTYPES = frozenset(np.dtype(t) for t in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))
"""The dtypes computed with: those that numpy has itself."""

KERNELS: dict[str, Kernel] = {}
"""Kernels by operator of the standard domain."""


def _kernel(*operators: str) -> Callable[[Kernel], Kernel]:
    def add(kernel: Kernel) -> Kernel:
        KERNELS.update(dict.fromkeys(operators, kernel))
        return kernel

    return add


def _present(inputs: Inputs, index: int) -> Array | None:
    return inputs[index] if index < len(inputs) else None


def _need(inputs: Inputs, index: int) -> Array:
    array = _present(inputs, index)
    if array is None:
        raise CannotFold(f"input {index} is missing")
    return array


def _ints(array: Array | None) -> list[int] | None:
    return None if array is None else [int(x) for x in array.reshape(-1)]


def _axes(node: ir.Node, inputs: Inputs, index: int, rank: int) -> tuple[int, ...]:
    given = _ints(_present(inputs, index)) if index < len(inputs) else None
    axes = tuple(attribute(node, "axes") or ()) if given is None else tuple(given)
    if any(not -rank <= axis < rank for axis in axes):
        raise CannotFold("an axis is out of range")
    return tuple(axis % rank for axis in axes)


# Elementwise -----------------------------------------------------------------------------------------------------


def _divide(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    if not np.all(b):
        raise CannotFold("integer division by zero is not defined")
    quotient = np.floor_divide(a, b)
    # ONNX truncates towards zero, numpy rounds down.
    truncated: Array = (quotient + ((quotient < 0) & (quotient * b != a))).astype(a.dtype)
    return truncated


def _no_nan(a: Array, b: Array) -> None:
    if a.dtype.kind == "f" and (np.isnan(a).any() or np.isnan(b).any()):
        raise CannotFold("runtimes differ in the maximum of NaN")


def _maximum(a: Array, b: Array) -> Array:
    _no_nan(a, b)
    return np.maximum(a, b)


def _minimum(a: Array, b: Array) -> Array:
    _no_nan(a, b)
    return np.minimum(a, b)


_BINARY: dict[str, Callable[[Array, Array], Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": _divide,
    "And": np.logical_and,
    "Or": np.logical_or,
    "Xor": np.logical_xor,
    "Equal": np.equal,
    "Greater": np.greater,
    "Less": np.less,
    "GreaterOrEqual": np.greater_equal,
    "LessOrEqual": np.less_equal,
    "BitwiseAnd": np.bitwise_and,
    "BitwiseOr": np.bitwise_or,
    "BitwiseXor": np.bitwise_xor,
}
_VARIADIC: dict[str, Callable[[Array, Array], Any]] = {"Max": _maximum, "Min": _minimum, "Sum": np.add}


@_kernel(*_BINARY)
def _binary(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    if node.op_type in ("Add", "Sub", "Mul", "Div") and version < 7:
        raise CannotFold("before opset 7 this operator broadcasts differently")
    return [_BINARY[node.op_type](_need(inputs, 0), _need(inputs, 1))]


@_kernel(*_VARIADIC)
def _variadic(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    total = _need(inputs, 0)
    for i in range(1, len(inputs)):
        total = _VARIADIC[node.op_type](total, _need(inputs, i))
    return [total]


@_kernel("Mod")
def _mod(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array] | None:
    a, b = _need(inputs, 0), _need(inputs, 1)
    if a.dtype.kind != "f" and not np.all(b):
        raise CannotFold("the remainder of a division by zero is not defined")
    if attribute(node, "fmod", 0):
        return [np.fmod(a, b)]
    if a.dtype.kind == "f":
        return None
    return [np.mod(a, b)]


@_kernel("Pow")
def _pow(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    a, b = _need(inputs, 0), _need(inputs, 1)
    if a.dtype.kind != "f":
        if (b.dtype.kind == "f" and np.any(b != np.rint(b))) or np.any(b < 0):
            raise CannotFold("integers are only raised to natural powers")
        return [np.power(a, b.astype(a.dtype))]
    return [np.power(a.astype(np.float64), b.astype(np.float64)).astype(a.dtype)]


def _erf(x: Array) -> Array:
    erf: Array = np.vectorize(math.erf, otypes=[np.float64])(x)
    return erf


def _sigmoid(x: Array) -> Array:
    sigmoid: Array = 1 / (1 + np.exp(-x))
    return sigmoid


_EXACT: dict[str, Callable[[Array], Any]] = {
    "Abs": np.abs,
    "Ceil": np.ceil,
    "Floor": np.floor,
    "Identity": lambda x: x,
    "IsNaN": np.isnan,
    "Neg": np.negative,
    "Not": np.logical_not,
    "BitwiseNot": np.invert,
    "Relu": lambda x: _maximum(x, np.zeros((), x.dtype)),
    "Round": np.rint,
    "Sign": np.sign,
    "Sqrt": np.sqrt,
}
_ROUNDED: dict[str, Callable[[Array], Any]] = {
    "Cos": np.cos,
    "Erf": _erf,
    "Exp": np.exp,
    "Log": np.log,
    "Reciprocal": lambda x: 1 / x,
    "Sigmoid": _sigmoid,
    "Sin": np.sin,
    "Softplus": lambda x: np.logaddexp(0, x),
    "Tanh": np.tanh,
}
"""Computed in double precision and rounded once."""


@_kernel(*_EXACT)
def _exact(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    return [_EXACT[node.op_type](_need(inputs, 0))]


@_kernel(*_ROUNDED)
def _rounded(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    x = _need(inputs, 0)
    return [_ROUNDED[node.op_type](x.astype(np.float64)).astype(x.dtype)]


@_kernel("Clip")
def _clip(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    x = _need(inputs, 0)
    low, high = _present(inputs, 1), _present(inputs, 2)
    if version < 11:
        low, high = (None if (b := attribute(node, k)) is None else np.array(b, x.dtype) for k in ("min", "max"))
    _no_nan(x, x)
    x = x if low is None else np.maximum(x, low.reshape(()))
    return [x if high is None else np.minimum(x, high.reshape(()))]


@_kernel("Where")
def _where(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    return [np.where(_need(inputs, 0), _need(inputs, 1), _need(inputs, 2))]


@_kernel("Cast", "CastLike")
def _cast(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    x = _need(inputs, 0)
    dtype = ir.DataType(attribute(node, "to")).numpy() if node.op_type == "Cast" else _need(inputs, 1).dtype
    if dtype not in DTYPES:
        raise CannotFold(f"constants of dtype {dtype} are left alone")
    if dtype.kind in "iu" and x.dtype.kind == "f":
        limits = np.iinfo(dtype)
        whole = np.trunc(x.astype(np.float64))
        if not np.isfinite(whole).all() or np.any(whole < limits.min) or np.any(whole > limits.max):
            raise CannotFold("a cast of floats out of the range of integers is not defined")
    return [x.astype(dtype)]


# Sizes and indices -----------------------------------------------------------------------------------------------


@_kernel("Shape")
def _shape(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    shape = _need(inputs, 0).shape
    return [np.array(shape[attribute(node, "start", 0) : attribute(node, "end", len(shape))], np.int64)]


@_kernel("Size")
def _size(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    return [np.array(_need(inputs, 0).size, np.int64)]


@_kernel("ConstantOfShape")
def _constant_of_shape(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    value = attribute(node, "value")
    fill = np.zeros((), np.float32) if value is None else value.numpy().reshape(())
    # A view: one element in memory, however large the tensor is.
    return [np.broadcast_to(fill, _ints(_need(inputs, 0)) or ())]


@_kernel("Range")
def _range(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array] | None:
    start, limit, delta = (_need(inputs, i).reshape(()) for i in range(3))
    if start.dtype.kind != "i":
        return None
    if not delta:
        raise CannotFold("a Range with step 0 is not defined")
    return [np.arange(int(start), int(limit), int(delta), dtype=start.dtype)]


@_kernel("Gather")
def _gather(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    x, index = _need(inputs, 0), _need(inputs, 1)
    axis = attribute(node, "axis", 0)
    if index.size and (index.min() < -x.shape[axis] or index.max() >= x.shape[axis]):
        raise CannotFold("an index is out of range")
    return [np.take(x, index.astype(np.int64), axis=axis)]


@_kernel("Slice")
def _slice(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    x = _need(inputs, 0)
    if version < 10:
        starts, ends = attribute(node, "starts"), attribute(node, "ends")
        axes, steps = attribute(node, "axes"), None
    else:
        starts, ends = _ints(_need(inputs, 1)), _ints(_need(inputs, 2))
        axes, steps = _ints(_present(inputs, 3)), _ints(_present(inputs, 4))
    cut = [slice(None)] * x.ndim
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis, step = (axes[i] if axes else i), (steps[i] if steps else 1)
        if step < 0 and end >= 2**31 - 1:
            raise CannotFold("runtimes differ in what the largest integer means as the end of a backward Slice")
        if step < 0:
            # Backwards, ONNX clamps a start to the first element, and an end to before it, which Python calls None.
            start = max(start, -x.shape[axis])
            end = None if end < -x.shape[axis] else end
        cut[axis] = slice(start, end, step)
    return [x[tuple(cut)]]


@_kernel("NonZero")
def _non_zero(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    x = _need(inputs, 0)
    return [np.stack(np.nonzero(x)).astype(np.int64) if x.ndim else np.zeros((0, int(bool(x))), np.int64)]


# Layout ----------------------------------------------------------------------------------------------------------


@_kernel("Reshape")
def _reshape(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    x = _need(inputs, 0)
    target = _ints(_need(inputs, 1)) or []
    if not attribute(node, "allowzero", 0):
        target = [x.shape[i] if size == 0 else size for i, size in enumerate(target)]
    return [x.reshape(target)]


@_kernel("Flatten")
def _flatten(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    x = _need(inputs, 0)
    axis = attribute(node, "axis", 1)
    axis += x.ndim if axis < 0 else 0
    return [x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))]


@_kernel("Squeeze")
def _squeeze(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    x = _need(inputs, 0)
    return [np.squeeze(x, axis=_axes(node, inputs, 1, x.ndim) or None)]


@_kernel("Unsqueeze")
def _unsqueeze(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    x = _need(inputs, 0)
    axes = attribute(node, "axes") if version < 13 else _ints(_need(inputs, 1))
    return [np.expand_dims(x, tuple(axes or ()))]


@_kernel("Transpose")
def _transpose(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    return [np.transpose(_need(inputs, 0), attribute(node, "perm"))]


@_kernel("Concat")
def _concat(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    return [np.concatenate([_need(inputs, i) for i in range(len(inputs))], axis=attribute(node, "axis", 1))]


@_kernel("Split")
def _split(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    x, count = _need(inputs, 0), len(node.outputs)
    axis = attribute(node, "axis", 0)
    parts = attribute(node, "split") if version < 13 else _ints(_present(inputs, 1))
    if parts is None:
        chunk = -(-x.shape[axis] // count)
        parts = [max(min(chunk, x.shape[axis] - i * chunk), 0) for i in range(count)]
    if sum(parts) != x.shape[axis] or len(parts) != count:
        raise CannotFold("the parts of a Split do not add up")
    return np.split(x, np.cumsum(parts)[:-1], axis=axis)


@_kernel("Expand")
def _expand(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    x = _need(inputs, 0)
    return [np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(_ints(_need(inputs, 1)) or ())))]


@_kernel("Tile")
def _tile(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    return [np.tile(_need(inputs, 0), _ints(_need(inputs, 1)) or [])]


@_kernel("Trilu")
def _trilu(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    x, k = _need(inputs, 0), _ints(_present(inputs, 1)) or [0]
    return [np.triu(x, k[0]) if attribute(node, "upper", 1) else np.tril(x, k[0])]


# Contractions and reductions -------------------------------------------------------------------------------------


@_kernel("MatMul")
def _matmul(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    a, b = _need(inputs, 0), _need(inputs, 1)
    if a.dtype.kind != "f":
        return [np.matmul(a, b)]
    return [np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(a.dtype)]


_REDUCE: dict[str, Callable[..., Any]] = {
    "ReduceMax": np.max,
    "ReduceMean": np.mean,
    "ReduceMin": np.min,
    "ReduceProd": np.prod,
    "ReduceSum": np.sum,
}


@_kernel(*_REDUCE)
def _reduce(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    x = _need(inputs, 0)
    axes = _axes(node, inputs, 1, x.ndim)
    if not axes and attribute(node, "noop_with_empty_axes", 0):
        return [x]
    if not x.size or (node.op_type == "ReduceMean" and x.dtype.kind != "f"):
        raise CannotFold("runtimes differ in this reduction")
    if node.op_type in ("ReduceMax", "ReduceMin"):
        _no_nan(x, x)
    wide = np.float64 if x.dtype.kind == "f" else x.dtype
    found = _REDUCE[node.op_type](x.astype(wide), axis=axes or None, keepdims=bool(attribute(node, "keepdims", 1)))
    return [np.asarray(found).astype(x.dtype)]
