"""Indices that are never chosen: experts that no router picks."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array, attribute
from graphc.known.knowledge import Knowledge
from graphc.known.registry import operand
from graphc.moves import MOVES


def exclude(node: ir.Node, known: Knowledge) -> None:
    """Follow which experts a router never picks: those whose logits are minus infinity, while others suffice."""
    if node.domain not in ("", "ai.onnx") or not node.inputs or node.inputs[0] is None:
        return
    if node.op_type in ("Cast", *MOVES) and node.inputs[0] in known.never:
        for out in node.outputs:
            known.never[out] = known.never[node.inputs[0]]
    elif node.op_type == "Concat" and all(v in known.never for v in node.inputs):
        masks = [known.never[v] for v in node.inputs if v is not None]
        if all(len(m) == len(masks[0]) for m in masks):
            known.never[node.outputs[0]] = np.logical_and.reduce(masks)
    elif node.op_type in ("TopK", "ArgMax"):
        _exclude_by_rank(node, known)


def _exclude_by_rank(node: ir.Node, known: Knowledge) -> None:
    shape = known.shape(node.inputs[0])
    if shape is None:
        return
    axis = attribute(node, "axis", -1 if node.op_type == "TopK" else 0) % len(shape)
    count = edit.scalar(operand(node, 1)) if node.op_type == "TopK" else 1
    if not isinstance(shape[axis], int) or not isinstance(count, int) or not attribute(node, "largest", 1):
        return
    lowest = bottom(node.inputs[0], known)
    if lowest is None:
        return
    mask = lowest.all(axis=tuple(a for a in range(len(shape)) if a != axis)).reshape(-1)
    if mask.size == shape[axis] and mask.size - int(mask.sum()) >= count:
        known.never[node.outputs[1 if node.op_type == "TopK" else 0]] = mask


def bottom(value: ir.Value | None, known: Knowledge) -> Array | None:
    """Where a value is the least it can be: minus infinity, or 0 where it is a probability. None if nowhere."""
    least = 0.0 if _probability(value) else -np.inf
    result = None
    for facet in known(value):
        here = facet == least
        result = here if result is None else result | here
    return result


def _probability(value: ir.Value | None) -> bool:
    """Whether a value is a Softmax's or a Sigmoid's, of a finite input hence positive."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("Cast", *MOVES):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in ("Softmax", "Sigmoid")
