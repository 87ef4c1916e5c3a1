"""Resolves the facts of a trace to leaves, and collects the groups."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from graphc import edit
from graphc.axes.algebra import Axis, Kind, digits, find, leaves, terms
from graphc.axes.exactness import zeros
from graphc.axes.group import Fixed, Group, Normaliser, Place
from graphc.axes.kinds import Signals
from graphc.axes.ragged import Ragged
from graphc.axes.trace import INTEGERS, Axes, Fact, Trace, node_name

Constant = tuple[ir.Value, ir.Node | None, Axes]
"""A constant, the reader whose own copy it is (None: everybody's), and its axes."""

NORMALISERS = {
    "RMSNormalization": "rms",
    "SimplifiedLayerNormalization": "rms",
    "SkipSimplifiedLayerNormalization": "rms",
    "ReduceMean": "mean",
    "LayerNormalization": "layer",
    "SkipLayerNormalization": "layer",
    "EmbedLayerNormalization": "layer",
    "GroupNormalization": "group",
    "GroupNorm": "group",
    "SkipGroupNorm": "group",
    "InstanceNormalization": "instance",
    "LpNormalization": "lp",
    "MeanVarianceNormalization": "layer",
    "BatchNormalization": "batch",
}
COMPENSATED = frozenset({"rms", "mean"})


class Collector:
    """One run over a trace.

    Attributes:
        groups: What can be cut, in the order of the first producing constant.
        fixed: What cannot, and why.
        reasons: Why a leaf cannot be cut.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.groups: list[Group] = []
        self.fixed: list[Fixed] = []
        self.reasons: dict[Axis, Fact] = {}
        self.key: dict[Axis, Axis] = {}
        self.members: dict[Axis, dict[Axis, int]] = {}
        self.names: set[str] = set()
        self.weights: dict[ir.Value, tuple[int, int]] = {}
        self.shares: dict[tuple[Axis, ir.Value, ir.Node | None, int], int] = {}

    def run(self) -> None:
        self._ties()
        by_leaf = self._facts()
        self.signals = Signals(self.trace, self._key)
        self.zeros = zeros(self.trace, self._key)
        constants = list(self.trace.constants())
        constants += [(v, None, axes) for v, axes in self.trace.axes.items() if axes and self._generated(v)]
        places = self._places(constants)
        roles = self._roles()
        free = [leaf for leaf in places if leaf not in self.reasons and leaf not in self.members]
        outer = Ragged(self.trace, free, self.key).blocks()
        drafts: list[tuple[Axis, list[Place], str]] = []
        order = {value: i for i, value in enumerate(self.trace.order)}
        for leaf, found in places.items():
            if leaf in self.reasons:
                continue
            built = [
                Place(v, a, roles.get((v, leaf), "produces"), off, st, ou, tree, by, self.members.get(leaf), leaf)
                for v, by, a, tree, off, st, ou, _ in found
            ]
            built.sort(key=lambda p: order.get(p.value, len(order)))
            drafts.append((leaf, built, self._name(leaf, built, found)))
        names = {leaf: name for leaf, _, name in drafts}
        first = {leaf: self._first(built) for leaf, built, _ in drafts}
        drafts.sort(key=lambda d: order.get(first[d[0]].value, len(order)))
        for leaf, built, name in drafts:
            self.groups.append(self._group(leaf, built, name, names, outer.get(leaf, ()), by_leaf[leaf]))
        self._fixed(constants)
        self._in_bodies()

    def _generated(self, value: ir.Value) -> bool:
        producer = value.producer()
        return edit.is_op(producer, "ConstantOfShape") and value not in self.trace.known

    def _ties(self) -> None:
        """Single positions belong to the leaf that they came from; leaves that share one are one group."""
        parent: dict[Axis, Axis] = {}

        def root(axis: Axis) -> Axis:
            while parent.setdefault(axis, axis) is not axis:
                axis = parent[axis]
            return axis

        for unit in self.trace.unifier.units:
            held = find(unit)
            assert unit.origin is not None
            if held.origin is not None:
                parent[root(unit.origin)] = root(held.origin)
        for unit in self.trace.unifier.units:
            held = find(unit)
            if held.origin is None:
                continue
            key = root(held.origin)
            self.key[held] = key
            numbers = self.members.setdefault(key, {})
            numbers.setdefault(held, len(numbers))

    def _key(self, leaf: Axis) -> Axis:
        return self.key.get(leaf, leaf)

    def _facts(self) -> dict[Axis, list[Fact]]:
        reasons = self.reasons
        by_leaf: dict[Axis, list[Fact]] = defaultdict(list)
        for fact in self.trace.facts:
            for leaf in leaves(fact.axis):
                key = self._key(leaf)
                if fact.what == "fixed":
                    reasons.setdefault(key, fact)
                else:
                    by_leaf[key].append(fact)
        return by_leaf

    def _size(self, leaf: Axis) -> int | None:
        size = len(self.members[leaf]) if leaf in self.members else leaf.size
        return size if isinstance(size, int) else None

    def _places(self, constants: list[Constant]) -> dict[Axis, list[Any]]:
        """By leaf, once a (constant, axis): constant, reader, axis, tree, offset, stride, outer, path in the tree."""
        found: dict[Axis, list[Any]] = defaultdict(list)
        for value, reader, axes in constants:
            for i, tree in enumerate(axes):
                # What is filled to sizes of the input, such as (batch sequence), cannot be cut along them.
                if not isinstance(find(tree).size, int):
                    continue
                seen: set[Axis] = set()
                for leaf, offset, stride, outer, path in _occurrences(tree):
                    key = self._key(leaf)
                    size = self._size(key)
                    if size is None or size < 2:
                        continue
                    entry = (key, value, reader, i)
                    self.shares[entry] = self.shares.get(entry, 0) + outer * stride
                    if key in seen:
                        continue
                    seen.add(key)
                    found[key].append((value, reader, i, tree, offset, stride, outer, path))
        return found

    def _roles(self) -> dict[tuple[ir.Value, Axis], str]:
        rank = {"produces": 0, "consumes": 1, "carries": 2}
        roles: dict[tuple[ir.Value, Axis], str] = {}
        for value, axis, role in self.trace.roles:
            for leaf in leaves(axis):
                key = (value, self._key(leaf))
                if key not in roles or rank[role] < rank[roles[key]]:
                    roles[key] = role
        return roles

    @staticmethod
    def _first(places: list[Place]) -> Place:
        """The place that names the group: the first producing matrix, else the first producing constant."""
        producing = [p for p in places if p.role == "produces"] or places
        for place in producing:
            shape = place.value.shape
            if shape is not None and sum(1 for d in shape if d != 1) > 1:
                return place
        return producing[0]

    def _name(self, leaf: Axis, places: list[Place], found: list[Any]) -> str:
        first = self._first(places)
        path = next(e[-1] for e in found if e[0] is first.value and e[1] is first.reader and e[2] == first.axis)
        name = f"{first.value.name}:{first.axis}" + "".join(f".{i}" for i in path)
        unique = name
        if name in self.names and first.reader is not None:
            unique = f"{name}@{node_name(first.reader)}"
        self.names.add(unique)
        return unique

    def _group(
        self,
        leaf: Axis,
        places: list[Place],
        name: str,
        names: dict[Axis, str],
        outer: tuple[Axis, ...],
        facts: list[Fact],
    ) -> Group:
        size = self._size(leaf)
        assert size is not None
        params = total = 0
        for place in places:
            if place.value not in self.weights:
                self.weights[place.value] = _weight(place.value)
            numel, nbytes = self.weights[place.value]
            dim = find(place.tree).size
            assert isinstance(dim, int)
            part = self.shares[leaf, place.value, place.reader, place.axis] / dim
            if leaf in self.members:
                part /= size
            params += round(numel * part)
            total += round(nbytes * part)
        normalisers = {
            f.source: Normaliser(f.source, NORMALISERS.get(f.source.op_type, "other"))
            for f in facts
            if f.what == "~" and f.source is not None
        }
        competing = [f.source for f in facts if f.what == "^" and f.source is not None]
        needed = [k for k in map(self._top, competing) if k]
        min_keep = max(needed, default=1)
        multiple_of = math.lcm(*(f.count for f in facts if f.what == "multiple"))
        constraints = []
        if outer:
            constraints.append("balanced: every block keeps equally many")
        if multiple_of > 1:
            constraints.append(f"a multiple of {multiple_of} must remain")
        if needed:
            constraints.append(f"at least {min_keep}: a top-k picks as many")
        reads = self._reads(leaf, facts)
        blocks = tuple(int(o.size) for o in outer if isinstance(o.size, int))
        return Group(
            name=name,
            size=size,
            kind=self.signals.kind(leaf, (n.kind for n in normalisers.values())),
            places=tuple(places),
            blocks=blocks,
            block_groups=tuple(names.get(o, "") for o in outer),
            params=params,
            bytes=total,
            min_keep=max(min_keep, multiple_of),
            multiple_of=multiple_of,
            constraints=tuple(constraints),
            normalisers=tuple(normalisers.values()),
            neutral=-math.inf if competing else 0.0,
            exact=all(n.kind in COMPENSATED for n in normalisers.values())
            and all(leaf in self.zeros.get(value, ()) for value in reads),
            reads=reads,
            leaf=leaf,
            outer=outer,
            numbers=self.members.get(leaf),
            subsets=self._subsets(leaf),
        )

    def _subsets(self, leaf: Axis) -> tuple[frozenset[int], ...]:
        """Units that are a whole axis somewhere, where that is not all of them: one of each set must remain."""
        numbers = self.members.get(leaf)
        if numbers is None:
            return ()
        found: set[frozenset[int]] = set()
        for axes in (*self.trace.axes.values(), *self.trace.copies.values()):
            for axis in axes or ():
                units = [numbers.get(unit) for unit in leaves(axis)]
                if None not in units and len(units) < len(numbers):
                    found.add(frozenset(u for u in units if u is not None))
        return tuple(sorted(found, key=sorted))

    def _top(self, node: ir.Node) -> int:
        if node.op_type == "TopK":
            k = self.trace.value_of(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
            held = edit.attribute(node, "k") if k is None else k.reshape(-1)[0]
            return held if isinstance(held, int) else 1
        if node.op_type == "MoE":
            return int(edit.attribute(node, "k", 1))
        return 0

    def _reads(self, leaf: Axis, facts: list[Fact]) -> tuple[ir.Value, ...]:
        """Operands of sums along the axis that no constant masks; of a product, one that is zero is enough."""
        by_node: dict[ir.Node, list[ir.Value]] = defaultdict(list)
        for fact in facts:
            if fact.what in ("summed", "~") and fact.source is not None and fact.operand is not None:
                by_node[fact.source].append(fact.operand)
        found: dict[ir.Value, None] = {}
        for operands in by_node.values():
            if not any(value in self.trace.roots for value in operands):
                dead = [value for value in operands if leaf in self.zeros.get(value, ())]
                found.update(dict.fromkeys(dead[:1] or operands))
        return tuple(found)

    def _fixed(self, constants: list[Constant]) -> None:
        for value, _, axes in constants:
            tensor = edit.tensor(value)
            if tensor is None or tensor.dtype in INTEGERS:
                continue
            for i, tree in enumerate(axes):
                # What is filled to sizes of the input, such as (batch sequence), cannot be cut along them.
                if not isinstance(find(tree).size, int):
                    continue
                seen: set[Axis] = set()
                single = [leaf for leaf in leaves(tree) if leaf.size == 1 and self._key(leaf) is leaf]
                if len(single) > 1:
                    reason = "single indices of it are read on their own (a gather, slice or concat)"
                    self.fixed.append(Fixed(value, i, len(single), reason, ""))
                for leaf in leaves(tree):
                    key = self._key(leaf)
                    fact = self.reasons.get(key)
                    size = self._size(key)
                    if key in seen or fact is None or size is None or size < 2:
                        continue
                    seen.add(key)
                    self.fixed.append(Fixed(value, i, size, fact.reason, fact.node))

    def _in_bodies(self) -> None:
        """Weights in the bodies of control flow are whole: bodies are not analysed."""
        for node in self.trace.graph:
            for body in edit.subgraphs(node):
                for graph in (body, *body.subgraphs()):
                    made = (out for inner in graph for out in inner.outputs if inner.op_type == "Constant")
                    for value in (*graph.initializers.values(), *made):
                        tensor = edit.tensor(value)
                        if tensor is None or tensor.dtype in INTEGERS:
                            continue
                        reason = f"the weight lies in a body of {node.op_type}, which is not analysed"
                        for i, size in enumerate(tensor.shape.numpy()):
                            if size > 1:
                                self.fixed.append(Fixed(value, i, size, reason, node_name(node)))


def _weight(value: ir.Value) -> tuple[int, int]:
    """Elements and bytes of a constant."""
    tensor = edit.tensor(value)
    return (int(tensor.size), int(tensor.nbytes)) if tensor is not None else (0, 0)


def _occurrences(tree: Axis) -> Iterator[tuple[Axis, int, int, int, tuple[int, ...]]]:
    """Leaves of a static tree with offset, stride, number of outer repeats, and path."""

    def walk(
        axis: Axis, offset: int, stride: int, outer: int, path: tuple[int, ...]
    ) -> Iterator[tuple[Axis, int, int, int, tuple[int, ...]]]:
        node = find(axis)
        if node.kind is Kind.LEAF:
            yield node, offset, stride, outer, path
        elif node.kind is Kind.SUM:
            at = offset
            for i, part in enumerate(terms(node)):
                yield from walk(part, at, stride, outer, (*path, i))
                assert isinstance(part.size, int)
                at += part.size * stride
        else:
            inner = stride * int(node.size)  # type: ignore[arg-type]
            before = outer
            for i, part in enumerate(digits(node)):
                assert isinstance(part.size, int)
                inner //= part.size
                yield from walk(part, offset, inner, before, (*path, i))
                before *= part.size

    yield from walk(tree, 0, 1, 1, ())
