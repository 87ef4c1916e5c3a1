"""Sizes of axes: integers, or polynomials over the symbolic dimensions of a model.

Shape arithmetic (``batch * seq``, ``past + seq``, ``total // 12``) is exact on polynomials where the result is
one; everything else becomes a new symbol named after its expression, so that equal expressions stay equal.
"""

from __future__ import annotations

from collections.abc import Iterable

Monomial = tuple[str, ...]


class Sym:
    """A polynomial with integer coefficients over named dimensions; immutable. Never a plain integer."""

    __slots__ = ("_hash", "terms")

    def __init__(self, terms: dict[Monomial, int]) -> None:
        self.terms = terms
        self._hash = hash(frozenset(terms.items()))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sym) and self._hash == other._hash and self.terms == other.terms

    def __repr__(self) -> str:
        def term(mono: Monomial, coefficient: int) -> str:
            names = "*".join(mono)
            if not mono:
                return str(coefficient)
            return names if coefficient == 1 else f"{coefficient}*{names}"

        return "+".join(term(m, c) for m, c in sorted(self.terms.items()))

    def __add__(self, other: Size) -> Size:
        terms = dict(self.terms)
        for mono, coefficient in _terms(other).items():
            terms[mono] = terms.get(mono, 0) + coefficient
        return _normal(terms)

    __radd__ = __add__

    def __neg__(self) -> Size:
        return Sym({m: -c for m, c in self.terms.items()})

    def __sub__(self, other: Size) -> Size:
        return self + (-other)

    def __rsub__(self, other: Size) -> Size:
        return (-self) + other

    def __mul__(self, other: Size) -> Size:
        terms: dict[Monomial, int] = {}
        for m1, c1 in self.terms.items():
            for m2, c2 in _terms(other).items():
                mono = tuple(sorted(m1 + m2))
                terms[mono] = terms.get(mono, 0) + c1 * c2
        return _normal(terms)

    __rmul__ = __mul__

    def __floordiv__(self, other: Size) -> Size:
        exact = divide(self, other)
        return symbol(f"({self}//{other})") if exact is None else exact

    def __rfloordiv__(self, other: Size) -> Size:
        return symbol(f"({other}//{self})")

    def __mod__(self, other: Size) -> Size:
        return 0 if divide(self, other) is not None else symbol(f"({self}%{other})")

    def __rmod__(self, other: Size) -> Size:
        return symbol(f"({other}%{self})")


Size = int | Sym


def symbol(name: str) -> Sym:
    """The dimension of this name."""
    return Sym({(name,): 1})


def _terms(size: Size) -> dict[Monomial, int]:
    return size.terms if isinstance(size, Sym) else {(): size}


def _normal(terms: dict[Monomial, int]) -> Size:
    kept = {m: c for m, c in terms.items() if c}
    if not kept:
        return 0
    if len(kept) == 1 and () in kept:
        return kept[()]
    return Sym(kept)


def divide(a: Size, b: Size) -> Size | None:
    """``a / b`` where it is exact for every value of the symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if a == b:
        return 1
    divisor = _terms(b)
    if len(divisor) != 1:
        return None
    (mono, coefficient), *_ = divisor.items()
    terms: dict[Monomial, int] = {}
    for m, c in _terms(a).items():
        rest = list(m)
        for name in mono:
            if name not in rest:
                return None
            rest.remove(name)
        if not coefficient or c % coefficient:
            return None
        terms[tuple(rest)] = c // coefficient
    return _normal(terms)


def product(sizes: Iterable[Size]) -> Size:
    """The product of sizes; 1 of none."""
    total: Size = 1
    for size in sizes:
        total = total * size
    return total
