"""The language of operator rules: one line of text says what an operator does to each axis.

    MatMul                   ... i k, ... k j -> ... i j
    Conv(group=g:1)          n (g i) [*x], (g o) i [*k], (g o) -> n (g o) [*y]
    LayerNormalization       ... c~, c~, c~ -> ... c~
    com.microsoft.BiasGelu   ... c, c -> ... c

Before the arrow stands one pattern for each input, after it one for each output; missing trailing inputs and
outputs are optional. A pattern lists the axes of a tensor:

    a        an axis; the same name is the same axis everywhere in the line. A name that only inputs have is
             summed over (einsum's convention)
    (a b)    a product of digits, outer first
    (a + b)  a sum: parts one after the other
    [a]      kept whole: mixed, moved or looked up along the axis
    a~       averaged along: a cut is possible, and changes the count that the operator divides by
    a^       competing along (softmax, top-k, max): a cut is possible, and free where the index carries -inf
    a@p      the indices of ``a`` that the constant ``p`` picks, in its order (outputs only)
    a>b      (a pattern's prefix, outputs only) the values are indices along axis ``a``
    1, 4     an axis of exactly this size, kept whole
    ...      any leading axes, aligned from the right and broadcast as numpy does
    *x       any number of axes, the same number and the same axes wherever ``*x`` stands
    !        all axes of this tensor are kept whole
    .        only the type or the shape of this tensor matters

An empty pattern is a tensor without axes of its own (a scalar, a shape, a length); if it has any, they are kept
whole. The head may bind names to integer attributes, with a default after the colon.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache, lru_cache

MARKS = "~^"


@dataclass(frozen=True)
class Name:
    """``a``, ``a~``, ``a^``, ``[a]`` or ``a@p``."""

    name: str
    mark: str = ""
    fixed: bool = False
    pick: str = ""

    def __str__(self) -> str:
        text = self.name + self.mark + (f"@{self.pick}" if self.pick else "")
        return f"[{text}]" if self.fixed else text


@dataclass(frozen=True)
class Star:
    """``*x``, ``*x~`` or ``[*x]``: any number of axes."""

    name: str
    mark: str = ""
    fixed: bool = False

    def __str__(self) -> str:
        text = f"*{self.name}{self.mark}"
        return f"[{text}]" if self.fixed else text


@dataclass(frozen=True)
class Number:
    """An axis of exactly this size."""

    size: int

    def __str__(self) -> str:
        return str(self.size)


@dataclass(frozen=True)
class Ellipsis_:
    """``...``: leading axes that broadcast."""

    def __str__(self) -> str:
        return "..."


@dataclass(frozen=True)
class Product:
    """``(a b)``: digits, outer first."""

    parts: tuple[Term, ...]

    def __str__(self) -> str:
        return f"({' '.join(map(str, self.parts))})"


@dataclass(frozen=True)
class Sum:
    """``(a + b)``: parts in order."""

    parts: tuple[Term, ...]

    def __str__(self) -> str:
        return f"({' + '.join(map(str, self.parts))})"


Term = Name | Star | Number | Ellipsis_ | Product | Sum


@dataclass(frozen=True)
class Pattern:
    """The axes of one tensor.

    Attributes:
        terms: In order; empty for a tensor that constrains nothing.
        whole: All axes are kept whole, whatever they are.
        free: The axes do not matter.
        indexes: The name of the axis that the tensor's values are indices of, or "".
    """

    terms: tuple[Term, ...] = ()
    whole: bool = False
    indexes: str = ""
    free: bool = False

    def __str__(self) -> str:
        text = "!" if self.whole else "." if self.free else " ".join(map(str, self.terms))
        return f"{self.indexes}> {text}".rstrip() if self.indexes else text


@dataclass(frozen=True)
class Rule:
    """One line of the language.

    Attributes:
        operator: ``domain.Operator``, or the operator alone for the standard domain; "" where only the patterns
            were given.
        inputs, outputs: A pattern each.
        attributes: ``(attribute, name, default)``: the size of ``name`` is the attribute.
    """

    inputs: tuple[Pattern, ...]
    outputs: tuple[Pattern, ...]
    operator: str = ""
    attributes: tuple[tuple[str, str, int | None], ...] = field(default=())

    def __str__(self) -> str:
        bound = ", ".join(f"{a}={n}" + ("" if d is None else f":{d}") for a, n, d in self.attributes)
        head = self.operator + (f"({bound})" if bound else "")
        arrow = f"{', '.join(map(str, self.inputs))} -> {', '.join(map(str, self.outputs))}".strip()
        return f"{head}  {arrow}" if head else arrow


class RuleError(ValueError):
    """A line that is not in the language."""


_TOKEN = re.compile(r"\s*(\.\.\.|\.|[A-Za-z_]\w*|\d+|[()\[\]*~^@+>!])")
_HEAD = re.compile(r"^([A-Za-z][\w.]*)(?:\(([^)]*)\))?\s\s+(?=\S)")


@lru_cache(maxsize=4096)
def parse(line: str) -> Rule:
    """Read one line, with or without the operator in front (two spaces separate it from the patterns).

    Raises:
        RuleError: The line is not in the language.
    """
    text = line.strip()
    operator = ""
    attributes: tuple[tuple[str, str, int | None], ...] = ()
    if head := _HEAD.match(text + " "):
        operator = head[1]
        attributes = tuple(_binding(part, line) for part in (head[2] or "").split(",") if part.strip())
        text = text[head.end() :]
    if text.count("->") != 1:
        raise RuleError(f"one '->' is needed: {line!r}")
    left, right = text.split("->")
    return Rule(_patterns(left), _patterns(right), operator, attributes)


def _binding(text: str, line: str) -> tuple[str, str, int | None]:
    match = re.fullmatch(r"\s*(\w+)=(\w+)(?::(-?\d+))?\s*", text)
    if not match:
        raise RuleError(f"'attribute=name:default' is needed, not {text!r}: {line!r}")
    return match[1], match[2], None if match[3] is None else int(match[3])


def _patterns(text: str) -> tuple[Pattern, ...]:
    return tuple(pattern(part.strip()) for part in text.split(","))


@cache
def pattern(text: str) -> Pattern:
    """Read the pattern of one tensor.

    Raises:
        RuleError: The pattern is not in the language.
    """
    tokens: list[str] = []
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if not match:
            raise RuleError(f"unexpected {text[at:]!r} in {text!r}")
        tokens.append(match[1])
        at = match.end()
    indexes = ""
    if len(tokens) > 1 and tokens[1] == ">":
        indexes, tokens = tokens[0], tokens[2:]
    if tokens == ["!"]:
        return Pattern(whole=True, indexes=indexes)
    if tokens == ["."]:
        return Pattern(free=True)
    found: list[Term] = []
    tokens.reverse()
    while tokens:
        found.append(_term(tokens, text))
    return Pattern(tuple(found), indexes=indexes)


def _term(tokens: list[str], text: str) -> Term:
    token = tokens.pop()
    if token == "...":
        return Ellipsis_()
    if token.isdigit():
        return Number(int(token))
    if token == "(":
        return _group(tokens, text)
    if token == "[":
        inner = _named(tokens.pop() if tokens else "", tokens, text, fixed=True)
        if not tokens or tokens.pop() != "]":
            raise RuleError(f"']' is missing in {text!r}")
        return inner
    return _named(token, tokens, text, fixed=False)


def _named(token: str, tokens: list[str], text: str, *, fixed: bool) -> Term:
    star = token == "*"
    if star:
        token = tokens.pop() if tokens else ""
    if not token.isidentifier():
        raise RuleError(f"a name is needed, not {token!r}, in {text!r}")
    mark = tokens.pop() if tokens and tokens[-1] in MARKS else ""
    if star:
        return Star(token, mark, fixed)
    pick = ""
    if tokens and tokens[-1] == "@":
        tokens.pop()
        pick = tokens.pop() if tokens else ""
        if not pick.isidentifier():
            raise RuleError(f"a name is needed after '@' in {text!r}")
    return Name(token, mark, fixed, pick)


def _group(tokens: list[str], text: str) -> Term:
    parts: list[Term] = []
    separators: list[bool] = []
    plus = False
    while True:
        if not tokens:
            raise RuleError(f"')' is missing in {text!r}")
        if tokens[-1] == ")":
            tokens.pop()
            break
        if tokens[-1] == "+":
            tokens.pop()
            plus = True
            continue
        if parts:
            separators.append(plus)
        plus = False
        parts.append(_term(tokens, text))
    if any(separators) and not all(separators):
        raise RuleError(f"products inside a sum need their own parentheses: {text!r}")
    if any(isinstance(p, Star | Ellipsis_) for p in parts) and any(separators):
        raise RuleError(f"a sum has a fixed number of parts: {text!r}")
    return Sum(tuple(parts)) if any(separators) else Product(tuple(parts))
