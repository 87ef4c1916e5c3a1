"""What a simplification rule is: it looks at one node, changes nothing, and says what the node should become."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphc.edit import Array

if TYPE_CHECKING:
    from graphc.simplification.sweep import Sweep


@dataclass(frozen=True)
class Forward:
    """The first output of the node is ``value``, which exists already; other outputs must be unused."""

    value: ir.Value
    what: str


@dataclass(frozen=True)
class Become:
    """The node computes the same as another operator on other inputs, and turns into it.

    Attributes:
        inputs: Existing values, None for omitted ones, or arrays that become constants.
        attributes: All attributes of the new node, as they are or as Python values.
        what: The change, for the report.
        operator: The new operator, where it changes.
    """

    inputs: Sequence[ir.Value | Array | None]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    what: str = ""
    operator: str | None = None


@dataclass(frozen=True)
class Refuse:
    """The rule was tried and does not apply, for this reason."""

    reason: str


Outcome = Forward | Become | Refuse | None
Rule = Callable[[ir.Node, "Sweep"], Outcome]


class Rules:
    """Rules by the operator of the standard domain that they start at, in the order they were added."""

    def __init__(self) -> None:
        self._by_operator: dict[str, list[Rule]] = {}

    def add(self, *operators: str) -> Callable[[Rule], Rule]:
        """Register a rule for these operators."""

        def register(rule: Rule) -> Rule:
            for operator in operators:
                self._by_operator.setdefault(operator, []).append(rule)
            return rule

        return register

    def __getitem__(self, operator: str) -> Sequence[Rule]:
        return self._by_operator.get(operator, ())


def kept_attributes(node: ir.Node, **changed: Any) -> dict[str, Any]:
    """The attributes of a node, some of them replaced by Python values."""
    return {**node.attributes, **changed}
