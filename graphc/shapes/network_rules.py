"""Facts of the operators that networks compute with: activations, normalisations, products, windows, recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc.edit import attribute
from graphc.shapes import UNKNOWN, Fact, Facts, Shape, rule, symbolic, tensor_rules
from graphc.shapes.symbolic import Dim

Facts_ = Sequence[Fact]


@rule(
    "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Ceil", "Celu", "Clip", "Cos", "Cosh",
    "CumSum", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Hardmax", "LRN", "LeakyRelu", "Log",
    "LogSoftmax", "LpNormalization", "MeanVarianceNormalization", "Mish", "PRelu", "Reciprocal", "Relu", "Round",
    "Selu", "Shrink", "Sigmoid", "Sin", "Sinh", "Softmax", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh",
    "ThresholdedRelu", "Trilu", "InstanceNormalization", "GroupNormalization", "RMSNormalization", "ScatterElements",
    "ScatterND", "Scatter", "ReverseSequence", "RotaryEmbedding",
)  # fmt: skip
def _like_first(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    return [Fact(inputs[0].dtype, inputs[0].shape)] if inputs[0].dtype is not None else None


@rule("IsNaN", "IsInf")
def _predicate(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    return [Fact(ir.DataType.BOOL, inputs[0].shape)]


@rule("Dropout")
def _dropout(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    return [Fact(inputs[0].dtype, inputs[0].shape), Fact(ir.DataType.BOOL, inputs[0].shape)]


@rule("LayerNormalization")
def _layer_normalization(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    x = inputs[0]
    statistics = UNKNOWN
    if x.shape is not None:
        axis = attribute(node, "axis", -1) % max(len(x.shape), 1)
        statistics = Fact(ir.DataType.FLOAT, x.shape[:axis] + (1,) * (len(x.shape) - axis))
    return [Fact(x.dtype, x.shape), statistics, statistics]


@rule("BatchNormalization")
def _batch_normalization(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    channels = [Fact(inputs[i].dtype, inputs[i].shape) for i in (3, 4)] if len(inputs) > 4 else []
    return [Fact(inputs[0].dtype, inputs[0].shape), *channels, *channels]


@rule("MatMul")
def _matmul(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    a, b = inputs[0], inputs[1]
    if a.shape is None or b.shape is None:
        return [Fact(a.dtype)]
    if not a.shape or not b.shape:
        return None
    x = a.shape if len(a.shape) > 1 else (1, *a.shape)
    y = b.shape if len(b.shape) > 1 else (*b.shape, 1)
    shape = tensor_rules.broadcast_shapes(x[:-2], y[:-2])
    if len(a.shape) > 1:
        shape += (x[-2],)
    if len(b.shape) > 1:
        shape += (y[-1],)
    return [Fact(a.dtype, shape)]


@rule("Gemm")
def _gemm(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    a, b = inputs[0], inputs[1]
    if a.shape is None or b.shape is None or len(a.shape) != 2 or len(b.shape) != 2:
        return [Fact(a.dtype, facts.freshen(2))]
    rows = a.shape[1 if attribute(node, "transA", 0) else 0]
    columns = b.shape[0 if attribute(node, "transB", 0) else 1]
    return [Fact(a.dtype, (rows, columns))]


def _window(
    size: Dim, kernel: int, stride: int, dilation: int, begin: int, end: int, auto_pad: str, ceil_mode: bool
) -> Dim | None:
    """How many windows a convolution or pooling makes along one axis (ONNX, operators Conv and MaxPool)."""
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        return symbolic.ceildiv(size, stride)
    span = (kernel - 1) * dilation + 1
    padding = 0 if auto_pad == "VALID" else begin + end
    room = symbolic.add(size, padding - span)
    if not ceil_mode:
        steps = symbolic.floordiv(room, stride)
        return None if steps is None else symbolic.add(steps, 1)
    if not isinstance(room, int):
        return None
    count = -(-room // stride) + 1
    # A window that would start in the padding at the end is left out (opset 19; runtimes always did so).
    if isinstance(size, int) and (count - 1) * stride >= size + (0 if auto_pad == "VALID" else begin):
        count -= 1
    return count


def _windows(node: ir.Node, spatial: Shape, kernel: Sequence[int], facts: Facts) -> Shape:
    n = len(spatial)
    strides = attribute(node, "strides") or (1,) * n
    dilations = attribute(node, "dilations") or (1,) * n
    pads = attribute(node, "pads") or (0,) * (2 * n)
    auto_pad = attribute(node, "auto_pad", "NOTSET")
    ceil_mode = bool(attribute(node, "ceil_mode", 0))
    if not len(strides) == len(dilations) == len(kernel) == n or len(pads) != 2 * n:
        return facts.freshen(n)
    dims = []
    for i, size in enumerate(spatial):
        dim = _window(size, kernel[i], strides[i], dilations[i], pads[i], pads[n + i], auto_pad, ceil_mode)
        dims.append(facts.fresh() if dim is None else symbolic.as_size(dim))
    return tuple(dims)


@rule("Conv")
def _conv(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    x, w = inputs[0], inputs[1]
    if x.shape is None or w.shape is None or len(x.shape) != len(w.shape) or len(x.shape) < 3:
        return [Fact(x.dtype)]
    kernel: Any = attribute(node, "kernel_shape") or w.shape[2:]
    if not all(isinstance(k, int) for k in kernel):
        return [Fact(x.dtype, (x.shape[0], w.shape[0], *facts.freshen(len(kernel))))]
    return [Fact(x.dtype, (x.shape[0], w.shape[0], *_windows(node, x.shape[2:], kernel, facts)))]


@rule("MaxPool", "AveragePool", "LpPool")
def _pool(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    x = inputs[0]
    kernel = attribute(node, "kernel_shape")
    if x.shape is None or kernel is None or len(x.shape) != len(kernel) + 2:
        return [Fact(x.dtype)]
    shape = x.shape[:2] + _windows(node, x.shape[2:], kernel, facts)
    return [Fact(x.dtype, shape), Fact(ir.DataType.INT64, shape)]


@rule("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def _global_pool(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    x = inputs[0]
    return [Fact(x.dtype, None if x.shape is None else x.shape[:2] + (1,) * (len(x.shape) - 2))]


@rule("Resize", "Upsample")
def _resize(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    x = inputs[0]
    cropped = attribute(node, "coordinate_transformation_mode") == "tf_crop_and_resize"
    if x.shape is None or cropped or attribute(node, "axes") is not None:
        return None
    if len(inputs) > 3 and node.inputs[3] is not None:
        sizes = inputs[3].items
        policy = attribute(node, "keep_aspect_ratio_policy", "stretch")
        if sizes is None or len(sizes) != len(x.shape) or policy != "stretch":
            return [Fact(x.dtype, facts.freshen(len(x.shape)))]
        return [Fact(x.dtype, tuple(facts.fresh() if d is None else d for d in sizes))]
    scales = facts.array(node.inputs[-1]) if len(node.inputs) in (2, 3) else None
    if scales is None or scales.size != len(x.shape):
        return [Fact(x.dtype, facts.freshen(len(x.shape)))]
    dims: list[Dim] = []
    for dim, scale in zip(x.shape, scales.reshape(-1).astype(np.float32), strict=True):
        if isinstance(dim, int):
            dims.append(int(np.floor(np.float32(dim) * scale)))
        elif float(scale).is_integer():
            dims.append(symbolic.mul(dim, int(scale)))
        else:
            dims.append(facts.fresh())
    return [Fact(x.dtype, tuple(dims))]


@rule("LSTM", "GRU", "RNN")
def _recurrent(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    x, hidden = inputs[0], attribute(node, "hidden_size")
    if x.shape is None or len(x.shape) != 3 or hidden is None:
        return None
    y: Shape
    state: Shape
    directions = 2 if attribute(node, "direction", "forward") == "bidirectional" else 1
    if attribute(node, "layout", 0):
        batch, length = x.shape[0], x.shape[1]
        y, state = (batch, length, directions, hidden), (batch, directions, hidden)
    else:
        length, batch = x.shape[0], x.shape[1]
        y, state = (length, directions, batch, hidden), (directions, batch, hidden)
    return [Fact(x.dtype, y), Fact(x.dtype, state), Fact(x.dtype, state)]


@rule("TopK")
def _top_k(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    x = inputs[0]
    if x.shape is None or not x.shape or len(inputs) < 2:
        return None
    axis = attribute(node, "axis", -1) % len(x.shape)
    items = inputs[1].items
    k = items[0] if items is not None and len(items) == 1 else None
    shape = (*x.shape[:axis], facts.fresh() if k is None else k, *x.shape[axis + 1 :])
    return [Fact(x.dtype, shape), Fact(ir.DataType.INT64, shape)]


@rule("Attention")
def _attention(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    """The result, and keys and values with those of the past in front."""
    shapes = [each.shape for each in inputs[:3]]
    if len(shapes) < 3 or any(shape is None or len(shape) != len(shapes[0] or ()) for shape in shapes):
        return [Fact(inputs[0].dtype)]
    q, k, v = (shape or () for shape in shapes)
    heads, fewer = attribute(node, "q_num_heads", 0), attribute(node, "kv_num_heads", 0)
    if len(q) == 4:
        result: Shape = (*q[:3], v[3])
        present = [k, v]
    else:
        sizes = [symbolic.exact_quotient(width, fewer) if fewer else None for width in (k[2], v[2])]
        if len(q) != 3 or not heads or not isinstance(sizes[1], int) or sizes[0] is None:
            return [Fact(inputs[0].dtype)]
        result = (q[0], q[1], heads * sizes[1])
        present = [(k[0], fewer, k[1], sizes[0]), (v[0], fewer, v[1], sizes[1])]
    if len(inputs) > 5:
        for number, past in enumerate(each.shape for each in inputs[4:6]):
            if past is not None and len(past) == 4:
                b, h, t, d = present[number]
                present[number] = (b, h, symbolic.add(past[2], t), d)
    found = [Fact(inputs[0].dtype, result)]
    return [*found, *(Fact(each.dtype, shape) for each, shape in zip(inputs[1:3], present, strict=True)), UNKNOWN]
