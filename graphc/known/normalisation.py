"""Normalisations, Softmax, reductions and pooling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphc.edit import Array, attribute
from graphc.known.elementwise import added
from graphc.known.facets import NOTHING, Facets, align, collapse, elementwise, tidy, times
from graphc.known.knowledge import Knowledge
from graphc.known.products import unpadded
from graphc.known.registry import operand, rank_of, rule
from graphc.shapes.tensor_rules import axes_of


@rule("BatchNormalization")
def _batch_norm(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    if attribute(node, "training_mode", 0):
        return ()
    rank, epsilon = rank_of(node, known), attribute(node, "epsilon", 1e-5)
    vectors = [tuple(f.reshape(-1, *(1,) * (rank - 2)) for f in known(v)) for v in node.inputs[1:5]]

    def normalise(x: Array, scale: Array, shift: Array, mean: Array, variance: Array) -> Array:
        return times(x - mean, scale / np.sqrt(variance + epsilon)) + shift

    return [elementwise(normalise, [known(node.inputs[0]), *vectors], rank)]


@rule("InstanceNormalization", "GroupNormalization")
def _channel_norm(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    rank = rank_of(node, known)
    scale, shift = ([f.reshape(-1, *(1,) * (rank - 2)) for f in known(v)] for v in node.inputs[1:3])
    x = known(node.inputs[0]) if node.op_type == "InstanceNormalization" else NOTHING
    channels, length = known.shape(node.inputs[0]), known.shape(node.inputs[1])
    if rank < 3 or channels is None or length is None or channels[1] != length[0]:
        # Before opset 21, GroupNormalization scales groups, not channels.
        return ()

    def normalise(x: Array, scale: Array, shift: Array) -> Array:
        # A constant channel equals its own mean.
        return np.where((scale == 0) | ~np.isnan(x), 0.0, np.nan) + shift

    flat = tuple(collapse(f, (0, *range(2, rank))) for f in x)
    return [elementwise(normalise, [flat, tuple(scale), tuple(shift)], rank)]


@rule("LayerNormalization")
def _layer_norm(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    rank = rank_of(node, known)
    scale = known(node.inputs[1])
    shift = known(node.inputs[2]) if operand(node, 2) is not None else (np.zeros((1,) * rank),)
    return [elementwise(lambda s, b: np.where(s == 0, 0.0, np.nan) + b, [scale, shift], rank)]


def _rms(x: Array, scale: Array) -> Array:
    return np.where((x == 0) | (scale == 0), 0.0, np.nan)


@rule("RMSNormalization", "SimplifiedLayerNormalization")
def _rms_norm(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    x, scale = known(node.inputs[0]), known(node.inputs[1])
    return [_either_zero(x, scale, rank_of(node, known))]


def _either_zero(a: Facets, b: Facets, rank: int) -> Facets:
    return tidy(np.where(align(f, rank) == 0, 0.0, np.nan) for f in (*a, *b))


@rule("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")
def _skip_norm(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    rank = rank_of(node, known)
    simplified = node.op_type == "SkipSimplifiedLayerNormalization"
    total = elementwise(added, [known(node.inputs[0]), known(node.inputs[1])], rank)
    bias = operand(node, 3 if simplified else 4)
    if bias is not None:
        total = elementwise(added, [total, known(bias)], rank)
    if simplified:
        return [_either_zero(total, known(node.inputs[2]), rank), NOTHING, NOTHING, total]
    beta = operand(node, 3)
    shift = known(beta) if beta is not None else (np.zeros((1,) * rank),)
    scale = known(node.inputs[2])
    norm = elementwise(lambda s, b: np.where(s == 0, 0.0, np.nan) + b, [scale, shift], rank)
    return [norm, NOTHING, NOTHING, total]


@rule("Softmax")
def _softmax(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    return [tidy(np.where(np.isneginf(f), 0.0, np.nan) for f in known(node.inputs[0]))]


@rule("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceL1", "ReduceSumSquare")
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


@rule("GlobalAveragePool", "GlobalMaxPool", "MaxPool", "AveragePool", "LpPool", "GlobalLpPool", "Resize", "Upsample")
def _pool(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    rank = rank_of(node, known)
    spatial = range(2, rank)
    shape_in, shape_out = known.shape(node.inputs[0]), known.shape(node.outputs[0])
    if node.op_type in ("Resize", "Upsample") and (
        shape_in is None
        or shape_out is None
        or shape_in[:2] != shape_out[:2]
        or attribute(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize"
    ):
        return ()
    found = tuple(collapse(f, spatial) for f in known(node.inputs[0]))
    constant = node.op_type in ("GlobalAveragePool", "GlobalMaxPool", "MaxPool") or (
        node.op_type == "AveragePool" and (unpadded(node) or not attribute(node, "count_include_pad", 0))
    )
    if constant and not attribute(node, "ceil_mode", 0):
        return [found]
    return [tidy(np.where(f == 0, 0.0, np.nan) for f in found)]
