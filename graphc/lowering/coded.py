"""Attention whose cache is in 8-bit codes, as ``quantize-cache`` writes it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphc import cache_codes, edit
from graphc.cache_codes import CHANNELS, HEADS
from graphc.edit import Array, is_op
from graphc.recognition.graph import Graph
from graphc.rewrites.base import Refused

_OTHERWISE = "the cache is in codes, and what is new is not rounded or joined as GroupQueryAttention does it"


@dataclass(frozen=True)
class Coded:
    """The keys or the values of an Attention.

    Attributes:
        new: What is new, as floats, ``b t (h d)``.
        past, present: The cache, as codes.
        scale: What codes are times, ``(1, heads, 1, channels)``.
        before, after: The nodes that make floats of codes, and those that join what is new to the past.
    """

    new: ir.Value
    past: ir.Value
    present: ir.Value
    scale: Array
    before: tuple[ir.Node, ...]
    after: tuple[ir.Node, ...]


def find(node: ir.Node, graph: Graph) -> tuple[Coded, Coded] | None:
    """The keys and values of an Attention with a past; None if their cache is not in codes.

    Raises:
        Refused: It is, but otherwise.
    """
    keys, values = (_find(node, slot, at, graph) for slot, at in ((1, 4), (2, 5)))
    if keys is None and values is None:
        return None
    if keys is None or values is None:
        raise Refused("GroupQueryAttention has keys and values both in codes")
    return keys, values


def _find(node: ir.Node, slot: int, at: int, graph: Graph) -> Coded | None:
    made, nodes = node.inputs[at], []
    while made is not None and is_op(made.producer(), "Mul", "DequantizeLinear"):
        nodes.append(producer := made.producer())
        made = producer.inputs[0] if producer is not None else None
    if made is None or not nodes or not made.is_graph_input() or made.dtype != ir.DataType.INT8:
        return None
    past, scale = made, cache_codes.scales(graph.model).get(str(made.name))
    dims = graph.dims(past) or ()
    back = node.inputs[slot].producer() if node.inputs[slot] is not None else None  # type: ignore[union-attr]
    codes = back.inputs[0] if is_op(back, "DequantizeLinear") and back is not None else None
    rounding = codes.producer() if codes is not None else None
    if scale is None or len(dims) != 4 or not is_op(rounding, "QuantizeLinear") or rounding is None or back is None:
        raise Refused(_OTHERWISE)
    heads, channels = dims[HEADS], dims[CHANNELS]
    if not isinstance(heads, int) or not isinstance(channels, int):
        raise Refused(_OTHERWISE)
    new, whole = rounding.inputs[0], np.broadcast_to(scale, (1, heads, 1, channels))
    same = all(_scale_is(each, whole) for each in (rounding, back))
    joined = _joined(codes, past, graph)
    if new is None or graph.rank(new) != 3 or not same or joined is None:
        raise Refused(_OTHERWISE)
    before = (*(each for each in reversed(nodes) if each is not None), rounding, back)
    return Coded(new, past, joined[-1].outputs[0], np.ascontiguousarray(whole), before, joined)


def _scale_is(node: ir.Node, whole: Array) -> bool:
    """Whether QuantizeLinear or DequantizeLinear has these scales along its last axis, and no zero points."""
    scale = edit.constant(node.inputs[1])
    zero = edit.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    last = edit.attribute(node, "axis", 1) in (2, -1)
    return scale is not None and last and np.array_equal(scale, whole.reshape(-1)) and (zero is None or not zero.any())


def _joined(codes: ir.Value | None, past: ir.Value, graph: Graph) -> tuple[ir.Node, ...] | None:
    """The nodes that lay codes ``b t (h d)`` out as ``b h t d`` and join them to the past."""
    assert codes is not None
    for reshape in codes.consumers():
        if not is_op(reshape, "Reshape"):
            continue
        dims, heads = graph.dims(reshape.outputs[0]) or (), list((graph.dims(past) or ())[HEADS::2])
        for after in reshape.outputs[0].consumers():
            if is_op(after, "Transpose") and edit.attribute(after, "perm") == (0, 2, 1, 3) and list(dims[2:]) == heads:
                row: tuple[ir.Node, ...] = (reshape, after)
            # Of one head, or of one token, nothing has to be turned.
            elif len(dims) == 4 and [dims[HEADS], dims[CHANNELS]] == heads and 1 in dims[1:3]:
                row = (reshape,)
            else:
                continue
            for join in row[-1].outputs[0].consumers():
                if is_op(join, "Concat") and list(join.inputs) == [past, row[-1].outputs[0]]:
                    return (*row, join)
    return None
