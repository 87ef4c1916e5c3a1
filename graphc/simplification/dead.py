"""Removes what no output depends on: nodes, outputs of nodes, initializers, functions, unread outputs of bodies."""

from __future__ import annotations

import onnx_ir as ir

from graphc import edit
from graphc.contract import PassResult


def remove(model: ir.Model, result: PassResult) -> bool:
    """Remove dead code from the whole model; say whether there was any.

    Every operator counts as pure, custom ones included: ONNX graphs are functional, and runtimes drop such nodes too.
    """
    found = PassResult()
    for root in (model.graph, *(function.graph for function in model.functions.values())):
        _nodes(root, found)
    _initializers(model.graph, found)
    _functions(model, found)
    for what, count in found.counts.items():
        result.change(what, count)
    return found.changed


def _unread(value: ir.Value) -> bool:
    return not value.is_graph_output() and not value.uses()


def _nodes(graph: ir.Graph) -> int:
    count = 0
    for node in reversed(graph):
        if all(_unread(value) for value in node.outputs):
            # The bodies go with their node: what they capture must not look read any more.
            for body in edit.subgraphs(node):
                _detach(body)
            for i in range(len(node.inputs)):
                node.replace_input_with(i, None)
            graph.remove(node)
            count += 1
            continue
        _drop_optional_outputs(node)
        for body in edit.subgraphs(node):
            count += _nodes(body)
    return count


def _detach(graph: ir.Graph) -> None:
    for node in graph:
        for i in range(len(node.inputs)):
            node.replace_input_with(i, None)
        for body in edit.subgraphs(node):
            _detach(body)


_OPTIONAL_FROM = {
    "BatchNormalization": 1, "Dropout": 1, "GRU": 0, "GroupNormalization": 1, "LSTM": 0, "LayerNormalization": 1,
    "MaxPool": 1, "RNN": 0,
}  # fmt: skip
"""The first output that may be left out, of the operators that have such."""


def _drop_optional_outputs(node: ir.Node) -> None:
    first = _OPTIONAL_FROM.get(node.op_type)
    if first is None or node.domain not in ("", "ai.onnx"):
        return
    if node.op_type == "BatchNormalization" and edit.attribute(node, "training_mode", 0):
        return
    for value in node.outputs[first:]:
        if _unread(value) and value.name:
            value.name = ""
    keep = len(node.outputs)
    while keep > max(first, 1) and not node.outputs[keep - 1].name:
        keep -= 1
    node.resize_outputs(keep)


def _initializers(graph: ir.Graph) -> int:
    count = 0
    for each in (graph, *graph.subgraphs()):
        for name, value in list(each.initializers.items()):
            if _unread(value) and not value.is_graph_input():
                del each.initializers[name]
                count += 1
    return count


def _functions(model: ir.Model) -> int:
    used: set[ir.OperatorIdentifier] = set()
    waiting = [model.graph]
    while waiting:
        for node in waiting.pop().all_nodes():
            key = node.op_identifier()
            if key in model.functions and key not in used:
                used.add(key)
                waiting.append(model.functions[key].graph)
    unused = [key for key in model.functions if key not in used]
    for key in unused:
        del model.functions[key]
    return len(unused)
