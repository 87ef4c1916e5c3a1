"""The forms: operators that may take the place of others, most of them of ``com.microsoft``, and how to find them."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from graphc import edit
from graphc.lowering import cached, decoded, experts, packed_experts, weights
from graphc.lowering.site import Site
from graphc.recognition.gates import gated
from graphc.recognition.graph import Graph
from graphc.rewrites.base import Refused


def _skip_norm(node: ir.Node, graph: Graph) -> Site | None:
    """A sum, normalised along its last axis."""
    simple = node.op_type == "RMSNormalization"
    total, scale = node.inputs[0], node.inputs[1]
    add = total.producer() if total is not None else None
    if add is None or total is None or not edit.is_op(add, "Add") or len(node.outputs) > 1:
        return None
    dims = graph.dims(total)
    if dims is None or len(dims) != 3 or edit.attribute(node, "axis", -1) not in (-1, 2):
        return None
    if any(graph.dims(v) != dims for v in add.inputs):
        raise Refused("what is added before the normalisation is broadcast")
    if scale is None or graph.rank(scale) != 1:
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    inputs = (*add.inputs, scale) if simple else (*add.inputs, scale, bias)
    wanted = total if len(total.uses()) > 1 or total.is_graph_output() else None
    return Site(
        "skip-rms-norm" if simple else "skip-layer-norm",
        "SkipSimplifiedLayerNormalization" if simple else "SkipLayerNormalization",
        (node, add),
        inputs,
        (node.outputs[0], None, None, wanted),
        {"epsilon": edit.attribute(node, "epsilon", 1e-5)},
    )


def _multi_head(node: ir.Node, graph: Graph) -> Site | None:
    """Attention whose heads are attributes, as many of keys as of queries."""
    heads = edit.attribute(node, "q_num_heads")
    if heads is None or len(node.outputs) > 1 or len(node.inputs) > 4:
        return None
    if edit.attribute(node, "kv_num_heads") != heads:
        raise Refused("keys have fewer heads than queries, which MultiHeadAttention has to repeat")
    if edit.attribute(node, "softcap", 0.0) or edit.attribute(node, "is_causal", 0):
        raise Refused("MultiHeadAttention has no soft cap, and its causal mask is another one")
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is not None and graph.dtype(mask) == ir.DataType.BOOL:
        raise Refused("MultiHeadAttention adds its mask, and this one is boolean")
    if mask is not None and graph.rank(mask) != 4:
        return None
    attributes = {"num_heads": heads}
    scale = edit.attribute(node, "scale")
    if scale is not None:
        attributes["scale"] = scale
    inputs = (*node.inputs[:3], None, None, mask) if mask is not None else tuple(node.inputs[:3])
    return Site("multi-head-attention", "MultiHeadAttention", (node,), inputs, (node.outputs[0],), attributes)


def _quick_gelu(node: ir.Node, graph: Graph) -> Site | None:
    """``x * sigmoid(alpha * x)``."""
    found = gated(node, graph)
    if found is None:
        return None
    product, x, alpha, scaled = found
    if scaled is not None and len(scaled.outputs[0].uses()) != 1:
        return None
    nodes = (product, node) if scaled is None else (product, node, scaled)
    return Site("quick-gelu", "QuickGelu", nodes, (x,), (product.outputs[0],), {"alpha": alpha})


def _bias_gelu(node: ir.Node, graph: Graph) -> Site | None:
    """A vector added before Gelu by Erf."""
    source = node.inputs[0]
    add = source.producer() if source is not None else None
    if edit.attribute(node, "approximate", "none") != "none" or not edit.is_op(add, "Add") or add is None:
        return None
    if source is None or len(source.uses()) != 1 or source.is_graph_output():
        return None
    for bias, x in (tuple(add.inputs[:2]), tuple(reversed(add.inputs[:2]))):
        held, dims = edit.tensor(bias), graph.dims(x)
        if held is not None and dims and len(held.shape) == 1 and held.size == dims[-1] and graph.dims(source) == dims:
            return Site("bias-gelu", "BiasGelu", (node, add), (x, bias), (node.outputs[0],), {})
    return None


def _sum_norm(node: ir.Node, graph: Graph) -> Site | None:
    """A sum of two values of one shape, normalised: ONNX Runtime makes SkipLayerNormalization of it, but not of Sum."""
    total = node.inputs[0]
    add = total.producer() if total is not None else None
    if total is None or add is None or not edit.is_op(add, "Add") or len(node.outputs) > 1:
        return None
    dims = graph.dims(total)
    if dims is None or len(dims) != 3 or any(graph.dims(v) != dims or edit.tensor(v) is not None for v in add.inputs):
        return None
    return Site("sum-norm", "Sum", (add,), tuple(add.inputs), (total,), {}, "", node, (1, 64, 384))


FORMS: dict[str, tuple[tuple[str, ...], Callable[[ir.Node, Graph], Site | None]]] = {
    "skip-rms-norm": (("RMSNormalization",), _skip_norm),
    "skip-layer-norm": (("LayerNormalization",), _skip_norm),
    "multi-head-attention": (("Attention",), _multi_head),
    "group-query-attention": (("Attention",), cached.group_query),
    "quick-gelu": (("Sigmoid",), _quick_gelu),
    "bias-gelu": (("Gelu",), _bias_gelu),
    "moe": (("TopK",), experts.find),
    "qmoe": (("TopK",), packed_experts.find),
    "sum-norm": (("LayerNormalization",), _sum_norm),
    "joint-product": (("MatMul",), weights.joint),
    "unpacked-product": (("MatMul",), weights.unpacked),
    "decoded-weight": (("DequantizeLinear",), decoded.find),
}
"""By name: the standard operators at which a form is tried, and what finds it."""

STANDARD = frozenset(("sum-norm", "joint-product", "unpacked-product", "decoded-weight"))
"""Forms that write standard operators alone."""
