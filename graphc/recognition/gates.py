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


def gated(node: ir.Node, graph: Graph) -> tuple[ir.Node, ir.Value, float, ir.Node | None] | None:
    """What a Sigmoid gates, if it is taken of that: the product, the value, the factor, and the node of the factor."""
    try:
        product = sole_reader(node.outputs[0])
    except Refused:
        return None
    if not edit.is_op(product, "Mul"):
        return None
    x = next((v for v in product.inputs if v is not node.outputs[0]), None)
    inside = node.inputs[0]
    if x is None or inside is None:
        return None
    if inside is x:
        return product, x, 1.0, None
    scaled = inside.producer()
    if scaled is None or not edit.is_op(scaled, "Mul"):
        return None
    factor = next((edit.scalar(v) for v in scaled.inputs if edit.scalar(v) is not None), None)
    # A factor with more axes than the value would give them to the result.
    same = (held := graph.dims(inside)) is not None and held == graph.dims(x)
    return (product, x, float(factor), scaled) if factor is not None and same and x in scaled.inputs else None


def recognise(node: ir.Node, rewriter: Rewriter) -> str | None:
    """Replace the product around a Sigmoid."""
    assert isinstance(rewriter, Graph)
    graph = rewriter
    found = gated(node, graph)
    if found is None:
        return None
    product, x, alpha, _ = found
    if not graph.runs("Swish", SINCE):
        raise Refused(f"{graph.target.name} has no kernel for Swish, or the model is of an older opset")
    graph.supersede(product, "Swish", [x], {"alpha": alpha})
    graph.sweep([node.outputs[0]])
    return "Swish recognised"


SWISH = Rule({"swish": "Swish, with any factor (opset 24)."}, ("Sigmoid",), recognise)
