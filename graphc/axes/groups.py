"""What must be cut together, what cannot be cut, and why: the result of running the rules over a graph.

``analyse`` reads no weights, only shapes and small integer constants, and never changes the model.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes.algebra import Axis, Kind, digits, find, leaves, siblings, terms
from graphc.axes.exactness import zeros
from graphc.axes.kinds import Signals
from graphc.axes.trace import INTEGERS, Axes, Fact, Trace, node_name

Array = np.ndarray[Any, np.dtype[Any]]


Constant = tuple[ir.Value, ir.Node | None, Axes]
"""A constant, the reader whose own copy it is (None: everybody's), and its axes."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where a group occurs in a constant.

    Attributes:
        value: The constant: an initializer, or the output of a Constant or ConstantOfShape node.
        axis: Which of its axes.
        reader: The node whose own copy of a shared constant this is; None if all readers are meant.
        role: ``"produces"``: zeros here make the unit zero. ``"consumes"``: zeros here make the reader ignore it.
            ``"carries"``: it is cut along, but its zeros mean nothing (variances, divisors, scales, tables).
        offset, stride, outer: Unit ``u`` lies at ``offset + o * size * stride + u * stride + i`` for ``o < outer``
            and ``i < stride``; of the first occurrence, and meaningless where indices are reordered.
        tree: The axis tree, for the algebra of cuts.
    """

    value: ir.Value
    axis: int
    role: str
    offset: int
    stride: int
    outer: int
    tree: Axis
    reader: ir.Node | None
    _numbers: dict[Axis, int] | None
    _leaf: Axis

    @cached_property
    def units(self) -> Array:
        """The unit of every position along the axis; -1 where it belongs to no unit of this group. Shape (dim,)."""
        return unit_map(self.tree, self._leaf, self._numbers)

    def indices(self, unit: int) -> Array:
        """The positions along the axis that belong to a unit."""
        return np.flatnonzero(self.units == unit)


@dataclass(frozen=True)
class Normaliser:
    """A node that divides by a count along the axis of a group.

    Attributes:
        node: The node.
        kind: ``"mean"`` and ``"rms"`` can be kept exact by a cut; ``"layer"``, ``"group"``, ``"instance"`` and
            ``"batch"`` cannot.
    """

    node: ir.Node
    kind: str


@dataclass(frozen=True, eq=False)
class Group:
    """The places that must keep the same indices.

    Attributes:
        name: First producing initializer, axis, and part of the axis if it has several.
        size: Number of units.
        kind: ``channel``, ``head``, ``head_dim``, ``neuron``, ``width``, ``expert`` or ``rank``.
        places: Where it occurs in constants, in the order of their first use.
        blocks: Not empty where the units are digits inside blocks that may each keep other units, equally many
            ("balanced"): the sizes of the blocks' axes. A mask then has shape ``(size,)`` or ``(*blocks, size)``.
        block_groups: The groups whose units the blocks are; "" where the blocks are fixed.
        params, bytes: Elements and bytes of constants that one unit carries, over all blocks.
        min_keep: How many units must remain.
        multiple_of: What the number of remaining units must be a multiple of.
        constraints: All constraints in words.
        normalisers: Nodes that divide by a count of the units.
        neutral: What a removed unit must have carried where units compete: 0, or -inf for experts.
        exact: Whether a cut of dead units computes the same.
        reads: Activations at which the unit itself must be zero, because no weight of the reader masks it.
    """

    name: str
    size: int
    kind: str
    places: tuple[Place, ...]
    blocks: tuple[int, ...] = ()
    block_groups: tuple[str, ...] = ()
    params: int = 0
    bytes: int = 0
    min_keep: int = 1
    multiple_of: int = 1
    constraints: tuple[str, ...] = ()
    normalisers: tuple[Normaliser, ...] = ()
    neutral: float = 0.0
    exact: bool = True
    reads: tuple[ir.Value, ...] = ()
    leaf: Axis = field(repr=False, default_factory=lambda: Axis(0))
    outer: tuple[Axis, ...] = field(repr=False, default=())
    numbers: dict[Axis, int] | None = field(repr=False, default=None)
    subsets: tuple[frozenset[int], ...] = field(repr=False, default=())


@dataclass(frozen=True)
class Fixed:
    """A part of an axis of a constant that cannot be cut.

    Attributes:
        value, axis: The constant and its axis.
        size: Number of indices.
        reason: Why, in plain words.
        node: The node that says so; "" for the model's interface.
    """

    value: ir.Value
    axis: int
    size: int
    reason: str
    node: str


def unit_map(tree: Axis, leaf: Axis, numbers: dict[Axis, int] | None) -> Array:
    """The index along ``leaf`` of every position of an axis, -1 where the position has none.

    Args:
        tree: The axis, of static size.
        leaf: A leaf of it.
        numbers: For a leaf with index ties, the unit of each of its single positions.
    """
    node = find(tree)
    assert isinstance(node.size, int)
    if node.kind is Kind.LEAF:
        if numbers is not None:
            return np.full(node.size, numbers.get(node, -1), dtype=np.int64)
        return np.arange(node.size) if node is leaf else np.full(node.size, -1)
    if node.kind is Kind.SUM:
        return np.concatenate([unit_map(part, leaf, numbers) for part in node.parts])
    result = np.zeros(1, dtype=np.int64) - 1
    for part in node.parts:
        own = unit_map(part, leaf, numbers)
        result = np.maximum(np.repeat(result, len(own)), np.tile(own, len(result)))
    return result


class Groups:
    """Everything ``analyse`` found.

    Attributes:
        model: The model that was analysed.
        groups: What can be cut, in the order of the first producing constant.
        fixed: What cannot, and why.
    """

    def __init__(self, model: ir.Model, trace: Trace) -> None:
        self.model = model
        self.trace = trace
        self.groups: list[Group] = []
        self.fixed: list[Fixed] = []
        self._reasons: dict[Axis, Fact] = {}
        _Builder(self).run()
        self._by_name = {group.name: group for group in self.groups}

    def __getitem__(self, name: str) -> Group:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def of(self, value: ir.Value) -> list[tuple[Group, Place]]:
        """The groups that go through a constant, and where."""
        return [(g, p) for g in self.groups for p in g.places if p.value is value]

    def scores(self, group: Group, place: Place, array: Array) -> Array:
        """Sum an array shaped like a place's constant down to the units of a group.

        Args:
            group: The group.
            place: One of its places.
            array: A value for every element of the constant, e.g. its absolute value.

        Returns:
            Shape ``(size,)``, or ``(*blocks, size)`` for a group with blocks.
        """
        wanted = [*zip(group.outer, group.blocks, strict=True), (group.leaf, group.size)]
        labels: list[Array | None] = [None] * array.ndim
        strides = np.cumprod([1, *[size for _, size in wanted[:0:-1]]])[::-1]
        for (leaf, _), stride in zip(wanted, strides, strict=True):
            axis, units = self._along(group, place, leaf)
            term = np.where(units < 0, -1, units * int(stride))
            held = labels[axis]
            labels[axis] = term if held is None else np.where((held < 0) | (term < 0), -1, held + term)
        return _sum_by(array, labels, [size for _, size in wanted])

    def _along(self, group: Group, place: Place, leaf: Axis) -> tuple[int, Array]:
        if leaf is group.leaf:
            return place.axis, place.units
        shared = None if place.reader is None else self.trace.at(place.value, place.reader)
        axes = shared or self.trace.axes[place.value] or ()
        order = [place.axis, *(i for i in range(len(axes)) if i != place.axis)]
        for axis in order:
            if any(found is leaf for found in leaves(axes[axis])):
                return axis, unit_map(axes[axis], leaf, None)
        raise AssertionError("a block's axis is in every place of its group")

    def explain(self, name: str) -> str:
        """What goes with a group, weight or node, or why it cannot be cut.

        Raises:
            BadInput: Nothing in the model has this name.
        """
        from graphc.axes.explain import explain

        return explain(self, name)

    def reason(self, leaf: Axis) -> Fact | None:
        """Why a leaf cannot be cut, or None if it can."""
        return self._reasons.get(find(leaf))


def _sum_by(array: Array, labels: list[Array | None], shape: list[int]) -> Array:
    """Sum ``array`` into ``shape``: element by element to the flat index that its axes' labels add up to."""
    used = [i for i, label in enumerate(labels) if label is not None]
    others = tuple(i for i in range(array.ndim) if i not in used)
    reduced = array.sum(axis=others) if others else array
    total: Array = np.zeros((), dtype=np.int64)
    valid: Array = np.ones((), dtype=bool)
    for k, i in enumerate(used):
        label = labels[i]
        assert label is not None
        view = label.reshape([-1 if j == k else 1 for j in range(len(used))])
        total = total + np.where(view < 0, 0, view)
        valid = valid & (view >= 0)
    total, valid = np.broadcast_to(total, reduced.shape), np.broadcast_to(valid, reduced.shape)
    flat = np.bincount(total[valid], weights=reduced[valid].astype(np.float64), minlength=math.prod(shape))
    return flat.reshape(shape)


def analyse(model: ir.Model, *, interface: bool = False) -> Groups:
    """Find what must be cut together.

    Args:
        model: Any model; it is not changed, and its weights are not read.
        interface: Whether static axes of graph inputs and outputs may be cut too.
    """
    return Groups(model, Trace(model, interface=interface))


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


class _Builder:
    """Resolves the facts of a trace to leaves, and collects the groups."""

    def __init__(self, out: Groups) -> None:
        self.out = out
        self.trace = out.trace
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
        outer = self._ragged([leaf for leaf in places if leaf not in self.out._reasons])
        drafts: list[tuple[Axis, list[Place], str]] = []
        order = {value: i for i, value in enumerate(self.trace.order)}
        for leaf, found in places.items():
            if leaf in self.out._reasons:
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
            self.out.groups.append(self._group(leaf, built, name, names, outer.get(leaf, ()), by_leaf[leaf]))
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
        reasons = self.out._reasons
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

    def _ragged(self, free: list[Axis]) -> dict[Axis, tuple[Axis, ...]]:
        """For each leaf the leaves beside it wherever it occurs: its indices may differ from block to block."""
        wanted = {leaf for leaf in free if leaf not in self.members}
        mixed = {find(axis) for axis in self.key}
        mixed.update(leaf for fact in self.trace.facts if fact.what in "~^" for leaf in leaves(fact.axis))
        mixed.update(leaf for axis in self.trace.mixed for leaf in leaves(axis))
        summed = self._summed()
        beside: dict[Axis, set[Axis]] = {}
        seen: set[tuple[Axis, ...]] = set()
        for axes in (*self.trace.axes.values(), *self.trace.copies.values()):
            if not axes or (roots := tuple(map(find, axes))) in seen:
                continue
            seen.add(roots)
            direct = [[d for d in digits(axis) if d.kind is Kind.LEAF] for axis in axes]
            for i, axis in enumerate(axes):
                others = [d for j, found in enumerate(direct) if j != i for d in found]
                for (leaf, around), (_, repeated) in zip(siblings(axis), _repeated(axis), strict=True):
                    if leaf not in wanted:
                        continue
                    near = {o for o, count in Counter((*around, *others)).items() if count == 1} - repeated
                    near.discard(leaf)
                    held = beside.get(leaf)
                    beside[leaf] = near if held is None else held & near
        rank = {leaf: i for i, leaf in enumerate(self._first_seen(beside))}
        ragged: dict[Axis, tuple[Axis, ...]] = {}
        for leaf, near in beside.items():
            # Where two leaves are beside each other, the one seen later is the digit inside.
            outer = [
                o
                for o in near
                if isinstance(o.size, int)
                and o.size > 1
                and o not in mixed
                and o not in summed.get(leaf, ())
                and not (leaf in beside.get(o, ()) and rank.get(o, -1) > rank[leaf])
            ]
            if outer:
                ragged[leaf] = tuple(sorted(outer, key=lambda o: rank.get(o, -1)))
        return self._aligned(ragged)

    def _aligned(self, ragged: dict[Axis, tuple[Axis, ...]]) -> dict[Axis, tuple[Axis, ...]]:
        """Only the blocks that every operator keeps apart.

        Where an operator uses a leaf under one name in several operands, a block of one must meet the same block
        of the other: the leaf of the blocks must have one name in all of them, too.
        """
        within: dict[Axis, frozenset[Axis]] = {}

        def inside(axis: Axis) -> frozenset[Axis]:
            root = find(axis)
            if root not in within:
                within[root] = frozenset(leaves(root))
            return within[root]

        kept = {leaf: set(outer) for leaf, outer in ragged.items()}
        for application in self.trace.bound.values():
            if not any(not kept.keys().isdisjoint(inside(axis)) for _, _, axis in application.held):
                continue
            by_name: dict[str, dict[ir.Value, Axis]] = defaultdict(dict)
            by_value: dict[ir.Value, list[tuple[str, Axis]]] = defaultdict(list)
            for value, name, axis in application.held:
                by_name[name][value] = axis
                by_value[value].append((name, axis))
            for uses in by_name.values():
                for leaf in kept.keys() & frozenset().union(*map(inside, uses.values())):
                    for outer in list(kept[leaf]):
                        holding = [v for v, axis in uses.items() if leaf in inside(axis)]
                        names = [{n for n, axis in by_value[v] if outer in inside(axis)} for v in holding]
                        if not set.intersection(*names):
                            kept[leaf].discard(outer)
        return {
            leaf: blocks for leaf, outer in ragged.items() if (blocks := tuple(o for o in outer if o in kept[leaf]))
        }

    def _summed(self) -> dict[Axis, set[Axis]]:
        """For each leaf the leaves that some operator sums over to make a value along it."""
        over: dict[ir.Node, set[Axis]] = defaultdict(set)
        for fact in self.trace.facts:
            if fact.what == "summed" and fact.source is not None:
                over[fact.source].update(leaves(fact.axis))
        found: dict[Axis, set[Axis]] = defaultdict(set)
        for node, gone in over.items():
            for out in node.outputs:
                for axis in self.trace.axes.get(out) or ():
                    for leaf in leaves(axis):
                        found[leaf] |= gone
        return found

    def _first_seen(self, wanted: Iterable[Axis]) -> list[Axis]:
        """Leaves in the order of their first occurrence in constants, then in any value."""
        ordered: dict[Axis, None] = {}
        seen: set[Axis] = set()
        constants = (axes for _, _, axes in self.trace.constants())
        for axes in (*constants, *self.trace.axes.values()):
            for axis in axes or ():
                if (root := find(axis)) not in seen:
                    seen.add(root)
                    ordered.update(dict.fromkeys(leaves(root)))
        return [*ordered, *(leaf for leaf in wanted if leaf not in ordered)]

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
                seen: set[Axis] = set()
                single = [leaf for leaf in leaves(tree) if leaf.size == 1 and self._key(leaf) is leaf]
                if len(single) > 1:
                    reason = "single indices of it are read on their own (a gather, slice or concat)"
                    self.out.fixed.append(Fixed(value, i, len(single), reason, ""))
                for leaf in leaves(tree):
                    key = self._key(leaf)
                    fact = self.out._reasons.get(key)
                    size = self._size(key)
                    if key in seen or fact is None or size is None or size < 2:
                        continue
                    seen.add(key)
                    self.out.fixed.append(Fixed(value, i, size, fact.reason, fact.node))

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
                                self.out.fixed.append(Fixed(value, i, size, reason, node_name(node)))


def _repeated(tree: Axis) -> Iterator[tuple[Axis, set[Axis]]]:
    """Leaves of a tree, each with the leaves that are there more than once in the products it lies in.

    Such a leaf (from a shuffle of equal factors, say) is no block: each of its occurrences is another digit.
    """

    def walk(axis: Axis, repeated: set[Axis]) -> Iterator[tuple[Axis, set[Axis]]]:
        node = find(axis)
        if node.kind is Kind.LEAF:
            yield node, repeated
            return
        if node.kind is Kind.PROD:
            counts = Counter(leaf for part in digits(node) for leaf in leaves(part))
            repeated = repeated | {leaf for leaf, count in counts.items() if count > 1}
        for part in digits(node) if node.kind is Kind.PROD else node.parts:
            yield from walk(part, repeated)

    yield from walk(tree, set())


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


__all__ = ["Fixed", "Group", "Groups", "Normaliser", "Place", "analyse", "node_name"]
