"""Scaled dot-product attention, in whatever way heads, scale, masks and repeated keys are written, becomes Attention.

Around every softmax along the last axis lie two products. Which axes of queries, keys, values and result are batch,
heads, positions and channels follows from which of them the products share; see :mod:`graphc.recognition.layout`. From
there on only this normal form matters:

    softmax(scale * q k^T + mask) v,   q: b (g r) s d,   k: b g t d,   v: b g t n,   mask: broadcast to b (g r) s t
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphc import edit
from graphc.moves import RESHAPES
from graphc.recognition import existing, masks, products
from graphc.recognition import scores as reading
from graphc.recognition.graph import Graph
from graphc.recognition.layout import Axes, Axis, Leaf, Place, moved, resolve, settled, size, trace
from graphc.recognition.operator import Heads, Operands, copies, onwards
from graphc.recognition.scores import Scores
from graphc.rewrites.base import Refused, Rewriter, Rule
from graphc.shapes import Shape

DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def recognise(node: ir.Node, rewriter: Rewriter) -> str | None:
    """Replace the attention around a softmax, or what lies around an Attention."""
    assert isinstance(rewriter, Graph)
    graph = rewriter
    if node.op_type == "Attention":
        return existing.tidy(node, graph)
    found = _weighted(node)
    if found is None:
        return None
    product, side, guards, between = found
    source = node.inputs[0]
    assert source is not None
    path = reading.find_product(source)
    if path is None:
        return None
    rank, axis = graph.rank(source), edit.attribute(node, "axis", -1)
    if rank is None:
        raise Refused("the rank of the scores is not known")
    if axis % rank != rank - 1:
        raise Refused(f"the softmax is over axis {axis}, not the last")
    measured = _only_here([*path, node, *between], graph)
    scores = reading.read(path, graph)
    known = {source, *(mask.value for mask in scores.masks[:1] if len(scores.masks) == 1 and mask.fill is None)}
    if any(tested is not None and tested not in known for tested in guards):
        raise Refused("some weights become 0, on a condition that is not that their row is masked")
    axes = scores.axes
    for each in between:
        after = moved(each, axes, graph) if not edit.is_op(each, "Cast") else axes
        if after is None:
            raise Refused("how the weights are reshaped cannot be followed")
        axes = after
    second = products.read(product, graph, (side, axes))
    attention = _Attention(graph, scores, second, side, bool(guards))
    # What the operator reads is made of these, so that they stay.
    sources = [attention.places[role][-1].value for role in "qk"]
    asked = {each: _asked(each, graph) or () for each in measured}
    if not all(graph.readable(dims, sources) for dims in asked.values()):
        raise Refused("the scores or the weights of the attention are read elsewhere")
    done = attention.replace()
    for each, dims in asked.items():
        if each.graph is not None and each.outputs[0].uses():
            whole = each.inputs[0]
            graph.bypass(each, graph.sizes(each, dims, sources))
            graph.sweep([whole])
    return done


def _weighted(node: ir.Node) -> tuple[ir.Node, int, list[ir.Value | None], list[ir.Node]] | None:
    """The product of the softmax with values, at which input it is, its guards, what lies between."""
    value = node.outputs[0]
    guards: list[ir.Value | None] = []
    between: list[ir.Node] = []
    for _ in range(8):
        readers = list(dict.fromkeys(value.consumers()))
        guard = _guard(value, readers)
        if guard is not None:
            value = guard[0].outputs[0]
            guards.append(guard[1])
            continue
        found = next((n for n in readers if products.is_product(n)), None)
        if found is not None:
            side = 0 if found.inputs[0] is value else 1
            return None if found.inputs[1 - side] is value else (found, side, guards, between)
        following = next((n for n in readers if edit.is_op(n, "Cast", *RESHAPES, "Transpose")), None)
        if following is None:
            return None
        between.append(following)
        value = following.outputs[0]
    return None


def _guard(value: ir.Value, readers: Sequence[ir.Node]) -> tuple[ir.Node, ir.Value | None] | None:
    """A Where that gives 0 for rows that are masked as a whole, and what it tests.

    Either ``where(isnan(value), 0, value)``, which tests nothing else, or, as ONNX defines Attention,
    ``where(max(mask) == -inf, 0, value)``.
    """
    choice = next((n for n in readers if edit.is_op(n, "Where")), None)
    if choice is None or value.is_graph_output() or choice.inputs[2] is not value or edit.scalar(choice.inputs[1]) != 0:
        return None
    test = choice.inputs[0].producer() if choice.inputs[0] is not None else None
    if edit.is_op(test, "IsNaN") and test is not None and test.inputs[0] is value:
        alone = len(readers) == 2 and len(test.outputs[0].uses()) == 1
        return (choice, None) if alone else None
    if len(readers) != 1 or not edit.is_op(test, "Equal") or test is None:
        return None
    for number, other in (tuple(test.inputs), tuple(reversed(test.inputs))):
        largest = other.producer() if other is not None else None
        if edit.scalar(number) != -float("inf") or not edit.is_op(largest, "ReduceMax") or largest is None:
            continue
        axes = edit.constant(largest.inputs[1], 1) if len(largest.inputs) > 1 else None
        if axes is not None and axes.reshape(-1).tolist() == [-1] and edit.attribute(largest, "keepdims", 1):
            return choice, largest.inputs[0]
    return None


def _only_here(nodes: Sequence[ir.Node], graph: Graph) -> list[ir.Node]:
    """Refuse an attention whose scores or weights anybody else wants; nodes that ask for sizes known from elsewhere."""
    inside, measured = set(nodes), []
    for node in nodes:
        value = node.outputs[0]
        readers = list(dict.fromkeys(value.consumers()))
        if value.is_graph_output():
            raise Refused("the scores or the weights of the attention are an output of the graph")
        others = []
        for reader in readers:
            if edit.is_op(reader, "Shape") and _asked(reader, graph):
                measured.append(reader)
            elif reader not in inside and not _measures(reader, inside):
                others.append(reader)
        if len(others) > (node is nodes[-1]) and _guard(value, readers) is None:
            raise Refused("the scores or the weights of the attention are read elsewhere")
    return measured


def _asked(shape: ir.Node, graph: Graph) -> Shape | None:
    """The sizes that a Shape gives, if they are known and may be read from elsewhere."""
    dims = graph.dims(shape.inputs[0])
    if dims is None or shape.outputs[0].is_graph_output():
        return None
    return dims[edit.attribute(shape, "start", 0) : edit.attribute(shape, "end")] or None


def _measures(node: ir.Node, inside: set[ir.Node], depth: int = 6) -> bool:
    """Whether a node reads a shape that only the attention itself needs."""
    if depth == 6 and not edit.is_op(node, "Shape"):
        return False
    return depth > 0 and all(
        not value.is_graph_output()
        and all(n in inside or _measures(n, inside, depth - 1) for n in dict.fromkeys(value.consumers()))
        for value in node.outputs
    )


class _Attention:
    """One attention: its operands as places, its heads, and the operator in its place.

    Args:
        graph: The graph.
        scores: What it is taken of.
        second: The product of its result with values.
        side: At which input of that product the weights are.
        guarded: Whether NaN in the weights becomes 0.
    """

    def __init__(self, graph: Graph, scores: Scores, second: products.Product, side: int, guarded: bool) -> None:
        self.graph, self.scores, self.second, self.guarded = graph, scores, second, guarded
        keys = set(resolve(scores.axes[-1]))
        first = scores.product
        sides = [i for i in (0, 1) if keys & set(_flat(first.operands[i]))]
        if len(sides) != 1 or second.summed != keys:
            raise Refused("the values are not weighted along the axis of the softmax")
        k, q = sides[0], 1 - sides[0]
        self.places: dict[str, list[Place]] = {
            "q": list(trace(first.values[q], first.operands[q], graph)),
            "k": list(trace(first.values[k], first.operands[k], graph)),
            "v": list(trace(second.values[1 - side], second.operands[1 - side], graph)),
        }
        self.out = onwards(second.node, second.result, graph)
        self.heads = self._heads(keys)

    def _heads(self, keys: set[Leaf]) -> Heads:
        first, second = self.scores.product, self.second
        q, k, v = (self.places[role][0].axes for role in "qkv")
        inner = first.summed
        shared_q = set(_flat(q)) - inner
        queries = tuple(leaf for leaf in _flat(q) if leaf in shared_q - set(_flat(k)) and self._alone(leaf, q))
        outer = tuple(leaf for leaf in _flat(v) if leaf not in keys and leaf in set(_flat(second.result)) - shared_q)
        taken = {*inner, *queries, *keys, *outer}
        rest = tuple(leaf for leaf in _flat(q) if leaf not in taken)
        heads = self._merged(set(rest), inner, set(outer))
        if not heads:
            batch_axes = [axis for axis in settled(q) if set(axis) <= set(rest)]
            heads = tuple(leaf for axis in batch_axes[1:] for leaf in axis)
        batch = tuple(leaf for leaf in rest if leaf not in heads)
        copied = copies(self.places["k"]), copies(self.places["v"])
        here = [set(_flat(self.places[role][0].axes)) - copied[i] for i, role in enumerate("kv")]
        if not set(batch) <= here[0] & here[1]:
            raise Refused("keys or values are shared by the whole batch")
        shared = tuple(leaf for leaf in heads if leaf in here[0])
        if shared != tuple(leaf for leaf in heads if leaf in here[1]):
            raise Refused("keys and values have different heads")
        if heads[: len(shared)] != shared:
            raise Refused("the heads of the keys are repeated in another order than that of the queries")
        ordered = [tuple(leaf for leaf in _flat(q) if leaf in inner), tuple(leaf for leaf in _flat(k) if leaf in inner)]
        along = [tuple(leaf for leaf in _flat(k) if leaf in keys), tuple(leaf for leaf in _flat(v) if leaf in keys)]
        if ordered[0] != ordered[1] or along[0] != along[1]:
            raise Refused("queries, keys and values are not in one order")
        found = Heads(batch, heads, shared, queries, along[0], ordered[0], outer)
        if any(not isinstance(size(axis), int) for axis in (found.heads, found.inner, found.outer)):
            raise Refused("the number or the size of the heads is not known")
        everything = {*_flat(self.second.result)}
        if everything != {*batch, *heads, *queries, *outer}:
            raise Refused("the result has axes that queries and values do not have")
        return found

    def _alone(self, leaf: Leaf, q: Axes) -> bool:
        """Whether a leaf of the queries lies in the axis of their positions, not among batch and heads."""
        first = self.scores.product
        k_side = 0 if self.places["k"][0].value is first.values[0] else 1
        batch = len(first.result) - 2 if edit.is_op(first.node, "MatMul") else None
        if batch is not None:
            return leaf in resolve(first.result[-2 if k_side == 1 else -1])
        return True

    def _merged(self, rest: set[Leaf], inner: frozenset[Leaf], outer: set[Leaf]) -> Axis:
        """The batch leaves that lie in one axis with channels somewhere: heads."""
        for places, channels in ((self.places["q"], inner), (self.places["k"], inner), (self.places["v"], outer)):
            for place in reversed(places):
                for axis in settled(place.axes):
                    merged = tuple(leaf for leaf in axis if leaf in rest)
                    if merged and set(axis) & set(channels):
                        return self._with_copies(merged, rest)
        for _, axes in reversed(self.out):
            for axis in settled(axes):
                merged = tuple(leaf for leaf in axis if leaf in rest)
                if merged and set(axis) & outer:
                    return merged
        return ()

    def _with_copies(self, merged: Axis, rest: set[Leaf]) -> Axis:
        """Heads, and along which leaves keys or values are copied to them, in the order that queries have them."""
        copied = (copies(self.places["k"]) | copies(self.places["v"])) & rest
        return tuple(leaf for leaf in _flat(self.places["q"][0].axes) if leaf in {*merged, *copied})

    def replace(self) -> str:
        """Write the operator and remove what it replaces."""
        graph, scores, before = self.graph, self.scores, self.second.node
        dtype = graph.dtype(self.places["v"][0].value)
        if dtype not in DTYPES or graph.dtype(self.places["q"][0].value) != dtype:
            raise Refused(f"attention in {dtype.name.lower() if dtype else 'an unknown dtype'} is not covered")
        if graph.dtype(before.outputs[0]) != dtype:
            raise Refused("the attention changes its dtype")
        operands = Operands(graph, before, self.places, self.out, self.heads)
        plan = operands.plan([mask.value for mask in scores.masks])
        scale = scores.scale * plan.factor
        if scale <= 0:
            raise Refused("the scale of the scores is not positive")
        causal = plan.cache is None and masks.causal(scores, self.heads, dtype, graph)
        mask = None
        if not causal:
            places = [*self.places["k"], *self.places["q"]]
            mask = masks.build(scores, self.heads, places, self.guarded, dtype, before, graph)
        attributes: dict[str, float | int] = {"scale": scale, **({"is_causal": 1} if causal else {})}
        if scores.cap:
            attributes["softcap"] = scores.cap
        if scores.upcast is not None and scores.upcast != dtype:
            attributes["softmax_precision"] = int(scores.upcast)
        return operands.write(plan, mask, attributes)


def _flat(axes: Axes) -> Axis:
    return tuple(leaf for axis in axes for leaf in resolve(axis))


ATTENTION = Rule(
    {"attention": "Attention, with heads, scale, mask and repeated keys."}, ("Softmax", "Attention"), recognise
)
