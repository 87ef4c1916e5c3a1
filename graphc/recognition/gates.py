"""A number times the sigmoid of a multiple of itself becomes Swish, where the target has a kernel for it.

ONNX Runtime's CPU provider has none, and its session makes one operator of the two by itself.
"""

from __future__ import annotations

import onnx_ir as ir

from graphc import edit
from graphc.contract import Capabilities
from graphc.recognition.graph import Graph
from graphc.rewrites.base import Refused, Rewriter, Rule, sole_reader

SINCE = 24


def wanted(model: ir.Model, target: Capabilities) -> bool:
    """Whether a model may have the operator, and a target computes it as one."""
    providers = target.providers or ("CPUExecutionProvider",)
    runs = not target.kernels or any(target.has_kernel("", "Swish", provider) for provider in providers)
    return runs and target.max_opset.get("", 0) >= SINCE and any(edit.is_op(n, "Sigmoid") for n in edit.nodes(model))


def recognise(node: ir.Node, rewriter: Rewriter) -> str | None:
    """Replace the product around a Sigmoid."""
    assert isinstance(rewriter, Graph)
    graph = rewriter
    try:
        product = sole_reader(node.outputs[0])
    except Refused:
        return None
    if not edit.is_op(product, "Mul"):
        return None
    x = next((v for v in product.inputs if v is not node.outputs[0]), None)
    inside, alpha = node.inputs[0], 1.0
    scaled = inside.producer() if inside is not None else None
    if inside is not x and edit.is_op(scaled, "Mul") and scaled is not None:
        factor = next((edit.scalar(v) for v in scaled.inputs if edit.scalar(v) is not None), None)
        inside = next((v for v in scaled.inputs if edit.scalar(v) is None), None)
        if factor is None or (held := graph.dims(scaled.outputs[0])) is None or held != graph.dims(inside):
            return None
        alpha = float(factor)
    if x is None or inside is not x:
        return None
    if not graph.runs("Swish", SINCE):
        raise Refused(f"{graph.target.name} has no kernel for Swish, or the model is of an older opset")
    graph.supersede(product, "Swish", [x], {"alpha": alpha})
    graph.sweep([node.outputs[0]])
    return "Swish recognised"


SWISH = Rule({"swish": "Swish, with any factor (opset 24)."}, ("Sigmoid",), recognise)
