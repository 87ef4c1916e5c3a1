"""Where the terms of a sum are zero: because one factor is, or the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphc.edit import Array, attribute
from graphc.known import Knowledge
from graphc.known.choice import bottom
from graphc.known.products import empty_blocks, matmul_letters
from graphc.pruning.sites import RECURRENT, Site

Mask = Array
"""Booleans, broadcastable to a value's shape with the same rank: an axis of length 1 speaks for all its indices."""

PRODUCTS = frozenset("MatMul FusedMatMul Gemm Einsum Conv FusedConv ConvTranspose MatMulNBits LSTM GRU RNN".split())
"""Operators whose sums are of products of two operands."""


def is_product(node: ir.Node) -> bool:
    """Whether a node sums products of its operands along every axis that it sums.

    Each operand of a product shows the same terms: it is enough that one proves them zero.
    """
    if node.op_type == "Attention":
        # Keys of the past meet the queries too.
        return node.domain in ("", "ai.onnx") and not any(node.inputs[4:6])
    return node.op_type in PRODUCTS


def either(a: Mask, b: Mask | None) -> Mask:
    return a if b is None else a | b


def nowhere(known: Knowledge, value: ir.Value) -> Mask:
    shape = known.shape(value)
    return np.zeros((1,) * len(shape or ()), dtype=bool)


def silent(node: ir.Node, site: Site, known: Knowledge) -> Mask:
    """Where an operand's terms are neutral."""
    if node.op_type == "MatMulNBits" and site.operand in (node.inputs[1], *node.inputs[3:4]):
        return nowhere(known, site.operand)  # a code that is 0 does not stand for 0
    marked = bottom(site.operand, known) if site.what == "^" else known.zeros(site.operand)
    own = either(nowhere(known, site.operand), marked)
    if site.what != "summed":
        return own
    return either(own, _silenced(node, site.operand, known))


def _silenced(node: ir.Node, operand: ir.Value, known: Knowledge) -> Mask | None:
    """Where the terms of an operand are zero because of what it is multiplied with."""
    match node.op_type:
        case "MatMul" | "FusedMatMul" | "Gemm" | "Einsum":
            letters = product_letters(node, known)
            if letters is None or len(node.inputs) < 2:
                return None
            return _across(node.inputs, letters, operand, known)
        case "Conv" | "FusedConv":
            return _convolution(node, operand, known)
        case "MatMulNBits":
            return _packed(node, operand, known)
        case "ConvTranspose":
            return _transposed_convolution(node, operand, known)
        case operator if operator in RECURRENT:
            return _recurrent(node, operand, known)
    return None


def product_letters(node: ir.Node, known: Knowledge) -> tuple[str, str] | None:
    """A letter for each axis of both operands of a product of two tensors."""
    shapes = [known.shape(v) for v in node.inputs[:2]]
    if any(s is None for s in shapes):
        return None
    if node.op_type == "Gemm":
        left = "km" if attribute(node, "transA", 0) else "mk"
        return left, "nk" if attribute(node, "transB", 0) else "kn"
    if node.op_type == "Einsum":
        terms = str(attribute(node, "equation", "")).replace(" ", "").partition("->")[0].split(",")
        if len(terms) != 2 or "." in "".join(terms) or any(len(set(t)) != len(t) for t in terms):
            return None
        return terms[0], terms[1]
    letters = matmul_letters(len(shapes[0] or ()), len(shapes[1] or ()))
    if letters is None or attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        return None
    left, right = letters[0], letters[1]
    if attribute(node, "transA", 0):
        left = left[:-2] + "km"
    if attribute(node, "transB", 0):
        right = right[:-2] + "nk"
    return left, right


def _across(
    inputs: Sequence[ir.Value | None], letters: tuple[str, str], operand: ir.Value, known: Knowledge
) -> Mask | None:
    """Zeros of the other operand, seen along the axes that both have."""
    result: Mask | None = None
    for i in (0, 1):
        if inputs[i] is not operand:
            continue
        other = known.zeros(inputs[1 - i])
        if other is None:
            continue
        mine, theirs = letters[i], letters[1 - i]
        other = np.asarray(other.all(axis=tuple(a for a, c in enumerate(theirs) if c not in mine), keepdims=True))
        kept = [c for c in theirs if c in mine]
        other = other.reshape([n for n, c in zip(other.shape, theirs, strict=True) if c in mine])
        other = other.transpose([kept.index(c) for c in mine if c in kept])
        here = other.reshape([other.shape[[c for c in mine if c in kept].index(c)] if c in kept else 1 for c in mine])
        # A tensor multiplied with itself: both roles must be silent.
        result = here if result is None else result & here
    return result


def _convolution(node: ir.Node, operand: ir.Value, known: Knowledge) -> Mask | None:
    x, w = node.inputs[0], node.inputs[1]
    group = attribute(node, "group", 1)
    if operand is x:
        taps = known.zeros(w)
        if taps is None:
            return None
        taps = np.asarray(taps.all(axis=tuple(range(2, taps.ndim))))
        rows = taps.reshape(group if taps.shape[0] > 1 else 1, -1, taps.shape[1]).all(axis=1)
        if rows.shape[1] > 1:
            rows = np.broadcast_to(rows, (group, rows.shape[1]))
        elif rows.shape[0] > 1:
            channels = known.shape(x)
            count = channels[1] if channels else None
            if not isinstance(count, int):
                return None
            rows = np.repeat(rows, count // group, axis=1)
        return rows.reshape(1, -1, *(1,) * (len(known.shape(x) or ()) - 2))
    dead = known.zeros(x)
    if dead is None:
        return None
    flat = collapse_mask(dead, keep=1)
    if flat.size > 1:
        flat = np.asarray(flat.reshape(group, -1).all(axis=0))
    return flat.reshape(1, -1, *(1,) * (len(known.shape(w) or ()) - 2))


def _packed(node: ir.Node, operand: ir.Value, known: Knowledge) -> Mask | None:
    """Inputs meet the blocks whose scales are zero for all outputs."""
    empty = empty_blocks(node, known) if operand is node.inputs[0] else None
    if empty is None:
        return None
    inputs = np.repeat(empty.all(axis=0), int(attribute(node, "block_size", 0)))[: int(attribute(node, "K", 0))]
    return inputs.reshape(*(1,) * (len(known.shape(operand) or ()) - 1), -1)


def _transposed_convolution(node: ir.Node, operand: ir.Value, known: Knowledge) -> Mask | None:
    """Input channels are the weight's first axis."""
    x, w = node.inputs[0], node.inputs[1]
    source, target = (w, x) if operand is x else (x, w)
    dead = known.zeros(source)
    if dead is None:
        return None
    flat = collapse_mask(dead, keep=0 if source is w else 1)
    rank = len(known.shape(target) or ())
    return flat.reshape([-1 if a == (1 if target is x else 0) else 1 for a in range(rank)])


def collapse_mask(mask: Mask, keep: int) -> Array:
    """What holds along one axis for all indices of the others."""
    return mask.all(axis=tuple(a for a in range(mask.ndim) if a != keep)).reshape(-1)


def _recurrent(node: ir.Node, operand: ir.Value, known: Knowledge) -> Mask | None:
    """Inputs meet the columns of W, the state those of R."""
    x, w, r = node.inputs[:3]
    if operand is x and (dead := known.zeros(w)) is not None:
        return collapse_mask(dead, keep=2).reshape(1, 1, -1)
    if operand is w and (dead := known.zeros(x)) is not None:
        return collapse_mask(dead, keep=2).reshape(1, 1, -1)
    if operand is r and (dead := known.zeros(node.outputs[0])) is not None and dead.ndim == 4:
        return dead.all(axis=(0, 2)).reshape(dead.shape[1], 1, dead.shape[3])
    return None
