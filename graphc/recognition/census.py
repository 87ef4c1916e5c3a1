"""How many attentions a model has, and how many of them the pass ``recognise`` can write as Attention."""

from __future__ import annotations

import onnx_ir as ir

from graphc import edit
from graphc.contract import Capabilities, Context, PassResult
from graphc.recipe import Recipe

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
