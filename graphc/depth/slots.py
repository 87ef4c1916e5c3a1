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
    read = {value: len(value.uses()) for value in graph.inputs}
    for branch in branches:
        _cut(branch)
    gone = {id(out) for branch in branches for out in branch.exits}
    names = [out.name or "" for out in graph.outputs if id(out) in gone]
    kept = [out for out in graph.outputs if id(out) not in gone]
    graph.outputs.clear()
    graph.outputs.extend(kept)
    RemoveUnusedNodesPass()(model)
    less = [v for v in graph.inputs if len(v.uses()) < read[v] and not v.is_graph_output()]
    for value in less:
        _size_from_another(value, [v for v in graph.inputs if v not in less])
        if not value.uses():
            names.append(value.name or "")
            graph.inputs.remove(value)
    if names:
        shrunk(model, _renumber(model, names))
    return names


def _cut(branch: Branch) -> None:
    """Let sums be without a branch; where one is an output of the model and cannot, its zeros stay."""
    for use in list(branch.value.uses()):
        rest = [v for v in use.node.inputs if v is not branch.value]
        if len(rest) == 1 and rest[0] is not None and edit.is_op(use.node, "Add", "Sum"):
            edit.replace(use.node.outputs[0], rest[0])


def _size_from_another(value: ir.Value, others: Sequence[ir.Value]) -> None:
    """Where only the sizes of a cache are still read, read those of another layer's."""
    if not all(edit.is_op(use.node, "Shape") for use in value.uses()) or value.shape is None:
        return
    for other in others:
        if other.type == value.type and other.shape == value.shape and len(value.shape) > 2:
            for use in list(value.uses()):
                use.node.replace_input_with(0, other)
            return


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
