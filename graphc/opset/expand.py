"""Replaces operators by what their definition says they compute: the function body that ONNX gives for many."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx.inliner
import onnx_ir as ir

from graphc import edit

LARGEST = 64
"""Elements of a constant up to which an operator's definition may look at its value."""


def expand(model: ir.Model, wanted: Callable[[ir.Node], bool]) -> dict[str, int]:
    """Replace nodes by the function bodies of their operators, again and again, in place.

    Args:
        model: Dtypes and shapes should be known, since some definitions depend on them.
        wanted: Whether a node shall be replaced; nodes without a function body stay.

    Returns:
        How many nodes of each operator were replaced.
    """
    counts: dict[str, int] = {}
    names = edit.Names(model)
    for graph in list(edit.graphs(model)):
        waiting = list(graph)
        while waiting:
            node = waiting.pop()
            if not wanted(node) or (body := _body(model, node)) is None:
                continue
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
            waiting += _splice(graph, node, body, names)
    return counts


def expandable(model: ir.Model, node: ir.Node) -> bool:
    """Whether the operator of a node has a function body for the opset of the model."""
    schema = _schema(model, node)
    return schema is not None and bool(schema.has_function or schema.has_context_dependent_function)


def _schema(model: ir.Model, node: ir.Node) -> onnx.defs.OpSchema | None:
    domain = "" if node.domain == "ai.onnx" else node.domain
    try:
        return onnx.defs.get_schema(node.op_type, model.opset_imports.get(domain, 1), domain)
    except onnx.defs.SchemaError:
        return None


def _body(model: ir.Model, node: ir.Node) -> ir.Graph | None:
    """The graph that a node stands for, with the node's inputs and outputs; None if its operator has none."""
    if not expandable(model, node):
        return None
    inputs = dict.fromkeys(value for value in node.inputs if value is not None)
    copies = {value: ir.Value(name=f"i{i}", type=value.type, shape=value.shape) for i, value in enumerate(inputs)}
    constants = []
    for value, copy in copies.items():
        held = edit.tensor(value)
        if held is not None and held.size <= LARGEST:
            copy.const_value = ir.tensor(held.numpy(), name=copy.name)
            constants.append(copy)
    alone = ir.Node(
        node.domain,
        node.op_type,
        [None if value is None else copies[value] for value in node.inputs],
        _attributes(model, node),
        outputs=[
            ir.Value(name=f"o{i}" if value.name else "", type=value.type, shape=value.shape)
            for i, value in enumerate(node.outputs)
        ],
    )
    free = [copy for copy in copies.values() if copy not in constants]
    graph = ir.Graph(
        free,
        [value for value in alone.outputs if value.name],
        nodes=[alone],
        initializers=constants,
        opset_imports=dict(model.opset_imports),
        name="node",
    )
    whole = ir.to_proto(ir.Model(graph, ir_version=model.ir_version))
    try:
        inlined = onnx.inliner.inline_selected_functions(
            whole, [(node.domain, node.op_type)], inline_schema_functions=True
        )
    except (RuntimeError, ValueError):  # a definition that depends on a dtype or shape that is not known
        return None
    if len(inlined.graph.node) == 1 and inlined.graph.node[0].op_type == node.op_type:
        return None
    body: ir.Graph = ir.from_proto(inlined).graph
    for old, copy in copies.items():
        found = next((v for v in body.inputs if v.name == copy.name), body.initializers.get(copy.name or ""))
        if found is not None:
            found.replace_all_uses_with(old)
    return body


def _attributes(model: ir.Model, node: ir.Node) -> list[ir.Attr]:
    """The attributes of a node, with the defaults of its operator written out: bodies refer to them."""
    schema = _schema(model, node)
    assert schema is not None
    absent = {name: a for name, a in schema.attributes.items() if name not in node.attributes and a.default_value.name}
    return [*node.attributes.values(), *(ir.from_proto(a.default_value) for a in absent.values())]


def _splice(graph: ir.Graph, node: ir.Node, body: ir.Graph, names: edit.Names) -> list[ir.Node]:
    """Put the nodes of a body in the place of a node; returns them."""
    made = {value.name: value for inner in body for value in inner.outputs}
    results = [made.get(f"o{i}") if value.name else None for i, value in enumerate(node.outputs)]
    body.outputs.clear()
    inner = list(body)
    body.remove(inner)
    prefix = node.name or node.op_type
    for number, each in enumerate(inner):
        each.name = f"{prefix}/{each.op_type}_{number}"
        for value in each.outputs:
            value.name = names.fresh(f"{node.outputs[0].name}/{value.name}")
    graph.insert_after(node, inner)
    for old, new in zip(node.outputs, results, strict=True):
        if new is not None:
            if new.type is None:
                new.type, new.shape = old.type, old.shape
            edit.replace(old, new)
    graph.remove(node, safe=True)
    return inner
