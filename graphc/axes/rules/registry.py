"""Where the rules of operators are kept, and what a rule that depends on the node may ask about it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes import notation
from graphc.axes.algebra import Axis
from graphc.axes.size import Size, Sym

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def letters(count: int, start: int = 0) -> list[str]:
    """Distinct axis names: a, b, ..., z, a1, b1, ..."""
    names = (f"{c}{i or ''}" for i in itertools.count() for c in LETTERS)
    return list(itertools.islice(names, start, start + count))


class NoRule(Exception):
    """The rule does not cover this use of the operator; its axes are kept whole.

    Args:
        reason: Why, in plain words.
    """


@dataclass(frozen=True)
class Line:
    """The rule of one node: its text, and what the text leaves open.

    Attributes:
        text: Patterns in the language of ``graphc.axes.notation``, without the operator.
        sizes: Sizes of names; a tuple for all axes of a star.
        picks: Constant positions by the name that follows ``@``.
        multiples: By name: what its size must be a multiple of, because kernels ask for it.
    """

    text: str
    sizes: Mapping[str, Size | tuple[Size, ...]] = field(default_factory=dict)
    picks: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    multiples: Mapping[str, int] = field(default_factory=dict)


class View:
    """A node as rules see it: attributes, shapes and small constants, all read-only."""

    def __init__(
        self,
        node: ir.Node,
        shapes: Callable[[ir.Value], Sequence[Size] | None],
        known: Callable[[ir.Value], np.ndarray[Any, Any] | None],
        indexed: Callable[[ir.Value], Axis | None],
        version: int,
    ) -> None:
        self.node = node
        self.version = version
        self._shapes, self._known, self._indexed = shapes, known, indexed

    def attr(self, name: str, default: Any = None) -> Any:
        return edit.attribute(self.node, name, default)

    def has(self, i: int) -> bool:
        """Whether input ``i`` is given."""
        return i < len(self.node.inputs) and self.node.inputs[i] is not None

    def wants(self, i: int) -> bool:
        """Whether output ``i`` is used."""
        return i < len(self.node.outputs) and bool(self.node.outputs[i].name)

    @property
    def inputs(self) -> int:
        """The number of inputs, omitted ones included."""
        return len(self.node.inputs)

    def shape(self, i: int = 0) -> list[Size]:
        """The sizes of the axes of input ``i``.

        Raises:
            NoRule: The rank is unknown.
        """
        value = self.node.inputs[i]
        found = None if value is None else self._shapes(value)
        if found is None:
            raise NoRule(f"the rank of input {i} is unknown")
        return list(found)

    def rank(self, i: int = 0) -> int:
        return len(self.shape(i))

    def axis(self, default: int, i: int = 0, name: str = "axis") -> int:
        """The attribute ``axis`` as a non-negative number within the rank of input ``i``."""
        axis, rank = int(self.attr(name, default)), self.rank(i)
        if not -rank <= axis < rank:
            raise NoRule(f"axis {axis} is outside rank {rank}")
        return axis % rank

    def values(self, i: int) -> list[Any] | None:
        """The elements of a small tensor (numbers or ``Sym``) where they are known."""
        value = self.node.inputs[i] if self.has(i) else None
        found = None if value is None else self._known(value)
        return None if found is None else list(found.reshape(-1).tolist())

    def ints(self, i: int, name: str = "") -> list[int] | None:
        """Static integers from input ``i``, or from the attribute of older opsets; None where not given.

        Raises:
            NoRule: They are given and depend on data or on dynamic sizes.
        """
        if name and (given := self.attr(name)) is not None:
            return [int(v) for v in (given if isinstance(given, tuple) else (given,))]
        if not self.has(i):
            return None
        found = self.values(i)
        if found is None or any(isinstance(v, Sym) for v in found):
            raise NoRule(f"input {i} is not a constant")
        return [int(v) for v in found]

    def constant(self, i: int, limit: int = 1 << 16) -> np.ndarray[Any, Any] | None:
        """A constant input as an array, or None."""
        return edit.constant(self.node.inputs[i], limit) if self.has(i) else None

    def indexed(self, i: int) -> bool:
        """Whether the values of input ``i`` are known to be indices along some axis."""
        value = self.node.inputs[i] if self.has(i) else None
        return value is not None and self._indexed(value) is not None

    def declared(self, i: int = 0) -> tuple[int | None, ...] | None:
        """The shape that the model declares for output ``i``: a hint; dynamic axes are None."""
        shape = self.node.outputs[i].shape if i < len(self.node.outputs) else None
        return None if shape is None else tuple(d if isinstance(d, int) else None for d in shape)


RuleFunction = Callable[[View], Line | str]
SizesFunction = Callable[[View], Mapping[str, Size | tuple[Size, ...]]]

_lines: dict[str, notation.Rule] = {}
_functions: dict[str, RuleFunction] = {}
_sizes: dict[str, SizesFunction] = {}


def lines(text: str) -> None:
    """Register one rule a line."""
    for line in text.strip().splitlines():
        rule = notation.parse(line)
        assert rule.operator not in _lines, line
        _lines[rule.operator] = rule


def same(operators: str, patterns: str) -> None:
    """Register the same patterns for several operators, given as words."""
    lines("\n".join(f"{operator}  {patterns}" for operator in operators.split()))


def rule(*operators: str) -> Callable[[RuleFunction], RuleFunction]:
    """Register a function that writes the line of each node (its text depends on ranks, attributes, constants)."""

    def register(fn: RuleFunction) -> RuleFunction:
        for operator in operators:
            assert operator not in _functions, operator
            _functions[operator] = fn
        return fn

    return register


def sizes(*operators: str) -> Callable[[SizesFunction], SizesFunction]:
    """Register a function that computes the sizes that the lines of these operators leave open."""

    def register(fn: SizesFunction) -> SizesFunction:
        for operator in operators:
            _sizes[operator] = fn
        return fn

    return register


def operator_name(node: ir.Node) -> str:
    """``Operator`` or ``domain.Operator``."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def operators() -> Iterator[str]:
    """All operators that have a rule, sorted."""
    return iter(sorted({*_lines, *_functions}))


def text_of(operator: str) -> str | None:
    """The line of an operator where it is always the same, else None."""
    found = _lines.get(operator)
    return None if found is None else str(found)


def line_for(view: View) -> tuple[notation.Rule, Line] | None:
    """The parsed rule of a node and what it leaves open, or None if the operator has no rule.

    Raises:
        NoRule: The operator has rules, but none for this use.
    """
    operator = operator_name(view.node)
    extra = _sizes.get(operator)
    given = dict(extra(view)) if extra else {}
    fixed = _lines.get(operator)
    if fixed is not None:
        for attribute, name, default in fixed.attributes:
            value = view.attr(attribute, default)
            if value is not None:
                given[name] = int(value)
        return fixed, Line("", given)
    function = _functions.get(operator)
    if function is None:
        return None
    made = function(view)
    line = made if isinstance(made, Line) else Line(made)
    return notation.parse(line.text), Line(line.text, {**given, **line.sizes}, line.picks, line.multiples)
