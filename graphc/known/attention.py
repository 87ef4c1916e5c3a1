"""Attention and recurrent layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphc.edit import Array, attribute
from graphc.known.elementwise import added
from graphc.known.facets import Facets, collapse, elementwise, tidy
from graphc.known.knowledge import Knowledge
from graphc.known.registry import CONTRIB, operand, rule


@rule("Attention")
def _attention(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    """A weighted mean of the values: where they are a constant for every token, so is the result."""
    if node.domain == CONTRIB:
        return ()
    shape = known.shape(node.inputs[2])
    heads = attribute(node, "q_num_heads", 0), attribute(node, "kv_num_heads", 0)
    if shape is None or operand(node, 5) is not None:
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


@rule("RotaryEmbedding")
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


@rule("MultiHeadAttention")
def _multi_head_attention(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    value = operand(node, 2)
    shape = known.shape(value)
    if value is None or shape is None or len(shape) != 3 or any(operand(node, i) is not None for i in (6, 7)):
        return ()
    found = tuple(collapse(f, (1,)) for f in known(value))
    if operand(node, 3) is not None:
        bias = known(node.inputs[3])
        width = shape[2]
        if not isinstance(width, int):
            return ()
        found = elementwise(added, [found, tuple(f.reshape(1, 1, -1)[:, :, -width:] for f in bias)], 3)
    return [tidy(np.where(f == 0, 0.0, np.nan) for f in found)]


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


@rule("LSTM", "GRU", "RNN")
def _recurrent(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    """A cell whose gates see nothing and that starts at zero stays at zero."""
    given = list(attribute(node, "activations", ()))
    usual = ACTIVATIONS[node.op_type]
    if given and given not in (usual, usual * 2, ["Relu"], ["Relu"] * 2):
        return ()
    if operand(node, 7) is not None or attribute(node, "layout", 0):
        return ()
    gates = GATES[node.op_type]
    zero: Array | None = None
    for index, count in ((1, gates), (2, gates), (3, 2 * gates), (5, 1), (6, 1)):
        value = operand(node, index)
        if value is None:
            continue
        where = known.zeros(value)
        if where is None:
            return ()
        if where.ndim == 3:
            # The rows of W and R; the states of all samples.
            where = np.asarray(where.all(axis=2 if index in (1, 2) else 1))
        if where.shape[1] > 1:
            where = np.asarray(where.reshape(where.shape[0], count, -1).all(axis=1))
        zero = where if zero is None else zero & where
    if zero is None:
        return ()
    state = np.where(zero, 0.0, np.nan)
    return [(state[None, :, None, :],), (state[:, None, :],), (state[:, None, :],)]
