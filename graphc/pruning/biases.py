"""Adding a constant to what a contraction gives: into its bias where it has one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array


def add_bias(node: ir.Node, bias: Array, names: edit.Names) -> ir.Value:
    """Add a constant to the output of a MatMul, Gemm or Conv; returns the value that holds the sum or becomes it.

    Args:
        node: The node.
        bias: What is added; it broadcasts to the output. Of Conv and Gemm, one element a channel.
        names: For what is made new.
    """
    out, graph = node.outputs[0], node.graph
    assert graph is not None
    dtype = (out.dtype or ir.DataType.FLOAT).numpy()
    if node.op_type == "MatMul":
        if not _into_add(node, bias, names):
            vector = edit.initializer(_root(graph), bias.astype(dtype), names.fresh(f"{out.name}.bias"))
            return _insert_add(node, vector, names)
        return out
    channels = bias.reshape(-1) if node.op_type == "Conv" else bias
    held = edit.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    scale = float(edit.attribute(node, "beta", 1.0)) if node.op_type == "Gemm" else 1.0
    if len(node.inputs) < 3 or node.inputs[2] is None:
        if node.op_type == "Gemm":
            node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
        made = edit.initializer(_root(graph), channels.astype(dtype), names.fresh(f"{out.name}.bias"))
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, made)
    elif held is not None and scale:
        total = (held.astype(np.float64) + channels / scale).astype(held.dtype)
        name = names.fresh(f"{node.inputs[2].name}.folded")
        old = node.inputs[2]
        node.replace_input_with(2, edit.initializer(_root(graph), total, name))
        edit.drop_unused(old)
    else:
        vector = edit.initializer(_root(graph), bias.astype(dtype), names.fresh(f"{out.name}.bias"))
        return _insert_add(node, vector, names)
    return out


def as_channels(node: ir.Node, bias: Array) -> Array:
    """A vector shaped to broadcast against the node's output."""
    kernel = node.inputs[1].shape if node.op_type == "Conv" and node.inputs[1] is not None else None
    return bias.reshape(-1, *(1,) * (len(kernel) - 2)) if kernel is not None else bias


def _into_add(node: ir.Node, bias: Array, names: edit.Names) -> bool:
    """Whether an Add of a constant follows that could take the bias up."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or node.outputs[0].is_graph_output() or not edit.is_op(uses[0].node, "Add"):
        return False
    other = uses[0].node.inputs[1 - uses[0].idx]
    held = edit.constant(other, limit=bias.size)
    if held is None or held.shape != bias.shape or other is None or not other.is_initializer():
        return False
    total = ir.Tensor((held.astype(np.float64) + bias).astype(held.dtype), name=other.name)
    if len(list(other.uses())) == 1:
        other.const_value = total
    else:
        graph = uses[0].node.graph
        assert graph is not None
        uses[0].node.replace_input_with(
            1 - uses[0].idx, edit.initializer(_root(graph), total, names.fresh(f"{other.name}.folded"))
        )
    return True


def _insert_add(node: ir.Node, vector: ir.Value, names: edit.Names) -> ir.Value:
    out, graph = node.outputs[0], node.graph
    assert graph is not None
    total = ir.Value(name=names.fresh(f"{out.name}.plus"), shape=out.shape, type=out.type)
    add = ir.Node("", "Add", [out, vector], outputs=[total], name=total.name)
    graph.insert_after(node, add)
    edit.replace(out, total)
    add.replace_input_with(0, out)
    return total


def _root(graph: ir.Graph | ir.Function) -> ir.Graph:
    assert isinstance(graph, ir.Graph)
    return graph
