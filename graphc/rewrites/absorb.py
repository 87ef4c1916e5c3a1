"""Scales and shifts next to a convolution or matrix product are folded into its weight and bias.

After it: ``s * (W x + b) + t = (s W) x + (s b + t)``. Before it: ``W (s x + t) + b = (W s) x + (W t + b)``,
but with zero padding, which comes after the shift, only a scale folds: ``s x + t = s (x + t / s)``.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array
from graphc.rewrites import linear as linears
from graphc.rewrites import neighbours, views
from graphc.rewrites.affine import affine
from graphc.rewrites.base import Refused, Rewriter, Rule
from graphc.rewrites.linear import Linear, linear
from graphc.rewrites.neighbours import Neighbours
from graphc.rewrites.weights import rounded


def fold_after(node: ir.Node, rewriter: Rewriter) -> str | None:
    """Fold what scales and shifts the result of a convolution or product into its weight and bias."""
    if node.op_type == "BatchNormalization":
        _check_unfolded(node)
        return None
    if not any(map(neighbours.may_belong, node.outputs[0].consumers())):
        return None
    try:
        kind = linear(node)
    except Refused:
        if any(map(_is_affine, node.outputs[0].consumers())):
            raise
        return None
    found = neighbours.after(kind, rewriter)
    scale, shift = found.together()
    is_scale, is_shift = bool((scale != 1).any()), bool(shift.any())
    if not found.maps:
        _check_stopped(found)
        return None
    if not kind.takes_bias and is_shift and not is_scale and len(found.maps) == 1:
        return None  # an Add behind a MatMul is where its bias belongs
    kind.check_bias()
    bias = kind.new_bias(scale, shift) if kind.takes_bias and (is_shift or kind.bias is not None) else None
    factor = kind.factor_out(scale)
    kind.check(factor, bias)
    if is_scale:
        _check_shared(kind, rewriter, scale)
    left = None if kind.takes_bias or not is_shift else rounded(shift, kind.held.dtype, "shift")
    _carry_out(kind, found, factor, bias, left, rewriter)
    return f"{found.operators()} folded into the {node.op_type} before it"


def fold_before(node: ir.Node, rewriter: Rewriter) -> str | None:
    """Fold what scales and shifts the input of a convolution or product into its weight and bias."""
    source = node.inputs[0] if node.inputs else None
    if source is None or not neighbours.may_belong(source.producer()):
        return None
    try:
        kind = linear(node)
    except Refused:
        return None  # where a constant is near, fold_after says why
    found = neighbours.before(kind, rewriter)
    if not found.maps:
        _check_stopped(found)
        return None
    scale, shift = found.together()
    if found.no_shift and shift.any():
        return _fold_scale_before(kind, found, rewriter)
    bias = left = None
    if shift.any():
        moved = kind.shift_out(shift)
        if kind.takes_bias:
            kind.check_bias()
            bias = kind.new_bias(np.asarray(1.0), moved)
        else:
            left = rounded(moved, kind.held.dtype, "shift")
    factor = kind.factor_in(scale)
    kind.check(factor, bias)
    if (scale != 1).any():
        _check_shared(kind, rewriter)
    _carry_out(kind, found, factor, bias, left, rewriter)
    return f"{found.operators()} folded into the {node.op_type} after it"


def _fold_scale_before(kind: Linear, found: Neighbours, rewriter: Rewriter) -> str:
    """Fold the scale of what leads to a linear map that cannot take the shift, and leave one Add of that."""
    scale, shift = found.together()
    if len(found.maps) < 2 or not (scale != 1).any() or not scale.all():
        raise Refused(found.no_shift)
    quotient = shift / scale
    remaining = rounded(quotient, kind.held.dtype, "shift")
    factor = kind.factor_in(scale)
    kind.check(factor, None)
    _check_shared(kind, rewriter)
    last = found.maps[-1].node
    if quotient.ndim:
        rank = kind.rank or rewriter.rank(kind.node.inputs[0]) or 1
        tail = (1,) * (rank - 1 - kind.axis_in % rank)
        remaining = ir.Tensor(remaining.numpy().reshape(-1, *tail), dtype=remaining.dtype)
    kind.change(rewriter, factor, None)
    constant = rewriter.constant(last, remaining, f"{last.outputs[0].name}.shift")
    rewriter.supersede(last, "Add", [found.maps[0].x, constant])
    for part in reversed(found.maps[:-1]):
        rewriter.drop(part.node)
    return f"scale of {found.operators()} folded into the {kind.node.op_type} after it"


def _carry_out(
    kind: Linear,
    found: Neighbours,
    factor: Array,
    bias: Array | None,
    left: ir.TensorProtocol | None,
    rewriter: Rewriter,
) -> None:
    """Change weight and bias, remove the affine maps, and add what is left behind a product without bias."""
    kind.change(rewriter, factor, bias)
    for part in reversed(found.maps):
        rewriter.bypass(part.node, part.x)
    if left is not None:
        stem = (kind.weight.name or "").removesuffix(".weight")
        constant = rewriter.constant(kind.node, left, f"{stem}.bias")
        rewriter.follow(kind.node.outputs[0], "Add", [constant])


def _check_stopped(found: Neighbours) -> None:
    if found.stopped is not None:
        node, reason = found.stopped
        raise Refused(reason, node)


def _check_shared(kind: Linear, rewriter: Rewriter, scale: Array | None = None) -> None:
    """See that a new weight does not stand beside the old one, unless it is small.

    Args:
        kind: What reads the weight.
        rewriter: The rewriter.
        scale: What follows ``kind``; the weight is no longer needed if its other readers get the same.

    Raises:
        Refused: The weight is big and others need it as it is.
    """
    others = [n for n in kind.weight.consumers() if n is not kind.node]
    is_output = kind.weight.is_graph_output()
    if kind.held.size <= edit.SMALL or not (others or is_output):
        return
    if scale is None or is_output or not all(_is_scaled_alike(other, kind, scale, rewriter) for other in others):
        raise Refused(f"the weight is shared with {len(others)} other node{'s' if len(others) > 1 else ''}")


def _is_scaled_alike(other: ir.Node, kind: Linear, scale: Array, rewriter: Rewriter) -> bool:
    """Whether another reader of the weight is certain to be scaled by as much."""
    if other.op_type != kind.node.op_type or other.graph is not kind.node.graph:
        return False
    try:
        twin = linear(other)
        twin.check_bias()
    except Refused:
        return False
    found = neighbours.after(twin, rewriter)
    return (
        twin.weight is kind.weight
        and bool(found.maps)
        and np.array_equal(twin.factor_out(found.together()[0]), kind.factor_out(scale))
    )


def _is_affine(node: ir.Node) -> bool:
    """Whether a node is an affine map, if perhaps one that cannot be folded."""
    try:
        return affine(node) is not None
    except Refused:
        return True


def _check_unfolded(node: ir.Node) -> None:
    """Say why a BatchNormalization is left.

    Raises:
        Refused: Always, unless it follows what should take it, where that is tried.
    """
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    while views.is_view(producer):
        assert producer is not None
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    if edit.is_op(producer, *linears.OPERATORS):
        return
    affine(node)
    what = producer.op_type if producer is not None else "an input of the graph"
    raise Refused(f"the BatchNormalization follows {what}, not a convolution or product")


RULES = (
    Rule(
        {
            "conv-bn": "BatchNormalization after Conv or ConvTranspose goes into it.",
            "conv-affine": "Add, Sub, Mul, Div by constants after Conv or ConvTranspose go into it.",
            "matmul-bn": "BatchNormalization after MatMul or Gemm goes into it.",
            "matmul-affine": "Add, Sub, Mul, Div by constants after MatMul or Gemm go into it.",
        },
        (*linears.OPERATORS, "BatchNormalization"),
        fold_after,
    ),
    Rule(
        {
            "bn-conv": "BatchNormalization before an unpadded Conv goes into it.",
            "affine-conv": "Add, Sub, Mul, Div by constants before Conv or ConvTranspose go into it.",
            "bn-matmul": "BatchNormalization before MatMul or Gemm goes into it.",
            "affine-matmul": "Add, Sub, Mul, Div by constants before MatMul or Gemm go into it.",
        },
        linears.OPERATORS,
        fold_before,
    ),
)
