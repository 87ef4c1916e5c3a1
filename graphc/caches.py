"""The caches of a decoder: which output continues which input, and whether both can be one buffer."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from graphc import edit

_CONTRIB = "com.microsoft"
_PLACES = {
    ("", "Attention"): ((4, 1), (5, 2)),
    (_CONTRIB, "GroupQueryAttention"): ((3, 1), (4, 2)),
    (_CONTRIB, "MultiHeadAttention"): ((6, 1), (7, 2)),
}
"""At which input the past is, and at which output the present."""


def pairs(model: ir.Model) -> dict[str, str]:
    """The output that each cache becomes, by the name of the input."""
    return {str(past.name): str(present.name) for past, present, _ in _pairs(model.graph)}


def in_place(model: ir.Model) -> bool:
    """Whether every cache may be a buffer that is longer than what it holds, and is appended to where it lies.

    ONNX Runtime's GroupQueryAttention does that where past and present are bound to the same buffer; nothing else may
    read the past, whose length would be that of the buffer.
    """
    found = list(_pairs(model.graph))
    readers = {use.node for past, _, _ in found for use in past.uses()}
    return bool(found) and all(edit.is_op(node, "GroupQueryAttention", domain=_CONTRIB) for node in readers)


def _pairs(graph: ir.Graph) -> Iterator[tuple[ir.Value, ir.Value, ir.Node]]:
    for node in graph:
        places: tuple[tuple[int, int], ...] = _PLACES.get((node.domain.replace("ai.onnx", ""), node.op_type), ())
        if edit.is_op(node, "Concat") and len(node.inputs) == 2 and edit.attribute(node, "axis", 0) in (2, -2):
            places = ((0, 0),)
        for before, after in places:
            if before >= len(node.inputs) or after >= len(node.outputs):
                continue
            past, present = node.inputs[before], node.outputs[after]
            if past is not None and past.is_graph_input() and present.is_graph_output():
                yield past, present, node
