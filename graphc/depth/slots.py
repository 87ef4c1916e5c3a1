"""The caches of layers that go: their inputs and outputs leave the interface, and the others are counted anew."""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graphc import edit
from graphc.depth.residual import Branch

_NUMBER = re.compile(r"\d+")


def remove(model: ir.Model, branches: Sequence[Branch]) -> list[str]:
    """Take branches out of their sums, with the outputs and inputs of the model that nothing else needs.

    Returns:
        The names of the inputs and outputs that went.
    """
    from graphc.checking.interface import shrunk

    graph = model.graph
    for branch in branches:
        _cut(branch)
    gone = {id(out) for branch in branches for out in branch.exits}
    names = [out.name or "" for out in graph.outputs if id(out) in gone]
    kept = [out for out in graph.outputs if id(out) not in gone]
    graph.outputs.clear()
    graph.outputs.extend(kept)
    fed = {id(v) for v in graph.inputs if v.uses()}
    RemoveUnusedNodesPass()(model)
    unread = [v for v in graph.inputs if id(v) in fed and not v.uses() and not v.is_graph_output()]
    names += [v.name or "" for v in unread]
    for value in unread:
        graph.inputs.remove(value)
    shrunk(model, _renumber(model, names))
    return names


def _cut(branch: Branch) -> None:
    """Let the sum be without a branch."""
    node = branch.node
    rest = [v for v in node.inputs if v is not branch.value]
    graph = node.graph
    assert graph is not None
    if len(rest) == 1 and rest[0] is not None and edit.replace(node.outputs[0], rest[0]):
        return
    for i, value in enumerate(node.inputs):
        if value is branch.value:
            held = ir.Value(name=f"{value.name}.none")
            like = ir.Node("", "Sub", [branch.stream, branch.stream], outputs=[held], name=held.name)
            graph.insert_before(node, like)
            node.replace_input_with(i, held)


def _renumber(model: ir.Model, gone: Sequence[str]) -> dict[str, str]:
    """Close the gaps that are left in numbered names of inputs and outputs.

    Returns:
        The old name of each new one.
    """
    values = {v.name or "": v for v in (*model.graph.inputs, *model.graph.outputs)}
    old: dict[str, str] = {}
    done: set[tuple[str, str]] = set()
    for name in gone:
        for match in _NUMBER.finditer(name):
            around = name[: match.start()], name[match.end() :]
            left = {int(n): v for each, v in values.items() if (n := _number(each, *around))}
            missing = {int(n) for each in gone if (n := _number(each, *around))}
            every = sorted({*left, *missing})
            if around in done or not left or every != list(range(every[0], every[-1] + 1)):
                continue
            done.add(around)
            for new, number in enumerate(sorted(left), start=every[0]):
                if new != number:
                    left[number].name, was = f"{around[0]}{new}{around[1]}", left[number].name or ""
                    old[left[number].name or ""] = was
    return old


def _number(name: str, start: str, end: str) -> str:
    """The digits of a name between what it starts and ends with, if there is nothing else; or nothing."""
    if len(name) <= len(start) + len(end) or not name.startswith(start) or not name.endswith(end):
        return ""
    middle = name[len(start) : len(name) - len(end)]
    return middle if middle.isdigit() else ""
