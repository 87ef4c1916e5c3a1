"""Axis trees and their unification.

An axis is an ordered index set: a *leaf*, a *product* of digits (outer to inner, as a reshape makes it) or a
*sum* of parts (as a concatenation makes it). Unifying two axes refines both until they agree. Afterwards two
places hold the same leaf exactly when the graph forces them to keep the same indices.

Trees are refined in place: a leaf that turns out to be a product or a sum forwards to it, so that everyone who
holds the leaf sees the refinement. Facts about axes (why one is fixed, who averages along it) are therefore
kept beside the trees and resolved to leaves at the end.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence

from graphc.axes.size import Size, divide, product


class Kind(enum.Enum):
    LEAF = "leaf"
    PROD = "prod"
    SUM = "sum"


class Axis:
    """A node of an axis tree. Compare by ``find(a) is find(b)``.

    Attributes:
        size: Number of indices.
        kind: Leaf, product or sum; meaningful for the representative only (see ``find``).
        parts: Digits, outer first, or parts in order; empty for a leaf.
        origin: For a single position of a leaf with index ties: the leaf it came from.
    """

    __slots__ = ("kind", "link", "origin", "parts", "size")

    def __init__(self, size: Size, kind: Kind = Kind.LEAF, parts: tuple[Axis, ...] = ()) -> None:
        self.size = size
        self.kind = kind
        self.parts = parts
        self.link: Axis | None = None
        self.origin: Axis | None = None

    def __repr__(self) -> str:
        node = find(self)
        if node.kind is Kind.LEAF:
            return f"{node.size}"
        sep = " " if node.kind is Kind.PROD else " + "
        return f"({sep.join(map(repr, node.parts))})"


def find(axis: Axis) -> Axis:
    """The representative that ``axis`` was unified into."""
    root = axis
    while root.link is not None:
        root = root.link
    while axis is not root:
        axis.link, axis = root, axis.link
    return root


def digits(axis: Axis) -> list[Axis]:
    """The factors of an axis, outer first, none of which is a product; the axis itself if it is none."""
    axis = find(axis)
    if axis.kind is not Kind.PROD:
        return [axis]
    return [d for part in axis.parts for d in digits(part)]


def terms(axis: Axis) -> list[Axis]:
    """The parts of an axis in order, none of which is a sum; the axis itself if it is none."""
    axis = find(axis)
    if axis.kind is not Kind.SUM:
        return [axis]
    return [t for part in axis.parts for t in terms(part)]


def leaves(axis: Axis) -> list[Axis]:
    """All leaves of a tree in order; one that occurs twice comes twice."""
    axis = find(axis)
    if axis.kind is Kind.LEAF:
        return [axis]
    found: list[Axis] = []
    todo = list(axis.parts[::-1])
    while todo:
        node = find(todo.pop())
        if node.kind is Kind.LEAF:
            found.append(node)
        else:
            todo.extend(node.parts[::-1])
    return found


def prod(parts: Sequence[Axis]) -> Axis:
    """The product of digits, outer first. Size-1 digits that carry nothing are left out."""
    kept = [p for p in parts if p.size != 1 or find(p).kind is not Kind.LEAF or find(p).origin is not None]
    if len(kept) == 1:
        return kept[0]
    if not kept:
        return Axis(1)
    return Axis(product(p.size for p in kept), Kind.PROD, tuple(kept))


def concat(parts: Sequence[Axis]) -> Axis:
    """The sum of parts in order; empty parts are left out."""
    kept = [term for p in parts if p.size != 0 for term in terms(p)]
    if len(kept) == 1:
        return kept[0]
    total: Size = 0
    for part in kept:
        total = total + part.size
    return Axis(total, Kind.SUM, tuple(kept))


def siblings(tree: Axis) -> Iterator[tuple[Axis, list[Axis]]]:
    """Leaves of a tree, each with the leaves that are digits outside of it in the products it lies in.

    A digit further inside does not count: if the indices of an outer digit depended on it, flattening would
    interleave them.
    """

    def walk(axis: Axis, near: list[Axis]) -> Iterator[tuple[Axis, list[Axis]]]:
        node = find(axis)
        if node.kind is Kind.LEAF:
            yield node, near
        elif node.kind is Kind.SUM:
            for part in node.parts:
                yield from walk(part, near)
        else:
            beside = list(near)
            for part in digits(node):
                yield from walk(part, beside)
                if part.kind is Kind.LEAF:
                    beside = [*beside, part]

    yield from walk(tree, [])


class Conflict(Exception):
    """Two axes cannot be made to agree.

    Args:
        reason: Why, in plain words.
        axes: What must stay whole because of it.
    """

    def __init__(self, reason: str, *axes: Axis) -> None:
        super().__init__(reason)
        self.reason = reason
        self.axes = axes


class Unifier:
    """Makes axes agree. What cannot agree is kept whole: it goes to ``conflicts`` with the reason.

    Keeping both sides whole is always sound: whole axes of equal length agree.

    Attributes:
        conflicts: What could not agree.
        units: All single positions that were made.
    """

    def __init__(self) -> None:
        self.conflicts: list[Conflict] = []
        self.units: list[Axis] = []

    def unify(self, a: Axis, b: Axis) -> None:
        """Refine two axes until every index of one is the same index of the other."""
        todo = [(a, b)]
        while todo:
            x, y = todo.pop()
            x, y = find(x), find(y)
            if x is y:
                continue
            if x.size != y.size:
                self._conflict(f"sizes {x.size} and {y.size} meet", x, y)
            elif x.kind is Kind.LEAF or y.kind is Kind.LEAF:
                self._bind(x, y)
            elif x.kind is Kind.PROD and y.kind is Kind.PROD:
                self._products(x, y, todo)
            elif x.kind is Kind.SUM and y.kind is Kind.SUM:
                self._sums(x, y, todo)
            elif x.kind is Kind.SUM:
                self._product_with_sum(y, x, todo)
            else:
                self._product_with_sum(x, y, todo)

    def split(self, axis: Axis, sizes: Sequence[Size]) -> list[Axis]:
        """The digits of ``axis`` for the given sizes, outer first; it is refined as needed."""
        parts = [Axis(size) for size in sizes]
        self.unify(axis, prod(parts))
        return parts

    def cut(self, axis: Axis, sizes: Sequence[Size]) -> list[Axis]:
        """Consecutive parts of ``axis`` with the given sizes; it is refined as needed."""
        parts = [Axis(size) for size in sizes]
        self.unify(axis, concat(parts))
        return parts

    def positions(self, axis: Axis) -> list[Axis] | None:
        """Every index of an axis as a unit of its own, or None if it is a product (whose indices share digits)."""
        units: list[Axis] = []
        for part in terms(axis):
            term = find(part)
            if term.kind is Kind.SUM:  # the same leaf came before, and has positions by now
                more = self.positions(term)
                if more is None:
                    return None
                units += more
                continue
            if term.kind is Kind.PROD or not isinstance(term.size, int):
                return None
            if term.origin is not None:
                units.append(term)
                continue
            own = [Axis(1) for _ in range(term.size)]
            for unit in own:
                unit.origin = term
            self.units += own
            if term.size == 1:
                term.link = own[0]
            else:
                term.kind, term.parts = Kind.SUM, tuple(own)
            units += own
        return units

    def _conflict(self, reason: str, *axes: Axis) -> None:
        self.conflicts.append(Conflict(reason, *axes))

    def _bind(self, x: Axis, y: Axis) -> None:
        if x.kind is not Kind.LEAF:
            x, y = y, x
        if y.kind is Kind.LEAF:
            if (x.origin is None) != (y.origin is None):
                # A position that is a whole axis elsewhere: removing it would leave that axis empty.
                self._conflict("one position of a reordered axis is used on its own", x, y)
            if x.origin is None or y.origin is not None:
                x.link = y
            else:
                y.link = x
            return
        if any(leaf is x for leaf in leaves(y)):
            self._conflict("an axis would have to contain itself", y)
            return
        x.link = y

    def _products(self, x: Axis, y: Axis, todo: list[tuple[Axis, Axis]]) -> None:
        left, right = digits(x), digits(y)
        while left and right:
            a, b = left.pop(), right.pop()
            if a.size == b.size:
                todo.append((a, b))
                continue
            if (rest := divide(a.size, b.size)) is not None:
                outer = Axis(rest)
                todo.append((a, Axis(a.size, Kind.PROD, (outer, b))))
                left.append(outer)
            elif (rest := divide(b.size, a.size)) is not None:
                outer = Axis(rest)
                todo.append((b, Axis(b.size, Kind.PROD, (outer, a))))
                right.append(outer)
            else:
                self._conflict(f"{x!r} and {y!r} are incompatible factorisations", a, b, *left, *right)
                return

    def _sums(self, x: Axis, y: Axis, todo: list[tuple[Axis, Axis]]) -> None:
        left, right = terms(x)[::-1], terms(y)[::-1]
        while left and right:
            a, b = left.pop(), right.pop()
            if a.size == b.size:
                todo.append((a, b))
                continue
            if not isinstance(a.size, int) or not isinstance(b.size, int):
                self._conflict("parts of unknown size meet", a, b, *left, *right)
                return
            longer, shorter, rest = (a, b, left) if a.size > b.size else (b, a, right)
            assert isinstance(longer.size, int) and isinstance(shorter.size, int)
            halves = self._cut_once(longer, shorter.size, todo)
            if halves is None:
                self._conflict(f"{x!r} and {y!r} are cut inside a digit", a, b, *left, *right)
                return
            todo.append((halves[0], shorter))
            rest.append(halves[1])

    def _cut_once(self, axis: Axis, at: int, todo: list[tuple[Axis, Axis]]) -> tuple[Axis, Axis] | None:
        """Both halves of an axis that is no sum; a product is cut along its outer digit and shares the others."""
        axis = find(axis)
        assert isinstance(axis.size, int)
        if axis.kind is Kind.LEAF:
            halves = Axis(at), Axis(axis.size - at)
            axis.kind, axis.parts = Kind.SUM, halves
            return halves
        outer, *inner = digits(axis)
        step = product(d.size for d in inner)
        if not isinstance(step, int) or not isinstance(outer.size, int) or at % step:
            return None
        first, second = Axis(at // step), Axis(outer.size - at // step)
        todo.append((outer, concat([first, second])))
        return prod([first, *inner]), prod([second, *inner])

    def _product_with_sum(self, x: Axis, y: Axis, todo: list[tuple[Axis, Axis]]) -> None:
        outer, *inner = digits(x)
        step = product(d.size for d in inner)
        parts = terms(y)
        counts = [divide(part.size, step) for part in parts]
        if any(count is None for count in counts):
            self._conflict(f"{x!r} and {y!r} are cut inside a digit", x, y)
            return
        outers = [Axis(count) for count in counts if count is not None]
        todo.append((outer, concat(outers)))
        todo.extend((part, prod([o, *inner])) for part, o in zip(parts, outers, strict=True))
