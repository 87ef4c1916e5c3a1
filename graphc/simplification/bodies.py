"""Outputs of If and Loop that nobody reads, and states of a Loop that never change, are not carried along."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from graphc import edit
from graphc.edit import attribute, is_op


def unread(value: ir.Value) -> bool:
    """Whether nothing depends on a value."""
    return not value.is_graph_output() and not value.uses()


def drop_unread(node: ir.Node) -> tuple[ir.Node, int]:
    """Drop the outputs of an If or a Loop that nobody reads; the node that stands there now, and how many went."""
    if is_op(node, "If"):
        gone = [i for i, value in enumerate(node.outputs) if unread(value)]
        for branch in edit.subgraphs(node) if gone else ():
            _delete(branch.outputs, gone)
    elif is_op(node, "Loop"):
        gone = _drop_from_loop(node)
    else:
        return node, 0
    return (_without(node, gone), len(gone)) if gone else (node, 0)


def _drop_from_loop(node: ir.Node) -> list[int]:
    body: ir.Graph = attribute(node, "body")
    carried = len(node.inputs) - 2
    states = []
    for i in range(carried):
        inside, returned, given = body.inputs[2 + i], body.outputs[1 + i], node.inputs[2 + i]
        if given is None:
            continue
        if _is_unchanged(inside, returned):
            if not node.outputs[i].is_graph_output():
                node.outputs[i].replace_all_uses_with(given)
            if unread(node.outputs[i]):
                states.append(i)
        elif unread(node.outputs[i]) and not inside.uses() and not inside.is_graph_output():
            states.append(i)
    stacked = [i for i in range(carried, len(node.outputs)) if unread(node.outputs[i])]
    _delete(body.outputs, [1 + i for i in (*states, *stacked)])
    for i in states:
        given = node.inputs[2 + i]
        assert given is not None
        body.inputs[2 + i].replace_all_uses_with(given)
    _delete(body.inputs, [2 + i for i in states])
    kept = [value for i, value in enumerate(node.inputs) if i - 2 not in states]
    for i, value in enumerate(kept):
        node.replace_input_with(i, value)
    node.resize_inputs(len(kept))
    return [*states, *stacked]


def _is_unchanged(inside: ir.Value, returned: ir.Value) -> bool:
    producer = returned.producer()
    return returned is inside or (is_op(producer, "Identity") and producer is not None and producer.inputs[0] is inside)


def _delete(values: Sequence[ir.Value], gone: Collection[int]) -> None:
    kept = [value for i, value in enumerate(values) if i not in gone]
    values.clear()  # type: ignore[attr-defined]
    values.extend(kept)  # type: ignore[attr-defined]


def _without(node: ir.Node, gone: Collection[int]) -> ir.Node:
    """The node without some of its outputs, in its place."""
    assert node.graph is not None
    kept = [value for i, value in enumerate(node.outputs) if i not in gone]
    outputs = [
        ir.Value(type=value.type, shape=value.shape, metadata_props=dict(value.metadata_props)) for value in kept
    ]
    names = [value.name for value in kept]
    inputs = list(node.inputs)
    made = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(node.attributes.values()),
        outputs=outputs,
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )
    for old, new, name in zip(kept, outputs, names, strict=True):
        old.name = f"{name}.before"
        new.name = name
    graph = node.graph
    graph.insert_after(node, made)
    for old, new in zip(kept, outputs, strict=True):
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    for i in range(len(inputs)):
        node.replace_input_with(i, None)
    graph.remove(node)
    return made
