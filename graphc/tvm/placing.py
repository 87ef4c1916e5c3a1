"""Operators of graphc's own, which only a lowered model has: how they come into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from graphc import edit
from graphc.contract import Capabilities
from graphc.recognition.graph import Graph

OWN = "graphc.tvm"
"""Their domain."""


def graph_of(model: ir.Model) -> Graph:
    """A model whose nodes are to be replaced."""
    return Graph(model, frozenset(), Capabilities("tvm", max_ir=10, max_opset={}))


def put(
    node: ir.Node,
    operator: str,
    inputs: Sequence[ir.Value | None],
    settings: Mapping[str, int | Sequence[int]],
    graph: Graph,
) -> None:
    """An operator in the place of a node; a Gemm's bias, if there is one, is added to it."""
    where, out = node.graph, node.outputs[0]
    assert where is not None
    made = ir.node(operator, inputs, dict(settings), domain=OWN, name=node.name, num_outputs=len(node.outputs))
    where.insert_before(node, made)
    bias = node.inputs[2] if edit.is_op(node, "Gemm") and len(node.inputs) > 2 else None
    results = [made.outputs[0]]
    if bias is not None:
        added = ir.node("Add", [results[0], bias], name=f"{node.name}.bias")
        where.insert_before(node, added)
        results.append(added.outputs[0])
    for result in results:
        result.name, result.type, result.shape = graph.fresh(f"{out.name}.own"), out.type, out.shape
    pairs = [(out, results[-1]), *zip(node.outputs[1:], made.outputs[1:], strict=True)]
    for old, new in pairs[1:]:
        new.name, new.type, new.shape = graph.fresh(f"{old.name}.own") if old.name else "", old.type, old.shape
    for old, new in pairs:
        edit.replace(old, new)
    edit.remove(node)
