"""What each operator makes of what is known of its inputs (:mod:`graphc.known`).

An operator without a rule makes nothing known. A rule may only claim what holds for every input of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array, attribute
from graphc.known import NOTHING, Facets, Knowledge, align, collapse, contract, elementwise, reshape, tidy, times
from graphc.tensor_rules import axes_of, slice_parameters, sliced

Rule = Callable[[ir.Node, Knowledge], Sequence[Facets]]
_RULES: dict[str, Rule] = {}
CONTRIB = "com.microsoft"


def facets(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    """The facets of a node's outputs, given those of its inputs; empty where nothing is known."""
    domain = (node.domain or "").replace("ai.onnx", "", 1)
    if domain not in ("", CONTRIB):
        return ()
    rule = _RULES.get(node.op_type)
    if rule is None or known.shape(node.outputs[0]) is None:
        return ()
    if any(value is not None and known.shape(value) is None for value in node.inputs):
        return ()
    return rule(node, known)


def _rule(*operators: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for operator in operators:
            _RULES[operator] = rule
        return rule

    return register


def _rank(node: ir.Node, known: Knowledge, output: int = 0) -> int:
    shape = known.shape(node.outputs[output])
    assert shape is not None
    return len(shape)


def _operand(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


# Elementwise ----------------------------------------------------------------------------------------------------------


def _erf(x: Array) -> Array:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _gelu(x: Array, approximate: str = "none") -> Array:
    if approximate == "tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


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


@_rule(*_UNARY)
def _unary(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    if node.op_type == "Dropout" and _operand(node, 2) is not None:
        return ()
    return [elementwise(_UNARY[node.op_type](node), [known(node.inputs[0])], _rank(node, known))]


def _divide(a: Array, b: Array) -> Array:
    return np.where((a == 0) & (b != 0), 0.0, a / b)


def _add(a: Array, b: Array) -> Array:
    # Minus infinity stays what it is, whatever finite number is added.
    return np.where(np.isneginf(a) | np.isneginf(b), -np.inf, a + b)


def _power(a: Array, b: Array) -> Array:
    return np.where(np.isnan(a) | np.isnan(b), np.nan, np.power(a, b))


_BINARY: dict[str, Callable[..., Array]] = {
    "Add": _add,
    "Sum": _add,
    "Sub": lambda a, b: a - b,
    "Mul": times,
    "Div": _divide,
    "Pow": _power,
    "Max": np.maximum,
    "Min": np.minimum,
    "PRelu": lambda x, slope: np.where(x == 0, 0.0, np.where(x > 0, x, x * slope)),
    "BiasGelu": lambda x, bias: _gelu(_add(x, bias)),
}


@_rule(*_BINARY)
def _binary(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    rank = _rank(node, known)
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


@_rule("FastGelu")
def _fast_gelu(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    rank = _rank(node, known)
    operands = [known(node.inputs[0])]
    if _operand(node, 1) is not None:
        operands.append(known(node.inputs[1]))
    return [elementwise(lambda x, *b: _gelu(sum(b, start=x), "tanh"), operands, rank)]


@_rule("Clip")
def _clip(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    low = edit.scalar(_operand(node, 1)) if _operand(node, 1) is not None else attribute(node, "min", -np.inf)
    high = edit.scalar(_operand(node, 2)) if _operand(node, 2) is not None else attribute(node, "max", np.inf)
    if low is None or high is None:
        return ()
    return [elementwise(lambda x: np.clip(x, low, high), [known(node.inputs[0])], _rank(node, known))]


@_rule("Where")
def _where(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    def choose(condition: Array, a: Array, b: Array) -> Array:
        either = np.where(a == b, a, np.nan)
        return np.where(np.isnan(condition), either, np.where(condition != 0, a, b))

    return [elementwise(choose, [known(v) for v in node.inputs], _rank(node, known))]


@_rule("Cast", "CastLike")
def _cast(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    to = known.facts(node.outputs[0]).dtype
    if to is None or not (to.is_floating_point() or to.is_integer()):
        return ()

    def convert(x: Array) -> Array:
        kept = np.asarray(np.where(np.isnan(x), 0, x)).astype(to.numpy()).astype(np.float64)
        return np.where(np.isnan(x), np.nan, kept)

    if to.is_integer():
        return ()
    return [elementwise(convert, [known(node.inputs[0])], _rank(node, known))]


@_rule("DequantizeLinear")
def _dequantize(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    x, scale, zero = node.inputs[0], node.inputs[1], _operand(node, 2)
    rank = _rank(node, known)
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
    if block and shape is not None and isinstance(shape[axis], int) and shape[axis] % block:  # type: ignore[operator]
        return ()
    integers = known(x)
    if zero is not None:
        integers = elementwise(lambda a, b: a - b, [integers, spread(zero)], rank)
    scaled = elementwise(times, [integers, spread(scale)], rank)
    zeros = tuple(np.where(f == 0, 0.0, np.nan) for f in integers)
    return [tidy((*scaled, *zeros))]


@_rule("QuantizeLinear")
def _quantize(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    return [_kept_zeros(known(node.inputs[0]), _operand(node, 2), known)]


def _kept_zeros(found: Facets, zero: ir.Value | None, known: Knowledge) -> Facets:
    """The zeros of a quantized activation, whose zero point is 0."""
    if zero is not None:
        held = known(zero)
        if not held or any((f != 0).any() for f in held[:1]):
            return NOTHING
    return tidy(np.where(f == 0, 0.0, np.nan) for f in found)


# Products -------------------------------------------------------------------------------------------------------------

_BATCH = "abcdefgh"


def matmul_letters(ra: int, rb: int) -> tuple[str, str, str] | None:
    """One letter per axis of both operands of a MatMul and of its result; ``k`` is summed. None below two axes."""
    if ra < 2 or rb < 2 or max(ra, rb) - 2 > len(_BATCH):
        return None
    batch = _BATCH[: max(ra, rb) - 2]
    left, right = batch[len(batch) - (ra - 2) :] + "mk", batch[len(batch) - (rb - 2) :] + "kn"
    return left, right, batch + "mn"


@_rule("MatMul", "FusedMatMul")
def _matmul(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    a, b = known(node.inputs[0]), known(node.inputs[1])
    sa, sb = known.shape(node.inputs[0]), known.shape(node.inputs[1])
    assert sa is not None and sb is not None
    letters = matmul_letters(len(sa), len(sb))
    if letters is None or attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        return ()
    left, right, out = letters
    if attribute(node, "transA", 0):
        left = left[:-2] + "km"
    if attribute(node, "transB", 0):
        right = right[:-2] + "nk"
    result = contract(a, b, (left, right, out), {"k": sa[left.index("k")]})
    alpha = attribute(node, "alpha", 1.0)
    return [tuple(f * alpha for f in result)]


@_rule("Gemm")
def _gemm(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    left = "km" if attribute(node, "transA", 0) else "mk"
    right = "nk" if attribute(node, "transB", 0) else "kn"
    shape = known.shape(node.inputs[0])
    assert shape is not None
    product = contract(known(node.inputs[0]), known(node.inputs[1]), (left, right, "mn"), {"k": shape[left.index("k")]})
    alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    result = tuple(f * alpha for f in product)
    if _operand(node, 2) is not None:
        result = elementwise(lambda x, c: x + beta * c, [result, known(node.inputs[2])], 2)
    return [result]


@_rule("Einsum")
def _einsum(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    terms, _, out = str(attribute(node, "equation", "")).replace(" ", "").partition("->")
    operands = terms.split(",")
    if "." in terms or len(operands) != 2 or not out or any(len(set(t)) != len(t) for t in (*operands, out)):
        return ()
    sizes = {}
    for value, letters in zip(node.inputs, operands, strict=True):
        shape = known.shape(value)
        assert shape is not None
        sizes.update(zip(letters, shape, strict=True))
    return [contract(known(node.inputs[0]), known(node.inputs[1]), (operands[0], operands[1], out), sizes)]


def unpadded(node: ir.Node) -> bool:
    """Whether a convolution or pooling reads nothing beyond its input's border."""
    auto = attribute(node, "auto_pad", "NOTSET")
    return auto == "VALID" or (auto == "NOTSET" and not any(attribute(node, "pads", ())))


@_rule("Conv", "FusedConv", "ConvTranspose")
def _conv(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    shape, kernel = known.shape(node.inputs[0]), known.shape(node.inputs[1])
    assert shape is not None and kernel is not None
    rank, group = len(shape), attribute(node, "group", 1)
    spatial = tuple(range(2, rank))
    transposed = node.op_type == "ConvTranspose"
    if not isinstance(shape[1], int) or any(not isinstance(d, int) for d in kernel[:2]):
        return ()
    channels = int(shape[1]) // group
    inputs = []
    for facet in known(node.inputs[0]):
        flat = collapse(facet, (0, *spatial)).reshape(-1)
        if not unpadded(node) or transposed:
            # At the border, fewer taps see the channel: only zeros stay what they are.
            flat = np.where(flat == 0, 0.0, np.nan)
        inputs.append(flat.reshape(group, channels) if flat.size > 1 else flat.reshape(1, 1))
    weights = []
    for facet in known(node.inputs[1]):
        total = (
            facet.sum(axis=spatial)
            if facet.shape[2:] == kernel[2:]
            else collapse(facet, spatial).reshape(facet.shape[:2])
        )
        zero = (facet == 0).all(axis=spatial)
        # A kernel that sums to zero is not a zero kernel where the input is not constant.
        total = np.where(zero, 0.0, np.where((total == 0) | (facet.shape[2:] != kernel[2:]), np.nan, total))
        if transposed:
            total = total.reshape(group if total.shape[0] > 1 else 1, -1, total.shape[1])
        else:
            total = total.reshape(group if total.shape[0] > 1 else 1, -1, total.shape[1])
        weights.append(total)
    letters = ("gi", "gio" if transposed else "goi", "go")
    outputs = int(kernel[1]) if transposed else int(kernel[0]) // group  # type: ignore[arg-type]
    results = []
    for facet in contract(tuple(inputs), tuple(weights), letters, {"i": channels}):
        spread = np.broadcast_to(facet, (group, outputs)) if facet.size > 1 else facet
        results.append(spread.reshape(1, -1, *(1,) * len(spatial)))
    result: Facets = tuple(results)
    if _operand(node, 2) is not None:
        bias = tuple(f.reshape(1, -1, *(1,) * len(spatial)) for f in known(node.inputs[2]))
        result = elementwise(_add, [result, bias], rank)
    if _operand(node, 3) is not None:
        result = elementwise(_add, [result, known(node.inputs[3])], rank)
    if node.op_type == "FusedConv":
        activation = attribute(node, "activation", "")
        if activation != "Relu":
            return [
                tidy(np.where(f == 0, 0.0, np.nan) for f in result) if activation in ("Tanh", "LeakyRelu") else NOTHING
            ]
        result = elementwise(lambda x: np.maximum(x, 0), [result], rank)
    return [result]


# Normalisation --------------------------------------------------------------------------------------------------------


@_rule("BatchNormalization")
def _batch_norm(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    if attribute(node, "training_mode", 0):
        return ()
    rank, epsilon = _rank(node, known), attribute(node, "epsilon", 1e-5)
    vectors = [tuple(f.reshape(-1, *(1,) * (rank - 2)) for f in known(v)) for v in node.inputs[1:5]]

    def normalise(x: Array, scale: Array, shift: Array, mean: Array, variance: Array) -> Array:
        return times(x - mean, scale / np.sqrt(variance + epsilon)) + shift

    return [elementwise(normalise, [known(node.inputs[0]), *vectors], rank)]


@_rule("InstanceNormalization", "GroupNormalization")
def _channel_norm(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    rank = _rank(node, known)
    scale, shift = ([f.reshape(-1, *(1,) * (rank - 2)) for f in known(v)] for v in node.inputs[1:3])
    x = known(node.inputs[0]) if node.op_type == "InstanceNormalization" else NOTHING
    if rank < 3:
        return ()

    def normalise(x: Array, scale: Array, shift: Array) -> Array:
        # A constant channel equals its own mean.
        return np.where((scale == 0) | ~np.isnan(x), 0.0, np.nan) + shift

    flat = tuple(collapse(f, (0, *range(2, rank))) for f in x)
    return [elementwise(normalise, [flat, tuple(scale), tuple(shift)], rank)]


@_rule("LayerNormalization")
def _layer_norm(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    rank = _rank(node, known)
    scale = known(node.inputs[1])
    shift = known(node.inputs[2]) if _operand(node, 2) is not None else (np.zeros((1,) * rank),)
    return [elementwise(lambda s, b: np.where(s == 0, 0.0, np.nan) + b, [scale, shift], rank)]


def _rms(x: Array, scale: Array) -> Array:
    return np.where((x == 0) | (scale == 0), 0.0, np.nan)


@_rule("RMSNormalization", "SimplifiedLayerNormalization")
def _rms_norm(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    x, scale = known(node.inputs[0]), known(node.inputs[1])
    return [_either_zero(x, scale, _rank(node, known))]


def _either_zero(a: Facets, b: Facets, rank: int) -> Facets:
    return tidy(np.where(align(f, rank) == 0, 0.0, np.nan) for f in (*a, *b))


@_rule("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")
def _skip_norm(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    rank = _rank(node, known)
    simplified = node.op_type == "SkipSimplifiedLayerNormalization"
    total = elementwise(_add, [known(node.inputs[0]), known(node.inputs[1])], rank)
    bias = _operand(node, 3 if simplified else 4)
    if bias is not None:
        total = elementwise(_add, [total, known(bias)], rank)
    if simplified:
        return [_either_zero(total, known(node.inputs[2]), rank), NOTHING, NOTHING, total]
    beta = _operand(node, 3)
    shift = known(beta) if beta is not None else (np.zeros((1,) * rank),)
    scale = known(node.inputs[2])
    norm = elementwise(lambda s, b: np.where(s == 0, 0.0, np.nan) + b, [scale, shift], rank)
    return [norm, NOTHING, NOTHING, total]


@_rule("Softmax")
def _softmax(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    return [tidy(np.where(np.isneginf(f), 0.0, np.nan) for f in known(node.inputs[0]))]


# Reductions and pooling -----------------------------------------------------------------------------------------------


@_rule("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceL1", "ReduceSumSquare")
def _reduce(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    shape = known.shape(node.inputs[0])
    assert shape is not None
    rank = len(shape)
    axes = axes_of(node, [known.facts(v) for v in node.inputs], 1, rank)
    if axes is None:
        return ()
    if not axes:
        if attribute(node, "noop_with_empty_axes", 0):
            return [known(node.inputs[0])]
        axes = tuple(range(rank))
    results = []
    for facet in known(node.inputs[0]):
        if node.op_type in ("ReduceMean", "ReduceMax", "ReduceMin"):
            result = collapse(facet, axes)
        else:
            result = np.where(collapse(facet, axes) == 0, 0.0, np.nan)
        if not attribute(node, "keepdims", 1):
            result = result.reshape([n for axis, n in enumerate(result.shape) if axis not in axes])
        results.append(result)
    return [tidy(results)]


@_rule("GlobalAveragePool", "GlobalMaxPool", "MaxPool", "AveragePool", "LpPool", "GlobalLpPool", "Resize", "Upsample")
def _pool(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    rank = _rank(node, known)
    spatial = range(2, rank)
    shape_in, shape_out = known.shape(node.inputs[0]), known.shape(node.outputs[0])
    if node.op_type in ("Resize", "Upsample") and (
        shape_in is None or shape_out is None or shape_in[:2] != shape_out[:2]
    ):
        return ()
    found = tuple(collapse(f, spatial) for f in known(node.inputs[0]))
    constant = node.op_type in ("GlobalAveragePool", "GlobalMaxPool", "MaxPool") or (
        node.op_type == "AveragePool" and (unpadded(node) or not attribute(node, "count_include_pad", 0))
    )
    if constant and not attribute(node, "ceil_mode", 0):
        return [found]
    return [tidy(np.where(f == 0, 0.0, np.nan) for f in found)]


# Moving ---------------------------------------------------------------------------------------------------------------


@_rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    old, new = known.shape(node.inputs[0]), known.shape(node.outputs[0])
    assert old is not None and new is not None
    return [tidy(reshape(f, old, new) for f in known(node.inputs[0]))]


@_rule("Transpose")
def _transpose(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    order = attribute(node, "perm", tuple(reversed(range(_rank(node, known)))))
    return [tuple(f.transpose(order) for f in known(node.inputs[0]))]


@_rule("ConstantOfShape")
def _constant_of_shape(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    held = attribute(node, "value")
    value = 0.0 if held is None else float(held.numpy().reshape(-1)[0])
    return [(np.full((1,) * _rank(node, known), value),)]


@_rule("Expand")
def _expand(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    rank = _rank(node, known)
    return [tuple(align(f, rank) for f in known(node.inputs[0]))]


@_rule("Tile")
def _tile(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    repeats = known.facts(node.inputs[1]).known
    if repeats is None:
        return ()
    return [
        tuple(
            np.tile(f, [r if n > 1 else 1 for r, n in zip(repeats, f.shape, strict=True)])
            for f in known(node.inputs[0])
        )
    ]


@_rule("Concat")
def _concat(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    rank = _rank(node, known)
    axis = attribute(node, "axis", 0) % rank
    shapes = [known.shape(v) for v in node.inputs]
    parts = []
    for value, shape in zip(node.inputs, shapes, strict=True):
        assert shape is not None
        found = known(value)
        facet = found[0] if found else np.full((1,) * rank, np.nan)
        if not isinstance(shape[axis], int):
            return [NOTHING]
        if facet.shape[axis] == 1:
            facet = np.repeat(facet, int(shape[axis]), axis)  # type: ignore[arg-type]
        parts.append(facet)
    full = np.broadcast_shapes(*(p.shape[:axis] + (1,) + p.shape[axis + 1 :] for p in parts))
    spread = [np.broadcast_to(p, full[:axis] + (p.shape[axis],) + full[axis + 1 :]) for p in parts]
    return [tidy([np.concatenate(spread, axis)])]


@_rule("Split")
def _split(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    axis = attribute(node, "axis", 0) % _rank(node, known)
    sizes = []
    for value in node.outputs:
        shape = known.shape(value)
        if shape is None or not isinstance(shape[axis], int):
            return ()
        sizes.append(int(shape[axis]))  # type: ignore[arg-type]
    results: list[list[Array]] = [[] for _ in sizes]
    for facet in known(node.inputs[0]):
        if facet.shape[axis] == 1:
            parts: Sequence[Array] = [facet] * len(sizes)
        else:
            parts = np.split(facet, np.cumsum(sizes)[:-1], axis)
        for result, part in zip(results, parts, strict=True):
            result.append(part)
    return [tidy(r) for r in results]


@_rule("Slice")
def _slice(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    shape = known.shape(node.inputs[0])
    assert shape is not None
    found = slice_parameters(node, [known.facts(v) for v in node.inputs], len(shape))
    if found is None:
        return ()
    results = []
    for facet in known(node.inputs[0]):
        for start, end, axis, step in zip(*found, strict=True):
            if facet.shape[axis] == 1:
                continue
            first, count = sliced(start, end, int(step), shape[axis])
            if not isinstance(first, int) or not isinstance(count, int):
                facet = collapse(facet, [axis])
            else:
                facet = facet.take(range(first, first + count * int(step), int(step)), axis)
        results.append(facet)
    return [tidy(results)]


@_rule("Gather")
def _gather(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    shape, chosen = known.shape(node.inputs[0]), known.shape(node.inputs[1])
    assert shape is not None and chosen is not None
    axis = attribute(node, "axis", 0) % len(shape)
    indices = edit.constant(node.inputs[1], edit.SMALL)
    results = []
    for facet in known(node.inputs[0]):
        if indices is not None and facet.shape[axis] > 1:
            results.append(np.take(facet, indices, axis))
        else:
            flat = collapse(_chosen(facet, axis, node, known), [axis])
            results.append(flat.reshape(flat.shape[:axis] + (1,) * len(chosen) + flat.shape[axis + 1 :]))
    return [tidy(results)]


@_rule("GatherND")
def _gather_nd(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    chosen = known.shape(node.inputs[1])
    if not chosen or not isinstance(chosen[-1], int) or attribute(node, "batch_dims", 0):
        return ()
    depth = chosen[-1]
    results = []
    for facet in known(node.inputs[0]):
        flat = collapse(_chosen(facet, 0, node, known) if depth == 1 else facet, range(depth))
        results.append(flat.reshape((1,) * (len(chosen) - 1) + flat.shape[depth:]))
    return [tidy(results)]


def _chosen(facet: Array, axis: int, node: ir.Node, known: Knowledge) -> Array:
    """The indices of an axis that the node's second input ever chooses."""
    never = known.never.get(node.inputs[1]) if node.inputs[1] is not None else None
    return facet if never is None or len(never) != facet.shape[axis] else facet.compress(~never, axis)


@_rule("ScatterElements")
def _scatter(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    """What is never indexed keeps what it had."""
    never = known.never.get(node.inputs[1]) if node.inputs[1] is not None else None
    shape = known.shape(node.inputs[0])
    if never is None or shape is None:
        return ()
    axis = attribute(node, "axis", 0) % len(shape)
    if shape[axis] != len(never):
        return ()
    here = never.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return [tidy(np.where(here, f, np.nan) for f in known(node.inputs[0]))]


@_rule("OneHot")
def _one_hot(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    never = known.never.get(node.inputs[0]) if node.inputs[0] is not None else None
    values = edit.constant(node.inputs[2], 2)
    rank = _rank(node, known)
    if never is None or values is None:
        return ()
    axis = attribute(node, "axis", -1) % rank
    return [(np.where(never, float(values[0]), np.nan).reshape([-1 if a == axis else 1 for a in range(rank)]),)]


@_rule("Pad")
def _pad(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    rank = _rank(node, known)
    pads = known.facts(_operand(node, 1)).known if len(node.inputs) > 1 else attribute(node, "pads")
    if pads is None or _operand(node, 3) is not None or len(pads) != 2 * rank:
        return ()
    zero = attribute(node, "mode", "constant") == "constant" and (
        _operand(node, 2) is None or edit.scalar(node.inputs[2]) == 0
    )
    shape = known.shape(node.inputs[0])
    assert shape is not None
    results = []
    for facet in known(node.inputs[0]):
        for axis in range(rank):
            before, after = pads[axis], pads[axis + rank]
            if not before and not after:
                continue
            if zero and isinstance(shape[axis], int) and before >= 0 and after >= 0 and facet.shape[axis] > 1:
                width = [(before, after) if a == axis else (0, 0) for a in range(rank)]
                facet = np.pad(facet, width)
            else:
                facet = (
                    np.where(collapse(facet, [axis]) == 0, 0.0, np.nan)
                    if zero
                    else np.full_like(collapse(facet, [axis]), np.nan)
                )
        results.append(facet)
    return [tidy(results)]


@_rule("DepthToSpace", "SpaceToDepth")
def _block_shuffle(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    block = attribute(node, "blocksize", 1)
    results = []
    for facet in known(node.inputs[0]):
        flat = collapse(facet, (0, 2, 3)).reshape(-1)
        if flat.size > 1 and node.op_type == "SpaceToDepth":
            flat = np.tile(flat, block * block)
        elif flat.size > 1 and attribute(node, "mode", "DCR") == "CRD":
            flat = collapse(flat.reshape(-1, block * block), [1]).reshape(-1)
        elif flat.size > 1:
            flat = collapse(flat.reshape(block * block, -1), [0]).reshape(-1)
        results.append(flat.reshape(1, -1, 1, 1))
    return [tidy(results)]


# Indices that are never chosen -----------------------------------------------------------------------------------------

_PASS_ON = frozenset(
    ["Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Flatten", "Expand", "Slice", "Split", "Tile"]
)


def exclude(node: ir.Node, known: Knowledge) -> None:
    """Follow which experts a router never picks: those whose logits are minus infinity, while others suffice."""
    if node.domain not in ("", "ai.onnx") or not node.inputs or node.inputs[0] is None:
        return
    if node.op_type in _PASS_ON and node.inputs[0] in known.never:
        for out in node.outputs:
            known.never[out] = known.never[node.inputs[0]]
    elif node.op_type == "Concat" and all(v in known.never for v in node.inputs):
        masks = [known.never[v] for v in node.inputs if v is not None]
        if all(len(m) == len(masks[0]) for m in masks):
            known.never[node.outputs[0]] = np.logical_and.reduce(masks)
    elif node.op_type in ("TopK", "ArgMax"):
        _exclude_by_rank(node, known)


def _exclude_by_rank(node: ir.Node, known: Knowledge) -> None:
    shape = known.shape(node.inputs[0])
    if shape is None:
        return
    axis = attribute(node, "axis", -1 if node.op_type == "TopK" else 0) % len(shape)
    count = edit.scalar(_operand(node, 1)) if node.op_type == "TopK" else 1
    if not isinstance(shape[axis], int) or not isinstance(count, int) or not attribute(node, "largest", 1):
        return
    lowest = bottom(node.inputs[0], known)
    if lowest is None:
        return
    mask = lowest.all(axis=tuple(a for a in range(len(shape)) if a != axis)).reshape(-1)
    if mask.size == shape[axis] and mask.size - int(mask.sum()) >= count:
        known.never[node.outputs[1 if node.op_type == "TopK" else 0]] = mask


def bottom(value: ir.Value | None, known: Knowledge) -> Array | None:
    """Where a value is the least it can be: minus infinity, or 0 where it is a probability. None if nowhere."""
    least = 0.0 if _probability(value) else -np.inf
    result = None
    for facet in known(value):
        here = facet == least
        result = here if result is None else result | here
    return result


def _probability(value: ir.Value | None) -> bool:
    """Whether a value is a Softmax's or a Sigmoid's, of a finite input hence positive."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in ("Softmax", "Sigmoid")


# Attention and recurrence ---------------------------------------------------------------------------------------------


@_rule("Attention")
def _attention(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    """A weighted mean of the values: where they are a constant for every token, so is the result."""
    if node.domain == CONTRIB:
        return ()
    shape = known.shape(node.inputs[2])
    heads = attribute(node, "q_num_heads", 0), attribute(node, "kv_num_heads", 0)
    if shape is None or _operand(node, 5) is not None:
        return ()
    results = []
    for facet in known(node.inputs[2]):
        flat = collapse(facet, (len(shape) - 2,))
        # Of a row that is masked altogether nothing is known but that zeros stay zero.
        flat = np.where(flat == 0, 0.0, np.nan)
        results.append(flat)
    if len(shape) == 3:
        if not all(heads):
            return ()
        repeated = []
        for facet in results:
            if facet.shape[2] > 1:
                split = facet.reshape(facet.shape[0], 1, heads[1], -1)
                facet = np.repeat(split, heads[0] // heads[1], 2).reshape(facet.shape[0], 1, -1)
            repeated.append(facet)
        return [tidy(repeated)]
    query = known.shape(node.inputs[0])
    if query is None or not isinstance(query[1], int) or not isinstance(shape[1], int):
        return ()
    return [tidy(np.repeat(f, query[1] // shape[1], 1) if f.shape[1] > 1 else f for f in results)]


@_rule("RotaryEmbedding")
def _rotary(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    """A rotated pair is zero where both of its halves are."""
    shape = known.shape(node.inputs[0])
    heads = attribute(node, "num_heads", 0)
    if shape is None or len(shape) not in (3, 4) or not isinstance(shape[-1], int):
        return ()
    if len(shape) == 3 and not heads:
        return ()
    size = shape[-1] if len(shape) == 4 else shape[-1] // heads
    part = attribute(node, "rotary_embedding_dim", 0) or size
    results = []
    for facet in known(node.inputs[0]):
        zero = facet == 0
        if zero.shape[-1] > 1:
            split = zero.reshape(*zero.shape[:-1], -1, size).copy()
            turned = split[..., :part]
            pairs = (-1, 2) if attribute(node, "interleaved", 0) else (2, -1)
            axis = -1 if attribute(node, "interleaved", 0) else -2
            both = turned.reshape(*turned.shape[:-1], *pairs).all(axis=axis, keepdims=True)
            both = np.broadcast_to(both, (*turned.shape[:-1], *((part // 2, 2) if axis == -1 else (2, part // 2))))
            split[..., :part] = both.reshape(turned.shape)
            zero = split.reshape(zero.shape)
        results.append(np.where(zero, 0.0, np.nan))
    return [tidy(results)]


@_rule("MultiHeadAttention")
def _multi_head_attention(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    value = _operand(node, 2)
    shape = known.shape(value)
    if value is None or shape is None or len(shape) != 3 or any(_operand(node, i) is not None for i in (6, 7)):
        return ()
    found = tuple(collapse(f, (1,)) for f in known(value))
    if _operand(node, 3) is not None:
        bias = known(node.inputs[3])
        width = shape[2]
        if not isinstance(width, int):
            return ()
        found = elementwise(_add, [found, tuple(f.reshape(1, 1, -1)[:, :, -width:] for f in bias)], 3)
    return [tidy(np.where(f == 0, 0.0, np.nan) for f in found)]


@_rule("LSTM", "GRU", "RNN")
def _recurrent(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    """A cell whose gates see nothing and that starts at zero stays at zero."""
    if any(_operand(node, i) is not None for i in (5, 6, 7)) or "activations" in node.attributes:
        return ()
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[node.op_type]
    zero = None
    for index in (1, 2, 3):
        value = _operand(node, index)
        if value is None:
            continue
        shape = known.shape(value)
        if shape is None or not isinstance(shape[0], int):
            return ()
        flat = None
        for facet in known(value):
            dead = (facet == 0).all(axis=2) if index != 3 else facet == 0
            count = gates if index != 3 else 2 * gates
            if dead.shape[1] > 1:
                here = np.broadcast_to(
                    dead.reshape(dead.shape[0], count, -1).all(axis=1), (shape[0], dead.shape[1] // count)
                )
                flat = here if flat is None else flat | here
        if flat is None:
            return ()
        zero = flat if zero is None else zero & flat
    if zero is None:
        return ()
    state = np.where(zero, 0.0, np.nan)
    return [
        (state[None, :, None, :],) if not attribute(node, "layout", 0) else NOTHING,
        (state[:, None, :],) if not attribute(node, "layout", 0) else NOTHING,
    ]
