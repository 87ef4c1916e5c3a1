"""Control flow and functions whose path is known: their bodies take the place of the node."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphc import edit, tiles
from graphc.edit import attribute
from graphc.shapes import Facts


def inline_if(node: ir.Node, facts: Facts, names: edit.Names) -> str | None:
    """Put the branch that a constant condition takes in the place of an If; the change made, or None."""
    condition = facts(node.inputs[0]).known
    if condition is None or len(condition) != 1:
        return None
    branch = attribute(node, "then_branch" if condition[0] else "else_branch")
    _splice(node, branch, list(branch.outputs))
    return "If with a constant condition inlined"


def inline_loop(node: ir.Node, facts: Facts, names: edit.Names) -> str | None:
    """Remove a Loop of no iterations, and unroll one of exactly one; the change made, or None."""
    trips, condition = facts(node.inputs[0]).known, facts(node.inputs[1]).known
    body: ir.Graph = attribute(node, "body")
    carried = len(node.inputs) - 2
    never = condition == (0,) or (trips is not None and len(trips) == 1 and trips[0] <= 0)
    if any(value is None for value in node.inputs[2:]):
        return None
    if never:
        if len(node.outputs) > carried:
            return None
        _replace_outputs(node, [value for value in node.inputs[2:] if value is not None])
        return "Loop without iterations removed"
    entered = node.inputs[1] is None or condition == (1,)
    if trips != (1,) or not entered or facts.version < 13:
        return None
    assert node.graph is not None
    stacked = list(body.outputs[1 + carried :])
    first = edit.initializer(node.graph, np.array(0, np.int64), names.fresh(f"{body.inputs[0].name}_first"))
    true = edit.initializer(node.graph, np.array(True), names.fresh(f"{body.inputs[1].name}_entered"))
    for value, given in zip(body.inputs, (first, true, *node.inputs[2:]), strict=True):
        assert given is not None
        _rebind(body, value, given)
    outputs = list(body.outputs[1 : 1 + carried])
    for value in stacked:
        axis = edit.initializer(node.graph, np.array([0], np.int64), names.fresh(f"{value.name}_axis"))
        unsqueeze = ir.Node("", "Unsqueeze", [value, axis], num_outputs=1)
        body.append(unsqueeze)
        outputs.append(unsqueeze.outputs[0])
    _splice(node, body, outputs)
    return "Loop with one iteration inlined"


def _rebind(body: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let a body read ``new`` where it reads its input ``old``."""
    for i, value in enumerate(body.outputs):
        if value is old:
            identity = ir.Node("", "Identity", [new], num_outputs=1)
            body.append(identity)
            body.outputs[i] = identity.outputs[0]
    old.replace_all_uses_with(new)


def _splice(node: ir.Node, body: ir.Graph, outputs: Sequence[ir.Value]) -> None:
    """Move the nodes and constants of a body behind ``node``, and let readers of the node read ``outputs``."""
    graph = node.graph
    assert graph is not None
    body.outputs.clear()
    body.inputs.clear()
    for value in list(body.initializers.values()):
        assert value.name is not None
        del body.initializers[value.name]
        graph.register_initializer(value)
    inner = list(body)
    body.remove(inner)
    graph.insert_after(node, inner)
    _replace_outputs(node, outputs, after=inner[-1] if inner else node)


def _replace_outputs(node: ir.Node, values: Sequence[ir.Value], after: ir.Node | None = None) -> None:
    """Let readers of a node read ``values``, through an Identity where a graph output must keep its name."""
    graph = node.graph
    assert graph is not None
    last = after or node
    taken: set[ir.Value] = set()
    for old, new in zip(node.outputs, values, strict=True):
        if not old.is_graph_output():
            old.replace_all_uses_with(new)
            continue
        inside = new.producer() is not None and new.producer().graph is graph  # type: ignore[union-attr]
        if not inside or new.is_graph_output() or new in taken:
            identity = ir.Node("", "Identity", [new], num_outputs=1)
            graph.insert_after(last, identity)
            last, new = identity, identity.outputs[0]
        taken.add(new)
        new.type, new.shape = old.type, old.shape
        edit.replace(old, new)
    edit.remove(node)


def inline_functions(model: ir.Model) -> int:
    """Replace every call of a local function by its body; returns how many functions there were.

    What puts a weight together from its tiles stays: targets read it.
    """
    from onnx_ir.passes.common import InlinePass

    count = sum(function.domain != tiles.DOMAIN for function in model.functions.values())
    if count:
        InlinePass(lambda function: function.domain != tiles.DOMAIN)(model)
    return count
