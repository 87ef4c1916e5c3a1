"""Where a decoder joins new keys and values to those of the past, and how that is done in 8-bit codes.

What is new is rounded before it is joined and before it is attended to, so that a token sees the same keys and values
whether they were computed with it or came with the past. That is also what ONNX Runtime's GroupQueryAttention does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphc import cache_codes, caches, edit
from graphc import model as models
from graphc.cache_codes import CHANNELS, HEADS, Coder
from graphc.contract import Context, PassResult
from graphc.edit import Array, is_op
from graphc.errors import BadInput
from graphc.stats.moments import Moments, MomentsOf

MOST = 127
"""The code of the largest value."""

CODES = (ir.DataType.INT8, ir.DataType.UINT8)


@dataclass(frozen=True)
class Cache:
    """A cache that can be in codes.

    Attributes:
        past, present: The input and the output that it becomes, ``b h t d``.
        node: The Concat or Attention that joins what is new.
        slot: At which input of the node that is; as ``b h t d``, or of Attention perhaps ``b t (h d)``.
    """

    past: ir.Value
    present: ir.Value
    node: ir.Node
    slot: int

    @property
    def name(self) -> str:
        return str(self.past.name)

    @property
    def new(self) -> ir.Value:
        value = self.node.inputs[self.slot]
        assert value is not None
        return value

    @property
    def heads(self) -> int:
        assert self.past.shape is not None
        size = self.past.shape[HEADS]
        assert isinstance(size, int)
        return size

    @property
    def channels(self) -> int:
        assert self.past.shape is not None
        size = self.past.shape[CHANNELS]
        assert isinstance(size, int)
        return size


def find(model: ir.Model, result: PassResult) -> list[Cache]:
    """The caches of the main graph; those that cannot be in codes are refused."""
    found = []
    joined = list(caches.joins(model))
    for past, present, node in joined:
        cache = Cache(past, present, node, {4: 1, 5: 2}.get(list(node.inputs).index(past), 1))
        if why := _why_not(cache, joined):
            result.refuse(past, why)
        else:
            found.append(cache)
    return found


def _why_not(cache: Cache, joined: Sequence[tuple[ir.Value, ir.Value, ir.Node]]) -> str:
    past, node = cache.past, cache.node
    if past.dtype in CODES:
        return "the cache is in 8-bit codes already"
    if past.dtype != ir.DataType.FLOAT:
        return f"caches of float32 become codes, and this one is {past.dtype.name.lower() if past.dtype else 'unknown'}"
    if node.domain not in ("", "ai.onnx"):
        return "an operator of ONNX Runtime's own joins to the cache already: quantize-cache comes before lower"
    if sum(past is each or cache.present is other for each, other, _ in joined) > 1:
        return "several operators join something to the cache"
    shape, new = past.shape, cache.new.shape
    if shape is None or len(shape) != 4 or not all(isinstance(shape[i], int) for i in (HEADS, CHANNELS)):
        return "the number of heads, or their size, is not known"
    if new is None or len(new) not in ((4,) if is_op(node, "Concat") else (3, 4)):
        return "the sizes of what is new are not known"
    return ""


LONELY = (
    "quantize-cache: scales come from single tokens without a past, and keys and values of texts are others: calibrate "
    "the graph that reads whole texts, and give what it became with like=FILE"
)


def moments(model: ir.Model, found: Sequence[Cache], ctx: Context, result: PassResult) -> dict[Cache, Moments]:
    """Moments of the channels of each cache, ``(heads * channels,)``: of what is new, without padding, and of the past.

    Where inputs were made to fit, their past is none that the model would have, and is left out.
    """
    copy, names = model.clone(), edit.Names(model)
    values = {v.name: v for node in copy.graph for v in node.outputs} | {v.name: v for v in copy.graph.inputs}
    requests: dict[Cache, list[MomentsOf]] = {cache: [] for cache in found}
    for cache, value in [(each, values[v.name]) for each in found for v in (each.new, each.past)[: 1 + bool(ctx.data)]]:
        if value.shape is not None and len(value.shape) == 4:
            shape = np.array([0, 0, cache.heads * cache.channels])
            turned = ir.node("Transpose", [value], {"perm": (0, 2, 1, 3)})
            flat = ir.node("Reshape", [turned.outputs[0], edit.initializer(copy.graph, shape, names.fresh("rows"))])
            for node in (turned, flat):
                node.outputs[0].name = names.fresh(f"{cache.name}.rows")
                node.outputs[0].type = value.type
                copy.graph.append(node)
            value = flat.outputs[0]
        requests[cache].append(MomentsOf(str(value.name)))
    statistics = ctx.collect(copy, {each for wanted in requests.values() for each in wanted})
    seen = {}
    single = any(cache.new.shape is not None and cache.new.shape[-2] == 1 for cache in found)
    if single and not any(statistics[past].count for _, *rest in requests.values() for past in rest):
        result.note(LONELY)
    for cache, (new, *past) in requests.items():
        seen[cache] = dataclasses.replace(statistics[new])
        for each in past:
            seen[cache].merge(statistics[each])
    return seen


def scale(cache: Cache, seen: Moments, by_channel: bool) -> Array:
    """Scales ``(heads, channels)``, or ``(heads, 1)``: the largest value seen is the largest code.

    A channel in which there was nothing gets the scale of its head, and a head without anything 1.
    """
    largest = seen.largest.reshape(cache.heads, cache.channels)
    heads = largest.max(axis=1, keepdims=True)
    heads = np.where(heads > 0, heads, MOST)
    chosen = np.where(largest > 0, largest, heads) if by_channel else heads
    return np.asarray(np.maximum(chosen / MOST, np.finfo(np.float32).tiny), np.float32)


def read(file: Path) -> dict[str, Array]:
    """The scales of caches of another model, ``(1, heads or 1, 1, channels or 1)``, by name.

    Raises:
        BadInput: It has none.
    """
    known = cache_codes.scales(models.load(file))
    if not known:
        raise BadInput("no cache of the model is in codes", where=str(file), hint="give what quantize-cache made")
    return known


def fitted(value: ir.Value, held: Array) -> Array:
    """Scales of another model for a cache ``b h t d`` of this one, ``(heads, channels)`` or ``(heads, 1)``.

    Raises:
        BadInput: They are for other sizes.
    """
    heads, channels = (value.shape[i] if value.shape is not None else None for i in (HEADS, CHANNELS))
    if not isinstance(heads, int) or held.shape[HEADS] not in (1, heads) or held.shape[CHANNELS] not in (1, channels):
        raise BadInput(
            f"the scales of '{value.name}' are those of another model",
            where="quantize-cache{like}",
            why=f"{held.shape[HEADS]} heads of {held.shape[CHANNELS]}, not {heads} of {channels}",
        )
    return np.repeat(held[0, :, 0], heads if held.shape[HEADS] == 1 else 1, axis=0)


def firsts(model: ir.Model, known: Mapping[str, Array]) -> list[ir.Value]:
    """The outputs that begin caches which another graph goes on with: those that have scales, and no past here."""
    joined = {present for _, present, _ in caches.joins(model)}
    return [
        value
        for value in model.graph.outputs
        if value.name in known and value not in joined and value.dtype == ir.DataType.FLOAT
        if value.shape is not None and len(value.shape) == 4 and value.producer() is not None
    ]


def round_firsts(model: ir.Model, chosen: Mapping[ir.Value, Array]) -> None:
    """Let outputs be codes with the given scales; what the graph itself reads stays."""
    names, graph = edit.Names(model), model.graph
    for value, scales in chosen.items():
        assert value.shape is not None
        channels = value.shape[CHANNELS]
        assert isinstance(channels, int)
        name = str(value.name)
        nodes = Coder(graph, name, scales, channels, names).encode(value)
        for node in nodes:
            graph.append(node)
        graph.outputs[list(graph.outputs).index(value)] = nodes[-1].outputs[0]
        value.name, nodes[-1].outputs[0].name = names.fresh(f"{name}.float"), name


def loss(cache: Cache, seen: Moments, chosen: Array) -> float:
    """The squared error of rounding in relation to the squares of what is rounded, errors taken as evenly spread."""
    steps = np.square(np.broadcast_to(chosen, (cache.heads, cache.channels)).astype(np.float64)).sum() / 12
    return float(steps * seen.count / max(float(seen.squares.sum()), 1e-300))


def units(found: Sequence[Cache]) -> list[list[Cache]]:
    """Caches that are in codes together or not at all: the keys and values of one Attention."""
    by_node: dict[ir.Node, list[Cache]] = {}
    for cache in found:
        by_node.setdefault(cache.node, []).append(cache)
    return list(by_node.values())


def write(model: ir.Model, chosen: Mapping[Cache, Array]) -> None:
    """Let caches be codes with the given scales."""
    names = edit.Names(model)
    for cache, scales in chosen.items():
        coder = Coder(model.graph, cache.name, scales, cache.channels, names)
        (_concat if is_op(cache.node, "Concat") else _attention)(cache, coder, model.graph, names)


def _concat(cache: Cache, coder: Coder, graph: ir.Graph, names: edit.Names) -> None:
    node, past, present = cache.node, cache.past, cache.present
    nodes = coder.encode(cache.new)
    graph.insert_before(node, nodes)
    node.replace_input_with(cache.slot, nodes[-1].outputs[0])
    past.type = present.type = ir.TensorType(ir.DataType.INT8)
    _dequantize(past, node, None, coder, graph)
    _dequantize(present, node, node, coder, graph)


def _attention(cache: Cache, coder: Coder, graph: ir.Graph, names: edit.Names) -> None:
    node, past, present = cache.node, cache.past, cache.present
    nodes = coder.encode(cache.new)
    codes = nodes[-1].outputs[0]
    again = coder.decode(codes)
    graph.insert_before(node, [*nodes, *again])
    node.replace_input_with(cache.slot, again[-1].outputs[0])
    past.type = ir.TensorType(ir.DataType.INT8)
    _dequantize(past, node, None, coder, graph)
    after = list(_as_heads(cache, codes, names, graph))
    made = ir.Value(name=str(present.name), type=ir.TensorType(ir.DataType.INT8), shape=present.shape)
    heads = after[-1].outputs[0] if after else codes
    after.append(ir.node("Concat", [past, heads], {"axis": 2}, outputs=[made], name=f"{made.name}.codes"))
    graph.insert_after(node, after)
    graph.outputs[list(graph.outputs).index(present)] = made
    present.name = names.fresh(f"{present.name}.float")  # Attention with a past has to give it, read or not


def _as_heads(cache: Cache, codes: ir.Value, names: edit.Names, graph: ir.Graph) -> Iterator[ir.Node]:
    """Codes ``b t (h d)`` as ``b h t d``; nothing to do for others."""
    shape = codes.shape
    assert shape is not None
    if len(shape) == 4:
        return
    split = edit.initializer(graph, np.array([0, 0, cache.heads, cache.channels]), names.fresh(f"{cache.name}.split"))
    sizes = (shape[0], shape[1], cache.heads, cache.channels)
    made = codes
    for kind, inputs, attributes, order in (
        ("Reshape", [split], {}, (0, 1, 2, 3)),
        ("Transpose", [], {"perm": (0, 2, 1, 3)}, (0, 2, 1, 3)),
    ):
        out = ir.Value(
            name=names.fresh(f"{cache.name}.{kind.lower()}"),
            type=ir.TensorType(ir.DataType.INT8),
            shape=ir.Shape([sizes[i] for i in order]),
        )
        yield ir.node(kind, [made, *inputs], attributes, outputs=[out], name=out.name)
        made = out


def _dequantize(codes: ir.Value, join: ir.Node, after: ir.Node | None, coder: Coder, graph: ir.Graph) -> None:
    """Let all that read a value read what its codes stand for, but for its sizes and the Concat of codes."""
    uses = [u for u in codes.uses() if not is_op(u.node, "Shape") and not (u.node is join and is_op(join, "Concat"))]
    if not uses:
        return
    nodes = coder.decode(codes)
    if after is not None:
        graph.insert_after(after, nodes)
    else:
        graph.insert_before(graph[0], nodes)
    for use in uses:
        use.node.replace_input_with(use.idx, nodes[-1].outputs[0])
