"""Sums of products of one source in which everything is scaled by channel, and constants are added anywhere.

So do DoRA's branches look, whose norms exporters have folded: ``r + (m - 1) (r - b) + m s (x A) B`` with
``r = x W + b``, which is ``x (m W + m s A B) + b``. So do adapters with a bias of their own, and products that work on
rows behind a Reshape (Conv1D of GPT-2) beside branches that do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array, attribute, is_op
from graphc.rewrites.base import FLOATS, Refused, Rewriter, dims
from graphc.rewrites.branch import Path, step, ways
from graphc.rewrites.products import Product, product

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
    """

    terms: tuple[Term, ...]
    constants: tuple[tuple[Factor, frozenset[ir.Node]], ...] = ()
    values: frozenset[ir.Value] = frozenset()
    reshapes: tuple[ir.Node, ...] = ()

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
    """

    rewriter: Rewriter
    known: dict[ir.Value, Region | None] = field(default_factory=dict)

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
        constant = _vector(made.bias, region, bias=True)
        if constant is not None:
            return replace(region, constants=((beta * constant, region.nodes),))
        inner = self.read(made.bias, depth + 1) if made.kind != "image" else None
        return _joined([region, inner.scaled(beta)]) if inner is not None else None

    def _sum(self, node: ir.Node, depth: int) -> Region | None:
        found, added = list[Region](), list[tuple[ir.Value, float]]()
        for i, data in enumerate(node.inputs):
            if data is None:
                return None
            sign = -1.0 if node.op_type == "Sub" and i == 1 else 1.0
            if edit.tensor(data) is not None:
                added.append((data, sign))
                continue
            inner = self.read(data, depth + 1)
            if inner is None:
                return None
            found.append(inner.scaled(sign))
        region = _joined(found)
        for data, sign in added:
            constant = _vector(data, region) if region is not None else None
            if region is None or constant is None:
                return None
            region = replace(region, constants=(*region.constants, (sign * constant, region.nodes)))
        return region

    def _scaled(self, node: ir.Node, depth: int) -> Region | None:
        first, second = node.inputs[:2]
        if first is not None and edit.tensor(first) is not None and node.op_type == "Mul":
            first, second = second, first
        if first is None or second is None or edit.tensor(second) is None:
            return None
        inner = self.read(first, depth + 1)
        factor = _vector(second, inner) if inner is not None else None
        if inner is None or factor is None:
            return None
        if node.op_type == "Div":
            if not np.all(factor):
                return None
            factor = 1 / factor
        return inner.scaled(factor)

    def _reshaped(self, node: ir.Node, depth: int) -> Region | None:
        data = node.inputs[0]
        if data is None or not self.keeps_channels(node):
            return None
        inner = self.read(data, depth + 1)
        if inner is None or inner.terms[0].last.kind != "rows":
            return None
        return replace(inner, reshapes=(*inner.reshapes, node))

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
    )


def _vector(value: ir.Value, region: Region, *, bias: bool = False) -> Factor | None:
    """A constant as one number, or one for each channel of a region; None if it is neither."""
    held = edit.tensor(value)
    last = region.terms[0].last
    channels = last.channels[1]
    if held is None or held.dtype not in FLOATS or held.size not in (1, channels):
        return None
    array = held.numpy().astype(np.float64).reshape(-1)
    if held.size == 1:
        return float(array[0]) if channels != 1 else None
    from_end = len(last.weight.shape) - 1 if last.kind == "image" and not bias else 1
    shape = dims(held)
    return array if len(shape) >= from_end and shape[-from_end] == channels else None


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
        for each in path.products:
            inside.add(each.node)
    for value in {*region.values, *(v for path in found.paths for v in path.values)} - {root.outputs[0]}:
        if value.is_graph_output() or any(use.node not in inside for use in value.uses()):
            raise Refused("the branch has an intermediate result that is read elsewhere")
    if any(node is not None and node.graph is not root.graph for node in inside):
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


def _alike(first: ir.Shape, second: ir.Shape) -> bool:
    """Whether all axes but the last are known to be the same."""
    a, b = list(first)[:-1], list(second)[:-1]
    return len(a) == len(b) and all(
        x == y if isinstance(x, int) else isinstance(y, ir.SymbolicDim) and x.value == y.value is not None
        for x, y in zip(a, b, strict=True)
    )


def candidates(graph: ir.Graph) -> Iterator[ir.Node]:
    """Where regions may end, the last first."""
    for node in reversed(graph):
        if not node.domain and node.op_type in ("Add", "Sub", "Sum"):
            yield node
