"""Sums of products of one source in which everything is scaled by channel, and constants are added anywhere.

So do DoRA's branches look, whose norms exporters have folded: ``r + (m - 1) (r - b) + m s (x A) B`` with
``r = x W + b``, which is ``x (m W + m s A B) + b``. So do adapters with a bias of their own, and products that work on
rows behind a Reshape (Conv1D of GPT-2) beside branches that do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array, attribute, is_op
from graphc.lora.branch import Path, step, ways
from graphc.lora.products import Product, product
from graphc.rewrites.base import FLOATS, Refused, Rewriter
from graphc.shapes import fold
from graphc.shapes.kernels import CannotFold

_MOST = 64
"""Nodes that compute a factor, at most."""

Factor = float | Array
"""One for all channels, or one for each."""


@dataclass(frozen=True)
class Term:
    """A product, or a chain of them, in a sum.

    Attributes:
        last: The product that gives the result.
        factor: What it is multiplied by.
    """

    last: Product
    factor: Factor


@dataclass(frozen=True)
class Region:
    """A value that is a sum of scaled products and constants.

    Attributes:
        terms: The products.
        constants: What is added, with the products that it is added to.
        values: Every result on the way, this one included.
        reshapes: Nodes that only change how rows are arranged.
        computing: Nodes that compute factors from constants alone (norms of DoRA).
    """

    terms: tuple[Term, ...]
    constants: tuple[tuple[Factor, frozenset[ir.Node]], ...] = ()
    values: frozenset[ir.Value] = frozenset()
    reshapes: tuple[ir.Node, ...] = ()
    computing: frozenset[ir.Node] = frozenset()

    @property
    def nodes(self) -> frozenset[ir.Node]:
        """The products."""
        return frozenset(term.last.node for term in self.terms)

    def scaled(self, factor: Factor) -> Region:
        """The region times a factor."""
        return replace(
            self,
            terms=tuple(replace(term, factor=term.factor * factor) for term in self.terms),
            constants=tuple((constant * factor, of) for constant, of in self.constants),
        )


@dataclass(frozen=True)
class Match:
    """A region that is one product with adapters.

    Attributes:
        base: The product.
        scale: What the product is multiplied by where it is computed.
        factor: What its weight is to be multiplied by, relative to that.
        paths: The adapters, with the factors of their channels.
        scales: What they are multiplied by, relative to the product.
        constant: What is added to everything.
        region: All of it.
    """

    base: Product
    scale: float
    factor: Factor
    paths: tuple[Path, ...]
    scales: tuple[float, ...]
    constant: Factor
    region: Region


@dataclass
class Reader:
    """Reads values as regions.

    Attributes:
        rewriter: Knows shapes.
        known: What was read already.
        computed: Constants that the graph computes, with the nodes that do so; None for values that are none.
    """

    rewriter: Rewriter
    known: dict[ir.Value, Region | None] = field(default_factory=dict)
    computed: dict[ir.Value, tuple[Array, frozenset[ir.Node]] | None] = field(default_factory=dict)

    def constant(self, value: ir.Value) -> tuple[Array, frozenset[ir.Node]] | None:
        """A small constant, be it stored or computed by the graph, with the nodes that compute it."""
        held = edit.tensor(value)
        if held is not None:
            return (held.numpy(), frozenset()) if held.size <= edit.SMALL and held.dtype in FLOATS else None
        if value not in self.computed:
            self.computed[value] = self._compute(value)
        return self.computed[value]

    def _compute(self, value: ir.Value) -> tuple[Array, frozenset[ir.Node]] | None:
        nodes = _computing(value)
        shape = self.rewriter.shape(value) if nodes else None
        sizes = [dim for dim in shape if isinstance(dim, int)] if shape is not None else []
        if shape is None or len(sizes) < len(shape) or math.prod(sizes) > edit.SMALL:
            return None
        arrays: dict[ir.Value, Array] = {}
        try:
            for node in nodes:
                inputs = [None if v is None else arrays[v] if v in arrays else edit.constant(v) for v in node.inputs]
                made = fold.evaluate(node, inputs, self.rewriter.version)
                arrays |= dict(zip(node.outputs, made, strict=False))
        except CannotFold:
            return None
        found = arrays[value]
        return (found, frozenset(nodes)) if found.dtype.kind == "f" else None

    def read(self, value: ir.Value, depth: int = 0) -> Region | None:
        """A value as a region; None if it is none."""
        if value not in self.known:
            self.known[value] = None  # while it is being read
            found = self._read(value, depth) if depth < 24 else None
            self.known[value] = replace(found, values=found.values | {value}) if found is not None else None
        return self.known[value]

    def _read(self, value: ir.Value, depth: int) -> Region | None:
        node = value.producer()
        if node is None or node.domain or value is not node.outputs[0]:
            return None
        made = product(node)
        if made is not None:
            return self._product(made, depth)
        match node.op_type:
            case "Add" | "Sum" | "Sub":
                return self._sum(node, depth)
            case "Mul" | "Div":
                return self._scaled(node, depth)
            case "Reshape":
                return self._reshaped(node, depth)
        found = step(value)
        if found is None or found.casts or not isinstance(found.scale, float):
            return None
        inner = self.read(found.value, depth + 1)
        return inner.scaled(found.scale) if inner is not None else None

    def _product(self, made: Product, depth: int) -> Region | None:
        if made.weight.problem or made.weight.casts:
            return None
        region = Region((Term(made, 1.0),))
        if made.bias is None:
            return region
        beta = float(attribute(made.node, "beta", 1.0))
        found = self._vector(made.bias, region, bias=True)
        if found is not None:
            return replace(region, constants=((beta * found[0], region.nodes),), computing=found[1])
        inner = self.read(made.bias, depth + 1) if made.kind != "image" else None
        return _joined([region, inner.scaled(beta)]) if inner is not None else None

    def _sum(self, node: ir.Node, depth: int) -> Region | None:
        found, added = list[Region](), list[tuple[ir.Value, float]]()
        for i, data in enumerate(node.inputs):
            if data is None:
                return None
            sign = -1.0 if node.op_type == "Sub" and i == 1 else 1.0
            if self.constant(data) is not None:
                added.append((data, sign))
                continue
            inner = self.read(data, depth + 1)
            if inner is None:
                return None
            found.append(inner.scaled(sign))
        region = _joined(found)
        for data, sign in added:
            constant = self._vector(data, region) if region is not None else None
            if region is None or constant is None:
                return None
            constants = (*region.constants, (sign * constant[0], region.nodes))
            region = replace(region, constants=constants, computing=region.computing | constant[1])
        return region

    def _scaled(self, node: ir.Node, depth: int) -> Region | None:
        first, second = node.inputs[:2]
        if first is not None and self.constant(first) is not None and node.op_type == "Mul":
            first, second = second, first
        if first is None or second is None or self.constant(second) is None:
            return None
        inner = self.read(first, depth + 1)
        found = self._vector(second, inner) if inner is not None else None
        if inner is None or found is None:
            return None
        factor = found[0]
        if node.op_type == "Div":
            if not np.all(factor):
                return None
            factor = 1 / factor
        return replace(inner.scaled(factor), computing=inner.computing | found[1])

    def _reshaped(self, node: ir.Node, depth: int) -> Region | None:
        data = node.inputs[0]
        if data is None or not self.keeps_channels(node):
            return None
        inner = self.read(data, depth + 1)
        if inner is None or inner.terms[0].last.kind != "rows":
            return None
        return replace(inner, reshapes=(*inner.reshapes, node))

    def _vector(
        self, value: ir.Value, region: Region, *, bias: bool = False
    ) -> tuple[Factor, frozenset[ir.Node]] | None:
        """A constant as one number, or one for each channel of a region; None if it is neither."""
        found = self.constant(value)
        last = region.terms[0].last
        channels = last.channels[1]
        if found is None or found[0].size not in (1, channels):
            return None
        shape, array = found[0].shape, found[0].astype(np.float64).reshape(-1)
        if array.size == 1:
            return (float(array[0]), found[1]) if channels != 1 else None
        from_end = len(last.weight.shape) - 1 if last.kind == "image" and not bias else 1
        fits = len(shape) >= from_end and shape[-from_end] == channels
        return (array, found[1]) if fits else None

    def keeps_channels(self, node: ir.Node) -> bool:
        """Whether a Reshape leaves the last axis as it is."""
        before, after = self.rewriter.shape(node.inputs[0]), self.rewriter.shape(node.outputs[0])
        if before is None or after is None or not len(before) or not len(after):
            return False
        return isinstance(before[-1], int) and before[-1] == after[-1] and before[-1] > 0


def _source(value: ir.Value) -> ir.Value:
    """What is read, before its rows are arranged: with as many channels, rows of any shape are in the same order."""
    node = value.producer()
    while node is not None and is_op(node, "Reshape") and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _joined(regions: Sequence[Region]) -> Region | None:
    if not regions or len({r.terms[0].last.kind == "image" for r in regions}) > 1:
        return None
    return Region(
        tuple(term for r in regions for term in r.terms),
        tuple(constant for r in regions for constant in r.constants),
        frozenset().union(*(r.values for r in regions)),
        tuple(dict.fromkeys(node for r in regions for node in r.reshapes)),
        frozenset().union(*(r.computing for r in regions)),
    )


def _computing(value: ir.Value) -> list[ir.Node]:
    """The nodes that compute a value from constants alone, in order; empty if it depends on anything else."""
    order: list[ir.Node] = []
    seen: set[ir.Node] = set()

    def visit(value: ir.Value) -> bool:
        if edit.tensor(value) is not None:
            return True
        node = value.producer()
        if node is None or node.domain or len(seen) > _MOST or any(edit.subgraphs(node)) or node.op_type in fold.KEPT:
            return False
        if node in seen:
            return True
        seen.add(node)
        if not fold.deterministic(node) or not all(v is None or visit(v) for v in node.inputs):
            return False
        order.append(node)
        return True

    return order if visit(value) else []


def matched(root: ir.Node, reader: Reader) -> Match | None:
    """The product with adapters that a sum is, where it is more than a plain sum of the two.

    Raises:
        Refused: It looks like one, and cannot be folded.
    """
    region = reader.read(root.outputs[0])
    if region is None or len(region.nodes) < 2:
        return None
    for last in dict.fromkeys(term.last.node for term in region.terms):
        found = _with_base(last, region)
        if found is not None and not _is_plain(found):
            _check(root, found, reader)
            return found
    return None


def _with_base(node: ir.Node, region: Region) -> Match | None:
    own = [term for term in region.terms if term.last.node is node]
    base = own[0].last
    first = next(iter(ways(base)))
    source, least = _source(first.source), min(base.channels)
    if first.scale == 0:
        return None
    paths, scales = [], []
    for term in region.terms:
        if term.last.node is node:
            continue
        chain = next((w for w in ways(term.last) if len(w.products) > 1 and _source(w.source) is source), None)
        if chain is not None and chain.products[-1].channels[0] != base.channels[0]:
            return None
        if chain is None or chain.kind != first.kind or chain.problem or chain.casts or chain.ranks:
            return None
        if min(p.channels[1] for p in chain.products[1:]) >= least or chain.channels != base.channels[1]:
            return None
        if any(p.bias is not None for p in chain.products[1:]):
            return None
        factor = term.factor
        if not isinstance(factor, float):
            old = chain.diagonals[0]
            chain = replace(chain, diagonals=(factor if old is None else old * factor, *chain.diagonals[1:]))
            factor = 1.0
        paths.append(chain)
        scales.append(chain.scale * factor / first.scale)
    if not paths or first.casts:
        return None
    total = sum((term.factor for term in own), 0.0)
    constant: Factor = 0.0
    for value, _ in region.constants:
        constant = constant + value
    return Match(base, first.scale, total, tuple(paths), tuple(scales), constant, region)


def _is_plain(found: Match) -> bool:
    """Whether there is nothing in it but a product, its bias, and scaled branches: that is folded elsewhere."""
    own = sum(term.last.node is found.base.node for term in found.region.terms)
    inside = any(found.base.node not in of for _, of in found.region.constants)
    return own == 1 and isinstance(found.factor, float) and not inside and not _arranged(found)


def _arranged(found: Match) -> bool:
    """Whether rows are arranged in one way here and in another there."""
    first = ways(found.base)[0].source
    return bool(found.region.reshapes) or any(path.source is not first for path in found.paths)


def _check(root: ir.Node, found: Match, reader: Reader) -> None:
    """See that the region is nobody else's, and that its parts have one shape."""
    region = found.region
    inside = {value.producer() for value in region.values}
    for path in found.paths:
        inside |= {value.producer() for value in path.values}
        inside |= {each.node for each in path.products}
    for value in {*region.values, *(v for path in found.paths for v in path.values)} - {root.outputs[0]}:
        if value.is_graph_output() or any(use.node not in inside for use in value.uses()):
            raise Refused("the branch has an intermediate result that is read elsewhere")
    everything = inside | region.computing
    for node in _reading(found.base.weight.value, region.computing):
        if any(v.is_graph_output() or any(use.node not in everything for use in v.uses()) for v in node.outputs):
            raise Refused("the adapter's norm is read elsewhere")
    if any(node is not None and node.graph is not root.graph for node in everything):
        raise Refused("the adapter is in another graph than the product")
    held = found.base.weight.held
    assert held is not None
    used = {p.weight.held.dtype for path in found.paths for p in path.products if p.weight.held is not None}
    if used - {held.dtype}:
        raise Refused("the branch is computed in another dtype")
    if _arranged(found):
        # All have as many rows, so where one has the shape of the sum, no other is broadcast.
        shape = reader.rewriter.shape(root.outputs[0])
        rows = reader.rewriter.shape(region.reshapes[-1].outputs[0]) if region.reshapes else shape
        branches = [reader.rewriter.shape(path.values[-1]) for path in found.paths]
        if shape is None or rows is None or len(rows) != len(shape):
            raise Refused("the product's rows are arranged in another way than the adapter's")
        if any(branch is None or not _alike(shape, branch) for branch in branches):
            raise Refused("the product's rows are arranged in another way than the adapter's")


def _reading(value: ir.Value, nodes: frozenset[ir.Node]) -> set[ir.Node]:
    """Which nodes need a value, directly or not."""
    found: set[ir.Node] = set()
    todo = [value]
    while todo:
        for use in todo.pop().uses():
            if use.node in nodes and use.node not in found:
                found.add(use.node)
                todo += use.node.outputs
    return found


def _alike(first: ir.Shape, second: ir.Shape) -> bool:
    """Whether all axes but the last are known to be the same."""
    a, b = list(first)[:-1], list(second)[:-1]
    return len(a) == len(b) and all(
        x == y if isinstance(x, int) else isinstance(y, ir.SymbolicDim) and x.value == y.value is not None
        for x, y in zip(a, b, strict=True)
    )


def candidates(graph: ir.Graph) -> Iterator[ir.Node]:
    """Where regions may end, the last first; nowhere if nothing is multiplied twice."""
    if not any(_is_second(node) for node in graph):
        return
    for node in reversed(graph):
        if not node.domain and node.op_type in ("Add", "Sub", "Sum"):
            yield node


def _is_second(node: ir.Node) -> bool:
    """Whether a node is a product of a product through fewer channels than it has: the end of an adapter's branch."""
    if node.op_type not in ("MatMul", "Gemm", "Conv") or node.domain:
        return False
    last = product(node)
    longer = ways(last)[1:] if last is not None else []
    return any(min(p.channels[1] for p in way.products[1:]) < max(way.products[0].channels) for way in longer)
