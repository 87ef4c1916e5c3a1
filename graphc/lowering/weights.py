"""Forms of products with constant weights: several of one input as one; one that reads its weight as it is stored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array
from graphc.lowering.cached import counts
from graphc.lowering.site import Site
from graphc.lowering.steps import Step, between, constant, ints
from graphc.recognition.graph import Graph
from graphc.rewrites.base import Refused, dims
from graphc.rewrites.weights import reading
from graphc.shapes.symbolic import plain_name

_MOST = 4
"""Products that are joined at most: all of them have their results in memory at once."""

_LARGE = 1 << 25
"""Bytes from which on a weight is read from memory whenever it is used, in whatever layout."""


def joint(node: ir.Node, graph: Graph) -> Site | None:
    """The products of one input with several weights."""
    x = node.inputs[0]
    if x is None or x.const_value is not None:
        return None
    group = [n for n in dict.fromkeys(x.consumers()) if _is_plain(n, x) and n.graph is node.graph]
    # Nodes come in order: the first one stands for all.
    if len(group) < 2 or node not in group or ("joint", x, node.graph) in graph.made:
        return None
    graph.made["joint", x, node.graph] = x
    group = [node, *(n for n in group if n is not node)]
    if len(group) > _MOST:
        raise Refused(f"more than {_MOST} products share their input")
    weights = [n.inputs[1] for n in group]
    tensors = [edit.tensor(value) for value in weights]
    held = [tensor for tensor in tensors if tensor is not None]
    if len({tensor.dtype for tensor in held}) > 1 or len(set(weights)) < len(weights):
        raise Refused("products of one input have weights of several dtypes, or the same one")
    if any(len(value.uses()) > 1 or value.is_graph_output() for value in weights if value is not None):
        raise Refused("another form of a weight that others read would store it twice")
    widths = [dims(tensor)[1] for tensor in held]
    lead = (graph.dims(x) or ())[:-1]
    if not lead:
        return None
    first = weights[0]
    assert first is not None
    joined = constant(f"{first.name}.joined", _beside(held))
    whole = between(f"{node.outputs[0].name}.joined", node.outputs[0], (*lead, sum(widths)))
    results = tuple(n.outputs[0] for n in group)
    steps = (
        Step("MatMul", (x, joined), (whole,)),
        Step("Split", (whole, ints(*widths)), results, {"axis": -1}),
    )
    return Site("joint-product", "MatMul", tuple(reversed(group)), (x, *weights), results, {}, "", steps=steps)


def _is_plain(node: ir.Node, x: ir.Value) -> bool:
    """Whether a node is a product of ``x`` with a matrix of its own."""
    if not edit.is_op(node, "MatMul") or node.inputs[0] is not x:
        return False
    held = edit.tensor(node.inputs[1])
    return held is not None and len(held.shape) == 2 and node.inputs[1] is not None and node.inputs[1].is_initializer()


def _beside(held: Sequence[ir.TensorProtocol]) -> ir.TensorProtocol:
    """Matrices beside each other, computed when they are read."""

    def compute() -> ir.TensorProtocol:
        columns: list[Array] = []
        for tensor in held:
            with reading(tensor) as array:
                columns.append(np.array(array))
                del array
        return ir.tensor(np.concatenate(columns, axis=1), dtype=held[0].dtype)

    shape = (dims(held[0])[0], sum(dims(tensor)[1] for tensor in held))
    return ir.LazyTensor(compute, dtype=held[0].dtype, shape=ir.Shape(shape), cache=False, name="joined")


def unpacked(node: ir.Node, graph: Graph) -> Site | None:
    """A product with a matrix that no cache holds, of single rows or, in a decoder, of as many as it reads tokens.

    ONNX Runtime repacks constant weights into blocks, which suit products of many rows; a single row is multiplied
    faster with the weight as it is stored. It repacks nothing that it sees as computed, such as a view whose shape is.
    """
    x, weight = node.inputs[:2]
    shape = graph.dims(x)
    if x is None or weight is None or edit.tensor(x) is not None or shape is None or len(shape) < 2:
        return None
    nodes: tuple[ir.Node, ...] = (node,)
    source, turned = weight, weight.producer()
    if edit.is_op(turned, "Transpose") and turned is not None and turned.inputs[0] is not None:
        source, nodes = turned.inputs[0], (node, turned)
    held = edit.tensor(source)
    if held is None or not source.is_initializer() or len(held.shape) != 2 or held.nbytes < _LARGE:
        return None
    if shape[-2] != 1 and plain_name(shape[-2]) not in counts(graph):
        return None
    free = next((i for i, dim in enumerate(shape[:-1]) if not isinstance(dim, int)), None)
    if free is None:
        raise Refused("all sizes are fixed, and the session would see through a view of the weight")
    like = ir.DataType.INT64
    size, none, target = (
        between(f"{weight.name}.{n}", like, (i,)) for n, i in (("free", 1), ("none", 1), ("target", 2))
    )
    whole = graph.dims(weight) or ()
    view = between(f"{weight.name}.view", node.outputs[0], whole)
    steps = [
        Step("Shape", (x,), (size,), {"start": free, "end": free + 1}),
        Step("Sub", (size, size), (none,)),
        # 0 keeps the size of an axis, and -1 is what is left.
        Step("Concat", (none, ints(-1)), (target,), {"axis": 0}),
    ]
    read = weight
    if turned is not None and len(nodes) == 2:
        read = between(f"{weight.name}.turned", node.outputs[0], whole)
        steps.append(Step("Transpose", (source,), (read,), {"perm": edit.attribute(turned, "perm", (1, 0))}))
    steps.append(Step("Reshape", (read, target), (view,)))
    steps.append(Step("MatMul", (x, view), (node.outputs[0],)))
    return Site("unpacked-product", "MatMul", nodes, (x, source), (node.outputs[0],), {}, "", steps=tuple(steps))
