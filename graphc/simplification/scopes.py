"""Brings a model into the form that the rewrites rely on: sorted, and every name meaning one value."""

from __future__ import annotations

import onnx_ir as ir

from graphc import edit


def prepare(model: ir.Model) -> None:
    """Sort the graphs if they are not, make outer values returned by a body visible, and undo shadowing."""
    if not _sorted(model.graph, set()):
        model.graph.sort()
    names = edit.Names(model)
    _resolve(model.graph, {}, set(), names)


def _sorted(graph: ir.Graph, known: set[ir.Value]) -> bool:
    """Whether every node comes after those it reads from; ``known`` collects what has been computed."""
    known.update(graph.inputs, graph.initializers.values())
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in known and value.producer() is not None:
                return False
        if not all(_sorted(body, known) for body in edit.subgraphs(node)):
            return False
        known.update(node.outputs)
    return True


def _resolve(graph: ir.Graph, outer: dict[str, ir.Value], seen: set[str], names: edit.Names) -> None:
    """Rename what a body calls by a name that the model uses elsewhere, and read outer values that it returns."""
    own = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    here: dict[str, ir.Value] = {}
    for value in own:
        if not value.name or here.get(value.name) is value:
            continue
        if value.name in seen:
            value.name = names.fresh(value.name)
        seen.add(value.name)
        here[value.name] = value
    for i, value in enumerate(graph.outputs):
        if value.name and here.get(value.name) is not value and value.name in outer:
            # onnx_ir reads a body's output that is an outer value as a value of its own: tie them together.
            made = ir.Value(name=names.fresh(f"{value.name}_returned"), type=value.type, shape=value.shape)
            graph.append(ir.Node("", "Identity", [outer[value.name]], outputs=[made]))
            graph.outputs[i] = made
    inner = [body for node in graph for body in edit.subgraphs(node)]
    scope = {**outer, **here} if inner else {}
    for body in inner:
        _resolve(body, scope, seen, names)
