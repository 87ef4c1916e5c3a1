"""Facts of the operators that compute with sizes: elementwise arithmetic, Shape and its kin, reductions.

These rules also follow the *contents* of small integer tensors, which is how a reshape's target becomes known.
Semantics are those of the ONNX operator specification.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc.edit import attribute
from graphc.shapes import (
    INTEGERS,
    MAX_ITEMS,
    Fact,
    Facts,
    Items,
    Shape,
    items_array,
    number,
    rule,
    symbolic,
    with_items,
)
from graphc.shapes.symbolic import Dim
from graphc.shapes.tensor_rules import axes_of, broadcast_shapes, dims_from

Facts_ = Sequence[Fact]


# Elementwise arithmetic ------------------------------------------------------------------------------------------

Combine = Callable[[Dim, Dim], "Dim | None"]


def _compare(certain: Callable[[Dim], bool | None]) -> Combine:
    def combine(a: Dim, b: Dim) -> Dim | None:
        verdict = certain(symbolic.sub(a, b))
        return None if verdict is None else int(verdict)

    return combine


def _is_zero(difference: Dim) -> bool | None:
    if isinstance(difference, int):
        return difference == 0
    return False if symbolic.unequal(difference, 0) else None


def _is_positive(difference: Dim) -> bool | None:
    if symbolic.positive(difference):
        return True
    return False if symbolic.nonnegative(symbolic.mul(difference, -1)) else None


def _negated(of: Callable[[Dim], bool | None], sign: int = -1) -> Callable[[Dim], bool | None]:
    def verdict(difference: Dim) -> bool | None:
        found = of(symbolic.mul(difference, sign))
        return None if found is None else not found

    return verdict


_COMPARE: dict[str, Combine] = {
    "Equal": _compare(_is_zero),
    "Greater": _compare(_is_positive),
    "Less": _compare(lambda d: _is_positive(symbolic.mul(d, -1))),
    "GreaterOrEqual": _compare(_negated(_is_positive)),
    "LessOrEqual": _compare(_negated(_is_positive, 1)),
}
_LOGIC: dict[str, Combine] = {
    "And": lambda a, b: a if b == 1 else b if a == 1 else 0 if 0 in (a, b) else None,
    "Or": lambda a, b: a if b == 0 else b if a == 0 else 1 if 1 in (a, b) else None,
    "Xor": lambda a, b: a ^ b if isinstance(a, int) and isinstance(b, int) else None,
}
_ARITHMETIC: dict[str, Combine] = {
    "Add": symbolic.add,
    "Sub": symbolic.sub,
    "Mul": symbolic.mul,
    "Div": symbolic.truncdiv,
    "Max": symbolic.maximum,
    "Min": symbolic.minimum,
    "Sum": symbolic.add,
}
_ABSORBING = {"Mul": 0, "And": 0, "Or": 1}


def _elementwise(combine: Combine, dtype: ir.DataType | None, absorbing: int | None, inputs: Facts_) -> Items | None:
    arrays = [items_array(fact) for fact in inputs]
    if any(array is None for array in arrays):
        return None

    def step(a: Any, b: Any) -> Dim | None:
        if absorbing is not None and absorbing in (a, b):
            return absorbing
        result = None if a is None or b is None else combine(a, b)
        return None if result is None else number(result, dtype)

    total = arrays[0]
    for array in arrays[1:]:
        assert total is not None and array is not None
        total, array = np.broadcast_arrays(total, array)
        if total.size > MAX_ITEMS:
            return None
        merged = np.empty(total.shape, dtype=object)
        merged.reshape(-1)[:] = [step(a, b) for a, b in zip(total.flat, array.flat, strict=True)]
        total = merged
    assert total is not None
    return tuple(total.reshape(-1).tolist())


@rule(
    "Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean", "Mod", "Pow", "And", "Or", "Xor", "Equal", "Greater",
    "Less", "GreaterOrEqual", "LessOrEqual", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor",
)  # fmt: skip
def _broadcasting(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    operator = node.op_type
    boolean = operator in _COMPARE or operator in _LOGIC
    dtype = ir.DataType.BOOL if boolean else inputs[0].dtype
    if any(fact.shape is None for fact in inputs) or not inputs:
        return [Fact(dtype)]
    shape = broadcast_shapes(*(fact.shape for fact in inputs if fact.shape is not None))
    if any(fact.items is None for fact in inputs) or inputs[0].dtype not in INTEGERS:
        return [Fact(dtype, shape)]
    combine = _COMPARE.get(operator) or _LOGIC.get(operator) or _ARITHMETIC.get(operator)
    if operator == "Mod" and not attribute(node, "fmod", 0):
        # Integer Mod has the sign of the divisor, as in Python.
        combine = lambda a, b: symbolic.mod(a, b, truncated=False)  # noqa: E731
    if combine is None or (operator in _COMPARE and inputs[0].dtype == ir.DataType.BOOL):
        return [Fact(dtype, shape)]
    return [Fact(dtype, shape, _elementwise(combine, dtype, _ABSORBING.get(operator), inputs))]


@rule("Neg", "Abs", "Not", "Sign")
def _unary(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    x = inputs[0]
    if x.items is None:
        return [Fact(x.dtype, x.shape)]

    def step(item: Dim | None) -> Dim | None:
        if item is None:
            return None
        match node.op_type:
            case "Neg":
                return number(symbolic.mul(item, -1), x.dtype)
            case "Not":
                return 1 - item if isinstance(item, int) else None
            case "Abs":
                return item if symbolic.nonnegative(item) else abs(item) if isinstance(item, int) else None
        return (item > 0) - (item < 0) if isinstance(item, int) else 1 if symbolic.positive(item) else None

    return [Fact(x.dtype, x.shape, tuple(map(step, x.items)))]


@rule("Where")
def _where(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    condition, a, b = inputs[:3]
    if condition.shape is None or a.shape is None or b.shape is None:
        return [Fact(a.dtype)]
    fact = Fact(a.dtype, broadcast_shapes(condition.shape, a.shape, b.shape))
    arrays = [items_array(x) for x in (condition, a, b)]
    if any(x is None for x in arrays):
        return [fact]
    tests, chosen, other = np.broadcast_arrays(*(x for x in arrays if x is not None))
    picked = np.empty(tests.shape, dtype=object)
    picked.reshape(-1)[:] = [
        (x if test else y) if isinstance(test, int) else x if x == y else None
        for test, x, y in zip(tests.flat, chosen.flat, other.flat, strict=True)
    ]
    return [with_items(fact, picked)]


@rule("Cast", "CastLike")
def _cast(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    x = inputs[0]
    dtype = ir.DataType(attribute(node, "to")) if node.op_type == "Cast" else inputs[1].dtype
    if dtype is None:
        return None
    if x.items is None or dtype not in INTEGERS or x.dtype not in INTEGERS:
        return [Fact(dtype, x.shape)]

    def step(item: Dim | None) -> Dim | None:
        if dtype != ir.DataType.BOOL or item is None:
            return None if item is None else number(item, dtype)
        return int(item != 0) if isinstance(item, int) else 1 if symbolic.positive(item) else None

    return [Fact(dtype, x.shape, tuple(map(step, x.items)))]


@rule("Shape")
def _shape(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    shape = inputs[0].shape
    if shape is None:
        return [Fact(ir.DataType.INT64, facts.freshen(1))]
    rank = len(shape)
    start, end = attribute(node, "start", 0), attribute(node, "end", rank)
    start, end = (min(max(at + rank if at < 0 else at, 0), rank) for at in (start, end))
    dims = shape[start : max(start, end)]
    return [Fact(ir.DataType.INT64, (len(dims),), dims)]


@rule("Size")
def _size(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    shape = inputs[0].shape
    return [Fact(ir.DataType.INT64, (), None if shape is None else (symbolic.product(shape),))]


@rule("ConstantOfShape")
def _constant_of_shape(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    value = attribute(node, "value")
    dtype = ir.DataType.FLOAT if value is None else value.dtype
    shape = dims_from(inputs[0], facts)
    fact = Fact(dtype, shape)
    size = math.prod(fact.static) if fact.static is not None else MAX_ITEMS + 1
    if dtype in INTEGERS and size <= MAX_ITEMS:
        fact = replace(fact, items=(0 if value is None else int(value.numpy().reshape(-1)[0]),) * size)
    return [fact]


@rule("Range")
def _range(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    dtype = inputs[0].dtype
    ends = [fact.items[0] if fact.items is not None and len(fact.items) == 1 else None for fact in inputs]
    start, limit, step = ends if len(ends) == 3 else (None, None, None)
    if start is None or limit is None or not isinstance(step, int) or step == 0:
        return [Fact(dtype, facts.freshen(1))]
    distance = symbolic.sub(limit, start)
    if step < 0:
        distance, stride = symbolic.mul(distance, -1), -step
    else:
        stride = step
    size = symbolic.as_size(distance) if stride == 1 else distance
    if not symbolic.nonnegative(distance):
        length: Dim = 0 if isinstance(distance, int) else size if facts.exists(size) else facts.fresh()
    else:
        length = symbolic.ceildiv(distance, stride)
    fact = Fact(dtype, (length,))
    if isinstance(length, int) and length <= MAX_ITEMS:
        return [replace(fact, items=tuple(symbolic.add(start, i * step) for i in range(length)))]
    return [fact]


@rule("NonZero")
def _non_zero(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    rank: Dim = facts.fresh() if inputs[0].shape is None else len(inputs[0].shape)
    return [Fact(ir.DataType.INT64, (rank, facts.fresh()))]


@rule(
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
)  # fmt: skip
def _reduce(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    x = inputs[0]
    if x.shape is None:
        return [Fact(x.dtype)]
    axes = axes_of(node, inputs, 1, len(x.shape))
    if axes is None:
        kept = facts.freshen(len(x.shape)) if attribute(node, "keepdims", 1) else None
        return [Fact(x.dtype, kept)]
    if not axes and attribute(node, "noop_with_empty_axes", 0):
        return [Fact(x.dtype, x.shape)]
    axes = axes or tuple(range(len(x.shape)))
    fact = Fact(x.dtype, _reduced(x.shape, axes, bool(attribute(node, "keepdims", 1))))
    combine = {
        "ReduceProd": symbolic.mul,
        "ReduceSum": symbolic.add,
        "ReduceMax": symbolic.maximum,
        "ReduceMin": symbolic.minimum,
    }
    if x.items and len(x.shape) == 1 and node.op_type in combine and None not in x.items:
        total: Any = x.items[0]
        for item in x.items[1:]:
            total = combine[node.op_type](total, item)  # type: ignore[arg-type]
        return [replace(fact, items=(number(total, x.dtype),))]
    return [fact]


@rule("ArgMax", "ArgMin")
def _arg(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    shape = inputs[0].shape
    if shape is None or not shape:
        return None
    axis = attribute(node, "axis", 0) % len(shape)
    return [Fact(ir.DataType.INT64, _reduced(shape, (axis,), bool(attribute(node, "keepdims", 1))))]


def _reduced(shape: Shape, axes: Sequence[int], keep: bool) -> Shape:
    if keep:
        return tuple(1 if i in axes else dim for i, dim in enumerate(shape))
    return tuple(dim for i, dim in enumerate(shape) if i not in axes)
