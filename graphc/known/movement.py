"""Operators that move, pick or repeat elements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array, attribute
from graphc.known.facets import NOTHING, Facets, align, collapse, reshape, tidy
from graphc.known.knowledge import Knowledge
from graphc.known.registry import operand, rank_of, rule
from graphc.shapes.tensor_rules import slice_parameters, sliced


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    old, new = known.shape(node.inputs[0]), known.shape(node.outputs[0])
    assert old is not None and new is not None
    return [tidy(reshape(f, old, new) for f in known(node.inputs[0]))]


@rule("Transpose")
def _transpose(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    order = attribute(node, "perm", tuple(reversed(range(rank_of(node, known)))))
    return [tuple(f.transpose(order) for f in known(node.inputs[0]))]


@rule("ConstantOfShape")
def _constant_of_shape(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    held = attribute(node, "value")
    value = 0.0 if held is None else float(held.numpy().reshape(-1)[0])
    return [(np.full((1,) * rank_of(node, known), value),)]


@rule("Expand")
def _expand(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    rank = rank_of(node, known)
    return [tuple(align(f, rank) for f in known(node.inputs[0]))]


@rule("Tile")
def _tile(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    repeats = known.facts(node.inputs[1]).known
    if repeats is None:
        return ()
    return [
        tuple(
            np.tile(f, [r if n > 1 else 1 for r, n in zip(repeats, f.shape, strict=True)])
            for f in known(node.inputs[0])
        )
    ]


@rule("Concat")
def _concat(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    rank = rank_of(node, known)
    axis = attribute(node, "axis", 0) % rank
    shapes = [known.shape(v) for v in node.inputs]
    parts = []
    for value, shape in zip(node.inputs, shapes, strict=True):
        assert shape is not None
        found = known(value)
        facet = found[0] if found else np.full((1,) * rank, np.nan)
        if not isinstance(shape[axis], int):
            return [NOTHING]
        if facet.shape[axis] == 1:
            facet = np.repeat(facet, int(shape[axis]), axis)
        parts.append(facet)
    full = np.broadcast_shapes(*((*p.shape[:axis], 1, *p.shape[axis + 1 :]) for p in parts))
    spread = [np.broadcast_to(p, (*full[:axis], p.shape[axis], *full[axis + 1 :])) for p in parts]
    return [tidy([np.concatenate(spread, axis)])]


@rule("Split")
def _split(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    axis = attribute(node, "axis", 0) % rank_of(node, known)
    sizes = []
    for value in node.outputs:
        shape = known.shape(value)
        if shape is None or not isinstance(shape[axis], int):
            return ()
        sizes.append(int(shape[axis]))
    results: list[list[Array]] = [[] for _ in sizes]
    for facet in known(node.inputs[0]):
        if facet.shape[axis] == 1:
            parts: Sequence[Array] = [facet] * len(sizes)
        else:
            parts = np.split(facet, np.cumsum(sizes)[:-1], axis)
        for result, part in zip(results, parts, strict=True):
            result.append(part)
    return [tidy(r) for r in results]


@rule("Slice")
def _slice(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    shape = known.shape(node.inputs[0])
    assert shape is not None
    found = slice_parameters(node, [known.facts(v) for v in node.inputs], len(shape))
    if found is None:
        return ()
    results = []
    for facet in known(node.inputs[0]):
        for start, end, axis, step in zip(*found, strict=True):
            if facet.shape[axis] == 1:
                continue
            first, count = sliced(start, end, int(step), shape[axis])
            if not isinstance(first, int) or not isinstance(count, int):
                facet = collapse(facet, [axis])
            else:
                facet = facet.take(range(first, first + count * int(step), int(step)), axis)
        results.append(facet)
    return [tidy(results)]


@rule("Gather")
def _gather(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    shape, chosen = known.shape(node.inputs[0]), known.shape(node.inputs[1])
    assert shape is not None and chosen is not None
    axis = attribute(node, "axis", 0) % len(shape)
    indices = edit.constant(node.inputs[1], edit.SMALL)
    results = []
    for facet in known(node.inputs[0]):
        if indices is not None and facet.shape[axis] > 1:
            results.append(np.take(facet, indices, axis))
        else:
            flat = collapse(_chosen(facet, axis, node, known), [axis])
            results.append(flat.reshape(flat.shape[:axis] + (1,) * len(chosen) + flat.shape[axis + 1 :]))
    return [tidy(results)]


@rule("GatherND")
def _gather_nd(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    chosen = known.shape(node.inputs[1])
    if not chosen or not isinstance(chosen[-1], int) or attribute(node, "batch_dims", 0):
        return ()
    depth = chosen[-1]
    results = []
    for facet in known(node.inputs[0]):
        flat = collapse(_chosen(facet, 0, node, known) if depth == 1 else facet, range(depth))
        results.append(flat.reshape((1,) * (len(chosen) - 1) + flat.shape[depth:]))
    return [tidy(results)]


def _chosen(facet: Array, axis: int, node: ir.Node, known: Knowledge) -> Array:
    """The indices of an axis that the node's second input ever chooses."""
    never = known.never.get(node.inputs[1]) if node.inputs[1] is not None else None
    return facet if never is None or len(never) != facet.shape[axis] else facet.compress(~never, axis)


@rule("ScatterElements")
def _scatter(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    """What is never indexed keeps what it had."""
    never = known.never.get(node.inputs[1]) if node.inputs[1] is not None else None
    shape = known.shape(node.inputs[0])
    if never is None or shape is None:
        return ()
    axis = attribute(node, "axis", 0) % len(shape)
    if shape[axis] != len(never):
        return ()
    here = never.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return [tidy(np.where(here, f, np.nan) for f in known(node.inputs[0]))]


@rule("OneHot")
def _one_hot(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    never = known.never.get(node.inputs[0]) if node.inputs[0] is not None else None
    values = edit.constant(node.inputs[2], 2)
    rank = rank_of(node, known)
    if never is None or values is None:
        return ()
    axis = attribute(node, "axis", -1) % rank
    return [(np.where(never, float(values[0]), np.nan).reshape([-1 if a == axis else 1 for a in range(rank)]),)]


@rule("Pad")
def _pad(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    rank = rank_of(node, known)
    pads = known.facts(operand(node, 1)).known if len(node.inputs) > 1 else attribute(node, "pads")
    if pads is None or operand(node, 3) is not None or len(pads) != 2 * rank:
        return ()
    zero = attribute(node, "mode", "constant") == "constant" and (
        operand(node, 2) is None or edit.scalar(node.inputs[2]) == 0
    )
    shape = known.shape(node.inputs[0])
    assert shape is not None
    results = []
    for facet in known(node.inputs[0]):
        for axis in range(rank):
            before, after = pads[axis], pads[axis + rank]
            if not before and not after:
                continue
            if zero and isinstance(shape[axis], int) and before >= 0 and after >= 0 and facet.shape[axis] > 1:
                width = [(before, after) if a == axis else (0, 0) for a in range(rank)]
                facet = np.pad(facet, width)
            else:
                facet = (
                    np.where(collapse(facet, [axis]) == 0, 0.0, np.nan)
                    if zero
                    else np.full_like(collapse(facet, [axis]), np.nan)
                )
        results.append(facet)
    return [tidy(results)]


@rule("DepthToSpace", "SpaceToDepth")
def _block_shuffle(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    block = attribute(node, "blocksize", 1)
    results = []
    for facet in known(node.inputs[0]):
        flat = collapse(facet, (0, 2, 3)).reshape(-1)
        if flat.size > 1 and node.op_type == "SpaceToDepth":
            flat = np.tile(flat, block * block)
        elif flat.size > 1 and attribute(node, "mode", "DCR") == "CRD":
            flat = collapse(flat.reshape(-1, block * block), [1]).reshape(-1)
        elif flat.size > 1:
            flat = collapse(flat.reshape(block * block, -1), [0]).reshape(-1)
        results.append(flat.reshape(1, -1, 1, 1))
    return [tidy(results)]
