"""Two-dimensional products with what is added to them, and transposed operands, are one Gemm."""

from __future__ import annotations

import onnx_ir as ir

from graphc import edit
from graphc.rewrites.base import FLOATS, Refused, Rewriter, Rule, sole_reader


def matmul_add(node: ir.Node, rewriter: Rewriter) -> str | None:
    """Turn the Add after a two-dimensional MatMul, or a Gemm without bias, into a Gemm's bias."""
    found = _product(node)
    if found is None:
        return None
    product, addend = found
    if product.op_type == "Gemm" and (len(product.inputs) > 2 and product.inputs[2] is not None):
        return None
    result = product.outputs[0]
    held = edit.tensor(addend)
    if held is None and product.op_type == "MatMul":
        return None  # a residual; a Gemm would have to copy it
    for operand in product.inputs[:2]:
        rank = rewriter.rank(operand)
        if rank is None:
            raise Refused("the rank of the product is not known")
        if rank != 2:
            raise Refused("the product is not two-dimensional, which Gemm needs")
    sole_reader(result)
    dtype = held.dtype if held is not None else addend.dtype
    if dtype not in FLOATS:
        raise Refused("the product is not one of floats")
    shape = tuple(held.shape) if held is not None else rewriter.shape(addend)
    columns = _columns(product, rewriter)
    if shape is None or len(shape) > 2:
        raise Refused("the added tensor does not broadcast to the product")
    if shape and shape[-1] != 1 and (columns is None or shape[-1] != columns):
        raise Refused("the added tensor does not broadcast to the product")
    if len(shape) == 2 and shape[0] != 1:
        wanted = rewriter.shape(result)
        is_named = isinstance(shape[0], int) or shape[0].value is not None
        if wanted is None or wanted[0] != shape[0] or not is_named:
            raise Refused("the added tensor may not broadcast to the product")
    made = rewriter.supersede(node, "Gemm", [*product.inputs[:2], addend])
    made.name = product.name
    made.metadata_props.clear()
    made.metadata_props.update(product.metadata_props)
    if product.op_type == "Gemm":
        made.attributes.update(product.attributes)
        made.attributes.pop("beta", None)  # it scaled a bias that was not there
    rewriter.drop(product)
    return f"{product.op_type}, Add merged into Gemm"


def _product(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The MatMul or Gemm whose result a node adds something to, and what it adds."""
    if len(node.inputs) != 2:
        return None
    left, right = node.inputs
    for value, other in ((left, right), (right, left)):
        producer = value.producer() if value is not None else None
        if edit.is_op(producer, "MatMul", "Gemm") and other is not None and other is not value:
            assert producer is not None
            return producer, other
    return None


def _columns(product: ir.Node, rewriter: Rewriter) -> int | None:
    shape = rewriter.shape(product.inputs[1])
    if shape is None:
        return None
    found = shape[0 if edit.attribute(product, "transB", 0) else 1]
    return found if isinstance(found, int) else None


def absorb_transpose(node: ir.Node, rewriter: Rewriter) -> str | None:
    """Let a Gemm read the operand of a Transpose instead of its result."""
    applied = None
    for index, name in enumerate(("transA", "transB")):
        value = node.inputs[index]
        producer = value.producer() if value is not None else None
        if not edit.is_op(producer, "Transpose"):
            continue
        assert value is not None and producer is not None
        if edit.attribute(producer, "perm", (1, 0)) != (1, 0):
            continue
        sole_reader(value)
        node.attributes[name] = ir.AttrInt64(name, 1 - int(edit.attribute(node, name, 0)))
        node.replace_input_with(index, producer.inputs[0])
        rewriter.drop(producer)
        applied = "Transpose folded into Gemm"
    return applied


RULES = (
    Rule(
        {"matmul-add": "A two-dimensional MatMul, or a Gemm without bias, and an Add become one Gemm."},
        ("Add",),
        matmul_add,
    ),
    Rule({"gemm-transpose": "Transpose before Gemm becomes its transA or transB."}, ("Gemm",), absorb_transpose),
)
