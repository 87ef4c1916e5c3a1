"""A factor of each head moves from the scores to the queries: cosine attention, as in Swin V2, has one."""

from __future__ import annotations

import onnx_ir as ir

from graphc import edit
from graphc.recognition import products
from graphc.recognition.graph import Graph
from graphc.recognition.scores import PASSED
from graphc.rewrites.base import Rewriter, Rule

_DEEPEST = 8
"""Nodes between the factor and the softmax at most."""


def to_queries(node: ir.Node, rewriter: Rewriter) -> str | None:
    """``(q k) * g`` is ``(q * g) k`` where ``g`` is one number for all queries and keys, if not for all heads."""
    assert isinstance(rewriter, Graph)
    graph = rewriter
    scores = node.outputs[0]
    uses = tuple(scores.uses())
    if not products.is_product(node) or node.op_type != "MatMul" or len(uses) != 1 or scores.is_graph_output():
        return None
    scaled = uses[0].node
    if not edit.is_op(scaled, "Mul") or scaled.graph is not node.graph or not _softmax_follows(scaled.outputs[0]):
        return None
    gain = scaled.inputs[1 - uses[0].idx]
    queries, keys = node.inputs
    own, full, wide = (graph.dims(value) for value in (gain, scores, queries))
    if own is None or full is None or wide is None or edit.scalar(gain) is not None or len(own) > len(full):
        return None
    aligned = (1,) * (len(full) - len(own)) + own
    if aligned[-2:] != (1, 1) or graph.dims(scaled.outputs[0]) != full:
        return None
    batch = (1,) * (len(full) - len(wide)) + wide[:-2]
    shape = [of_q if of_g == 1 else of_g for of_q, of_g in zip(batch, aligned[:-2], strict=True)]
    more = graph.make(scaled, "Mul", [queries, gain], like=queries, shape=[*shape, *wide[-2:]])
    again = graph.make(scaled, "MatMul", [more, keys], like=scores, shape=full)
    graph.bypass(scaled, again)
    graph.sweep([scores])
    return "factor of each head moved to the queries"


def _softmax_follows(value: ir.Value, depth: int = _DEEPEST) -> bool:
    """Whether a value is, after masks at most, what a softmax is taken of."""
    if depth == 0 or value.is_graph_output():
        return False
    readers = [reader for reader in dict.fromkeys(value.consumers()) if not edit.is_op(reader, "Shape")]
    if len(readers) != 1:
        return False
    if edit.is_op(readers[0], "Softmax"):
        return True
    return edit.is_op(readers[0], *PASSED) and _softmax_follows(readers[0].outputs[0], depth - 1)


GAIN = Rule({"attention": "A factor of each head moves to the queries."}, ("MatMul",), to_queries)
