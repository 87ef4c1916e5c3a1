"""What a group is called, from the structure around it: one table, no architecture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import onnx_ir as ir

from graphc.axes.algebra import Axis, find, leaves
from graphc.axes.algebra import siblings as siblings_of
from graphc.axes.notation import Ellipsis_
from graphc.axes.words import words

if TYPE_CHECKING:
    from graphc.axes.apply import Application
    from graphc.axes.trace import Trace

TABLE: tuple[tuple[str, str], ...] = (
    ("expert", "a top-k chooses along it, or chosen indices look it up"),
    (
        "head",
        "a batch axis of a product of two activations (or a head axis of a fused attention), outside of digits",
    ),
    (
        "head_dim",
        "a digit inside a head, that two activations are multiplied along or that such a product carries",
    ),
    ("width", "a layer or RMS normalisation averages along it, or an embedding table produces it"),
    ("channel", "a channel of a convolution"),
    ("width", "two activations are added along it (a residual stream without convolutions)"),
    ("rank", "between two matrix products with nothing but movement and scaling by scalars in between"),
    ("neuron", "everything else"),
)
"""Kinds in the order in which they are tried, each with what defines it."""

CONVOLUTIONS = words("Conv ConvTranspose ConvInteger QLinearConv DeformConv FusedConv NhwcConv NhwcFusedConv")
FUSED = words("Attention MultiHeadAttention GroupQueryAttention DecoderMaskedMultiHeadAttention")
LINEAR = words(
    "MatMul Gemm Einsum FusedMatMul Conv Transpose Reshape Flatten Squeeze Unsqueeze Identity Cast Dropout "
    "MatMulNBits MatMulInteger DequantizeLinear QuantizeLinear Split Slice"
)
STREAM_NORMS = frozenset({"mean", "rms", "layer"})


class Signals:
    """What the nodes around a leaf say about its role."""

    def __init__(self, trace: Trace, key: Callable[[Axis], Axis]) -> None:
        self.trace, self.key = trace, key
        self.of: dict[Axis, set[str]] = defaultdict(set)
        self._seen: set[tuple[str, Axis]] = set()
        self.added: dict[Axis, list[ir.Node]] = defaultdict(list)
        for node, application in trace.bound.items():
            self._node(node, application)
        heads = {leaf for leaf, found in self.of.items() if "batch" in found}
        dims = {leaf for leaf, found in self.of.items() if "multiplied" in found}
        for _, _, axes in trace.constants():
            self._inside(list(axes), heads, dims)

    def kind(self, leaf: Axis, normalisers: Iterable[str]) -> str:
        """The kind of a leaf whose units the given kinds of normalisers count."""
        found = self.of.get(leaf, set())
        if "chosen" in found:
            return "expert"
        if "fused head" in found or ("batch" in found and "outside" in found):
            return "head"
        if "fused dim" in found or ("multiplied" in found and "inside" in found):
            return "head_dim"
        if STREAM_NORMS & set(normalisers) or "embedded" in found:
            return "width"
        if "multiplied" in found and "beside" in found:
            return "head_dim"
        if "channel" in found:
            return "channel"
        if "added" in found and any(_skips(node) for node in self.added[leaf]):
            return "width"
        return "neuron" if "bent" in found else "rank"

    def _add(self, signal: str, axes: Iterable[Axis]) -> None:
        for axis in axes:
            root = find(axis)
            if (signal, root) not in self._seen:
                self._seen.add((signal, root))
                for leaf in leaves(root):
                    self.of[self.key(leaf)].add(signal)

    def _node(self, node: ir.Node, application: Application) -> None:
        op, trace, names = node.op_type, self.trace, application.names
        kept = set(application.names_in(application.rule.outputs))
        if application.consumed:
            looked_up = {p.indexes for p in application.rule.inputs if p.indexes}
            self._add("chosen", (names[n] for n in looked_up if n in names))
        if op in ("TopK", "MoE"):
            self._add("chosen", [f.axis for f in trace.facts_of(node) if f.what == "^"])
        if op in CONVOLUTIONS:
            self._add("channel", (names[n] for n in ("g", "i", "o") if n in names))
        if op in FUSED:
            self._add("fused head", (names[n] for n in ("h", "r") if n in names))
            self._add("fused dim", (names[n] for n in ("d", "v", "e") if n in names))
        if op == "Gather" and not application.consumed:
            data = node.inputs[0]
            if data in trace.roots:
                self._add("embedded", (axis for n, axis in names.items() if n in kept))
        activations = [v for v in node.inputs if v is not None and v not in trace.roots and v not in trace.known]
        summed = [n for n, used in application.operands.items() if n not in kept and len(used) > 1]
        if summed and len(activations) == len([v for v in node.inputs if v is not None]) and op not in FUSED:
            self._add("multiplied", (names[n] for n in names if n in summed))
            for name, used in application.operands.items():
                if name in kept and name in names:
                    self._add("batch" if len(used) > 1 else "multiplied", [names[name]])
            if any(isinstance(t, Ellipsis_) for t in application.rule.inputs[0].terms):
                self._add("batch", application.batch)
        if op == "Add" and len(activations) == 2:
            self._add("added", trace.axes.get(node.outputs[0]) or ())
            for axis in trace.axes.get(node.outputs[0]) or ():
                for leaf in leaves(axis):
                    self.added[self.key(leaf)].append(node)
        scaled = op in ("Mul", "Div") and any(v in trace.roots and not trace.at(v, node) for v in node.inputs if v)
        if op not in LINEAR and not scaled and not all(o in trace.roots for o in node.outputs):
            for out in node.outputs:
                self._add("bent", trace.axes.get(out) or ())

    def _inside(self, axes: list[Axis], heads: set[Axis], dims: set[Axis]) -> None:
        """Heads and head dimensions are side by side in the weights that make them."""
        for i, axis in enumerate(axes):
            around = [leaf for j, other in enumerate(axes) if j != i for leaf in leaves(other)]
            for leaf, siblings in siblings_of(axis):
                if leaf not in dims:
                    continue
                for near, signal in ((siblings, "inside"), (around, "beside")):
                    for head in near:
                        if head in heads:
                            self.of[self.key(leaf)].add(signal)
                            self.of[self.key(head)].add("outside")


def _skips(add: ir.Node, limit: int = 400) -> bool:
    """Whether one operand of an addition was computed from the other: a residual connection."""
    first, second = add.inputs[0], add.inputs[1]
    for start, goal in ((first, second), (second, first)):
        todo, seen = [start], {start}
        while todo and len(seen) < limit:
            value = todo.pop()
            node = None if value is None else value.producer()
            for earlier in () if node is None else node.inputs:
                if earlier is goal:
                    return True
                if earlier not in seen:
                    seen.add(earlier)
                    todo.append(earlier)
    return False
