"""Shape arithmetic: what the integer tensors of a graph hold, as far as it follows from shapes and constants.

The value of a tensor is an object array of Python numbers and ``Sym``: exact integers for static sizes,
polynomials for dynamic ones. What cannot be followed becomes a new symbol.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes.size import Size, Sym, product, symbol

Known = np.ndarray[Any, np.dtype[Any]]

LIMIT = 256
"""Elements up to which a tensor is followed: shapes, pads, splits, small index lists."""


def known(array: Any) -> Known:
    """An object array of Python scalars."""
    array = np.asarray(array)
    out = np.empty(array.shape, dtype=object)
    out[...] = array.tolist() if array.shape else array.item()
    return out


def sizes(array: Known) -> list[Size]:
    """The elements as a flat list; only for integer contents."""
    return list(array.reshape(-1).tolist())


def shape(node: ir.Node, lengths: Sequence[Size]) -> Known:
    """What a Shape or a Size node gives for a tensor of these lengths."""
    if node.op_type == "Size":
        total = np.empty((), dtype=object)
        total[()] = product(lengths)
        return total
    chosen = list(lengths)[edit.attribute(node, "start", 0) : edit.attribute(node, "end")]
    held = np.empty(len(chosen), dtype=object)
    held[:] = chosen
    return held


def evaluate(node: ir.Node, inputs: Sequence[Known | None]) -> list[Known] | None:
    """What a node's outputs hold, given what its inputs hold; None where it cannot be said.

    Args:
        node: A node of the standard domain.
        inputs: One entry per input; None for an omitted one.
    """
    rule = _RULES.get(node.op_type)
    if rule is None:
        return None
    try:
        results = rule(node, list(inputs))
    except (TypeError, ValueError, IndexError, ZeroDivisionError, OverflowError, KeyError):
        return None
    if results is None:
        return None
    outputs = results if isinstance(results, list) else [results]
    if any(np.size(array) > LIMIT for array in outputs):
        return None
    return [_named(array, out.name or "") for array, out in zip(outputs, node.outputs, strict=False)]


def _named(array: Any, name: str) -> Known:
    out = np.empty(np.shape(array), dtype=object)
    out[...] = array
    if None in out.reshape(-1).tolist():
        for index in np.ndindex(out.shape):
            if out[index] is None:
                out[index] = symbol(f"{name}{list(index)}")
    return out


def _elementwise(fn: Callable[..., Any]) -> Callable[[ir.Node, list[Any]], Any]:
    def run(node: ir.Node, inputs: list[Any]) -> Any:
        return np.frompyfunc(fn, len(inputs), 1)(*inputs)

    return run


def _compare(fn: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool | None]:
    """Comparisons of sizes; a dynamic size is only known not to be negative."""

    def run(a: Any, b: Any) -> bool | None:
        if isinstance(a, Sym) or isinstance(b, Sym):
            if a == b:
                return fn(0, 0)
            if not isinstance(b, Sym) and b < 0:
                return fn(0, b) if fn(0, b) == fn(1 << 40, b) else None
            if not isinstance(a, Sym) and a < 0:
                return fn(a, 0) if fn(a, 0) == fn(a, 1 << 40) else None
            return None
        return fn(a, b)

    return run


def _divide(a: Any, b: Any) -> Any:
    if isinstance(a, float) or isinstance(b, float):
        return a / b
    return a // b


def _pick(a: Any, b: Any, take: Callable[[Any, Any], Any]) -> Any:
    if isinstance(a, Sym) or isinstance(b, Sym):
        return a if a == b else None
    return take(a, b)


def _where(node: ir.Node, inputs: list[Any]) -> Any:
    def choose(c: Any, a: Any, b: Any) -> Any:
        if c is None or isinstance(c, Sym):
            return a if a == b else None
        return a if c else b

    return np.frompyfunc(choose, 3, 1)(*inputs)


def _cast(node: ir.Node, inputs: list[Any]) -> Any:
    to = ir.DataType(edit.attribute(node, "to"))
    if to.is_floating_point():
        convert: Callable[[Any], Any] = lambda v: v if isinstance(v, Sym) else float(v)  # noqa: E731
    elif to == ir.DataType.BOOL:
        convert = lambda v: v if isinstance(v, Sym) else bool(v)  # noqa: E731
    else:
        convert = lambda v: v if isinstance(v, Sym) else int(v)  # noqa: E731
    return np.frompyfunc(convert, 1, 1)(inputs[0])


def _rounding(fn: Callable[[Any], Any]) -> Callable[[ir.Node, list[Any]], Any]:
    def run(node: ir.Node, inputs: list[Any]) -> Any:
        return np.frompyfunc(lambda v: v if isinstance(v, Sym) else float(fn(v)), 1, 1)(inputs[0])

    return run


def _axes(node: ir.Node, inputs: list[Any]) -> list[int] | None:
    if len(inputs) > 1 and inputs[1] is not None:
        return [int(a) for a in inputs[1].reshape(-1)]
    found = edit.attribute(node, "axes")
    return None if found is None else list(found)


def _squeeze(node: ir.Node, inputs: list[Any]) -> Any:
    axes = _axes(node, inputs)
    return np.squeeze(inputs[0], None if axes is None else tuple(axes))


def _unsqueeze(node: ir.Node, inputs: list[Any]) -> Any:
    return np.expand_dims(inputs[0], tuple(_axes(node, inputs) or ()))


def _slice(node: ir.Node, inputs: list[Any]) -> Any:
    data = inputs[0]
    if len(inputs) > 1:
        starts, ends = inputs[1], inputs[2]
        axes = inputs[3] if len(inputs) > 3 else None
        steps = inputs[4] if len(inputs) > 4 else None
    else:
        starts, ends = np.array(edit.attribute(node, "starts")), np.array(edit.attribute(node, "ends"))
        given = edit.attribute(node, "axes")
        axes, steps = None if given is None else np.array(given), None
    axes = np.arange(len(starts)) if axes is None else axes
    index = [slice(None)] * data.ndim
    for i, axis in enumerate(axes):
        if any(isinstance(v, Sym) for v in (starts[i], ends[i])):
            return None
        step = 1 if steps is None else int(steps[i])
        end: int | None = int(ends[i])
        if step < 0 and end is not None and end < -data.shape[int(axis)]:
            end = None
        index[int(axis)] = slice(int(starts[i]), end, step)
    return data[tuple(index)]


def _gather(node: ir.Node, inputs: list[Any]) -> Any:
    return np.take(inputs[0], inputs[1].astype(np.int64), axis=edit.attribute(node, "axis", 0))


def _concat(node: ir.Node, inputs: list[Any]) -> Any:
    return np.concatenate(inputs, axis=edit.attribute(node, "axis"))


def _reshape(node: ir.Node, inputs: list[Any]) -> Any:
    return inputs[0].reshape([int(v) for v in inputs[1].reshape(-1)])


def _expand(node: ir.Node, inputs: list[Any]) -> Any:
    shape = np.broadcast_shapes(inputs[0].shape, tuple(int(v) for v in inputs[1].reshape(-1)))
    return np.broadcast_to(inputs[0], shape).copy()


def _constant_of_shape(node: ir.Node, inputs: list[Any]) -> Any:
    shape = tuple(int(v) for v in inputs[0].reshape(-1))
    if int(np.prod(shape)) > LIMIT:
        return None
    value = edit.attribute(node, "value")
    return np.full(shape, 0 if value is None else value.numpy().reshape(-1)[0].item(), dtype=object)


def _range(node: ir.Node, inputs: list[Any]) -> Any:
    start, limit, step = (i.item() for i in inputs)
    if any(isinstance(v, Sym | float) for v in (start, limit, step)):
        return None
    return None if (limit - start) / step > LIMIT else np.arange(start, limit, step).astype(object)


def _reduce(fn: Callable[[Any, Any], Any], initial: int) -> Callable[[ir.Node, list[Any]], Any]:
    def run(node: ir.Node, inputs: list[Any]) -> Any:
        data = inputs[0]
        if data.ndim != 1:
            return None
        total: Any = initial
        for value in data:
            total = fn(total, value)
        return known([total]) if edit.attribute(node, "keepdims", 1) else np.array(total, dtype=object)

    return run


def _split(node: ir.Node, inputs: list[Any]) -> list[Any] | None:
    axis = edit.attribute(node, "axis", 0)
    lengths = edit.attribute(node, "split")
    if len(inputs) > 1 and inputs[1] is not None:
        lengths = [int(v) for v in inputs[1].reshape(-1)]
    if lengths is None:
        count = len(node.outputs)
        step = -(-inputs[0].shape[axis] // count)
        lengths = [step] * (count - 1) + [inputs[0].shape[axis] - step * (count - 1)]
    return list(np.split(inputs[0], np.cumsum(lengths)[:-1], axis=axis))


def _transpose(node: ir.Node, inputs: list[Any]) -> Any:
    return np.transpose(inputs[0], edit.attribute(node, "perm"))


def _identity(node: ir.Node, inputs: list[Any]) -> Any:
    return inputs[0]


_RULES: dict[str, Callable[[ir.Node, list[Any]], Any]] = {
    "Add": _elementwise(operator.add),
    "Sub": _elementwise(operator.sub),
    "Mul": _elementwise(operator.mul),
    "Div": _elementwise(_divide),
    "Mod": _elementwise(operator.mod),
    "Neg": _elementwise(operator.neg),
    "Abs": _elementwise(lambda a: a if isinstance(a, Sym) else abs(a)),
    "Max": _elementwise(lambda a, b: _pick(a, b, max)),
    "Min": _elementwise(lambda a, b: _pick(a, b, min)),
    "Equal": _elementwise(_compare(operator.eq)),
    "Less": _elementwise(_compare(operator.lt)),
    "LessOrEqual": _elementwise(_compare(operator.le)),
    "Greater": _elementwise(_compare(operator.gt)),
    "GreaterOrEqual": _elementwise(_compare(operator.ge)),
    "Not": _elementwise(lambda a: not a),
    "And": _elementwise(lambda a, b: a and b),
    "Or": _elementwise(lambda a, b: a or b),
    "Where": _where,
    "Cast": _cast,
    "CastLike": _identity,
    "Floor": _rounding(np.floor),
    "Ceil": _rounding(np.ceil),
    "Round": _rounding(np.round),
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Slice": _slice,
    "Gather": _gather,
    "Concat": _concat,
    "Reshape": _reshape,
    "Expand": _expand,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "ReduceProd": _reduce(operator.mul, 1),
    "ReduceSum": _reduce(operator.add, 0),
    "Split": _split,
    "Transpose": _transpose,
    "Identity": _identity,
}

ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", "Floor", "Ceil", "Round", "Cast", "CastLike"})
"""Operators that compute with numbers; the others only move them."""
