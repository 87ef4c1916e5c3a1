"""Removes what no output depends on: nodes, outputs of nodes, initializers, functions."""

from __future__ import annotations

import onnx_ir as ir

from graphc import edit
from graphc.contract import PassResult
from graphc.simplification import bodies


def remove(model: ir.Model, result: PassResult) -> bool:
    """Remove dead code from the whole model; say whether there was any.

    Every operator counts as pure, custom ones included: ONNX graphs are functional, and runtimes drop such nodes too.
    """
    counts = {
        "dead node removed": 0,
        "unread output dropped": 0,
        "unused initializer removed": 0,
        "unused function removed": _functions(model),
    }
    for root in (model.graph, *(function.graph for function in model.functions.values())):
        _nodes(root, counts)
    for graph in (model.graph, *edit.bodies(model.graph)):
        for name, value in list(graph.initializers.items()):
            if bodies.unread(value) and not value.is_graph_input():
                del graph.initializers[name]
                counts["unused initializer removed"] += 1
    for what, count in counts.items():
        result.change(what, count)
    return any(counts.values())


def _nodes(graph: ir.Graph, counts: dict[str, int]) -> None:
    # Readers come before what they read.
    for node in reversed(graph):
        if all(bodies.unread(value) for value in node.outputs):
            _detach(node)
            graph.remove(node)
            counts["dead node removed"] += 1
            continue
        kept, dropped = bodies.drop_unread(node)
        counts["unread output dropped"] += dropped + _drop_optional(kept)
        for body in edit.subgraphs(kept):
            _nodes(body, counts)


def _detach(node: ir.Node) -> None:
    """Let a node, and all that its bodies hold, read nothing any more."""
    for i in range(len(node.inputs)):
        node.replace_input_with(i, None)
    for body in edit.subgraphs(node):
        for inner in body:
            _detach(inner)


_OPTIONAL_FROM = {
    "BatchNormalization": 1, "Dropout": 1, "GRU": 0, "GroupNormalization": 1, "LSTM": 0, "LayerNormalization": 1,
    "MaxPool": 1, "RNN": 0,
}  # fmt: skip
"""The first output that may be left out, of the operators that have such."""


def _drop_optional(node: ir.Node) -> int:
    """Leave out the optional outputs of a node that nobody reads; returns how many."""
    first = _OPTIONAL_FROM.get(node.op_type)
    if first is None or node.domain not in ("", "ai.onnx"):
        return 0
    if node.op_type == "BatchNormalization" and (len(node.outputs) > 3 or edit.attribute(node, "training_mode", 0)):
        # Before opset 14 the number of outputs says whether it trains.
        return 0
    unread = [value for value in node.outputs[first:] if bodies.unread(value) and value.name]
    for value in unread:
        value.name = ""
    keep = len(node.outputs)
    while keep > max(first, 1) and not node.outputs[keep - 1].name:
        keep -= 1
    node.resize_outputs(keep)
    return len(unread)


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
