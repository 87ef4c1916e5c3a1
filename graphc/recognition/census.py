"""How many attentions and mixtures of experts a model has, and how many of them are recognised."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from graphc import edit
from graphc.contract import Capabilities, Context, PassResult
from graphc.recipe import Recipe
from graphc.recognition import experts
from graphc.recognition.graph import Graph
from graphc.rewrites.base import Refused

_WHOLE = ("Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention", "PackedMultiHeadAttention")


def attentions(model: ir.Model, target: Capabilities) -> str:
    """In words, such as ``"12 of 12 recognised"``; "" for a model without attention.

    Args:
        model: It is not changed.
        target: What the operators would be emitted for.
    """
    if not any(node.op_type in ("Softmax", *_WHOLE) for node in edit.nodes(model)):
        return ""
    copy, context = model.clone(), Context(target)
    result = PassResult()
    for each in Recipe.parse("simplify,recognise{only=attention}").passes:
        result = each.run(copy, context)
    whole = sum(node.op_type in _WHOLE for node in edit.nodes(copy))
    softmaxes = {node.name for node in edit.nodes(copy) if node.op_type == "Softmax"}
    missed = [refusal for refusal in result.refusals if refusal.node in softmaxes]
    total = whole + sum(refusal.count for refusal in missed)
    if not total:
        return ""
    why = "; ".join(f"{refusal.count}: {refusal.reason}" for refusal in missed)
    return f"{whole} of {total} recognised" + (f" ({why})" if why else "")


def mixtures(model: ir.Model, target: Capabilities) -> str:
    """As ``attentions``, for routers with the experts that they pick; "" for a model without."""
    if not any(edit.is_op(node, "TopK") for node in edit.nodes(model)):
        return ""
    copy = model.clone()
    for each in Recipe.parse("simplify").passes:
        each.run(copy, Context(target))
    graph = Graph(copy, frozenset(), target)
    found, missed = 0, Counter[str]()
    for node in edit.nodes(copy):
        try:
            found += experts.find(node, graph) is not None
        except Refused as refusal:
            missed[refusal.reason] += 1
    total = found + missed.total()
    why = "; ".join(f"{count}: {reason}" for reason, count in missed.items())
    return f"{found} of {total} recognised" + (f" ({why})" if why else "") if total else ""
