"""The caches of a decoder: which output continues which input, and whether both can be one buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.contract import Arrays

_CONTRIB = "com.microsoft"
_PLACES = {
    ("", "Attention"): ((4, 1), (5, 2)),
    (_CONTRIB, "GroupQueryAttention"): ((3, 1), (4, 2)),
    (_CONTRIB, "MultiHeadAttention"): ((6, 1), (7, 2)),
}
"""At which input the past is, and at which output the present."""


def pairs(model: ir.Model) -> dict[str, str]:
    """The output that each cache becomes, by the name of the input."""
    return {str(past.name): str(present.name) for past, present, _ in joins(model)}


ROUNDS = 2
"""Runs that fill a cache: the first still reads what was made up."""


def lived(known: Mapping[str, str], arrays: Arrays, run: Callable[[Arrays], Arrays]) -> Arrays:
    """Inputs whose caches hold what the model makes of these inputs, repeated, instead of what was made up for them.

    Args:
        known: See :func:`pairs`.
        arrays: Inputs, caches ``b h t d`` among them.
        run: Runs the model.
    """
    pasts = {name: arrays[name] for name in known if name in arrays}
    for _ in range(ROUNDS if pasts else 0):
        found, new = run(arrays), {}
        for name, past in pasts.items():
            length = past.shape[-2]
            made = found[known[name]][..., length:, :] if known[name] in found else past[..., :0, :]
            if not made.shape[-2]:
                return arrays
            new[name] = made.take(np.arange(length) % made.shape[-2], axis=-2)
            if new[name].shape != past.shape:
                return arrays
        arrays = {**arrays, **new}
    return arrays


def in_place(model: ir.Model) -> bool:
    """Whether every cache may be a buffer that is longer than what it holds, and is appended to where it lies.

    ONNX Runtime's GroupQueryAttention does that where past and present are bound to the same buffer; nothing else may
    read the past, whose length would be that of the buffer.
    """
    found = list(joins(model))
    readers = {use.node for past, _, _ in found for use in past.uses()}
    return bool(found) and all(edit.is_op(node, "GroupQueryAttention", domain=_CONTRIB) for node in readers)


def name_presents(model: ir.Model) -> None:
    """Let every Attention with a past give what it becomes, read or not: without, ONNX Runtime does not run it."""
    names = edit.Names(model)
    for node in edit.nodes(model):
        if edit.is_op(node, "Attention") and len(node.inputs) > 5 and node.inputs[4] is not None:
            node.resize_outputs(max(3, len(node.outputs)))
            for value in node.outputs[1:3]:
                value.name = value.name or names.fresh(f"{node.name}.present")


def joins(model: ir.Model) -> Iterator[tuple[ir.Value, ir.Value, ir.Node]]:
    """Each cache: the input, the output that it becomes, and the operator that joins what is new."""
    for node in model.graph:
        places: tuple[tuple[int, int], ...] = _PLACES.get((node.domain.replace("ai.onnx", ""), node.op_type), ())
        if edit.is_op(node, "Concat") and len(node.inputs) == 2 and edit.attribute(node, "axis", 0) in (2, -2):
            places = ((0, 0),)
        for before, after in places:
            if before >= len(node.inputs) or after >= len(node.outputs):
                continue
            past, present = node.inputs[before], node.outputs[after]
            if past is not None and past.is_graph_input() and present.is_graph_output():
                yield past, present, node
