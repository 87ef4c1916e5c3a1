"""Facets: arrays that say of each index of a value which constant it holds, or NaN.

A *facet* of a value is an array of the value's rank whose axes are full or 1: an element is the constant that
the value holds at those indices whatever the input, or NaN where it depends on the input. An axis of length 1
says the same about all its indices: a Conv with some zero filters and no bias has a facet ``(1, C, 1, 1)`` with
zeros and NaNs. A value has a few facets; what any of them knows is true. ``-inf`` is a constant like any other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from graphc.edit import Array
from graphc.shapes import symbolic
from graphc.shapes.symbolic import Dim

Facet = Array
Facets = tuple[Facet, ...]
Shape = tuple[Dim, ...]

LARGEST = 1 << 22
"""Elements of a facet, or of a sum of products of facets, beyond which nothing is claimed."""
MOST = 3
"""Facets kept of a value."""

NOTHING: Facets = ()


def collapse(facet: Facet, axes: Sequence[int]) -> Facet:
    """The same knowledge with ``axes`` of length 1: what holds for all their indices."""
    axes = tuple(axis for axis in axes if facet.shape[axis] != 1)
    if not axes:
        return facet
    low = np.asarray(facet.min(axis=axes, keepdims=True), dtype=np.float64)
    high = np.asarray(facet.max(axis=axes, keepdims=True), dtype=np.float64)
    return np.where(low == high, low, np.nan)


def tidy(facets: Iterable[Facet]) -> Facets:
    """Without facets that know nothing, or nothing that another one does not say; at most ``MOST``."""
    kept: list[Facet] = []
    for facet in sorted(facets, key=lambda f: (-(f.size), f.shape)):
        if np.isnan(facet).all():
            continue
        if any(_implies(other, facet) for other in kept):
            continue
        kept.append(facet)
    return tuple(kept[:MOST])


def _implies(a: Facet, b: Facet) -> bool:
    """Whether everything in ``b`` is in ``a``, whose axes are full wherever those of ``b`` are."""
    if any(y not in (x, 1) for x, y in zip(a.shape, b.shape, strict=True)):
        return False
    return bool((np.isnan(b) | (a == b)).all())


def align(facet: Facet, rank: int) -> Facet:
    """A facet as an operand that is broadcast to ``rank``."""
    return facet.reshape((1,) * (rank - facet.ndim) + facet.shape)


def elementwise(function: Callable[..., Array], operands: Sequence[Facets], rank: int) -> Facets:
    """Apply a NaN-propagating function to every choice of one facet of each operand."""
    choices = [facets or (np.full((1,) * rank, np.nan),) for facets in operands]
    results = []
    for choice in itertools.product(*choices):
        aligned = [align(f, rank) for f in choice]
        if np.prod(np.broadcast_shapes(*(f.shape for f in aligned)), dtype=float) > LARGEST:
            continue
        with np.errstate(all="ignore"):
            results.append(np.asarray(function(*aligned), dtype=np.float64))
    return tidy(results)


def times(a: Facet, b: Facet) -> Facet:
    """The product, where zero times anything is zero."""
    return np.where((a == 0) | (b == 0), 0.0, a * b)


def reshape(facet: Facet, old: Shape, new: Shape) -> Facet:
    """The facet of a reshaped value: exact for static axes; what is mixed with a dynamic axis is collapsed."""
    for before, after in _blocks(old, new):
        sizes = [old[i] for i in before], [new[j] for j in after]
        if not all(isinstance(size, int) for part in sizes for size in part):
            facet = collapse(facet, before)
    full, target = [1] * len(old), [1] * len(new)
    for before, after in _blocks(old, new):
        if any(facet.shape[i] != 1 for i in before):
            for shape, positions, result in ((old, before, full), (new, after, target)):
                for position in positions:
                    size = shape[position]
                    assert isinstance(size, int)
                    result[position] = size
    return np.broadcast_to(facet, full).reshape(target)


def _blocks(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Runs of axes that hold the same elements before and after, as short as the sizes show."""
    blocks = []
    i = j = 0
    while i < len(old) or j < len(new):
        before, after = list(range(i, min(i + 1, len(old)))), list(range(j, min(j + 1, len(new))))
        p, q = symbolic.product(tuple(old[x] for x in before)), symbolic.product(tuple(new[x] for x in after))
        i, j = (before[-1] + 1 if before else i), (after[-1] + 1 if after else j)
        while p != q and (i < len(old) or j < len(new)):
            if j == len(new) or (i < len(old) and symbolic.exact_quotient(p, q) is None):
                before.append(i)
                p, i = symbolic.mul(p, old[i]), i + 1
            else:
                after.append(j)
                q, j = symbolic.mul(q, new[j]), j + 1
        blocks.append((before, after))
    return blocks


def contract(a: Facets, b: Facets, spec: tuple[str, str, str], sizes: dict[str, Dim | None]) -> Facets:
    """The facets of a sum of products.

    Args:
        a: Facets of the first operand.
        b: Facets of the second.
        spec: One letter per axis of the first operand, the second, and the result.
        sizes: The true size of each summed letter; None or a polynomial where it is not a number.
    """
    left, right, out = spec
    results = []
    for x, y in itertools.product(a or (_unknown(left),), b or (_unknown(right),)):
        p, q = _Factor(x, left), _Factor(y, right)
        repeated = [c for c in dict.fromkeys(left + right) if c not in out and c not in p.letters + q.letters]
        counts = [sizes.get(letter) for letter in repeated]
        p.sum_alone(q.letters + out)
        q.sum_alone(p.letters + out)
        spread = [c for c in out if c in p.letters + q.letters]
        if np.prod([p.length(c) or q.length(c) for c in {*p.letters, *q.letters}], dtype=float) > 4 * LARGEST:
            continue
        equation = f"{p.letters},{q.letters}->{''.join(spread)}"
        known = np.einsum(equation, p.unknown, q.unknown + q.nonzero) + np.einsum(equation, p.nonzero, q.unknown) == 0
        value = np.einsum(equation, p.value, q.value)
        for count in counts:
            if isinstance(count, int):
                value = value * count
            else:
                # The number of equal terms is not known: only a sum of zeros is.
                known = known & (np.einsum(equation, p.nonzero, q.nonzero) == 0)
        shape = [p.length(c) or q.length(c) or 1 for c in out]
        results.append(np.where(known, value, np.nan).reshape(shape))
    return tidy(results)


def _unknown(letters: str) -> Facet:
    return np.full((1,) * len(letters), np.nan)


class _Factor:
    """One factor of a sum of products: its letters of full length, and three indicators over them.

    Attributes:
        letters: The letters whose axis is not of length 1.
        value: What is known, 0 elsewhere.
        unknown: 1 where nothing is known.
        nonzero: 1 where something other than zero is known.
    """

    def __init__(self, facet: Facet, letters: str) -> None:
        self.letters = "".join(c for c, n in zip(letters, facet.shape, strict=True) if n != 1)
        flat = facet.reshape([n for n in facet.shape if n != 1])
        finite = np.isfinite(flat)
        self.value = np.where(finite, flat, 0.0)
        self.unknown = (~finite).astype(np.float64)
        self.nonzero = (finite & (flat != 0)).astype(np.float64)

    def length(self, letter: str) -> int:
        """The length of a letter's axis, 0 if it has none."""
        return self.value.shape[self.letters.index(letter)] if letter in self.letters else 0

    def sum_alone(self, others: str) -> None:
        """Sum over the letters that nobody else has."""
        alone = tuple(i for i, c in enumerate(self.letters) if c not in others)
        if alone:
            self.value, self.unknown, self.nonzero = (
                np.asarray(x.sum(axis=alone)) for x in (self.value, self.unknown, self.nonzero)
            )
            self.letters = "".join(c for c in self.letters if c in others)
