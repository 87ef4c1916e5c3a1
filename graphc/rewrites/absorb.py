"""Scales and shifts next to a convolution or matrix product are folded into its weight and bias.

After it: ``s * (W x + b) + t = (s W) x + (s b + t)``. Before it: ``W (s x + t) + b = (W s) x + (W t + b)``,
but with zero padding, which comes after the shift, only a scale folds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array
from graphc.rewrites import affine as affines
from graphc.rewrites import linear as linears
from graphc.rewrites import views
from graphc.rewrites.affine import Affine, affine
from graphc.rewrites.base import Refused, Rewriter, Rule, sole_reader
from graphc.rewrites.linear import Linear, linear
from graphc.rewrites.weights import rounded


@dataclass(frozen=True)
class _Chain:
    """Affine maps in a row next to a linear map, as one: ``y = x * scale + shift`` along its channels.

    Attributes:
        maps: From the first computed to the last.
        scale: float64, of shape () or (channels,).
        shift: Likewise.
        stopped: Where and why it does not go on, if it stops at what might have been a part of it.
    """

    maps: tuple[Affine, ...]
    scale: Array
    shift: Array
    stopped: tuple[ir.Node, str] | None = None


def rule_name(kind: Linear, part: Affine, *, before: bool) -> str:
    """The name of the rule that folds this affine map into this linear map."""
    what, into = "bn" if part.is_batchnorm else "affine", "conv" if kind.is_conv else "matmul"
    return f"{what}-{into}" if before else f"{into}-{what}"


def _check_place(part: Affine, rank: int, axis: int, channels: int) -> None:
    here = part.axis_in(rank)
    if here is not None and here != axis:
        raise Refused("the constant does not vary along the channels")
    if part.size not in (1, channels):
        raise Refused("the constant broadcasts the result to more channels")


def _after(kind: Linear, rewriter: Rewriter) -> _Chain:
    """The affine maps that follow a linear map, through views, as far as nobody else reads in between."""
    maps: list[Affine] = []
    scale, shift = np.asarray(1.0), np.asarray(0.0)
    value, rank, axis = kind.node.outputs[0], 0, 0
    node = kind.node
    while True:
        readers = value.consumers()
        if not any(views.is_view(n) or edit.is_op(n, *affines.OPERATORS) for n in readers):
            return _Chain(tuple(maps), scale, shift)
        try:
            node = readers[0]
            part = None if views.is_view(node) else affine(node)
            if part is None and not views.is_view(node):
                return _Chain(tuple(maps), scale, shift)
            sole_reader(value)
            if rank == 0:
                # A product of unknown rank has an axis of channels at least.
                rank = kind.rank or rewriter.rank(value) or 1
                axis = kind.axis % rank
            if part is None:
                moved = views.forward(node, rank, axis)
                if moved is None:
                    return _Chain(tuple(maps), scale, shift)
                rank, axis = moved
            else:
                if rule_name(kind, part, before=False) not in rewriter.enabled:
                    return _Chain(tuple(maps), scale, shift)
                _check_place(part, rank, axis, kind.channels)
                maps.append(part)
                scale, shift = scale * part.scale, shift * part.scale + part.shift
            value = node.outputs[0]
        except Refused as refusal:
            stopped = None if views.is_view(node) else (node, refusal.reason)
            return _Chain(tuple(maps), scale, shift, stopped)


def _before(kind: Linear, rewriter: Rewriter) -> _Chain:
    """The affine maps that lead to a linear map, through views, as far as nobody else reads in between."""
    maps: list[Affine] = []
    scale, shift = np.asarray(1.0), np.asarray(0.0)
    value, rank, axis = kind.node.inputs[0], 0, 0
    while True:
        node = value.producer() if value is not None else None
        if node is None or not (views.is_view(node) or edit.is_op(node, *affines.OPERATORS)):
            return _Chain(tuple(maps), scale, shift)
        assert value is not None
        try:
            part = None if views.is_view(node) else affine(node)
            if part is None and not views.is_view(node):
                return _Chain(tuple(maps), scale, shift)
            if part is not None and rule_name(kind, part, before=True) not in rewriter.enabled:
                return _Chain(tuple(maps), scale, shift)
            sole_reader(value)
            if rank == 0:
                rank = kind.rank or rewriter.rank(value) or 1
                axis = kind.axis_in % rank
            if part is None:
                moved = views.backward(node, rank, axis)
                if moved is None:
                    return _Chain(tuple(maps), scale, shift)
                rank, axis = moved
                value = node.inputs[0]
            else:
                _check_place(part, rank, axis, kind.channels_in)
                if part.shift.any():
                    _check_shift_before(kind)
                if _is_normalisation(part.x):
                    raise Refused("the scale belongs to a normalisation, which runtimes compute as a whole")
                maps.insert(0, part)
                scale, shift = scale * part.scale, shift + part.shift * scale
                value = part.x
        except Refused as refusal:
            stopped = None if views.is_view(node) else (node, refusal.reason)
            return _Chain(tuple(maps), scale, shift, stopped)


def _is_normalisation(value: ir.Value) -> bool:
    """Whether a value is a quotient by something computed, as in a layer or RMS normalisation written out."""
    node = value.producer()
    while edit.is_op(node, "Cast"):
        assert node is not None and node.inputs[0] is not None
        node = node.inputs[0].producer()
    if not edit.is_op(node, "Div", "Mul"):
        return False
    assert node is not None
    computed = [v.producer() for v in node.inputs if v is not None and edit.tensor(v) is None]
    if len(computed) < 2:
        return False
    return node.op_type == "Div" or any(edit.is_op(n, "Reciprocal", "Div", "Pow", "Sqrt") for n in computed)


def fold_after(node: ir.Node, rewriter: Rewriter) -> str | None:
    """Fold what scales and shifts the result of a convolution or product into its weight and bias."""
    if node.op_type == "BatchNormalization":
        _check_unfolded(node)
        return None
    candidates = node.outputs[0].consumers()
    if not any(views.is_view(n) or edit.is_op(n, *affines.OPERATORS) for n in candidates):
        return None
    chain: _Chain | None = None
    try:
        kind = linear(node)
        if kind is None:
            return None
        chain = _after(kind, rewriter)
    except Refused:
        if not _concerns(node, rewriter):
            return None
        raise
    if chain.stopped is not None and not chain.maps:
        raise Refused(chain.stopped[1], chain.stopped[0])
    left = not kind.takes_bias and bool(chain.shift.any())
    is_scale = bool((chain.scale != 1).any())
    if not chain.maps or (left and not is_scale and len(chain.maps) == 1):
        return None
    kind.check_bias()
    bias = None
    if kind.takes_bias and (chain.shift.any() or (is_scale and kind.bias is not None)):
        bias = kind.new_bias(chain.scale, chain.shift)
    factor = kind.factor_out(chain.scale)
    kind.check(factor, bias)
    if is_scale:
        _check_shared(kind, rewriter, chain.scale)
    shift = rounded(chain.shift, kind.held.dtype, "shift") if left else None
    kind.change(rewriter, factor, bias)
    for part in reversed(chain.maps):
        rewriter.bypass(part.node, part.x)
    if shift is not None:
        _shift_result(kind, rewriter, shift)
    return f"{_what(chain)} folded into the {node.op_type} before it"


def _concerns(node: ir.Node, rewriter: Rewriter) -> bool:
    """Whether an affine map with constants follows a node."""
    for reader in node.outputs[0].consumers():
        try:
            if affine(reader) is not None:
                return True
        except Refused:
            return True
    return False


def fold_before(node: ir.Node, rewriter: Rewriter) -> str | None:
    """Fold what scales and shifts the input of a convolution or product into its weight and bias."""
    producer = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if producer is None or not (views.is_view(producer) or edit.is_op(producer, *affines.OPERATORS)):
        return None
    try:
        kind = linear(node)
    except Refused:
        return None  # a product of two results; fold_after says why where a constant is near
    if kind is None:
        return None
    chain = _before(kind, rewriter)
    if not chain.maps:
        if chain.stopped is not None:
            raise Refused(chain.stopped[1], chain.stopped[0])
        return None
    is_scale, is_shift = bool((chain.scale != 1).any()), bool(chain.shift.any())
    bias = moved = None
    if is_shift:
        moved = kind.shift_out(chain.shift)
        if kind.takes_bias:
            kind.check_bias()
            bias, moved = kind.new_bias(np.asarray(1.0), moved), None
    factor = kind.factor_in(chain.scale)
    kind.check(factor, bias)
    if is_scale:
        _check_shared(kind, rewriter)
    shift = None if moved is None else rounded(moved, kind.held.dtype, "shift")
    kind.change(rewriter, factor, bias)
    for part in reversed(chain.maps):
        rewriter.bypass(part.node, part.x)
    if shift is not None:
        _shift_result(kind, rewriter, shift)
    return f"{_what(chain)} folded into the {node.op_type} after it"


def _check_shift_before(kind: Linear) -> None:
    if kind.node.op_type == "ConvTranspose":
        raise Refused("a shift before a transposed convolution does not fold: the borders see less of it")
    if not kind.unpadded():
        raise Refused("a shift before a zero-padded convolution does not fold")
    if kind.takes_bias:
        return
    readers = kind.node.outputs[0].consumers()
    if len(readers) != 1 or kind.node.outputs[0].is_graph_output() or affine(readers[0]) is None:
        raise Refused("a shift before a product without bias would only move behind it")


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
    if kind.held.size <= edit.SMALL or not (others or kind.weight.is_graph_output()):
        return
    if scale is not None and not kind.weight.is_graph_output():
        try:
            if all(_same_after(other, kind, scale, rewriter) for other in others):
                return
        except Refused:
            pass
    raise Refused(f"the weight is shared with {len(others)} other node{'s' if len(others) > 1 else ''}")


def _same_after(other: ir.Node, kind: Linear, scale: Array, rewriter: Rewriter) -> bool:
    """Whether another reader of the weight is certain to be scaled alike."""
    twin = linear(other)
    if twin is None or other.op_type != kind.node.op_type or twin.weight is not kind.weight:
        return False
    if other.graph is not kind.node.graph:
        return False
    chain = _after(twin, rewriter)
    twin.check_bias()
    factor = twin.factor_out(chain.scale)
    return bool(chain.maps) and np.array_equal(factor, kind.factor_out(scale))


def _shift_result(kind: Linear, rewriter: Rewriter, shift: ir.TensorProtocol) -> None:
    """Add a constant to the result of a product that has no bias of its own."""
    result = kind.node.outputs[0]
    stem = (kind.weight.name or "").removesuffix(".weight")
    constant = rewriter.constant(kind.node, shift, f"{stem}.bias")
    rewriter.follow(result, "Add", [constant])


def _what(chain: _Chain) -> str:
    names = dict.fromkeys(part.node.op_type for part in chain.maps)
    return ", ".join(names)


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
        return  # folding it was tried there
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
