"""Forms of several operators: what is written in a row, and how equal parts of it are written once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from graphc import edit
from graphc.recognition.graph import Graph
from graphc.shapes import Shape, emitted


@dataclass(frozen=True)
class Step:
    """One operator to be written.

    Attributes:
        operator: Its name.
        inputs: What it reads: values of the graph, constants that are in no graph yet, and what earlier steps give.
        outputs: What it gives: values whose place its outputs take, or such that later steps read.
        attributes: Its attributes.
        domain: Its domain.
    """

    operator: str
    inputs: tuple[ir.Value | None, ...]
    outputs: tuple[ir.Value, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    domain: str = ""


def between(name: str, like: ir.Value | ir.DataType, shape: Shape) -> ir.Value:
    """What one step gives and another one reads: of the dtype of ``like``."""
    dtype = like.dtype if isinstance(like, ir.Value) else like
    return ir.Value(name=name, type=ir.TensorType(dtype or ir.DataType.FLOAT), shape=emitted(shape))


def constant(name: str, held: ir.TensorProtocol) -> ir.Value:
    """A constant that is in no graph yet."""
    return ir.Value(name=name, type=ir.TensorType(held.dtype), shape=ir.Shape(held.shape.numpy()), const_value=held)


def ints(*numbers: int) -> ir.Value:
    """A vector of int64 that is in no graph yet."""
    return constant("graphc." + "_".join(map(str, numbers)), ir.tensor(list(numbers), dtype=ir.DataType.INT64))


def write(steps: Sequence[Step], before: ir.Node, replaced: set[ir.Value], graph: Graph) -> dict[ir.Value, ir.Value]:
    """Put steps in front of a node; what several places need alike is written once.

    Args:
        steps: In order.
        before: The node.
        replaced: The outputs of steps that take the place of values of the graph.
        graph: The graph.

    Returns:
        The new value for each of ``replaced``.
    """
    made: dict[ir.Value, ir.Value] = {}

    def read(value: ir.Value | None) -> ir.Value | None:
        if value is None:
            return None
        if value in made:
            return made[value]
        value = graph.made.get(("written", value), value)
        if value.graph is None and value.const_value is not None and value.producer() is None:
            return _held(value, before, graph)
        return value

    for step in steps:
        inputs = [read(value) for value in step.inputs]
        key = ("step", before.graph, step.operator, step.domain, *inputs, *sorted(step.attributes.items()))
        known = None if replaced & set(step.outputs) else graph.made.get(key)
        if known is not None:
            made[step.outputs[0]] = known
            continue
        node = ir.node(
            step.operator,
            inputs,
            dict(step.attributes),
            domain=step.domain,
            num_outputs=len(step.outputs),
            name=graph.fresh(f"{before.name}.{step.operator.lower()}"),
            metadata_props=dict(before.metadata_props),
        )
        before.prepend(node)
        for new, old in zip(node.outputs, step.outputs, strict=True):
            new.type, new.shape = old.type, old.shape
            new.name = graph.fresh(old.name or step.operator)
            made[old] = new
        if len(step.outputs) == 1 and not replaced & set(step.outputs):
            graph.made[key] = node.outputs[0]
    return {old: made[old] for old in replaced}


def _held(value: ir.Value, before: ir.Node, graph: Graph) -> ir.Value:
    """The initializer for a constant; small ones are made once."""
    held = value.const_value
    assert held is not None
    if held.size <= edit.SMALL:
        return graph.array(before, held.numpy(), value.name or "graphc.constant")
    key = ("held", value)
    if key not in graph.made:
        graph.made[key] = graph.constant(before, held, value.name or "graphc.constant")
    return graph.made[key]
