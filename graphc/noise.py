"""The rounding noise of a model, measured: what "the same up to rounding" means for it.

Monte Carlo arithmetic (Parker, "Monte Carlo Arithmetic: exploiting randomness in floating-point arithmetic", 1997):
every rounding is replaced by a random relative error of its size, and the spread of the outputs over such runs is
what two correct evaluations of the same function may differ by. The model itself carries the errors: behind every
operator that rounds, its output is multiplied by ``1 + u``, ``u`` uniform in ``[-a, a]``; bounded functions such as
the sigmoid, which runtimes approximate with an error relative to their range, get ``u`` added.

The size ``a`` of an operator's error: one rounding has a relative error of ``eps / 2`` at most. A sum of ``K``
products, rounded after each addition, gathers independent errors relative to its partial sums,
``sqrt(sum_k k (eps/2)^2 / 3)`` against a result of about ``sqrt(K)``: a standard deviation of ``0.2 eps sqrt(K)``,
which is that of a uniform ``a = 0.35 eps sqrt(K)``. Kernels sum in blocks: ONNX Runtime's MatMul has 1.2, 2.4, 2.5,
2.6 eps for K = 64, 256, 1024, 4096, so that ``K`` counts up to ``BLOCK``.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from graphc import edit

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
_BOUNDED = frozenset(["Cos", "Erf", "HardSigmoid", "Sigmoid", "Sin", "Tanh"])

BLOCK = 512
"""Products that a kernel may sum one after the other."""

_UNKNOWN_LENGTH = 64


def noisy(model: ir.Model, *, gain: float = GAIN, seed: int = 0) -> ir.Model:
    """A copy of a model that makes random errors where it rounds, ``gain`` times as large as rounding makes.

    Runs of one session differ from each other; the sequence of runs is the same for the same seed. The copy shares
    the tensors of the original. Values whose dtype is not known are left exact.
    """
    copy = model.clone()
    default = _only_float_dtype(copy)
    names = edit.Names(copy)
    number = seed * 1_000_003
    for graph in edit.graphs(copy):
        if "" not in graph.opset_imports and "" not in copy.opset_imports:
            continue
        places: list[tuple[ir.Value, float]] = []
        if graph is copy.graph:
            places = [(v, 1.0) for v in graph.inputs if v.uses() and not v.is_initializer()]
        for node in graph:
            amplitude = _amplitude(node)
            if amplitude:
                places += [(v, amplitude) for v in node.outputs if v.name and (v.uses() or v.is_graph_output())]
        for value, amplitude in places:
            dtype = value.dtype or (default if value.producer() is not None else None)
            if dtype in EPS:
                number += 1
                _disturb(graph, value, dtype, gain * amplitude * EPS[dtype], number, names)
    return copy


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


def _amplitude(node: ir.Node) -> float:
    """The relative error of an operator's result, in units of eps; 0 for operators that do not round."""
    if node.op_type in _CONTRACTIONS:
        return max(1.0, 0.35 * math.sqrt(min(contraction_length(node), BLOCK)))
    if node.op_type in _REDUCTIONS or node.op_type in _FUNCTIONS or node.op_type in _BOUNDED:
        return 2.0
    return 0.0


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


def _disturb(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, size: float, seed: int, names: edit.Names) -> None:
    """Multiply a value by ``1 + u`` for all its readers; a product keeps infinities what they are."""
    hint = f"{value.name}.noise"
    producer = value.producer()
    absolute = producer is not None and producer.op_type in _BOUNDED
    # What is near 1 cannot be written finer than eps in single precision, and need not be.
    single = dtype == ir.DataType.FLOAT
    low, high = (1 - size, 1 + size) if single and not absolute else (-size, size)
    added = [
        ir.node(
            "RandomUniformLike",
            [value],
            {"low": low, "high": high, "seed": float(seed % (1 << 24)), "dtype": int(ir.DataType.FLOAT)},
        )
    ]
    if single:
        added.append(ir.node("Add" if absolute else "Mul", [value, added[-1].outputs[0]]))
    else:
        one = edit.initializer(graph, ir.tensor([1.0], dtype=ir.DataType.DOUBLE), names.fresh(f"{hint}.one"))
        wide = ir.node("Cast", [added[-1].outputs[0]], {"to": int(ir.DataType.DOUBLE)})
        total = ir.node("Add", [wide.outputs[0], one])
        exact = ir.node("Cast", [value], {"to": int(ir.DataType.DOUBLE)})
        result = ir.node("Add" if absolute else "Mul", [exact.outputs[0], (wide if absolute else total).outputs[0]])
        added += [wide, total, exact, result, ir.node("Cast", [result.outputs[0]], {"to": int(dtype)})]
    for node in added:
        node.outputs[0].name = names.fresh(hint)
    if producer is not None:
        graph.insert_after(producer, added)
    elif len(graph):
        graph.insert_before(graph[0], added)
    if not edit.replace(value, added[-1].outputs[0]):
        return
    for node in added:
        for index, read in enumerate(node.inputs):
            if read is added[-1].outputs[0]:
                node.replace_input_with(index, value)
