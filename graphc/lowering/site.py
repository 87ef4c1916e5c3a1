"""Where a form fits, and how it is written in the place of other operators."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from graphc import edit
from graphc.lowering import steps as several
from graphc.lowering.steps import Step
from graphc.recognition.graph import Graph

DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class Site:
    """A place where a form fits.

    Attributes:
        form: The name of the form.
        operator: The operator that takes their place.
        nodes: The standard operators, the last one first.
        inputs: What the operator reads, None for what is left out.
        outputs: Which value each of its outputs becomes, None for one that nobody reads.
        attributes: Its attributes.
        domain: Of the operator.
        reader: A node that reads its first output and stays; it is timed with it.
        typical: The sizes to time it with, the last axes of each value, where the model's own do not matter.
        steps: The operators that take their place, where they are several; ``operator`` is then the main one.
        common: The inputs that many such places share. What depends on nothing else is computed once for all of them,
            and timed so.
        known: Whether it is known to be faster, and not timed.
    """

    form: str
    operator: str
    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value | None, ...]
    outputs: tuple[ir.Value | None, ...]
    attributes: dict[str, Any]
    domain: str = DOMAIN
    reader: ir.Node | None = None
    typical: tuple[int, ...] = ()
    steps: tuple[Step, ...] = ()
    common: tuple[ir.Value, ...] = ()
    known: bool = False


def write(site: Site, graph: Graph) -> None:
    """Put the operator in the place of the standard ones."""
    if site.steps:
        _write_steps(site, graph)
        return
    last = site.nodes[0]
    # What an earlier site gave may have a new producer by now.
    inputs = [graph.made.get(("written", v), v) if v is not None else None for v in site.inputs]
    made = ir.node(
        site.operator,
        inputs,
        dict(site.attributes),
        domain=site.domain,
        num_outputs=len(site.outputs),
        name=last.name,
        metadata_props=dict(last.metadata_props),
    )
    # In front of the first reader of what it gives: a sum may be read before it is normalised.
    last_input = site.nodes[-1]
    last_input.append(made)
    for new, old in zip(made.outputs, site.outputs, strict=True):
        if old is None:
            new.name = ""
            continue
        new.type, new.shape = old.type, old.shape
        _take_place(new, old, {*site.nodes, made}, graph)
    _remove(site, graph)


def _write_steps(site: Site, graph: Graph) -> None:
    """Put operators in a row in the place of the standard ones."""
    replaced = {v for v in site.outputs if v is not None}
    # All that they read is there before the first node that gives one of their results.
    first = next(n for n in reversed(site.nodes) if replaced & set(n.outputs))
    made = several.write(site.steps, first, replaced, graph)
    inside = {*site.nodes, *(v.producer() for v in made.values())}
    for old in site.outputs:
        if old is not None:
            _take_place(made[old], old, inside, graph)
    _remove(site, graph)


def _take_place(new: ir.Value, old: ir.Value, inside: Collection[ir.Node | None], graph: Graph) -> None:
    """Let everyone but the nodes ``inside`` read a new value in the place of an old one, under its name."""
    name, public, declared = old.name, old.is_graph_output(), (old.type, old.shape)
    if public:
        edit.replace(old, new)
    else:
        for use in [u for u in old.uses() if u.node not in inside]:
            use.node.replace_input_with(use.idx, new)
        old.name, new.name = graph.fresh(f"{name}.replaced"), name
    graph.made["written", old] = new
    graph.note(new, old, graph.dims(old))
    if public:
        new.type, new.shape = declared


def _remove(site: Site, graph: Graph) -> None:
    graph.sweep([v for n in site.nodes for v in n.outputs])
    for node in site.nodes:
        if node.graph is not None and not any(v.uses() or v.is_graph_output() for v in node.outputs):
            graph.drop(node)
