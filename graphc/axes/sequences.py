"""Sequences of tensors, as the PyTorch exporters write ``chunk`` and ``unbind`` before constant folding.

A sequence is followed when its length and the positions that are read are constants.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from graphc import edit
from graphc.axes.algebra import Axis, concat
from graphc.axes.rules import NoRule
from graphc.axes.size import Sym

if TYPE_CHECKING:
    from graphc.axes.trace import Axes, Trace

OPERATORS = frozenset({"SplitToSequence", "SequenceAt", "SequenceConstruct", "ConcatFromSequence"})


def follow(trace: Trace, node: ir.Node) -> None:
    """Give the outputs of a sequence operator their axes.

    Raises:
        NoRule: The sequence is not known statically.
    """
    match node.op_type:
        case "SplitToSequence":
            trace.sequences[node.outputs[0]] = _split(trace, node)
        case "SequenceConstruct":
            members = [trace.axes_of(v) for v in node.inputs if v is not None]
            trace.sequences[node.outputs[0]] = [p for p in members if p is not None]
            if None in members:
                raise NoRule("a tensor of unknown rank enters a sequence")
        case "SequenceAt":
            parts = _sequence(trace, node.inputs[0])
            known = trace.value_of(node.inputs[1]) if node.inputs[1] is not None else None
            if known is None or isinstance(known.item(), Sym):
                raise NoRule("the position in the sequence is not constant")
            trace.axes[node.outputs[0]] = parts[int(known.item())]
        case "ConcatFromSequence":
            trace.axes[node.outputs[0]] = _join(trace, node)


def _sequence(trace: Trace, value: ir.Value | None) -> list[Axes]:
    if value is None or value not in trace.sequences:
        raise NoRule("the sequence is not known")
    return trace.sequences[value]


def _split(trace: Trace, node: ir.Node) -> list[Axes]:
    source = node.inputs[0]
    axes = trace.axes_of(source) if source is not None else None
    if axes is None:
        raise NoRule("the rank of the tensor is unknown")
    at = edit.attribute(node, "axis", 0) % len(axes)
    total = axes[at].size
    if not isinstance(total, int):
        raise NoRule("a dynamic axis is split")
    given = node.inputs[1] if len(node.inputs) > 1 else None
    drop = given is None and not edit.attribute(node, "keepdims", 1)
    lengths = [1] * total
    if given is not None:
        known = trace.value_of(given)
        if known is None or any(isinstance(v, Sym) for v in known.reshape(-1).tolist()):
            raise NoRule("the lengths of the parts are not constant")
        lengths = [int(v) for v in known.reshape(-1)]
        if known.ndim == 0:
            step = lengths[0]
            lengths = [min(step, total - start) for start in range(0, total, step)]
    parts = trace.unifier.cut(axes[at], lengths)
    return [(*axes[:at], *(() if drop else (part,)), *axes[at + 1 :]) for part in parts]


def _join(trace: Trace, node: ir.Node) -> Axes:
    parts = _sequence(trace, node.inputs[0])
    rank = len(parts[0]) + (1 if edit.attribute(node, "new_axis", 0) else 0)
    at = edit.attribute(node, "axis") % rank
    first = list(parts[0])
    if rank > len(first):
        first.insert(at, Axis(len(parts)))
        trace.fix([first[at]], "tensors are stacked along this axis", node)
    else:
        first[at] = concat([part[at] for part in parts])
    for part in parts[1:]:
        others = list(part)
        if rank > len(others):
            others.insert(at, first[at])
        for i, (a, b) in enumerate(zip(first, others, strict=True)):
            if i != at:
                trace.unifier.unify(a, b)
    return tuple(first)
