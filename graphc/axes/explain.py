"""Answers "what goes with it?" and "why can I not cut this?" in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphc.axes.trace import node_name
from graphc.errors import BadInput, nearest

if TYPE_CHECKING:
    from graphc.axes.groups import Fixed, Group, Groups


def explain(groups: Groups, name: str) -> str:
    """See ``Groups.explain``."""
    if name in groups:
        return _group(groups[name])
    constants = {v.name: v for v in groups.trace.order if v.name}
    if name in constants:
        value = constants[name]
        lines = [_place_line(g, p.axis, p.role) for g, p in groups.of(value)]
        lines += [_fixed(f) for f in groups.fixed if f.value is value]
        return "\n".join([f"{name}:", *(lines or ["  nothing of it is larger than one index"])])
    nodes = {node_name(node): node for node in groups.trace.graph}
    if name in nodes:
        node = nodes[name]
        lines = []
        for fact in groups.trace.facts_of(node):
            if fact.what == "fixed":
                where = f" of '{fact.operand.name}'" if fact.operand is not None else ""
                lines.append(f"  keeps an axis of size {fact.axis.size}{where} whole: {fact.reason}")
        for read in (*node.inputs, *node.outputs):
            if read is not None and read in groups.trace.order:
                lines += [_place_line(g, p.axis, p.role) for g, p in groups.of(read)]
        return "\n".join([f"{name} ({node.op_type}):", *dict.fromkeys(lines or ["  keeps nothing whole"])])
    known = [*(g.name for g in groups), *constants, *nodes]
    raise BadInput(f"nothing in the model is called '{name}'", hint=nearest(name, known))


def _group(group: Group) -> str:
    lines = [
        f"{group.name}: {group.size} units of kind {group.kind}, "
        f"{group.params} parameters ({group.bytes} bytes) in each"
    ]
    if group.blocks:
        lines.append(f"  in blocks of {' x '.join(map(str, group.blocks))}, which may keep other units")
    lines += [f"  constraint: {text}" for text in group.constraints]
    for n in group.normalisers:
        lines.append(f"  {node_name(n.node)} ({n.node.op_type}) divides by their number")
    lines.append("  a cut of dead units is exact" if group.exact else "  a cut changes the values that remain")
    lines += [
        f"  {p.role} along axis {p.axis} of {p.value.name}"
        + (f", stride {p.stride}" if p.stride > 1 else "")
        + (f", repeated {p.outer} times" if p.outer > 1 else "")
        for p in group.places
    ]
    return "\n".join(lines)


def _place_line(group: Group, axis: int, role: str) -> str:
    return f"  axis {axis} {role} group {group.name} ({group.size} units of kind {group.kind})"


def _fixed(fixed: Fixed) -> str:
    by = f", says {fixed.node}" if fixed.node else ""
    return f"  axis {fixed.axis}: {fixed.size} indices cannot be cut: {fixed.reason}{by}"
