"""Which leaves may keep other indices in each block of another leaf: balanced constraints, found from the structure.

Where a leaf only ever occurs beside another one (the channels of a convolution's groups, the query heads of a key
head, the dimensions of a head, the units of a direction or an expert), its indices may differ from one index of the
other, its *block*, to the next, as long as all blocks keep equally many.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

import onnx_ir as ir

from graphc.axes.algebra import Axis, Kind, digits, find, leaves, siblings
from graphc.axes.trace import Trace


class Ragged:
    """The search in one trace.

    Args:
        trace: The finished trace.
        free: Leaves that can be cut.
        positions: Single positions of leaves with index ties.
    """

    def __init__(self, trace: Trace, free: Sequence[Axis], positions: Iterable[Axis]) -> None:
        self.trace, self.free, self.positions = trace, free, positions

    def blocks(self) -> dict[Axis, tuple[Axis, ...]]:
        """For each leaf the leaves beside it wherever it occurs: its indices may differ from block to block."""
        competing = {leaf for fact in self.trace.facts if fact.what == "^" for leaf in leaves(fact.axis)}
        wanted = {leaf for leaf in self.free if leaf not in competing}
        mixed = {find(axis) for axis in self.positions}
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
