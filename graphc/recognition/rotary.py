"""Rotary position embedding written out becomes RotaryEmbedding: by halves or by pairs, of all channels or the first.

A region between what is rotated, two tables and one result is recognised by what it computes of random numbers.
Tables that hold every angle twice are cut to one; that they do is read off how they are made, or off their numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array
from graphc.recognition.graph import Graph
from graphc.recognition.layout import Axes, Place, arrange, fresh, reachable, resolve, settled, sizes, trace
from graphc.rewrites.base import FLOATS, Refused, Rewriter, Rule, chain
from graphc.shapes import Shape
from graphc.shapes.fold import evaluate
from graphc.shapes.kernels import CannotFold
from graphc.shapes.symbolic import Dim, Expr

_VIEWS = ("Unsqueeze", "Squeeze", "Reshape")
_REGION = ("Add", "Sub", "Mul", "Neg", "Concat", "Slice", "Split", *_VIEWS)
_LONGEST = 24
_AHEAD = 6


@dataclass(frozen=True)
class _Rotation:
    """What a region computes.

    Attributes:
        x: What is rotated, ``(batch, ., ., channels)``.
        cos, sin: The tables, broadcast to ``x``.
        interleaved: Whether neighbours are rotated together, rather than the halves.
        doubled: Whether the tables hold every angle twice.
        turned: How many channels are rotated; the others stay.
    """

    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    interleaved: bool
    doubled: bool
    turned: int


def recognise(node: ir.Node, rewriter: Rewriter) -> str | None:
    """Replace the rotation that ends at an addition, or up to some views and concatenations later."""
    assert isinstance(rewriter, Graph)
    graph = rewriter
    if not _is_rotation_like(node):
        return None
    for end in reversed(chain(node, _is_layout, _AHEAD)):
        region_and_rotation = _find(end, node, graph)
        if region_and_rotation is None:
            continue
        region, rotation = region_and_rotation
        stale = [v for n in region for v in n.inputs]
        _replace(end, rotation, graph)
        graph.sweep(stale)
        return "RotaryEmbedding recognised"
    return None


def _is_rotation_like(node: ir.Node) -> bool:
    """Whether a sum of two products is not that of a normalisation: one operand is cut from the other's source."""
    products = [v.producer() if v is not None else None for v in node.inputs[:2]]
    return len(node.inputs) == 2 and all(edit.is_op(p, "Mul") for p in products)


def _is_layout(node: ir.Node) -> bool:
    return edit.is_op(node, "Concat", *_VIEWS)


def _find(end: ir.Node, marker: ir.Node, graph: Graph) -> tuple[list[ir.Node], _Rotation] | None:
    """The nodes and the meaning of a region that ends at a node."""
    region = [end]
    while len(region) <= _LONGEST:
        frontier = _variables(region)
        if len(frontier) == 3 and marker in region:
            rotation = _meaning(region, frontier, graph)
            if rotation is not None:
                return region, rotation
        inside = set(region)
        candidates = []
        for value in frontier:
            producer = value.producer()
            if producer is None or not edit.is_op(producer, *_REGION):
                continue
            # A view of a table stays outside.
            if (
                edit.is_op(producer, *_VIEWS)
                and (graph.dims(value) or ())[:3] != (graph.dims(end.outputs[0]) or ())[:3]
            ):
                continue
            used = [use.node for output in producer.outputs for use in output.uses()]
            if all(n in inside for n in used) and not any(v.is_graph_output() for v in producer.outputs):
                candidates.append(producer)
        if not candidates:
            return None
        # Views of what is rotated last: they may belong to the heads.
        region.append(next((n for n in candidates if n.op_type not in _VIEWS), candidates[0]))
    return None


def _variables(region: Sequence[ir.Node]) -> list[ir.Value]:
    made = {value for node in region for value in node.outputs}
    return list(
        dict.fromkeys(v for node in region for v in node.inputs if v is not None and v not in made and not _is_small(v))
    )


def _is_small(value: ir.Value) -> bool:
    """Whether a value is a constant that is no table."""
    held = edit.tensor(value)
    return held is not None and (held.dtype not in FLOATS or held.size == 1)


def _meaning(region: Sequence[ir.Node], frontier: Sequence[ir.Value], graph: Graph) -> _Rotation | None:
    """The rotation that a region computes of its three variables."""
    shapes = [graph.dims(v) for v in frontier]
    out = graph.dims(region[0].outputs[0])
    if None in shapes or out is None or len(out) != 4:
        return None
    for place, (x, shape) in enumerate(zip(frontier, shapes, strict=True)):
        tables = [v for i, v in enumerate(frontier) if i != place]
        if shape != out or not isinstance(out[-1], int) or any(graph.dims(t) == out for t in tables):
            continue
        widths = {(graph.dims(t) or (0,))[-1] for t in tables}
        if len(widths) != 1 or not isinstance(width := widths.pop(), int) or not width:
            continue
        for doubled in (True, False):
            turned = width if doubled else 2 * width
            if turned % 2 or turned > out[-1]:
                continue
            for interleaved in (False, True):
                for cos, sin in (tables, tables[::-1]):
                    rotation = _Rotation(x, cos, sin, interleaved, doubled, turned)
                    if _agrees(region, rotation, graph):
                        return rotation
    return None


def _agrees(region: Sequence[ir.Node], rotation: _Rotation, graph: Graph) -> bool:
    """Whether a region computes a rotation of random numbers."""
    rng = np.random.default_rng(0)
    numbers: dict[str, int] = {}

    def sample(value: ir.Value, last: int | None = None) -> Array:
        dims = [_number(dim, numbers) for dim in graph.dims(value) or ()]
        return rng.uniform(0.5, 2.0, (*dims[:-1], dims[-1] if last is None else last))

    half = rotation.turned // 2
    x, cos, sin = sample(rotation.x), sample(rotation.cos, half), sample(rotation.sin, half)
    values = {rotation.x: x, rotation.cos: _doubled(cos, rotation), rotation.sin: _doubled(sin, rotation)}
    for node in edit.in_order(region, values) or ():
        inputs = [None if v is None else values[v] if v in values else edit.constant(v) for v in node.inputs]
        try:
            found = evaluate(node, inputs, graph.version)
        except CannotFold:
            return False
        values.update(zip(node.outputs, found, strict=False))
    result = values.get(region[0].outputs[0])
    if result is None:
        return False
    try:
        wanted = _rotated(x, cos, sin, rotation)
    except ValueError:
        return False
    return result.shape == wanted.shape and bool(np.allclose(result, wanted, rtol=1e-6, atol=1e-6))


def _number(dim: Dim, numbers: dict[str, int]) -> int:
    """A size for a symbolic dim, the same for the same names."""
    if not isinstance(dim, Expr):
        return int(dim)
    total = 0
    for atoms, factor in dim.terms:
        part = factor
        for atom in atoms:
            part *= numbers.setdefault(atom, 2 + len(numbers) % 3)
        total += part
    return max(1, total)


def _doubled(table: Array, rotation: _Rotation) -> Array:
    if not rotation.doubled:
        return table
    return np.repeat(table, 2, axis=-1) if rotation.interleaved else np.concatenate([table, table], axis=-1)


def _rotated(x: Array, cos: Array, sin: Array, rotation: _Rotation) -> Array:
    """The definition, see RotaryEmbedding of ONNX."""
    turned, rest = x[..., : rotation.turned], x[..., rotation.turned :]
    half = rotation.turned // 2
    if rotation.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = turned[..., :half], turned[..., half:]
    real, imaginary = cos * a - sin * b, sin * a + cos * b
    if rotation.interleaved:
        both = np.stack([real, imaginary], axis=-1).reshape(turned.shape)
    else:
        both = np.concatenate([real, imaginary], axis=-1)
    return np.concatenate([both, rest], axis=-1)


def _replace(end: ir.Node, rotation: _Rotation, graph: Graph) -> None:
    dims = graph.dims(rotation.x)
    assert dims is not None
    if graph.dtype(rotation.cos) != graph.dtype(rotation.x):
        raise Refused("the rotary tables have another dtype than what they rotate")
    axes: Axes = tuple(fresh(dim) for dim in dims)
    places = [p for p in trace(rotation.x, axes, graph) if p.factor == 1.0 and not p.copied]
    head = _head_axis(rotation, dims, graph)
    order = (0, 2, 1) if head == 1 else (0, 1, 2)
    batch, queries, heads = (axes[i] for i in order)
    if not isinstance(dims[head], int):
        raise Refused("the number of heads that are rotated is not known")
    tables = [_table(t, rotation, dims, head, end, graph) for t in (rotation.cos, rotation.sin)]
    attributes: dict[str, int] = {}
    if rotation.interleaved:
        attributes["interleaved"] = 1
    if rotation.turned != dims[-1]:
        attributes["rotary_embedding_dim"] = rotation.turned
    channels = axes[3]
    flat: Axes = (batch, queries, heads + channels)
    free = [p for p in places if reachable(p, flat, graph) == 0]
    if not free and head != 1:
        raise Refused("the heads that are rotated cannot be merged with constant shapes")
    attributes["num_heads"] = int(dims[head])  # type: ignore[arg-type]
    wanted = flat if free else axes
    x = arrange(free[-1], flat, end, graph) if free else rotation.x
    made = graph.make(end, "RotaryEmbedding", [x, *tables], attributes, like=rotation.x, shape=sizes(settled(wanted)))
    graph.bypass(end, arrange(Place(made, settled(wanted)), settled(axes), end, graph))


def _head_axis(rotation: _Rotation, dims: Shape, graph: Graph) -> int:
    """The axis of heads, along which the tables are the same; the other one of the two is that of positions.

    Raises:
        Refused: The tables are those of every head, or of every batch in a way that is not covered.
    """
    shapes = []
    for table in (rotation.cos, rotation.sin):
        shape = graph.dims(table) or ()
        shapes.append((*[1] * (4 - len(shape)), *shape))
    if shapes[0] != shapes[1]:
        raise Refused("the rotary tables differ in shape")
    shape = shapes[0]
    for head, positions in ((1, 2), (2, 1)):
        if shape[head] == 1 and shape[positions] == dims[positions] and shape[0] in (1, dims[0]):
            return head
    raise Refused("the rotary tables are not the same for all heads")


def _table(value: ir.Value, rotation: _Rotation, dims: Shape, head: int, before: ir.Node, graph: Graph) -> ir.Value:
    """A table ``(batch, positions, pairs)``."""
    half = rotation.turned // 2
    positions = dims[3 - head]
    key = ("rotary", value, rotation.doubled, rotation.interleaved, head, dims[0], before.graph)
    known = graph.made.get(key)
    if known is not None:
        return known
    kind = "pairs" if rotation.interleaved else "halves"
    if rotation.doubled and kind not in repeats(value, graph):
        raise Refused(f"the rotary table is not known to hold two equal {kind}")
    made = value
    shape = graph.dims(value) or ()
    if rotation.doubled:
        start, end, axis, step = (
            ([0], [rotation.turned], [-1], [2]) if rotation.interleaved else ([0], [half], [-1], [1])
        )
        bounds = [graph.ints(before, part) for part in (start, end, axis, step)]
        made = graph.make(before, "Slice", [made, *bounds], like=value, shape=(*shape[:-1], half))
    shape = graph.dims(made) or ()
    drop = head - (4 - len(shape))
    if drop >= 0:
        squeezed = (*shape[:drop], *shape[drop + 1 :])
        made = graph.make(before, "Squeeze", [made, graph.ints(before, [drop])], like=value, shape=squeezed)
    shape = graph.dims(made) or ()
    if len(shape) < 3:
        lead = tuple(range(3 - len(shape)))
        wide = (*[1] * len(lead), *shape)
        made = graph.make(before, "Unsqueeze", [made, graph.ints(before, lead)], like=value, shape=wide)
    shape = graph.dims(made) or ()
    if shape[0] != dims[0]:
        full = (dims[0], positions, half)
        if isinstance(dims[0], int):
            target = graph.ints(before, [dims[0], 1, 1])
        else:
            like = graph.ints(before, [1])
            count = graph.make(before, "Shape", [rotation.x], {"start": 0, "end": 1}, like=like, shape=(1,))
            ones = graph.ints(before, [1, 1])
            target = graph.make(before, "Concat", [count, ones], {"axis": 0}, like=like, shape=(3,))
        made = graph.make(before, "Expand", [made, target], like=value, shape=full)
    graph.made[key] = made
    return made


def repeats(value: ir.Value, graph: Graph, depth: int = 12) -> frozenset[str]:
    """Whether the last axis of a value certainly is two equal ``halves``, or ``pairs`` of equal neighbours."""
    held = edit.constant(value, 1 << 22)
    if held is not None:
        return frozenset(_of_constant(held))
    dims = graph.dims(value)
    if dims is None or not dims or depth == 0:
        return frozenset()
    axes: Axes = tuple(fresh(dim) for dim in dims)
    last = axes[-1]
    for place in trace(value, axes, graph):
        node = place.value.producer()
        copied = place.copies()
        leaves = resolve(last)
        if edit.is_op(node, "Concat") and node is not None and len({id(v) for v in node.inputs}) == 1:
            along = resolve(settled(place.axes)[edit.attribute(node, "axis", 0)])
            if len(node.inputs) == 2 and len(along) == 1 and along[0].size == 2:
                copied |= {along[0]}
            elif len(node.inputs) == 2 and along == leaves:
                return frozenset({"halves"})
        if len(leaves) == 1 and leaves[0] in copied and leaves[0].size == 2:
            return frozenset({"halves", "pairs"})
        if len(leaves) == 2 and leaves[0] in copied and leaves[0].size == 2:
            return frozenset({"halves"})
        if len(leaves) == 2 and leaves[1] in copied and leaves[1].size == 2:
            return frozenset({"pairs"})
        if settled(place.axes)[-1:] != (leaves,):
            continue
        if node is not None and (found := list(_through(node, graph))):
            kinds = [repeats(source, graph, depth - 1) for source in found]
            return frozenset.intersection(*kinds)
    return frozenset()


def _through(node: ir.Node, graph: Graph) -> Iterator[ir.Value]:
    """The inputs of a node whose last axes its output has, element by element."""
    if edit.is_op(node, "Cos", "Sin", "Cast", "Neg", "Exp", "Reciprocal", "Tanh"):
        yield from (v for v in node.inputs[:1] if v is not None)
    elif edit.is_op(node, "Mul", "Add", "Sub", "Div", "Where"):
        for value in node.inputs:
            dims = graph.dims(value)
            if value is not None and not (dims is not None and (not dims or dims[-1] == 1)):
                yield value
    elif edit.is_op(node, "Gather") and edit.attribute(node, "axis", 0) == 0:
        dims = graph.dims(node.inputs[0])
        if dims is not None and len(dims) > 1 and node.inputs[0] is not None:
            yield node.inputs[0]


def _of_constant(held: Array) -> Iterator[str]:
    if held.ndim and held.shape[-1] % 2 == 0:
        half = held.shape[-1] // 2
        if np.array_equal(held[..., :half], held[..., half:]):
            yield "halves"
        if np.array_equal(held[..., 0::2], held[..., 1::2]):
            yield "pairs"


ROTARY = Rule({"rotary": "RotaryEmbedding, by halves or pairs, of all channels or the first."}, ("Add",), recognise)
