"""Facts through the bodies of If, Loop and Scan.

What a body is given is believed only as far as it holds in every iteration: a carried tensor keeps its dtype,
and its shape only where the body is seen to return the same one.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphc.edit import attribute
from graphc.shapes import Fact, Facts, merge, rule
from graphc.shapes.symbolic import Dim


def body_facts(graph: ir.Graph, inputs: Sequence[Fact], facts: Facts) -> list[Fact]:
    """Visit a body whose inputs have these facts, and return those of its outputs."""
    for value, fact in zip(graph.inputs, inputs, strict=True):
        facts[value] = fact
    facts.visit_graph(graph)
    return [facts(value) for value in graph.outputs]


@rule("If")
def _if(node: ir.Node, inputs: Sequence[Fact], facts: Facts) -> Sequence[Fact] | None:
    """An If gives what holds for both branches, or for the one that its constant condition takes."""
    then, other = (body_facts(attribute(node, name), (), facts) for name in ("then_branch", "else_branch"))
    if len(then) != len(node.outputs) or len(other) != len(node.outputs):
        return None
    condition = inputs[0].known
    if condition is not None and len(condition) == 1:
        return then if condition[0] else other
    return [merge(facts, a, b) for a, b in zip(then, other, strict=True)]


def _invariant(
    body: ir.Graph, given: Sequence[Fact], first: int, carried: int, returned: int, facts: Facts
) -> list[Fact]:
    """Facts of a body's outputs that hold in every iteration.

    Output ``returned + i`` becomes input ``first + i``, of ``carried`` many, in the next iteration. Assumes the
    shapes of the first iteration, and weakens what the body does not preserve until it preserves the rest.
    """
    given = list(given)
    any_size: set[Dim] = set()
    while True:
        outputs = body_facts(body, given, facts)
        changed = False
        for i in range(carried):
            before, after = given[first + i].shape, outputs[returned + i].shape
            if before is None:
                continue
            shape = None
            if after is not None and len(after) == len(before):
                shape = tuple(
                    old if old == new or old in any_size else facts.fresh()
                    for old, new in zip(before, after, strict=True)
                )
                any_size.update(new for new, old in zip(shape, before, strict=True) if new != old)
            if shape != before:
                given[first + i] = Fact(given[first + i].dtype, shape)
                changed = True
        if not changed:
            return outputs


@rule("Loop")
def _loop(node: ir.Node, inputs: Sequence[Fact], facts: Facts) -> Sequence[Fact] | None:
    """A Loop: ``M, cond, carried... -> carried..., scanned...``.

    Its body: ``i, cond, carried... -> cond, carried..., scanned...``.
    """
    body: ir.Graph = attribute(node, "body")
    carried = len(node.inputs) - 2
    if len(body.inputs) != carried + 2 or len(body.outputs) != len(node.outputs) + 1:
        return None
    counters = [Fact(ir.DataType.INT64, ()), Fact(ir.DataType.BOOL, ())]
    start = [Fact(fact.dtype, fact.shape, None, fact.type) for fact in inputs[2:]]
    outputs = _invariant(body, counters + start, 2, carried, 1, facts)[1:]
    found = []
    for i, fact in enumerate(outputs):
        if i < carried:
            # Zero iterations return what was given.
            found.append(merge(facts, Fact(fact.dtype, fact.shape, None, fact.type), start[i]))
        else:
            found.append(
                Fact(
                    fact.dtype,
                    None if fact.shape is None else (facts.fresh(), *facts.freshen(len(fact.shape))),
                )
            )
    return found


@rule("Scan")
def _scan(node: ir.Node, inputs: Sequence[Fact], facts: Facts) -> Sequence[Fact] | None:
    """A Scan (opset 9 on): ``state..., scanned... -> state..., stacked...``; its body sees one slice of the scanned."""
    body: ir.Graph = attribute(node, "body")
    scanned = attribute(node, "num_scan_inputs", 0)
    carried = len(node.inputs) - scanned
    if facts.version < 9 or len(body.inputs) != len(node.inputs) or len(body.outputs) != len(node.outputs):
        return None
    axes = attribute(node, "scan_input_axes") or (0,) * scanned
    given = [Fact(fact.dtype, fact.shape) for fact in inputs[:carried]]
    length: Dim = facts.fresh()
    for fact, axis in zip(inputs[carried:], axes, strict=True):
        if fact.shape is None:
            given.append(Fact(fact.dtype))
            continue
        axis %= len(fact.shape)
        length = fact.shape[axis]
        given.append(Fact(fact.dtype, fact.shape[:axis] + fact.shape[axis + 1 :]))
    outputs = _invariant(body, given, 0, carried, 0, facts)
    out_axes = attribute(node, "scan_output_axes") or (0,) * (len(outputs) - carried)
    found = []
    for i, fact in enumerate(outputs):
        if i < carried:
            found.append(merge(facts, Fact(fact.dtype, fact.shape), given[i]))
        elif fact.shape is None:
            found.append(Fact(fact.dtype))
        else:
            axis = out_axes[i - carried] % (len(fact.shape) + 1)
            found.append(Fact(fact.dtype, (*fact.shape[:axis], length, *fact.shape[axis:])))
    return found
