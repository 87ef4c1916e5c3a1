"""Branches that compute nothing: an operand that is the same constant for every input is not worth computing.

A residual branch whose output is all zero disappears from its Add: that is how depth pruning is made exact.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graphc import edit
from graphc.contract import PassResult
from graphc.known import Facet, Knowledge

ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "PRelu", "Sum"})
"""Operators at which an operand may be replaced by a constant that broadcasts to it."""


def remove(model: ir.Model, known: Knowledge, result: PassResult) -> bool:
    """Replace computed operands of elementwise operators that are constant for every input; drop what added zero.

    Returns:
        Whether the model changed; what is known of it must then be found anew.
    """
    names = edit.Names(model)
    changed = 0
    for node in model.graph:
        if not edit.is_op(node, *ELEMENTWISE):
            continue
        for index, value in enumerate(node.inputs):
            held = edit.tensor(value)
            if value is None or len(node.inputs) < 2 or (held is not None and held.size > edit.SMALL):
                continue
            facet = _whole(value, known)
            if facet is None or not _others_span(node, index, known):
                continue
            if not facet.any() and node.op_type in ("Add", "Sub", "Sum") and (node.op_type != "Sub" or index == 1):
                if _drop(node, index):
                    changed += 1
                    result.change("branch that adds zero removed")
                    break
            elif held is None and not _constant_branch(value):
                dtype = known.facts(value).dtype
                assert dtype is not None
                name = names.fresh(f"{value.name}.constant")
                node.replace_input_with(index, edit.initializer(model.graph, facet.astype(dtype.numpy()), name))
                changed += 1
                result.change("branch that computes a constant replaced")
    if changed:
        RemoveUnusedNodesPass()(model)
    return bool(changed)


def _whole(value: ir.Value, known: Knowledge) -> Facet | None:
    """What a floating-point value always is, if that is known altogether."""
    dtype = known.facts(value).dtype
    if dtype is None or not dtype.is_floating_point():
        return None
    return next((f for f in known(value) if np.isfinite(f).all()), None)


def _constant_branch(value: ir.Value) -> bool:
    """Whether a value is made of constants alone: folding it is simplify's work."""
    seen: set[ir.Value] = set()
    todo = [value]
    while todo:
        each = todo.pop()
        if each in seen or edit.tensor(each) is not None:
            continue
        seen.add(each)
        producer = each.producer()
        if producer is None:
            return False
        todo += [v for v in producer.inputs if v is not None]
        if len(seen) > 64:
            return False
    return True


def _others_span(node: ir.Node, index: int, known: Knowledge) -> bool:
    """Whether the other operands alone have the shape and dtype of the result."""
    result = known.facts(node.outputs[0])
    others = [known.facts(v) for i, v in enumerate(node.inputs) if i != index]
    return result.shape is not None and any(o.shape == result.shape and o.dtype == result.dtype for o in others)


def _drop(node: ir.Node, index: int) -> bool:
    """Take a zero operand out of a sum."""
    rest = [v for i, v in enumerate(node.inputs) if i != index]
    if len(rest) == 1:
        return rest[0] is not None and edit.replace(node.outputs[0], rest[0])
    graph = node.graph
    assert graph is not None
    out = node.outputs[0]
    fewer = ir.Node("", node.op_type, rest, num_outputs=1, name=node.name)
    fewer.outputs[0].type, fewer.outputs[0].shape = out.type, out.shape
    fewer.outputs[0].name = f"{out.name}.rest"
    graph.insert_after(node, fewer)
    return edit.replace(out, fewer.outputs[0])
