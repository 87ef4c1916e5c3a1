"""Weights that stay packed: products and lookups read codes of 2, 4 or 8 bits, in operators of graphc's own.

``PackedProduct(x, words, scales, zeros, bias)`` and ``PackedLookup(index, words, scales, zeros)`` stand in a lowered
model where MatMul, Gemm or Gather read a dequantized constant. ``words`` is ``(outputs, depth / codes of a word)``
int32, the first code in the lowest bits; ``scales`` and ``zeros`` are ``(outputs, blocks)`` float32. Both sizes are
filled up. A constant that is added to a product, ``bias (outputs, 1)``, and a Relu after it belong to the operator:
what is in registers is not stored and read again.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array
from graphc.lowering import nbits
from graphc.lowering.packed import unsigned
from graphc.recognition.graph import Graph
from graphc.tvm.importer import WEIGHT
from graphc.tvm.kernels.packed import OUTPUTS, WORD
from graphc.tvm.placing import graph_of, put

PRODUCT, LOOKUP = "PackedProduct", "PackedLookup"

_SIGNED = (ir.DataType.INT2, ir.DataType.INT4, ir.DataType.INT8)


def write(model: ir.Model) -> int:
    """Let products and lookups read packed codes, in place; returns how many do.

    Weights that are read in other ways as well stay as they are: they would be stored twice.

    Args:
        model: Its shapes are static and annotated.
    """
    for node in [node for node in model.graph if edit.is_op(node, "DequantizeLinear")]:
        _outward(node, edit.Names(model))
    graph = graph_of(model)
    found = [each for each in nbits.weights(graph) if isinstance(each, nbits.Weight) and each.held.size >= WEIGHT]
    for weight in found:
        _write(weight, graph)
    return sum(len(weight.products) + len(weight.lookups) for weight in found)


def _outward(node: ir.Node, names: edit.Names) -> None:
    """Rows of codes, dequantized, become rows of a dequantized table, so that all tables look the same."""
    gathers = [value.producer() if value is not None else None for value in node.inputs]
    first = gathers[0]
    if first is None or not all(edit.is_op(each, "Gather") for each in gathers):
        return
    reads = [each for each in gathers if each is not None]
    held = [edit.tensor(each.inputs[0]) for each in reads]
    if any(each.inputs[1] is not first.inputs[1] or edit.attribute(each, "axis", 0) for each in reads):
        return
    if any(tensor is None or len(tensor.shape) != 2 for tensor in held) or node.graph is None:
        return
    axis, block = edit.attribute(node, "axis", 1), edit.attribute(node, "block_size", 0)
    out = node.outputs[0]
    if out.shape is None or axis % len(out.shape) != len(out.shape) - 1 or not block:
        return
    operands = [each.inputs[0] for each in reads]
    settings = {"axis": 1, "block_size": block}
    if held[1] is not None and held[1].shape[1] == 1:
        # One scale for a row.
        settings = {"axis": 0}
        for number, tensor in enumerate(held[1:], 1):
            assert tensor is not None
            part = ir.Tensor(tensor.numpy().reshape(-1), dtype=tensor.dtype)
            operands[number] = edit.initializer(node.graph, part, names.fresh(f"{operands[number].name}.row"))  # type: ignore[union-attr]
    table = ir.node("DequantizeLinear", operands, settings, name=names.fresh(f"{node.name}.table"))
    rows = ir.node("Gather", [table.outputs[0], first.inputs[1]], {"axis": 0}, name=node.name)
    node.graph.insert_before(node, [table, rows])
    table.outputs[0].name, rows.outputs[0].name = names.fresh(f"{out.name}.table"), names.fresh(f"{out.name}.rows")
    codes = held[0]
    assert codes is not None
    table.outputs[0].type, table.outputs[0].shape = out.type, ir.Shape(codes.shape.numpy())
    rows.outputs[0].type, rows.outputs[0].shape = out.type, out.shape
    edit.replace(out, rows.outputs[0])
    edit.remove(node)
    for each in dict.fromkeys(reads):
        if not each.outputs[0].uses():
            edit.remove(each)
            edit.drop_unused(each.inputs[0])


def _write(weight: nbits.Weight, graph: Graph) -> None:
    outputs, depth = weight.size
    name, home = weight.codes.name or "", graph.model.graph
    block, scale, zero = _blocks(weight)
    filled = -(-depth // block) * block
    signed = weight.held.dtype in _SIGNED and weight.zero is None
    made = {"words": _words(weight, filled, signed=signed), "scales": _filled(scale)}
    if zero is not None:
        made["zeros"] = _filled(zero)
    operands = [edit.initializer(home, array, graph.fresh(f"{name}.{part}")) for part, array in made.items()]
    settings = {"outputs": outputs, "depth": depth, "bits": weight.bits, "block": block, "signed": int(signed)}
    settings["zeros"] = int(zero is not None)
    for node in weight.products:
        bias, after = _followers(node, outputs)
        held = [] if bias is None else [edit.initializer(home, _filled(bias), graph.fresh(f"{name}.bias"))]
        more = {"bias": len(held), "relu": int(any(edit.is_op(each, "Relu") for each in after))}
        if held and edit.is_op(node, "Gemm") and len(node.inputs) > 2:
            node.replace_input_with(2, None)
        put(node, PRODUCT, [node.inputs[0], *operands, *held], {**settings, **more}, graph)
        for each in after:
            result = next(v for v in each.inputs if v is not None and edit.tensor(v) is None)
            edit.replace(each.outputs[0], result)
            edit.remove(each)
    settings["half"] = int(weight.scale.dtype == np.float16)
    for node in weight.lookups:
        put(node, LOOKUP, [node.inputs[1], *operands], settings, graph)
    graph.sweep([value for node in weight.nodes for value in node.outputs])


def _followers(node: ir.Node, outputs: int) -> tuple[Array | None, list[ir.Node]]:
    """A constant that is added to a product's outputs, as ``(outputs, 1)``, and the nodes that do so, and a Relu."""
    found: list[ir.Node] = []
    bias: Array | None = None

    def column(value: ir.Value | None, rank: int) -> Array | None:
        array = edit.constant(value)
        if array is None or not 1 <= array.ndim <= rank or not array.size == array.shape[-1] == outputs:
            return None
        return array.reshape(outputs, 1).astype(np.float32)

    def reader(value: ir.Value) -> ir.Node | None:
        readers = [use.node for use in value.uses()]
        return readers[0] if len(readers) == 1 and not value.is_graph_output() else None

    out = node.outputs[0]
    rank = len(out.shape) if out.shape is not None else 0
    if edit.is_op(node, "Gemm") and len(node.inputs) > 2 and node.inputs[2] is not None:
        if (bias := column(node.inputs[2], rank)) is None:
            return None, []
    elif (after := reader(out)) is not None and edit.is_op(after, "Add"):
        other = after.inputs[1] if after.inputs[0] is out else after.inputs[0]
        if (bias := column(other, rank)) is None:
            return None, []
        found.append(after)
    after = reader(found[-1].outputs[0] if found else out)
    return bias, [*found, after] if after is not None and edit.is_op(after, "Relu") else found


def _blocks(weight: nbits.Weight) -> tuple[int, Array, Array | None]:
    """Inputs in a block, scales and zero points (those of codes without a sign) by block, as float32."""
    scale = np.asarray(weight.scale, np.float32)
    points = weight.zero
    if points is None and weight.held.dtype not in _SIGNED:
        points = np.zeros(scale.shape, weight.held.dtype.numpy())
    zero = None if points is None else unsigned(points, weight.held.dtype).astype(np.float32)
    if zero is not None and not zero.any():
        zero = None
    # One scale for all inputs of an output came cut into blocks.
    if all(part is None or (part == part[:, :1]).all() for part in (scale, zero)):
        per = WORD // weight.bits
        depth = -(-weight.size[1] // per) * per
        return depth, scale[:, :1], None if zero is None else zero[:, :1]
    return weight.block, scale, zero


def _words(weight: nbits.Weight, depth: int, *, signed: bool) -> Array:
    """``(outputs, depth / codes of a word)`` int32, both filled up with zeros."""
    bits, held = weight.bits, weight.held
    codes = held.numpy()
    codes = codes.T if weight.turned else codes
    # With a sign or without, a code is its lowest bits.
    low = codes.astype(np.int8).view(np.uint8) & ((1 << bits) - 1) if signed else unsigned(codes, held.dtype)
    edit.release(held)
    filled = np.pad(low, [(0, -len(low) % OUTPUTS), (0, depth - low.shape[1])])
    per = WORD // bits
    words = np.zeros((filled.shape[0], depth // per), np.uint32)
    for place in range(per):
        words |= filled[:, place::per].astype(np.uint32) << np.uint32(bits * place)
    return words.view(np.int32)


def _filled(part: Array) -> Array:
    return np.pad(np.ascontiguousarray(part), [(0, -len(part) % OUTPUTS), (0, 0)])


def refused(model: ir.Model) -> dict[ir.Node, str]:
    """Nodes that dequantize a matrix which is not read packed, and why."""
    graph = graph_of(model)
    return dict(each for each in nbits.weights(graph) if not isinstance(each, nbits.Weight))
