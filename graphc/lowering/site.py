"""Where a form fits: what is written in the place of which operators, and both as models to be timed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from graphc import edit
from graphc.lowering import steps as several
from graphc.lowering.steps import Step
from graphc.recognition.graph import Graph
from graphc.shapes import Shape

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
    name = old.name
    if old.is_graph_output():
        edit.replace(old, new)
    else:
        for use in [u for u in old.uses() if u.node not in inside]:
            use.node.replace_input_with(use.idx, new)
        old.name, new.name = graph.fresh(f"{name}.replaced"), name
    graph.made["written", old] = new
    graph.note(new, old, graph.dims(old))


def _remove(site: Site, graph: Graph) -> None:
    graph.sweep([v for n in site.nodes for v in n.outputs])
    for node in site.nodes:
        if node.graph is not None and not any(v.uses() or v.is_graph_output() for v in node.outputs):
            graph.drop(node)


_Written = tuple[str, str, Sequence[ir.Value | None], Sequence[ir.Value | None], dict[str, Any]]
"""Operator, domain, inputs, outputs, attributes."""


def models(
    site: Site, graph: Graph, shape: Callable[[ir.Value], Sequence[int]]
) -> tuple[ir.Model, ir.Model, dict[str, tuple[int, ...]]]:
    """The standard operators of a site, and what may take their place, as two models with the same inputs.

    Args:
        site: The place.
        graph: The graph that it is in.
        shape: Gives the shape of each value to time it with.

    Returns:
        Both models, and the shape of each input; sizes that the graph leaves open are open there, too.
    """
    nodes = (*reversed(site.nodes), *([site.reader] if site.reader is not None else []))
    made = {v for node in nodes for v in node.outputs}
    outer = list(dict.fromkeys(v for node in nodes for v in node.inputs if v is not None and v not in made))
    wanted = [v for v in (site.outputs if site.reader is None else site.reader.outputs) if v is not None]

    feeds: dict[str, tuple[int, ...]] = {}

    def build(written: Sequence[_Written]) -> ir.Model:
        copies: dict[ir.Value, ir.Value] = {}
        inputs: list[ir.Value] = []
        initializers: list[ir.Value] = []
        for value in outer:
            held, own = edit.tensor(value), tuple(shape(value))
            if held is not None and tuple(held.shape) != own:
                held = None
            copies[value] = ir.Value(
                name=value.name,
                type=ir.TensorType(graph.dtype(value) or ir.DataType.FLOAT),
                shape=ir.Shape(own),
                const_value=held,
            )
            if held is None:
                assert value.name is not None
                feeds[value.name] = own
                copies[value].shape = _open(own, graph.dims(value))
            (inputs if held is None else initializers).append(copies[value])
        for value in dict.fromkeys(v for _, _, reads, _, _ in written for v in reads if v is not None):
            if value.graph is None and value.const_value is not None and value not in copies:
                copies[value] = several.constant(f"constant.{len(copies)}", value.const_value)
                initializers.append(copies[value])
        nodes = []
        for operator, domain, reads, gives, attributes in written:
            read = [None if v is None else copies[v] for v in reads]
            node = ir.node(operator, read, attributes, domain=domain, num_outputs=len(gives))
            for new, old in zip(node.outputs, gives, strict=True):
                new.name = old.name if old is not None else ""
                if old is not None:
                    copies[old] = new
            nodes.append(node)
        for value in wanted:
            copies[value].type = ir.TensorType(graph.dtype(value) or ir.DataType.FLOAT)
        body = ir.Graph(
            inputs,
            [copies[v] for v in wanted],
            nodes=nodes,
            initializers=initializers,
            opset_imports={"": graph.version, DOMAIN: 1},
            name="probe",
        )
        return ir.Model(body, ir_version=10)

    standard: list[_Written] = [(n.op_type, n.domain, n.inputs, n.outputs, dict(n.attributes)) for n in nodes]
    kept = standard[len(site.nodes) :]
    steps = site.steps or (Step(site.operator, site.inputs, site.outputs, site.attributes, site.domain),)  # type: ignore[arg-type]
    other: list[_Written] = [(s.operator, s.domain, s.inputs, s.outputs, s.attributes) for s in steps]
    return build(standard), build([*other, *kept]), feeds


def _open(own: Sequence[int], known: Shape | None) -> ir.Shape:
    """The shape of an input: numbers where the graph has them."""
    if known is None or len(known) != len(own):
        return ir.Shape([None] * len(own))
    return ir.Shape([size if isinstance(dim, int) else None for size, dim in zip(own, known, strict=True)])
