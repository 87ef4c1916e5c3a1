"""A quantized weight in the graph: integers under the weight's own name, and a DequantizeLinear for its readers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes import cut
from graphc.edit import Array
from graphc.quantization.rounding import Codes
from graphc.quantization.sites import Site


@dataclass(frozen=True)
class Stored:
    """The values that hold a quantized weight.

    Attributes:
        codes: The integers; the weight as it was called.
        scale: Their scales.
        zero: Their zero points, None for zeros.
    """

    codes: ir.Value
    scale: ir.Value
    zero: ir.Value | None

    @property
    def operands(self) -> list[ir.Value]:
        return [self.codes, self.scale, *filter(None, (self.zero,))]


def store(site: Site, codes: Codes, names: edit.Names) -> Stored:
    """Let the weight hold codes, and add scales and zero points beside it; readers are not changed."""
    cut.write(site.value, codes.codes)
    site.value.type = ir.TensorType(codes.grid.dtype)
    graph = home(site.value)
    scale = edit.initializer(graph, codes.scale, names.fresh(f"{site.name}.scale"))
    zero = None
    if codes.zero is not None:
        held = ir.Tensor(codes.zero, dtype=codes.grid.dtype)
        zero = edit.initializer(graph, held, names.fresh(f"{site.name}.zero"))
    return Stored(site.value, scale, zero)


def home(value: ir.Value) -> ir.Graph:
    """The graph that a constant is in."""
    producer = value.producer()
    graph = producer.graph if producer is not None else value.graph
    assert isinstance(graph, ir.Graph)
    return graph


def dequantized(site: Site, codes: Codes, names: edit.Names) -> None:
    """Write a weight as Q/DQ: whoever read it reads what it stands for.

    Rows of an embedding are looked up as codes and dequantized then. A Gemm becomes MatMul and Add where it is one,
    since ONNX Runtime computes with the codes of a MatMul only.
    """
    flipped = _as_matmul(site, codes)
    if flipped is not None:
        codes = flipped
    readers = list(site.value.uses())
    stored = store(site, codes, names)
    rows = [node for node in site.gathers if codes.granularity.axis == 0 and not codes.granularity.block]
    if codes.grid.dtype.bitwidth < 8:
        rows = []
    for node in rows:
        _looked_up(node, stored, names)
    left = [use for use in readers if use.node not in rows]
    if not left:
        return
    value = _dequantize(stored, codes, names, site)
    for use in left:
        use.node.replace_input_with(use.idx, value)
    for read in site.uses:
        if read.node.op_type == "Gemm":
            _split_gemm(read.node, value, names, transposed=flipped is None)


def _dequantize(stored: Stored, codes: Codes, names: edit.Names, site: Site) -> ir.Value:
    out = ir.Value(
        name=names.fresh(f"{site.name}.dequantized"),
        shape=ir.Shape(stored.codes.shape or ()),
        type=ir.TensorType(stored.scale.dtype or ir.DataType.FLOAT),
    )
    node = ir.node("DequantizeLinear", stored.operands, codes.granularity.attributes(), outputs=[out], name=out.name)
    graph, producer = home(stored.codes), stored.codes.producer()
    if producer is not None:
        graph.insert_after(producer, node)
    elif len(graph):
        graph.insert_before(graph[0], node)
    else:
        graph.append(node)
    return out


def _looked_up(gather: ir.Node, stored: Stored, names: edit.Names) -> None:
    """Rows of codes and their scales instead of rows of a table that is dequantized as a whole."""
    graph, out, index = gather.graph, gather.outputs[0], gather.inputs[1]
    assert graph is not None
    picked = []
    for operand in stored.operands:
        value = ir.Value(
            name=names.fresh(f"{operand.name}.rows"), type=ir.TensorType(operand.dtype or ir.DataType.FLOAT)
        )
        graph.insert_before(gather, ir.node("Gather", [operand, index], {"axis": 0}, outputs=[value], name=value.name))
        picked.append(value)
    # A scale for each row is one block along the last axis.
    axis = edit.initializer(graph if isinstance(graph, ir.Graph) else graph.graph, _MINUS_ONE, names.fresh("last_axis"))
    operands = [picked[0]]
    for value in picked[1:]:
        wide = ir.Value(name=names.fresh(f"{value.name}.wide"), type=value.type)
        graph.insert_before(gather, ir.node("Unsqueeze", [value, axis], outputs=[wide], name=wide.name))
        operands.append(wide)
    depth = int(ir.Shape(stored.codes.shape or ()).numpy()[1])
    made = ir.Value(name=names.fresh(f"{out.name}.dequantized"), shape=out.shape, type=out.type)
    node = ir.node("DequantizeLinear", operands, {"axis": -1, "block_size": depth}, outputs=[made], name=gather.name)
    graph.insert_before(gather, node)
    edit.replace(out, made)
    edit.remove(gather)


_MINUS_ONE: Array = np.array([-1], dtype=np.int64)


def _as_matmul(site: Site, codes: Codes) -> Codes | None:
    """The codes as ``(inputs, outputs)`` if only Gemms read the weight, which lies the other way; else None."""
    uses = site.uses
    if not uses or site.gathers or site.views or len(site.value.uses()) != len(uses):
        return None
    if not all(plain_gemm(use.node) and edit.attribute(use.node, "transB", 0) for use in uses):
        return None
    return transposed(codes)


def transposed(codes: Codes) -> Codes:
    """A matrix of codes with its axes swapped."""
    array = codes.codes.numpy()
    flipped = np.ascontiguousarray(array.T)
    granularity = codes.granularity
    scale, zero = codes.scale, codes.zero
    if granularity.axis is not None:
        granularity = type(granularity)(1 - granularity.axis, granularity.block)
        if granularity.block:
            scale = np.ascontiguousarray(scale.T)
            zero = None if zero is None else np.ascontiguousarray(zero.T)
    tensor = ir.Tensor(flipped, dtype=codes.codes.dtype, name=codes.codes.name)
    return Codes(tensor, scale, zero, granularity, codes.grid)


def plain_gemm(node: ir.Node) -> bool:
    """Whether a Gemm is a product of its first input with a constant, and a sum."""
    return (
        edit.is_op(node, "Gemm")
        and edit.attribute(node, "alpha", 1.0) == 1
        and edit.attribute(node, "beta", 1.0) == 1
        and not edit.attribute(node, "transA", 0)
        and edit.tensor(node.inputs[0]) is None
    )


def _split_gemm(node: ir.Node, weight: ir.Value, names: edit.Names, *, transposed: bool) -> None:
    """A Gemm as MatMul and Add.

    Args:
        node: The Gemm.
        weight: Its dequantized weight.
        names: For what is new.
        transposed: Whether the weight lies as the Gemm had it.
    """
    if not plain_gemm(node) or node.inputs[1] is not weight:
        return
    graph = node.graph
    assert graph is not None
    right = weight
    if transposed and edit.attribute(node, "transB", 0):
        right = ir.Value(name=names.fresh(f"{weight.name}.T"), type=weight.type)
        graph.insert_before(node, ir.node("Transpose", [weight], {"perm": [1, 0]}, outputs=[right], name=right.name))
    split(node, [node.inputs[0], right], names)


def split(node: ir.Node, operands: Sequence[ir.Value | None], names: edit.Names) -> None:
    """Let MatMul of two operands, and an Add, take a Gemm's place."""
    graph, out = node.graph, node.outputs[0]
    assert graph is not None
    product = ir.Value(name=names.fresh(f"{out.name}.product"), shape=out.shape, type=out.type)
    graph.insert_before(node, ir.node("MatMul", operands, outputs=[product], name=node.name))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        made = ir.Value(name=names.fresh(f"{out.name}.sum"), shape=out.shape, type=out.type)
        graph.insert_before(
            node, ir.node("Add", [product, bias], outputs=[made], name=names.fresh(f"{node.name}.bias"))
        )
        product = made
    edit.replace(out, product)
    edit.remove(node)
