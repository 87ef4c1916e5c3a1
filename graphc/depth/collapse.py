"""LaCo (2024): several blocks become one, whose weights are the first block's plus what the others differ by.

In the paper ``w + sum of (w_k - w)`` over the blocks that follow. The released notebook updates ``w`` while it
adds, so that the sum telescopes to the last block's weights, with the first block's norms; both readings are here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes import cut
from graphc.depth.structure import Block


def pairs(first: Block, others: Sequence[Block]) -> tuple[list[tuple[ir.Value, ir.Node, list[ir.Value]]], str]:
    """The constants of a block with their counterparts in others, found by their places in equal branches.

    Returns:
        For each floating-point constant that only its block reads: it, its reader, and its counterparts. Or nothing
        and why the blocks do not match.
    """
    found: dict[ir.Value, tuple[ir.Value, ir.Node, list[ir.Value]]] = {}
    own = set(first.constants)
    rows = [[branch.nodes for branch in block.branches] for block in (first, *others)]
    for branches in zip(*rows, strict=False):
        if any(len(nodes) != len(branches[0]) for nodes in branches):
            return [], "its blocks are not built alike"
        for nodes in zip(*branches, strict=True):
            if any(node.op_type != nodes[0].op_type or len(node.inputs) != len(nodes[0].inputs) for node in nodes):
                return [], "its blocks are not built alike"
            for values in zip(*(node.inputs for node in nodes), strict=True):
                held = edit.tensor(values[0])
                if held is None or values[0] is None or values[0] not in own or not held.dtype.is_floating_point():
                    continue
                tensors = [edit.tensor(v) for v in values]
                if any(t is None or t.shape != held.shape for t in tensors):
                    return [], "its blocks have weights of different shapes"
                found[values[0]] = (values[0], nodes[0], [v for v in values[1:] if v is not None])
    if any(len(row) != len(rows[0]) for row in rows):
        return [], "its blocks have different numbers of branches"
    return list(found.values()), "" if found else "it has no weights of its own"


def merge(model: ir.Model, first: Block, others: Sequence[Block], how: str) -> str:
    """Write the merged weights into ``first``; the others stay as they are.

    Args:
        model: The model.
        first: The block that stays.
        others: The blocks that are merged into it, which match it.
        how: "sum" as in the paper, or "last" as in the released code.

    Returns:
        Why it cannot be done; nothing then changed.
    """
    matched, why = pairs(first, others)
    if why:
        return why
    names = edit.Names(model)
    for value, reader, rest in matched:
        tensors = [t for v in (value, *rest) if (t := edit.tensor(v)) is not None]
        if how == "last" and len(tensors[0].shape) < 2:
            continue
        held = tensors[0]
        make = partial(_merged, tensors, how)
        lazy = ir.LazyTensor(make, dtype=held.dtype, shape=ir.Shape(held.shape.numpy()), name=held.name, cache=False)
        cut.write(value, lazy, reader=reader, names=names)
    return ""


def _merged(tensors: Sequence[ir.TensorProtocol], how: str) -> ir.TensorProtocol:
    first = tensors[0]
    total = tensors[-1].numpy().astype(np.float64)
    if how == "sum":
        base = first.numpy().astype(np.float64)
        total = base.copy()
        for other in tensors[1:]:
            total += other.numpy() - base
            edit.release(other)
    edit.release(first)
    return ir.Tensor(np.ascontiguousarray(total.astype(first.dtype.numpy())), dtype=first.dtype, name=first.name)
