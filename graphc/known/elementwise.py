"""Elementwise operators, casts, and (de)quantization."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array, attribute
from graphc.known.facets import NOTHING, Facets, align, elementwise, tidy, times
from graphc.known.knowledge import Knowledge
from graphc.known.registry import operand, rank_of, rule


def _erf(x: Array) -> Array:
    result: Array = np.vectorize(math.erf, otypes=[np.float64])(x)
    return result


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _gelu(x: Array, approximate: str = "none") -> Array:
    if approximate == "tanh":
        gate: Array = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    else:
        gate = _erf(x / math.sqrt(2))
    return np.asarray(0.5 * x * (1 + gate))


def _fixed(function: Callable[[Array], Array]) -> Callable[[ir.Node], Callable[[Array], Array]]:
    return lambda node: function


_UNARY: dict[str, Callable[[ir.Node], Callable[[Array], Array]]] = {
    "Relu": _fixed(lambda x: np.maximum(x, 0)),
    "Sigmoid": _fixed(_sigmoid),
    "Tanh": _fixed(np.tanh),
    "Erf": _fixed(_erf),
    "Exp": _fixed(np.exp),
    "Log": _fixed(np.log),
    "Sqrt": _fixed(np.sqrt),
    "Reciprocal": _fixed(lambda x: 1 / x),
    "Neg": _fixed(np.negative),
    "Abs": _fixed(np.abs),
    "Sign": _fixed(np.sign),
    "Sin": _fixed(np.sin),
    "Cos": _fixed(np.cos),
    "Floor": _fixed(np.floor),
    "Ceil": _fixed(np.ceil),
    "Softplus": _fixed(lambda x: np.log1p(np.exp(x))),
    "Softsign": _fixed(lambda x: x / (1 + np.abs(x))),
    "HardSwish": _fixed(lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    "Mish": _fixed(lambda x: x * np.tanh(np.log1p(np.exp(x)))),
    "Gelu": lambda n: lambda x: _gelu(x, attribute(n, "approximate", "none")),
    "QuickGelu": lambda n: lambda x: x * _sigmoid(attribute(n, "alpha", 1.702) * x),
    "LeakyRelu": lambda n: lambda x: np.where(x < 0, attribute(n, "alpha", 0.01) * x, x),
    "ThresholdedRelu": lambda n: lambda x: np.where(x > attribute(n, "alpha", 1.0), x, x * 0),
    "Elu": lambda n: lambda x: np.where(x < 0, attribute(n, "alpha", 1.0) * np.expm1(x), x),
    "Celu": lambda n: lambda x: np.maximum(x, 0) + np.minimum(0, (a := attribute(n, "alpha", 1.0)) * np.expm1(x / a)),
    "Selu": lambda n: lambda x: attribute(n, "gamma", 1.0507009873554805)
    * np.where(x < 0, attribute(n, "alpha", 1.6732632423543772) * np.expm1(x), x),
    "HardSigmoid": lambda n: lambda x: np.clip(attribute(n, "alpha", 0.2) * x + attribute(n, "beta", 0.5), 0, 1),
    "Identity": _fixed(lambda x: x),
    "Dropout": _fixed(lambda x: x),
    "Swish": lambda n: lambda x: x * _sigmoid(attribute(n, "alpha", 1.0) * x),
}  # fmt: skip


@rule(*_UNARY)
def _unary(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    if node.op_type == "Dropout" and operand(node, 2) is not None:
        return ()
    return [elementwise(_UNARY[node.op_type](node), [known(node.inputs[0])], rank_of(node, known))]


def _divide(a: Array, b: Array) -> Array:
    return np.where((a == 0) & (b != 0), 0.0, a / b)


def added(a: Array, b: Array) -> Array:
    # Minus infinity stays what it is, whatever finite number is added.
    return np.where(np.isneginf(a) | np.isneginf(b), -np.inf, a + b)


def _power(a: Array, b: Array) -> Array:
    return np.where(np.isnan(a) | np.isnan(b), np.nan, np.power(a, b))


_BINARY: dict[str, Callable[..., Array]] = {
    "Add": added,
    "Sum": added,
    "Sub": lambda a, b: a - b,
    "Mul": times,
    "Div": _divide,
    "Pow": _power,
    "Max": np.maximum,
    "Min": np.minimum,
    "PRelu": lambda x, slope: np.where(x == 0, 0.0, np.where(x > 0, x, x * slope)),
    "BiasGelu": lambda x, bias: _gelu(added(x, bias)),
}


@rule(*_BINARY)
def _binary(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    rank = rank_of(node, known)
    if node.op_type in ("Div", "Pow") and not _floating(node, known):
        return ()
    result = elementwise(lambda x: x, [known(node.inputs[0])], rank)
    function = _BINARY[node.op_type]
    for value in node.inputs[1:]:
        result = tidy((*elementwise(function, [result, known(value)], rank), *_zeros(node, result, known(value), rank)))
    return [result]


def _floating(node: ir.Node, known: Knowledge) -> bool:
    dtype = known.facts(node.inputs[0]).dtype
    return dtype is not None and dtype.is_floating_point()


def _zeros(node: ir.Node, a: Facets, b: Facets, rank: int) -> Facets:
    """The zeros of either factor of a product survive whatever the other is."""
    if node.op_type == "Mul":
        return tuple(np.where(align(f, rank) == 0, 0.0, np.nan) for f in (*a, *b))
    return NOTHING


@rule("FastGelu")
def _fast_gelu(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    rank = rank_of(node, known)
    operands = [known(node.inputs[0])]
    if operand(node, 1) is not None:
        operands.append(known(node.inputs[1]))
    return [elementwise(lambda x, *b: _gelu(sum(b, start=x), "tanh"), operands, rank)]


@rule("Clip")
def _clip(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    low = edit.scalar(operand(node, 1)) if operand(node, 1) is not None else attribute(node, "min", -np.inf)
    high = edit.scalar(operand(node, 2)) if operand(node, 2) is not None else attribute(node, "max", np.inf)
    if low is None or high is None:
        return ()
    return [elementwise(lambda x: np.clip(x, low, high), [known(node.inputs[0])], rank_of(node, known))]


@rule("Where")
def _where(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    def choose(condition: Array, a: Array, b: Array) -> Array:
        either = np.where(a == b, a, np.nan)
        return np.where(np.isnan(condition), either, np.where(condition != 0, a, b))

    return [elementwise(choose, [known(v) for v in node.inputs], rank_of(node, known))]


@rule("Cast", "CastLike")
def _cast(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    to = known.facts(node.outputs[0]).dtype
    if to is None or not (to.is_floating_point() or to.is_integer()):
        return ()

    def convert(x: Array) -> Array:
        kept = np.asarray(np.where(np.isnan(x), 0, x)).astype(to.numpy()).astype(np.float64)
        return np.where(np.isnan(x), np.nan, kept)

    if to.is_integer():
        return ()
    return [elementwise(convert, [known(node.inputs[0])], rank_of(node, known))]


@rule("DequantizeLinear")
def _dequantize(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    x, scale, zero = node.inputs[0], node.inputs[1], operand(node, 2)
    rank = rank_of(node, known)
    held = [edit.tensor(v) for v in (x, scale, zero)]
    if held[0] is None:
        # Of an activation: what is known survives with the grid's rounding, hence only zeros are claimed.
        return [_kept_zeros(known(x), zero, known)]
    axis, block = attribute(node, "axis", 1) % max(rank, 1), attribute(node, "block_size", 0)

    def spread(value: ir.Value | None) -> Facets:
        found = known(value)
        if not found:
            return found
        if found[0].ndim == 1 and rank > 1:
            return tuple(f.reshape([-1 if a == axis else 1 for a in range(rank)]) for f in found)
        if found[0].ndim == rank and block:
            return tuple(np.repeat(f, block, axis) if f.shape[axis] > 1 else f for f in found)
        return tuple(f.reshape((1,) * rank) for f in found if f.size == 1)

    shape = known.shape(x)
    if block and shape is not None and isinstance(shape[axis], int) and shape[axis] % block:
        return ()
    integers = known(x)
    if zero is not None:
        integers = elementwise(lambda a, b: a - b, [integers, spread(zero)], rank)
    scaled = elementwise(times, [integers, spread(scale)], rank)
    zeros = tuple(np.where(f == 0, 0.0, np.nan) for f in integers)
    return [tidy((*scaled, *zeros))]


@rule("QuantizeLinear")
def _quantize(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    return [_kept_zeros(known(node.inputs[0]), operand(node, 2), known)]


def _kept_zeros(found: Facets, zero: ir.Value | None, known: Knowledge) -> Facets:
    """The zeros of a quantized activation, whose zero point is 0."""
    if zero is not None:
        held = known(zero)
        if not held or any((f != 0).any() for f in held[:1]):
            return NOTHING
    return tidy(np.where(f == 0, 0.0, np.nan) for f in found)
