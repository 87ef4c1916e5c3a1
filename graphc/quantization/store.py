"""A quantized weight in the graph: integers under the weight's own name, and a DequantizeLinear for its readers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes import cut
from graphc.edit import Array
from graphc.quantization.granularity import Granularity
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

    ONNX Runtime multiplies with the codes themselves where a MatMul alone reads what one DequantizeLinear makes of
    constants. So every reader gets its own, a Gemm becomes MatMul and Add where it is one, and a product with the
    transposed weight reads transposed codes. Rows of an embedding are looked up as codes and dequantized then. What is
    read in the bodies of If and Loop is dequantized outside: ONNX Runtime 1.31 refuses a DequantizeLinear whose codes
    are constants of an outer graph.
    """
    turned = _as_matmul(site, codes)
    if turned is not None:
        codes = turned
    for node in [use.node for use in site.uses if plain_gemm(use.node) and use.node.inputs[1] is site.value]:
        _as_product(node, site.value, names, flipped=turned is None and bool(edit.attribute(node, "transB", 0)))
    stored = store(site, codes, names)
    graph = home(stored.codes)
    readers = list(site.value.uses())
    if len(readers) > 1:
        place = {node: i for i, node in enumerate(graph)}
        readers.sort(key=lambda use: place.get(use.node, len(place)))
    alone = _Alone(stored, names)
    looked_up = codes.granularity.axis == 0 and not codes.granularity.block and codes.grid.dtype.bitwidth == 8
    for node, index in readers:
        if looked_up and node in site.gathers:
            _looked_up(node, stored, names)
        elif node.graph is graph and _flips(node) and not node.outputs[0].is_graph_output():
            _read_flipped(node, stored, codes, names)
        else:
            operands = stored.operands
            if node.graph is graph and index == 1 and len(site.shape) == 2 and edit.is_op(node, "MatMul"):
                operands = alone.operands()
            node.replace_input_with(index, _dequantize(operands, codes.granularity, names))


class _Alone:
    """Operands for several products with one weight that ONNX Runtime 1.31 takes for those of several weights.

    It multiplies with codes where nothing else reads them, nor their scales. So each product but the first has copies
    of the scales, which are small, and reads the codes transposed twice, once more than the one before: that is
    computed when a session is made, and equal transpositions would be merged.
    """

    def __init__(self, stored: Stored, names: edit.Names) -> None:
        self._stored, self._names, self._codes = stored, names, stored.codes
        self._first = True

    def operands(self) -> list[ir.Value]:
        """Those of the next product."""
        if self._first:
            self._first = False
            return self._stored.operands
        for _ in range(2):
            shape = None if self._codes.shape is None else ir.Shape(list(self._codes.shape)[::-1])
            value = ir.Value(name=self._names.fresh(f"{self._stored.codes.name}.T"), type=self._codes.type, shape=shape)
            node = ir.node("Transpose", [self._codes], {"perm": [1, 0]}, outputs=[value], name=value.name)
            _insert(node, self._codes)
            self._codes = value
        copies = []
        for each in self._stored.operands[1:]:
            held = edit.tensor(each)
            assert held is not None
            copies.append(edit.initializer(home(self._stored.codes), held, self._names.fresh(each.name or "scale")))
        return [self._codes, *copies]


def _as_product(node: ir.Node, weight: ir.Value, names: edit.Names, *, flipped: bool) -> None:
    """A Gemm as MatMul and Add; ``flipped`` if the weight lies as (outputs, inputs)."""
    graph, right = node.graph, weight
    assert graph is not None
    if flipped:
        right = ir.Value(name=names.fresh(f"{weight.name}.T"), type=weight.type)
        graph.insert_before(node, ir.node("Transpose", [weight], {"perm": [1, 0]}, outputs=[right], name=right.name))
    split(node, [node.inputs[0], right], names)


def _flips(node: ir.Node) -> bool:
    """Whether a node swaps the axes of a matrix."""
    return edit.is_op(node, "Transpose") and edit.attribute(node, "perm", (1, 0)) == (1, 0)


def _read_flipped(view: ir.Node, stored: Stored, codes: Codes, names: edit.Names) -> None:
    """Transposed codes, dequantized for each reader, instead of a transposition of what they stand for."""
    graph, out, granularity = view.graph, view.outputs[0], codes.granularity
    assert graph is not None
    operands = []
    for operand in stored.operands:
        if operand is not stored.codes and not granularity.block:  # a scale for each output is a vector
            operands.append(operand)
            continue
        value = ir.Value(name=names.fresh(f"{operand.name}.T"), type=operand.type)
        graph.insert_before(view, ir.node("Transpose", [operand], {"perm": [1, 0]}, outputs=[value], name=value.name))
        operands.append(value)
    if granularity.axis is not None:
        granularity = type(granularity)(1 - granularity.axis, granularity.block)
    for node, index in list(out.uses()):
        node.replace_input_with(index, _dequantize(operands, granularity, names, node))
    edit.remove(view)


def _dequantize(
    operands: Sequence[ir.Value], granularity: Granularity, names: edit.Names, before: ir.Node | None = None
) -> ir.Value:
    """What codes, scales and zero points stand for, computed in front of a node; None: as early as can be.

    Of what a node reads, ONNX Runtime computes last what stands first in the graph. A weight that is dequantized early
    in the file is so when it is needed, and not held all the time.
    """
    out = ir.Value(
        name=names.fresh(f"{operands[0].name}.dequantized"),
        shape=operands[0].shape,
        type=ir.TensorType(operands[1].dtype or ir.DataType.FLOAT),
    )
    node = ir.node("DequantizeLinear", operands, granularity.attributes(), outputs=[out], name=out.name)
    if before is None:
        _insert(node, operands[0])
    else:
        assert before.graph is not None
        before.graph.insert_before(before, node)
    return out


def _insert(node: ir.Node, source: ir.Value) -> None:
    """Put a node as early as a value that it reads allows; constants that it reads, too, are there."""
    graph, producer = home(source), source.producer()
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        producer.append(node)


def _looked_up(gather: ir.Node, stored: Stored, names: edit.Names) -> None:
    """Rows of codes and their scales instead of rows of a table that is dequantized as a whole."""
    graph, out, index = gather.graph, gather.outputs[0], gather.inputs[1]
    assert graph is not None

    def add(operator: str, inputs: Sequence[ir.Value | None], hint: str, **attributes: int) -> ir.Value:
        first = inputs[0]
        assert first is not None
        value = ir.Value(name=names.fresh(f"{first.name}.{hint}"), type=first.type)
        graph.insert_before(gather, ir.node(operator, inputs, attributes, outputs=[value], name=value.name))
        return value

    # A scale for each row is one block along the last axis. Scales are unsqueezed first: a session does it once, and
    # what a tied head multiplies with has them for itself.
    axis = edit.initializer(graph if isinstance(graph, ir.Graph) else graph.graph, _MINUS_ONE, names.fresh("last_axis"))
    wide = [add("Unsqueeze", [operand, axis], "column") for operand in stored.operands[1:]]
    operands = [add("Gather", [operand, index], "rows", axis=0) for operand in (stored.codes, *wide)]
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


def spare_relus(model: ir.Model, names: edit.Names) -> int:
    """Write Relu between two products with codes as the larger one of its input and 0; returns how many.

    ONNX Runtime 1.31 does not multiply with the codes themselves where a Relu, or a Clip, stands directly behind, and
    the next product has codes, too.
    """
    done = 0
    for node in [node for node in model.graph if edit.is_op(node, "Relu")]:
        source, out = node.inputs[0], node.outputs[0]
        product = source.producer() if source is not None else None
        dtype = _by_codes(product)
        if dtype is None or not any(_by_codes(use.node) for use in out.uses()):
            continue
        zero = edit.initializer(model.graph, np.zeros((), dtype.numpy()), names.fresh("zero"))
        made = ir.Value(name=names.fresh(f"{out.name}.max"), shape=out.shape, type=out.type)
        model.graph.insert_before(node, ir.node("Max", [source, zero], outputs=[made], name=node.name))
        edit.replace(out, made)
        edit.remove(node)
        done += 1
    return done


def _by_codes(node: ir.Node | None) -> ir.DataType | None:
    """The dtype of a product whose right side is dequantized; None of other nodes."""
    if node is None or not edit.is_op(node, "MatMul") or node.inputs[1] is None:
        return None
    source = node.inputs[1].producer()
    if source is None or not edit.is_op(source, "DequantizeLinear") or source.inputs[1] is None:
        return None
    return source.inputs[1].dtype
