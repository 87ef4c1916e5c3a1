"""Experts that every token picks, computed without a copy of their weights for each token.

What exporters write gathers a matrix for each token and multiplies the token with it: of 512 picks of experts of 256 kB
that is 134 MB, and more with every row of a batch. Statistics need the products, not the copies.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.contraction import Contraction, of


def by_expert(model: ir.Model) -> int:
    """Multiply expert by expert, each with the tokens that picked it; in place, returns how many products.

    The products are the same up to rounding. Where something else reads the gathered weights, they stay.
    """
    names = edit.Names(model)
    count = 0
    for node in [node for node in model.graph if edit.is_op(node, "MatMul")]:
        found = of(node)
        if isinstance(found, Contraction) and found.rows.by and _alone(found):
            _write(model.graph, found, names)
            count += 1
    return count


def _chain(found: Contraction) -> list[ir.Node]:
    """The Gather or GatherND of a product, and the Transpose behind it."""
    value = found.node.inputs[1 - list(found.node.inputs).index(found.activation)]
    chain: list[ir.Node] = []
    while value is not found.weight:
        node = value.producer() if value is not None else None
        assert node is not None
        chain.append(node)
        value = node.inputs[0]
    return chain


def _alone(found: Contraction) -> bool:
    """Whether a product is all that reads its gathered weights, with one index and as many matrices as tokens."""
    chain = _chain(found)
    gather, x = chain[-1], found.activation
    index = gather.inputs[1]
    if any(len(node.outputs[0].uses()) != 1 or node.outputs[0].is_graph_output() for node in chain):
        return False
    if x.shape is None or len(x.shape) != 3 or x.dtype is None or index is None or index.shape is None:
        return False
    if edit.is_op(gather, "Gather"):
        return len(index.shape) == 1
    return len(index.shape) == 2 and index.shape[1] == 1 and not edit.attribute(gather, "batch_dims", 0)


def _write(graph: ir.Graph, found: Contraction, names: edit.Names) -> None:
    node, x, stack = found.node, found.activation, found.weight
    experts, outputs, _ = (found.shape[axis] for axis in found.order)
    gone = [node, *_chain(found)]
    index, out = gone[-1].inputs[1], node.outputs[0]
    right = found.rows.axis == -2

    def add(op: str, *inputs: ir.Value | None, name: str = "", **attributes: object) -> ir.Value:
        made = ir.node(op, inputs, attributes, outputs=[ir.Value(name=names.fresh(f"{out.name}.{name or op}"))])
        graph.insert_before(node, made)
        return made.outputs[0]

    def ints(*numbers: int) -> ir.Value:
        return edit.initializer(graph, np.array(numbers, np.int64), names.fresh(f"{out.name}.sizes"))

    # Rows (tokens, rows of each, channels), and the expert of each, which is counted from the end where it is negative.
    rows = add("Transpose", x, perm=(0, 2, 1)) if right else x
    picks = add("Mod", add("Reshape", add("Cast", index, to=int(ir.DataType.INT64)), ints(-1)), ints(experts))
    tokens = add("Concat", add("Shape", picks), ints(1, 1), axis=0)
    picks = add("Expand", picks, add("Shape", rows, end=1))
    rows = add("Expand", rows, tokens)
    shape = add("Concat", add("Shape", rows, end=2), ints(outputs), axis=0)
    assert x.dtype is not None
    zero = ir.tensor(np.zeros(1, x.dtype.numpy()), dtype=x.dtype)
    start = add("ConstantOfShape", shape, value=zero)
    body = _body(rows, picks, turned=found.order == (0, 1, 2), dtype=x.dtype)
    numbers = edit.initializer(graph, np.arange(experts), names.fresh(f"{out.name}.numbers"))
    made = add("Scan", start, stack, numbers, body=body, num_scan_inputs=2)
    made = add("Transpose", made, perm=(0, 2, 1)) if right else made
    made.type, made.shape = out.type, out.shape
    edit.replace(out, made)
    for old in gone:
        edit.remove(old)


def _body(rows: ir.Value, picks: ir.Value, *, turned: bool, dtype: ir.DataType) -> ir.Graph:
    """One expert: what the tokens that picked it become is put to the rest."""

    def value(name: str, dtype: ir.DataType) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype))

    out, weight = value("picked.out", dtype), value("picked.weight", dtype)
    number = value("picked.number", ir.DataType.INT64)
    nodes: list[ir.Node] = []

    def add(op: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        nodes.append(ir.node(op, inputs, attributes, outputs=[ir.Value(name=f"picked.{op}.{len(nodes)}")]))
        return nodes[-1].outputs[0]

    mine = add("Transpose", add("NonZero", add("Equal", picks, number)), perm=(1, 0))
    matrix = add("Transpose", weight, perm=(1, 0)) if turned else weight
    product = add("MatMul", add("GatherND", rows, mine), matrix)
    put = add("ScatterND", out, mine, product)
    put.type = ir.TensorType(dtype)
    return ir.Graph([out, weight, number], [put], nodes=nodes, name="picked")
