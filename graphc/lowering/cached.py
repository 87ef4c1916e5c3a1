"""Attention with a cache as GroupQueryAttention, which can append to the buffers of the caller in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.lowering import coded
from graphc.lowering.site import DOMAIN, Site
from graphc.lowering.steps import Step, between, constant, ints
from graphc.recognition.graph import Graph
from graphc.recognition.scores import extremes, lowest, overflows
from graphc.rewrites.base import Refused
from graphc.shapes import Shape, symbolic

_INT32 = ir.DataType.INT32
_MULTIPLE = 8
"""What the size of a head is a multiple of."""

_PAST = (4, 5)
"""The inputs of Attention that are a cache."""


def group_query(node: ir.Node, graph: Graph) -> Site | None:
    """Attention of one new token with its past; the mask is added as it is, nothing is causal by itself.

    The lengths that the operator wants are read off the mask, not off the past: the past may then be longer than what
    it holds, which is how buffers are used in place.
    """
    if len(node.inputs) < 6 or any(node.inputs[i] is None for i in _PAST) or any(node.inputs[6:]):
        return None
    if any(value.uses() or value.is_graph_output() for value in node.outputs[3:]):
        return None
    heads, fewer = edit.attribute(node, "q_num_heads", 0), edit.attribute(node, "kv_num_heads", 0)
    if not heads or not fewer:
        raise Refused("its heads are an axis, and GroupQueryAttention has them as an attribute")
    codes = coded.find(node, graph)
    q, k, v, mask, past = node.inputs[:5]
    shapes = [graph.dims(value) for value in (q, k, v, past)]
    if q is None or past is None or any(shape is None for shape in shapes):
        return None
    queries, keys, values, before = (shape or () for shape in shapes)
    if queries[1] != 1 and queries[0] != 1:
        raise Refused("with a past, GroupQueryAttention takes several tokens of one sequence only")
    if keys[2] != values[2]:
        raise Refused("GroupQueryAttention has keys and values of one size")
    if not isinstance(queries[2], int) or queries[2] // heads % _MULTIPLE:
        raise Refused(f"GroupQueryAttention has heads whose size is a multiple of {_MULTIPLE}")
    if edit.attribute(node, "is_causal", 0) or edit.attribute(node, "softmax_precision", 1) != ir.DataType.FLOAT:
        raise Refused("GroupQueryAttention has another causal mask, or another precision of the softmax")
    _check_mask(mask, queries, symbolic.add(before[2], keys[1]), graph)
    assert mask is not None
    attributes = {"num_heads": heads, "kv_num_heads": fewer, "causal": 0}
    attributes |= {name: edit.attribute(node, name) for name in ("scale", "softcap") if name in node.attributes}
    outputs, pasts, nodes = tuple(node.outputs[:3]), tuple(node.inputs[4:6]), (node,)
    scales: tuple[ir.Value | None, ...] = ()
    kinds: dict[str, Any] = {}
    if codes is not None:
        k, v = (each.new for each in codes)
        pasts, outputs = tuple(each.past for each in codes), (node.outputs[0], *(each.present for each in codes))
        scales = (None, *(constant(f"{each.past.name}.scale", ir.tensor(each.scale)) for each in codes))
        kinds = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        before, behind = (tuple(n for each in codes for n in getattr(each, part)) for part in ("before", "after"))
        nodes = (*reversed(behind), node, *reversed(before))
    lengths, total, steps = _lengths(mask, q, graph)
    added, results, after = mask, outputs, list[Step]()
    if graph.dtype(mask) == ir.DataType.BOOL:
        added, results, before_it, after = _boolean(mask, outputs, graph)
        steps += before_it
    steps += [
        Step(
            "GroupQueryAttention",
            (q, k, v, *pasts, lengths, total, None, None, None, added, *scales),
            results,
            attributes | kinds,
            DOMAIN,
        ),
        *after,
    ]
    return Site(
        "group-query-attention",
        "GroupQueryAttention",
        nodes,
        (q, k, v, mask, *pasts),
        outputs,
        attributes,
        steps=tuple(steps),
        common=(mask,) if sum(edit.is_op(use.node, "Attention") for use in mask.uses()) > 1 else (),
    )


def _check_mask(mask: ir.Value | None, queries: Shape, total: symbolic.Dim, graph: Graph) -> None:
    """Refuse masks that the operator does not read, or reads as another one."""
    dims = graph.dims(mask)
    if mask is None or dims is None:
        raise Refused("without a mask nothing says how long the past is")
    if graph.dtype(mask) == ir.DataType.BOOL and len(dims) == 4 and dims[1] != 1:
        raise Refused("GroupQueryAttention adds its mask, and this one is boolean and not the same for all heads")
    if len(dims) != 4 or dims[2:] != (queries[1], total):
        raise Refused("the mask is not known to cover all keys of every query")
    if -float("inf") in extremes(mask) or overflows(mask):
        raise Refused("the mask may hide all keys of a query, of which GroupQueryAttention makes something else")


def _boolean(
    mask: ir.Value, outputs: tuple[ir.Value, ...], graph: Graph
) -> tuple[ir.Value, tuple[ir.Value, ...], list[Step], list[Step]]:
    """A boolean mask as one that is added, the results with it, and what stands before and after the operator.

    A query that sees no key gets 0 of Attention, and of the operator the mean of all values.
    """
    like, dims = outputs[0], graph.dims(mask) or ()
    assert like.dtype is not None
    low = constant("graphc.lowest", ir.tensor(np.array(lowest(like.dtype), like.dtype.numpy())))
    zero = constant("graphc.zero", ir.tensor(np.array(0, like.dtype.numpy())))
    added, most = between("cache.mask", like, dims), between("cache.most", like, (*dims[:3], 1))
    rows = between("cache.rows", like, (dims[0], dims[2], 1))
    seen = between("cache.seen", ir.DataType.BOOL, (dims[0], dims[2], 1))
    mixed = between(f"{like.name}.mixed", like, graph.dims(like) or ())
    before = [
        Step("Where", (mask, zero, low), (added,)),
        Step("ReduceMax", (added, ints(-1)), (most,), {"keepdims": 1}),
        Step("Squeeze", (most, ints(1)), (rows,)),
        Step("Greater", (rows, low), (seen,)),
    ]
    return added, (mixed, *outputs[1:]), before, [Step("Where", (seen, mixed, zero), (like,))]


def _lengths(mask: ir.Value, q: ir.Value, graph: Graph) -> tuple[ir.Value, ir.Value, list[Step]]:
    """The index of the last key of each sequence, the number of keys, and what computes them."""
    batch = mask if (graph.dims(mask) or ())[0] == (graph.dims(q) or ())[0] else q
    int64 = ir.DataType.INT64
    count, narrow = between("cache.keys", int64, (1,)), between("cache.keys32", _INT32, (1,))
    total, last = between("cache.total", _INT32, ()), between("cache.last", _INT32, (1,))
    rows = between("cache.batch", int64, (1,))
    lengths = between("cache.lengths", _INT32, (graph.dims(batch) or ())[:1])
    one = constant("graphc.one", ir.tensor(np.array([1], np.int32)))
    return (
        lengths,
        total,
        [
            Step("Shape", (mask,), (count,), {"start": 3, "end": 4}),
            Step("Cast", (count,), (narrow,), {"to": int(_INT32)}),
            Step("Squeeze", (narrow, ints(0)), (total,)),
            Step("Sub", (narrow, one), (last,)),
            Step("Shape", (batch,), (rows,), {"start": 0, "end": 1}),
            Step("Expand", (last, rows), (lengths,)),
        ],
    )


def counts(graph: Graph) -> set[str]:
    """The names of the sizes that say how many tokens a decoder with a cache reads; empty without a cache."""
    with_cache = [n for n in edit.nodes(graph.model) if edit.is_op(n, "Attention") and len(n.inputs) > 5]
    dims = [dim for node in with_cache for dim in (graph.dims(node.inputs[0]) or ())[-2:-1]]
    return {name for dim in dims if (name := symbolic.plain_name(dim)) is not None}


def untie(graph: Graph) -> list[str]:
    """Let what reads the length of the past off a cache read it off the mask, so that buffers may be longer.

    Returns:
        The caches that only buffers of just their length fit, by name.
    """
    caches = [
        value
        for value in graph.model.graph.inputs
        if any(edit.is_op(u.node, "GroupQueryAttention", domain=DOMAIN) and u.idx in (3, 4) for u in value.uses())
    ]
    tied = []
    for past in caches:
        for node in [u.node for u in past.uses() if not edit.is_op(u.node, "GroupQueryAttention", domain=DOMAIN)]:
            sizes = _elsewhere(past, node, caches, graph) if edit.is_op(node, "Shape") else None
            if sizes is None:
                tied.append(past.name or "")
                break
            graph.bypass(node, sizes)
    return tied


def _elsewhere(past: ir.Value, node: ir.Node, caches: Sequence[ir.Value], graph: Graph) -> ir.Value | None:
    """The sizes of a cache that a Shape gives, read off what is no cache; None if one of them is nowhere else."""
    dims = graph.dims(past) or ()
    length, counted = dims[2] if len(dims) == 4 else None, _counted(past, graph)
    wanted = dims[edit.attribute(node, "start", 0) : edit.attribute(node, "end")]
    others = [(value, graph.dims(value) or ()) for value in graph.model.graph.inputs if value not in caches]
    found: list[tuple[ir.Value, int, int] | int] = []
    for dim in wanted:
        place = next(((value, known.index(dim), 0) for value, known in others if dim in known), None)
        if isinstance(dim, int):
            found.append(dim)
        elif place is not None:
            found.append(place)
        elif dim == length and counted is not None:
            found.append(counted)
        else:
            return None
    like = graph.ints(node, [1])
    parts = []
    for each in found:
        if isinstance(each, int):
            parts.append(graph.ints(node, [each]))
            continue
        value, axis, more = each
        size = graph.make(node, "Shape", [value], {"start": axis, "end": axis + 1}, like=like, shape=(1,))
        less = graph.ints(node, [more])
        parts.append(graph.make(node, "Sub", [size, less], like=like, shape=(1,)) if more else size)
    if len(parts) == 1:
        return parts[0]
    return graph.make(node, "Concat", parts, {"axis": 0}, like=like, shape=(len(parts),)) if parts else None


def _counted(past: ir.Value, graph: Graph) -> tuple[ir.Value, int, int] | None:
    """An axis of another input that is longer than the past by a number, and that number."""
    length = (graph.dims(past) or (None,) * 3)[2]
    if length is None:
        return None
    for value in graph.model.graph.inputs:
        for axis, dim in enumerate(graph.dims(value) or ()):
            more = symbolic.sub(dim, length)
            if value is not past and isinstance(more, int) and more > 0 and not isinstance(dim, int):
                return value, axis, more
    return None
