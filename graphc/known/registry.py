"""Where the rules of :mod:`graphc.known` are kept: what each operator makes of what is known of its inputs.

An operator without a rule makes nothing known. A rule may only claim what holds for every input of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from graphc.known.facets import Facets

if TYPE_CHECKING:
    from graphc.known.knowledge import Knowledge

Rule = Callable[[ir.Node, "Knowledge"], Sequence[Facets]]
_RULES: dict[str, Rule] = {}
CONTRIB = "com.microsoft"


def facets(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    """The facets of a node's outputs, given those of its inputs; empty where nothing is known."""
    domain = (node.domain or "").replace("ai.onnx", "", 1)
    if domain not in ("", CONTRIB):
        return ()
    rule = _RULES.get(node.op_type)
    if rule is None or known.shape(node.outputs[0]) is None:
        return ()
    if any(value is not None and known.shape(value) is None for value in node.inputs):
        return ()
    return rule(node, known)


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a rule for standard or com.microsoft operators of these names."""

    def register(rule: Rule) -> Rule:
        for operator in operators:
            _RULES[operator] = rule
        return rule

    return register


def rank_of(node: ir.Node, known: Knowledge, output: int = 0) -> int:
    """The rank of one of a node's outputs."""
    shape = known.shape(node.outputs[output])
    assert shape is not None
    return len(shape)


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """An input of a node, None where it is omitted."""
    return node.inputs[index] if index < len(node.inputs) else None
