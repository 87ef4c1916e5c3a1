"""What is known of a model's values before it runs, index by index: this channel is zero, that one always 0.3.

A *facet* of a value is an array of the value's rank whose axes are full or 1: an element is the constant that
the value holds at those indices whatever the input, or NaN where it depends on the input. An axis of length 1
says the same about all its indices: a Conv with some zero filters and no bias has a facet ``(1, C, 1, 1)`` with
zeros and NaNs. A value has a few facets; what any of them knows is true. ``-inf`` is a constant like any other.

Zero times something unknown is taken to be zero: weights and activations are supposed to be finite.
Rules by operator are in :mod:`graphc.known_rules`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx_ir as ir

from graphc import edit, symbolic
from graphc.axes.trace import Trace
from graphc.edit import Array
from graphc.shapes import Fact, Facts
from graphc.symbolic import Dim, symbol

Facet = Array
Facets = tuple[Facet, ...]
Shape = tuple[Dim, ...]

JOINT = 1 << 20
"""Elements up to which a constant is one facet; of larger ones, each axis is looked at alone."""
MOST = 3
"""Facets kept of a value."""

NOTHING: Facets = ()


class Knowledge:
    """The facets of all values of a model's main graph.

    Constants are read one at a time and not kept; a large one leaves a vector for each of its axes.

    Args:
        model: The model.
        trace: The trace of its axes, for the shapes of what shape inference does not cover (fused operators).
    """

    def __init__(self, model: ir.Model, trace: Trace | None = None) -> None:
        from graphc import known_rules

        self.facts = Facts(model)
        self._facets: dict[ir.Value, Facets] = {}
        self.never: dict[ir.Value, Array] = {}
        """By integer tensor: for each index along the axis that it selects from, whether it is never chosen."""
        for node in model.graph:
            self.facts.visit(node)
            if trace is not None:
                self._shapes_from(node, trace)
            known_rules.exclude(node, self)
            found = known_rules.facets(node, self)
            for value, facets in zip(node.outputs, found, strict=False):
                rank = self.facts(value).rank
                if facets and rank is not None:
                    self._facets[value] = tidy(f for f in facets if f.ndim == rank)

    def _shapes_from(self, node: ir.Node, trace: Trace) -> None:
        for value in node.outputs:
            axes = trace.axes.get(value)
            if axes is not None and self.facts(value).shape is None:
                dims: list[Dim] = [a.size if isinstance(a.size, int) else symbol(f"_{a.size}") for a in axes]
                dtype = self.facts(value).dtype or self.facts(node.inputs[0]).dtype
                self.facts[value] = Fact(dtype, tuple(dims))

    def __call__(self, value: ir.Value | None) -> Facets:
        """What is known of a value; empty where it is nothing."""
        if value is None:
            return NOTHING
        found = self._facets.get(value)
        if found is None:
            held = edit.tensor(value)
            if held is None or not numeric(held.dtype):
                return NOTHING
            found = constant_facets(held)
            if held.size > JOINT:
                self._facets[value] = found
        return found

    def shape(self, value: ir.Value | None) -> Shape | None:
        """The dims of a value, numbers or polynomials; None if not even the rank is known."""
        return self.facts(value).shape


def numeric(dtype: ir.DataType) -> bool:
    """Whether the dtype is one whose elements convert to float64."""
    return dtype.is_floating_point() or dtype.is_integer() or dtype == ir.DataType.BOOL


def constant_facets(held: ir.TensorProtocol) -> Facets:
    """The facets of a constant: itself, or for a large one a vector per axis."""
    array = held.numpy()
    if held.size <= JOINT:
        return (np.asarray(array, dtype=np.float64),)
    facets = []
    for axis in range(array.ndim):
        others = tuple(a for a in range(array.ndim) if a != axis)
        facets.append(collapse(array, others))
    if isinstance(held, ir.ExternalTensor):
        held.release()
    return tidy(facets)


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
    if any(x != y and y != 1 for x, y in zip(a.shape, b.shape, strict=True)):
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
        if np.prod(np.broadcast_shapes(*(f.shape for f in aligned)), dtype=float) > 4 * JOINT:
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
        static = all(isinstance(old[i], int) for i in before) and all(isinstance(new[j], int) for j in after)
        if not static:
            facet = collapse(facet, before)
    full: list[int] = []
    target = [1] * len(new)
    for before, after in _blocks(old, new):
        spread = any(facet.shape[i] != 1 for i in before)
        full += [int(old[i]) if spread else 1 for i in before]  # type: ignore[call-overload]
        for j in after if spread else ():
            target[j] = int(new[j])  # type: ignore[call-overload]
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
    summed = [letter for letter in dict.fromkeys(left + right) if letter not in out]
    nothing_a, nothing_b = np.full((1,) * len(left), np.nan), np.full((1,) * len(right), np.nan)
    results = []
    for x, y in itertools.product(a or (nothing_a,), b or (nothing_b,)):
        uncounted = False
        for letter in summed:
            size = sizes.get(letter)
            lengths = {f.shape[s.index(letter)] for f, s in ((x, left), (y, right)) if letter in s}
            if lengths == {1} and size != 1:
                if isinstance(size, int):
                    x, y = _spread(x, left, letter, size), _spread(y, right, letter, size)
                else:
                    uncounted = True
        x, y = (np.where(np.isinf(f), np.nan, f) for f in (x, y))
        x, y, shapes = _together(x, left, y, right)
        if shapes > 16 * JOINT:
            continue
        unknown_x, unknown_y = np.isnan(x), np.isnan(y)
        equation = f"{left},{right}->{out}"
        some_x = (~unknown_x & (x != 0)).astype(np.float64)
        open_terms = np.einsum(equation, unknown_x.astype(np.float64), (y != 0).astype(np.float64))
        open_terms = open_terms + np.einsum(equation, some_x, unknown_y.astype(np.float64))
        value = np.einsum(equation, np.where(unknown_x, 0.0, x), np.where(unknown_y, 0.0, y))
        known = open_terms == 0
        if uncounted:
            # The number of terms is not known: only a sum of zeros is.
            terms = np.einsum(equation, some_x, (~unknown_y & (y != 0)).astype(np.float64))
            known &= terms == 0
        results.append(np.where(known, value, np.nan))
    return tidy(results)


def _spread(facet: Facet, letters: str, letter: str, size: int) -> Facet:
    if letter not in letters:
        return facet
    return np.repeat(facet, size, axis=letters.index(letter))


def _together(x: Facet, left: str, y: Facet, right: str) -> tuple[Facet, Facet, float]:
    """Both operands with the letters that they share at equal lengths, and the size of the whole sum."""
    lengths: dict[str, int] = {}
    for facet, letters in ((x, left), (y, right)):
        for letter, length in zip(letters, facet.shape, strict=True):
            lengths[letter] = max(lengths.get(letter, 1), length)
    shared = set(left) & set(right)
    x = np.broadcast_to(x, [lengths[c] if c in shared else n for c, n in zip(left, x.shape, strict=True)])
    y = np.broadcast_to(y, [lengths[c] if c in shared else n for c, n in zip(right, y.shape, strict=True)])
    return x, y, float(np.prod(list(lengths.values()), dtype=float))
