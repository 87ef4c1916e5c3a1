"""A site as two models to be timed: what stands there, and what may take its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import onnx_ir as ir

from graphc import edit
from graphc.lowering.site import DOMAIN, Site
from graphc.lowering.steps import Step
from graphc.recognition.graph import Graph
from graphc.shapes import Shape

_COLD = 48 << 20
"""Bytes of weights that both models read in turns at least: in a network, no cache still holds them."""

_SMALL = 1 << 18
"""Bytes of weights up to which a cache holds them anyway."""

_MOST = 16
"""Copies of a site with weights at most."""

_MANY = 8
"""Copies of a site that shares inputs with others."""


def copies(site: Site) -> int:
    """How many copies of a site are timed together, with inputs of their own but for those that all share."""
    return _MANY if site.common else 1


def copied(name: str | None, number: int) -> str:
    """The name that a value has in a copy of a site."""
    return f"{name}.{number}" if number and name else name or ""


def models(
    site: Site, graph: Graph, cases: Sequence[Callable[[ir.Value], Sequence[int]]]
) -> tuple[ir.Model, ir.Model, list[dict[str, tuple[int, ...]]]]:
    """The standard operators of a site, and what may take their place, as two models with the same inputs.

    Args:
        site: The place. One with weights is written several times, each with weights of its own, and so is one that
            shares inputs with others (see ``copies``).
        graph: The graph that it is in.
        cases: Each gives the shape of each value to time it with.

    Returns:
        Both models, and the shape of each input in each case, by name (see ``copied``); sizes that the graph leaves
        open are open there, too.
    """
    nodes = (*reversed(site.nodes), *([site.reader] if site.reader is not None else []))
    standard = [Step(n.op_type, tuple(n.inputs), tuple(n.outputs), dict(n.attributes), n.domain) for n in nodes]
    kept = standard[len(site.nodes) :]
    # An output that nobody reads is a value without a name.
    outputs = tuple(v if v is not None else ir.Value(name="") for v in site.outputs)
    steps = site.steps or (Step(site.operator, site.inputs, outputs, site.attributes, site.domain),)
    made = {v for step in standard for v in step.outputs}
    outer = list(dict.fromkeys(v for step in standard for v in step.inputs if v is not None and v not in made))
    wanted = [v for v in (site.outputs if site.reader is None else site.reader.outputs) if v is not None]
    sizes = [{value: tuple(shape(value)) for value in outer} for shape in cases]
    feeds = sizes[0]
    held = {value: tensor for value in outer if (tensor := edit.tensor(value)) and tuple(tensor.shape) == feeds[value]}
    feeds = {value: own for value, own in feeds.items() if value not in held}
    size = sum(tensor.nbytes for tensor in held.values())
    times = min(_MOST, -(-_COLD // size)) if size > _SMALL else copies(site)
    own = [value for value in feeds if site.common and value not in site.common]

    def build(written: Sequence[Step]) -> ir.Model:
        inputs = {value: _input(value, shape, graph) for value, shape in feeds.items()}
        several = list(inputs.values())
        once = {value: inputs[value] for value in feeds if value not in own}
        constants: list[ir.Value] = []
        results: list[ir.Value] = []
        ops: list[ir.Node] = []
        for number in range(times):
            known = {**inputs, **once}
            if number:
                known |= {value: _input(value, feeds[value], graph, number) for value in own}
                several += [known[value] for value in own]
            for value, tensor in [*held.items(), *_new(written)]:
                if value not in known:
                    known[value] = _constant(f"{value.name}.{number}", tensor)
                    constants.append(known[value])
            for step in written:
                if all(value in once for value in step.outputs):
                    continue
                read = [None if v is None else known[v] for v in step.inputs]
                node = ir.node(step.operator, read, step.attributes, domain=step.domain, num_outputs=len(step.outputs))
                for new, old in zip(node.outputs, step.outputs, strict=True):
                    new.name = copied(old.name, number)
                    known[old] = new
                ops.append(node)
                if site.common and all(v is None or v in once or v.const_value is not None for v in step.inputs):
                    once |= {old: known[old] for old in step.outputs}
            for value in wanted:
                known[value].type = ir.TensorType(graph.dtype(value) or ir.DataType.FLOAT)
                results.append(known[value])
        body = ir.Graph(
            several,
            results,
            nodes=ops,
            initializers=constants,
            opset_imports={"": graph.version, DOMAIN: 1},
            name="probe",
        )
        return ir.Model(body, ir_version=10)

    named = [
        {copied(value.name, n): each[value] for n in range(times) for value in (own if n else feeds)} for each in sizes
    ]
    return build(standard), build([*steps, *kept]), named


def _new(written: Sequence[Step]) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Constants that steps read and that are in no graph."""
    for value in dict.fromkeys(v for step in written for v in step.inputs if v is not None):
        if value.graph is None and value.const_value is not None:
            yield value, value.const_value


def _constant(name: str, held: ir.TensorProtocol) -> ir.Value:
    shape = ir.Shape(held.shape.numpy())
    return ir.Value(name=name, type=ir.TensorType(held.dtype), shape=shape, const_value=held)


def _input(value: ir.Value, own: Sequence[int], graph: Graph, number: int = 0) -> ir.Value:
    """An input of a model to be timed: its sizes are numbers where the graph has them."""
    known: Shape | None = graph.dims(value)
    if known is None or len(known) != len(own):
        known = None
    sizes = [size if known is not None and isinstance(known[i], int) else None for i, size in enumerate(own)]
    kind = ir.TensorType(graph.dtype(value) or ir.DataType.FLOAT)
    return ir.Value(name=copied(value.name, number), type=kind, shape=ir.Shape(sizes))
