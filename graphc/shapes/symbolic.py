"""Sizes that are not known until a model runs: integer polynomials in named dims.

A dim is a Python ``int`` or an :class:`Expr`. Two dims that are equal for every input compare equal when their
polynomials are the same; what is no polynomial (a division with a remainder, a maximum) becomes an *atom*
named by its own text, so that equal computations stay equal. This is all that shape arithmetic needs, at a
hundredth of the cost of a computer algebra system.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache

Monomial = tuple[str, ...]
"""A product of atoms, sorted, repeated for powers; empty for the constant term."""

_SIGNED = "~"
"""First character of an atom that may be negative; all other atoms are sizes, hence >= 0."""
_OPAQUE = "#"
"""First character of an atom that stands for a computation."""
UNNAMED = "?"
"""First character of an atom about which nothing is known."""
RESERVED = _SIGNED + _OPAQUE + UNNAMED
_LARGEST_COEFFICIENT = 2**62
_LONGEST_ATOM = 48
"""Characters from which the text of an atom is replaced by its hash: nested divisions would grow without end."""


class Expr:
    """A polynomial that is not a plain integer; immutable, hashable, compared by its terms."""

    __slots__ = ("_hash", "_text", "terms")

    def __init__(self, terms: tuple[tuple[Monomial, int], ...]) -> None:
        self.terms = terms
        self._hash = hash(terms)
        self._text: str | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expr) and self.terms == other.terms

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        if self._text is None:
            parts = []
            for monomial, factor in self.terms:
                body = "*".join(monomial)
                if not body:
                    parts.append(str(factor))
                elif factor == 1:
                    parts.append(body)
                else:
                    parts.append(f"{factor}*{body}")
            self._text = " + ".join(parts).replace("+ -", "- ")
        return self._text


Dim = int | Expr


class Unrepresentable(ArithmeticError):
    """A coefficient left the range of int64, where the runtime's arithmetic would wrap around."""


@cache
def symbol(name: str) -> Expr:
    """The size called ``name``; it is >= 0."""
    return Expr((((name,), 1),))


def _opaque(text: str, *, signed: bool = False) -> Expr:
    """The atom that stands for a computation that is no polynomial; equal texts are equal atoms."""
    if len(text) > _LONGEST_ATOM:
        text = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
    return symbol(f"{_SIGNED if signed else _OPAQUE}{text}")


_SIZES: dict[Monomial, Expr] = {}
"""What the atoms that ``as_size`` makes stand for."""

_QUOTIENTS: dict[Monomial, tuple[Dim, int]] = {}
"""What the atoms that stand for a division by a number, rounded down, divide, and by what."""


def as_size(dim: Dim) -> Dim:
    """The dim, known to be the size of a tensor that exists and hence >= 0, even where its formula does not show it."""
    if isinstance(dim, int) or nonnegative(dim):
        return dim
    made = _opaque(str(dim))
    _SIZES[made.terms[0][0]] = dim
    return made


def plain_name(dim: Dim) -> str | None:
    """The name of a dim that is one named size of the model's inputs and nothing else."""
    if not isinstance(dim, Expr) or len(dim.terms) != 1 or dim.terms[0][1] != 1 or len(dim.terms[0][0]) != 1:
        return None
    atom = dim.terms[0][0][0]
    return None if atom[0] in RESERVED else atom


def _terms(dim: Dim) -> Mapping[Monomial, int]:
    if isinstance(dim, Expr):
        return dict(dim.terms)
    return {(): dim} if dim else {}


def _make(terms: Mapping[Monomial, int]) -> Dim:
    kept = tuple(sorted((m, c) for m, c in terms.items() if c))
    if any(abs(c) > _LARGEST_COEFFICIENT for _, c in kept):
        raise Unrepresentable
    if not kept:
        return 0
    if len(kept) == 1 and not kept[0][0]:
        return kept[0][1]
    return Expr(kept)


def add(a: Dim, b: Dim) -> Dim:
    """``a + b``."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    terms = dict(_terms(a))
    for monomial, factor in _terms(b).items():
        terms[monomial] = terms.get(monomial, 0) + factor
    return _make(terms)


def sub(a: Dim, b: Dim) -> Dim:
    """``a - b``."""
    return a - b if isinstance(a, int) and isinstance(b, int) else add(a, mul(b, -1))


def mul(a: Dim, b: Dim) -> Dim:
    """``a * b``."""
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    terms: dict[Monomial, int] = {}
    for m, x in _terms(a).items():
        for n, y in _terms(b).items():
            key = tuple(sorted(m + n))
            terms[key] = terms.get(key, 0) + x * y
    return _make(terms)


def product(dims: tuple[Dim, ...]) -> Dim:
    """The product of all dims; 1 if there is none."""
    total: Dim = 1
    for dim in dims:
        total = mul(total, dim)
    return total


def exact_quotient(a: Dim, b: Dim) -> Dim | None:
    """``q`` with ``a == q * b`` as polynomials where ``b`` has a single term; None if there is no such ``q``."""
    if b == 0:
        return None
    divisor = tuple(_terms(b).items())
    if len(divisor) != 1:
        return 1 if a == b else None
    ((under, factor),) = divisor
    terms: dict[Monomial, int] = {}
    for monomial, coefficient in _terms(a).items():
        rest = list(monomial)
        for atom in under:
            if atom not in rest:
                return None
            rest.remove(atom)
        if coefficient % factor:
            return None
        terms[tuple(rest)] = coefficient // factor
    return _make(terms)


def floordiv(a: Dim, b: Dim) -> Dim | None:
    """``a / b`` rounded down; None if ``b`` is 0 or may be."""
    return _divide("floor", a, b)


def truncdiv(a: Dim, b: Dim) -> Dim | None:
    """``a / b`` rounded towards zero, as ONNX divides integers; None if ``b`` is 0."""
    return _divide("trunc", a, b)


def ceildiv(a: Dim, b: int) -> Dim:
    """``a / b`` rounded up, for ``b > 0``."""
    quotient = floordiv(add(a, b - 1), b)
    assert quotient is not None
    return quotient


def _divide(how: str, a: Dim, b: Dim) -> Dim | None:
    if b == 0:
        return None
    if isinstance(a, int) and isinstance(b, int):
        down = a // b
        return down + 1 if how == "trunc" and down < 0 and down * b != a else down
    quotient = exact_quotient(a, b)
    if quotient is not None:
        return quotient
    sized = nonnegative(a) and nonnegative(b)
    if isinstance(b, int) and b > 0 and (sized or how == "floor"):
        return _down(a, b)
    return _opaque(f"({a})//({b})" if sized else f"{how}({a})//({b})", signed=not sized)


def _down(a: Dim, b: int) -> Dim:
    """``a / b`` rounded down, as one division of what no multiple of ``b`` can be taken out of.

    Convolutions divide what convolutions before them have divided: ``((n // 5) + k) // 2`` is ``(n + 5 k) // 10``.
    """
    whole: dict[Monomial, int] = {}
    rest: dict[Monomial, int] = {}
    for monomial, factor in _terms(_formula(a)).items():
        whole[monomial] = factor // b
        rest[monomial] = factor % b
    left, taken = _make(rest), _make(whole)
    if isinstance(left, int):
        return taken
    divided = [m for m, _ in left.terms if m]
    if len(divided) == 1 and rest[divided[0]] == 1 and (inner := _QUOTIENTS.get(divided[0])) is not None:
        return add(taken, _down(add(inner[0], rest.get((), 0) * inner[1]), inner[1] * b))
    sized = nonnegative(left)
    made = _opaque(f"({left})//({b})" if sized else f"floor({left})//({b})", signed=not sized)
    _QUOTIENTS[made.terms[0][0]] = left, b
    return add(taken, made)


def _formula(dim: Dim) -> Dim:
    """A dim in which no atom stands for a size whose formula is known."""
    total: Dim = 0
    for monomial, factor in _terms(dim).items():
        term: Dim = factor
        for atom in monomial:
            term = mul(term, _SIZES.get((atom,)) or symbol(atom))
        total = add(total, term)
    return total


def mod(a: Dim, b: Dim, *, truncated: bool) -> Dim | None:
    """The remainder of ``floordiv`` or, if ``truncated``, of ``truncdiv``; None if ``b`` is 0."""
    quotient = truncdiv(a, b) if truncated else floordiv(a, b)
    return None if quotient is None else sub(a, mul(quotient, b))


def maximum(a: Dim, b: Dim) -> Dim:
    """The larger of two dims."""
    return _extreme("max", a, b)


def minimum(a: Dim, b: Dim) -> Dim:
    """The smaller of two dims."""
    return _extreme("min", a, b)


_MINIMA: dict[Expr, tuple[Dim, Dim]] = {}
"""What the atoms that stand for a minimum are the minimum of."""


def _extreme(how: str, a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b) if how == "max" else min(a, b)
    if nonnegative(sub(a, b)):
        return a if how == "max" else b
    if nonnegative(sub(b, a)):
        return b if how == "max" else a
    first, second = sorted((a, b), key=str)
    extreme = _opaque(f"{how}({first}, {second})", signed=not (nonnegative(a) and nonnegative(b)))
    if how == "min":
        _MINIMA[extreme] = (a, b)
    return extreme


def broadcast(a: Dim, b: Dim) -> Dim:
    """The size of two aligned dims after multidirectional broadcasting, if the model is valid at all.

    ``n`` against 1 is ``n``; ``n`` against a constant other than 1 is that constant; ``n`` against ``min(n, 64)``,
    a slice of a table of positions, is ``n``: where the two differ, neither is 1.
    """
    if b in (a, 1):
        return a
    if a == 1 or isinstance(b, int):
        return b
    if isinstance(a, int):
        return a
    for whole, part in ((a, b), (b, a)):
        bounds = _MINIMA.get(part, ())
        if whole in bounds and all(bound == whole or (isinstance(bound, int) and bound > 1) for bound in bounds):
            return whole
    first, second = sorted((a, b), key=str)
    return _opaque(f"broadcast({first}, {second})")


def nonnegative(dim: Dim) -> bool:
    """Whether the dim is certainly >= 0."""
    if isinstance(dim, int):
        return dim >= 0
    return all(c > 0 and not any(atom[0] == _SIGNED for atom in m) for m, c in dim.terms)


def positive(dim: Dim) -> bool:
    """Whether the dim is certainly >= 1, even where named sizes are 0."""
    if isinstance(dim, int):
        return dim > 0
    return nonnegative(dim) and any(not m for m, _ in dim.terms)


def unequal(a: Dim, b: Dim) -> bool:
    """Whether two dims certainly differ."""
    difference = sub(a, b)
    if isinstance(difference, int):
        return difference != 0
    return positive(difference) or positive(mul(difference, -1))
