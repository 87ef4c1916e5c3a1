"""The rounding noise of a model, measured: what "the same up to rounding" means for it.

Monte Carlo arithmetic (Parker, "Monte Carlo Arithmetic: exploiting randomness in floating-point arithmetic", 1997):
every rounding is replaced by a random relative error of its size, and the spread of the outputs over such runs is
what two correct evaluations of the same function may differ by. The model itself carries the errors: behind every
operator that rounds, its output is multiplied by ``1 + a`` or ``1 - a`` at random; bounded functions such as the
sigmoid, which runtimes approximate with an error relative to their range, get ``a`` added or subtracted.

The size ``a`` of an operator's error: one rounding has a relative error of ``eps / 2`` at most. A sum of ``K``
products, rounded after each addition, gathers independent errors relative to its partial sums,
``sqrt(sum_k k (eps/2)^2 / 3)`` against a result of about ``sqrt(K)``: a standard deviation of ``0.2 eps sqrt(K)``.
Kernels sum in blocks: ONNX Runtime's MatMul has 1.2, 2.4, 2.5, 2.6 eps for K = 64, 256, 1024, 4096, so that ``K``
counts up to ``BLOCK``.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir

from graphc import edit, shapes
from graphc.checking.roles import role

GAIN = 8.0
"""How much stronger than rounding the inserted errors are: enough to stand out of the rounding of the run itself,
and to show which discrete decisions (top-k, arg max, quantization) are within the reach of rounding."""

EPS = {
    ir.DataType.FLOAT16: 2.0**-10,
    ir.DataType.BFLOAT16: 2.0**-7,
    ir.DataType.FLOAT: 2.0**-23,
    ir.DataType.DOUBLE: 2.0**-52,
}
"""The distance from 1 to the next number, by dtype."""

# fmt: off
_CONTRACTIONS = frozenset({
    "Attention", "Conv", "ConvTranspose", "DFT", "DeformConv", "Einsum", "FusedConv", "FusedGemm", "FusedMatMul", "GRU",
    "Gemm", "GroupQueryAttention", "LSTM", "MatMul", "MatMulNBits", "MultiHeadAttention", "RNN", "STFT",
})
_REDUCTIONS = frozenset({
    "AveragePool", "BatchNormalization", "GlobalAveragePool", "GroupNormalization", "InstanceNormalization", "LRN",
    "LayerNormalization", "LogSoftmax", "LpNormalization", "MeanVarianceNormalization", "RMSNormalization",
    "ReduceLogSumExp", "ReduceMean", "SimplifiedLayerNormalization", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization", "Softmax",
})
_FUNCTIONS = frozenset({
    "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BiasGelu", "Celu", "Cosh", "Elu", "Exp", "FastGelu", "Gelu",
    "HardSwish", "Log", "Mish", "QuickGelu", "Reciprocal", "Selu", "Sinh", "Softplus", "Softsign", "Sqrt", "Swish",
    "Tan",
})
# fmt: on
# Runtimes approximate these with an error relative to their range, which is about 1, not to the result.
_BOUNDED = frozenset({"Cos", "Erf", "HardSigmoid", "Sigmoid", "Sin", "Tanh"})
# These have such functions inside, next to others.
# fmt: off
_HAVE_BOUNDED = frozenset({
    "BiasGelu", "Celu", "Elu", "FastGelu", "GRU", "Gelu", "HardSwish", "LSTM", "Mish", "QuickGelu", "RNN", "Selu",
    "Softplus", "Swish",
})
# fmt: on

BLOCK = 512
"""Products that a kernel may sum one after the other."""

_SUM = 0.2
_FUNCTION = 1.2
_UNKNOWN_LENGTH = 64

_DROPOUT_TRAINS = 12
"""The opset from which Dropout can drop outside of training. Below, there are kernels of RandomUniformLike; from 22
on, ONNX Runtime has none."""


def noisy(model: ir.Model, *, gain: float = GAIN, seed: int = 0) -> ir.Model:
    """A copy of a model that makes random errors where it rounds, ``gain`` times as large as rounding makes.

    Runs of one session differ from each other; the sequence of runs is the same for the same seed. The copy shares
    the tensors of the original. Values whose dtype is not known are left exact, as are inputs that are sizes.
    """
    copy = model.clone()
    default = _only_float_dtype(copy)
    known = _inferred(model) if default is None else {}
    names = edit.Names(copy)
    number = seed * 1_000_003
    for graph in edit.graphs(copy):
        opset = graph.opset_imports.get("", copy.opset_imports.get("", 0))
        places: list[tuple[ir.Value, float, bool]] = []
        if graph is copy.graph:
            given = [v for v in graph.inputs if v.uses() and not v.is_initializer()]
            places = [(v, _FUNCTION, False) for v in given if not role(copy, v).sizes]
        for node in graph:
            for size, absolute in _errors(node):
                places += [(v, size, absolute) for v in node.outputs if v.name and (v.uses() or v.is_graph_output())]
        for value, size, absolute in places:
            dtype = value.dtype or known.get(value.name) or (default if value.producer() is not None else None)
            if dtype in EPS:
                number += 1
                size *= gain * EPS[dtype]
                random = _random_nodes(value, size, number, opset)
                _disturb(graph, value, dtype, random, names, shift=-size if absolute else 1 - size, absolute=absolute)
    return copy


def _inferred(model: ir.Model) -> dict[str | None, ir.DataType]:
    """The dtypes that shape inference finds, by value name: exporters often leave them out.

    It runs on a copy, for it knows the current operators, and what it says of old ones may be wrong.
    """
    copy = model.clone()
    shapes.infer(copy)
    return {v.name: v.dtype for node in edit.nodes(copy) for v in node.outputs if v.dtype is not None}


def _only_float_dtype(model: ir.Model) -> ir.DataType | None:
    """The float dtype of the model's inputs and weights, if there is just one."""
    found = {v.dtype for v in model.graph.inputs}
    for graph in edit.graphs(model):
        found |= {v.dtype for v in graph.initializers.values()}
        for node in graph:
            if edit.is_op(node, "Constant") and (tensor := edit.tensor(node.outputs[0])) is not None:
                found.add(tensor.dtype)
            if edit.is_op(node, "Cast"):
                found.add(ir.DataType(edit.attribute(node, "to", 0)))
    floats = {d for d in found if d in EPS}
    return floats.pop() if len(floats) == 1 else None


def _errors(node: ir.Node) -> list[tuple[float, bool]]:
    """The errors an operator makes: their standard deviation in units of eps, and whether it is absolute."""
    kind = node.op_type
    errors = []
    if kind in _CONTRACTIONS:
        errors.append((max(1.0, _SUM * math.sqrt(min(contraction_length(node), BLOCK))), False))
    if kind in _REDUCTIONS or kind in _FUNCTIONS:
        errors.append((_FUNCTION, False))
    if kind in _BOUNDED or kind in _HAVE_BOUNDED:
        errors.append((_FUNCTION, True))
    return errors


def contraction_length(node: ir.Node) -> int:
    """How many products an element of the result sums, as far as the shapes tell; a guess of 64 otherwise."""

    def shape(index: int) -> tuple[int, ...] | None:
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            return None
        tensor = edit.tensor(value)
        if tensor is not None:
            return tuple(tensor.shape.numpy())
        return tuple(s if isinstance(s, int) else 0 for s in iter(value.shape or ())) or None

    weight = shape(1)
    if weight is None:
        return _UNKNOWN_LENGTH
    length = _UNKNOWN_LENGTH
    match node.op_type:
        case "Conv" | "FusedConv":
            length = math.prod(weight[1:])
        case "ConvTranspose":
            length = math.prod(weight) // max(weight[1], 1)
        case "MatMul" | "FusedMatMul":
            length = weight[-2] if len(weight) > 1 else weight[0]
            if not length and (first := shape(0)):
                length = first[-1]
        case "Gemm" | "FusedGemm":
            length = weight[1] if edit.attribute(node, "transB", 0) else weight[0]
        case "LSTM" | "GRU" | "RNN":
            recurrent = shape(2)
            length = weight[-1] + (recurrent[-1] if recurrent else 0)
    return length or _UNKNOWN_LENGTH


def _random_nodes(value: ir.Value, size: float, seed: int, opset: int) -> list[ir.Node]:
    """Nodes whose last gives numbers of the shape of ``value``, of mean and standard deviation ``size``."""
    if opset < _DROPOUT_TRAINS:
        spread = math.sqrt(3) * size
        bounds = {"low": size - spread, "high": size + spread}
        single = int(ir.DataType.FLOAT)
        return [ir.node("RandomUniformLike", [value], {**bounds, "seed": float(seed % (1 << 24)), "dtype": single})]
    shape = ir.node("Shape", [value])
    filled = ir.node("ConstantOfShape", [shape.outputs[0]], {"value": ir.tensor([size], dtype=ir.DataType.FLOAT)})
    half = ir.node("Constant", [], {"value": ir.tensor(0.5, dtype=ir.DataType.FLOAT)})
    yes = ir.node("Constant", [], {"value": ir.tensor(True)})
    # Half of the numbers become 0, the other half twice what they are.
    inputs = [filled.outputs[0], half.outputs[0], yes.outputs[0]]
    return [shape, filled, half, yes, ir.node("Dropout", inputs, {"seed": seed % (1 << 31)})]


def _disturb(
    graph: ir.Graph,
    value: ir.Value,
    dtype: ir.DataType,
    random: list[ir.Node],
    names: edit.Names,
    *,
    shift: float,
    absolute: bool,
) -> None:
    """Multiply a value by random numbers for all its readers, or add them; a product keeps infinities what they are.

    Args:
        graph: The graph of the value.
        value: A float value.
        dtype: Its dtype.
        random: Nodes whose last gives the numbers, in single precision.
        names: For the new values.
        shift: Added to the numbers.
        absolute: Whether the sum is added rather than multiplied with.
    """
    producer = value.producer()
    # Only in double precision are the numbers next to 1 near enough for every other dtype.
    wide = ir.DataType.FLOAT if dtype == ir.DataType.FLOAT else ir.DataType.DOUBLE
    added = list(random)

    def append(kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        added.append(ir.node(kind, list(inputs), attributes))
        return added[-1].outputs[0]

    centre = append("Constant", value=ir.tensor(shift, dtype=wide))
    numbers, exact = random[-1].outputs[0], value
    if wide != ir.DataType.FLOAT:
        numbers, exact = append("Cast", numbers, to=int(wide)), append("Cast", value, to=int(wide))
    result = append("Add" if absolute else "Mul", exact, append("Add", numbers, centre))
    if wide != dtype:
        result = append("Cast", result, to=int(dtype))
    for node in added:
        node.outputs[0].name = names.fresh(f"{value.name}.noise")
    if producer is not None:
        graph.insert_after(producer, added)
    elif len(graph):
        graph.insert_before(graph[0], added)
    if edit.replace(value, result):
        for node in added:
            for index, read in enumerate(node.inputs):
                if read is result:
                    node.replace_input_with(index, value)
