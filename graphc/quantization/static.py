"""Activations on grids that calibration fixed, written as QuantizeLinear and DequantizeLinear around what can be done
in integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array, is_op
from graphc.moves import VIEWS
from graphc.quantization import store
from graphc.quantization.rounding import Codes
from graphc.quantization.sites import Site

Scales = dict[str, tuple[np.float32, np.uint8]]
"""Scale and zero point of activations, by the name of the value."""

SAME = ("MaxPool", "Transpose", *VIEWS)
"""Operators whose output takes values of their input only."""

JOINED = ("Add", "AveragePool", "Concat", "GlobalAveragePool", "Mul")
"""Other operators that ONNX Runtime's CPU provider has kernels in 8 bits for."""

CLIPPED = ("Relu", "Clip")
"""What a kernel does at no cost when its output's grid ends where these do."""


def why_not(site: Site) -> str:
    """Why the products of a weight cannot be done in integers; "" if they can."""
    if site.gathers or not site.uses:
        return "an embedding has no product to be done in integers"
    if site.views:
        return "a transposition reads the weight, too"
    if site.held.dtype != ir.DataType.FLOAT:
        return "activations other than float32 are not quantized"
    if len(site.value.uses()) != len(site.uses):
        return "other operators read the weight, too"
    for use in site.uses:
        if is_op(use.node, "Conv"):
            continue
        right = len(use.node.inputs) > 1 and use.node.inputs[1] is site.value
        if not right or len(site.shape) != 2 or (is_op(use.node, "Gemm") and not store.plain_gemm(use.node)):
            return "ONNX Runtime has no kernel in integers for this product"
    return ""


@dataclass(frozen=True)
class Plan:
    """Which values are quantized.

    Attributes:
        values: The values, in an order that gives each after those that it is made of.
        same: Values whose scale is that of another one.
        readers: For each value, the nodes that read its codes; None for all of them.
    """

    values: list[ir.Value]
    same: dict[ir.Value, ir.Value]
    readers: dict[ir.Value, set[ir.Node] | None]

    @property
    def calibrated(self) -> list[ir.Value]:
        """The values whose ranges are needed."""
        return [value for value in self.values if value not in self.same]

    def move(self, old: ir.Value, new: ir.Value) -> None:
        """Quantize another value instead of one, which all readers read now."""
        if old is new or old not in self.readers:
            return
        self.values[self.values.index(old)] = new
        self.readers[new] = self.readers.pop(old)
        if old in self.same:
            self.same[new] = self.same.pop(old)
        for value, source in self.same.items():
            self.same[value] = new if source is old else source


def plan(model: ir.Model, sites: Sequence[Site]) -> Plan:
    """What to quantize so that the products with some weights, and what lies between them, are done in integers."""
    products = {use.node for site in sites for use in site.uses}
    found = Plan([], {}, {})

    def read(value: ir.Value, node: ir.Node) -> None:
        if value not in found.readers:
            found.values.append(value)
            found.readers[value] = set()
        chosen = found.readers[value]
        if chosen is not None:
            chosen.add(node)

    def whole(value: ir.Value) -> None:
        if value not in found.readers:
            found.values.append(value)
        found.readers[value] = None

    for node in model.graph:
        if node in products:
            activation = node.inputs[0]
            assert activation is not None
            read(activation, node)
            end = _end(node.outputs[0])
            # A product with a bias that a Relu follows becomes one float kernel unless its output is quantized.
            if is_op(node, "Conv") or (is_op(node, "Gemm") and end is not node.outputs[0]):
                whole(end)
        elif is_op(node, *SAME, *JOINED) and node.outputs[0] not in found.readers:
            data = [
                v for v in (node.inputs if is_op(node, "Add", "Mul", "Concat") else node.inputs[:1]) if v is not None
            ]
            if not data or any(v not in found.readers for v in data) or len(node.outputs) > 1:
                continue
            end = node.outputs[0] if is_op(node, *SAME) else _end(node.outputs[0])
            if end.is_graph_output():
                continue
            for value in data:
                read(value, node)
            whole(end)
            if is_op(node, *SAME):
                found.same[end] = data[0]
    return found


def _end(value: ir.Value) -> ir.Value:
    """Behind a Relu or Clip that alone reads a value, its output."""
    uses = list(value.uses())
    if len(uses) == 1 and uses[0].idx == 0 and is_op(uses[0].node, *CLIPPED) and not value.is_graph_output():
        return uses[0].node.outputs[0]
    return value


def between(node: ir.Node, planned: Plan) -> bool:
    """Whether a node reads and makes planned values, perhaps through a Relu or Clip."""
    value = node.inputs[0]
    if value is None or value not in planned.readers or len(node.outputs) != 1:
        return False
    readers = planned.readers[value]
    return (readers is None or node in readers) and _end(node.outputs[0]) in planned.readers


def quantize(model: ir.Model, planned: Plan, scales: Scales, names: edit.Names) -> int:
    """Put Q/DQ behind the planned values; returns how many."""
    for value in planned.values:
        scale, zero = scales[value.name or ""]
        readers = planned.readers[value]
        value = _before_relu(value, int(zero)) if readers is None else value
        uses = [use for use in value.uses() if readers is None or use.node in readers]
        graph, name = model.graph, value.name or "activation"
        output = value.is_graph_output() and readers is None
        held = [
            edit.initializer(graph, np.asarray(array), names.fresh(f"{name}.{hint}"))
            for array, hint in ((scale, "scale"), (zero, "zero"))
        ]
        codes = ir.Value(
            name=names.fresh(f"{name}.quantized"), shape=value.shape, type=ir.TensorType(ir.DataType.UINT8)
        )
        again = ir.Value(name=names.fresh(f"{name}.dequantized"), shape=value.shape, type=value.type)
        first = ir.node("QuantizeLinear", [value, *held], outputs=[codes], name=codes.name)
        second = ir.node("DequantizeLinear", [codes, *held], outputs=[again], name=again.name)
        producer = value.producer()
        if producer is not None:
            graph.insert_after(producer, [first, second])
        else:
            graph.insert_before(graph[0], [first, second])
        for use in uses:
            use.node.replace_input_with(use.idx, again)
        if output:
            edit.replace(value, again)
            first.replace_input_with(0, value)
    return len(planned.values)


def _before_relu(value: ir.Value, zero: int) -> ir.Value:
    """What a Relu behind a Gemm reads, where codes from 0 on do its work; the Relu goes. Else the value itself."""
    relu = value.producer()
    made = relu.inputs[0] if relu is not None and is_op(relu, "Relu") else None
    if zero or made is None or relu is None or not is_op(made.producer(), "Gemm") or value.is_graph_output():
        return value
    value.replace_all_uses_with(made)
    edit.remove(relu)
    return made


def as_gemm(model: ir.Model, sites: Iterable[Site]) -> int:
    """Let MatMul and Add of rows and a bias become a Gemm, which can take both as integers; returns how many.

    ONNX Runtime would make one of them that cannot: only as a Gemm the bias can be written as integers. Sites must be
    looked for again then.
    """
    count = 0
    for node in [use.node for site in sites for use in site.uses if is_op(use.node, "MatMul")]:
        x, out = node.inputs[0], node.outputs[0]
        uses = list(out.uses())
        if x is None or x.shape is None or len(x.shape) != 2 or len(uses) != 1 or out.is_graph_output():
            continue
        add = uses[0].node
        bias = add.inputs[1 - uses[0].idx] if is_op(add, "Add") else None
        held = edit.tensor(bias)
        if held is None or len(held.shape) != 1 or add.graph is None or add.graph is not node.graph:
            continue
        made = ir.Value(name=f"{add.outputs[0].name}.gemm", shape=add.outputs[0].shape, type=add.outputs[0].type)
        gemm = ir.node("Gemm", [*node.inputs, bias], outputs=[made], name=node.name)
        add.graph.insert_before(add, gemm)
        edit.replace(add.outputs[0], made)
        edit.remove(add)
        edit.remove(node)
        count += 1
    return count


def bias_of(node: ir.Node) -> ir.Value | None:
    """The constant bias of a convolution or Gemm that is one number for each output."""
    bias = node.inputs[2] if is_op(node, "Conv", "Gemm") and len(node.inputs) > 2 else None
    held = edit.tensor(bias)
    return bias if held is not None and len(held.shape) == 1 else None


def least_scales(site: Site, scales: Scales) -> Array | None:
    """Scales of the outputs below which their biases would leave 32 bits, ``(outputs,)``."""
    found: Array | None = None
    for use in site.uses:
        bias = edit.constant(bias_of(use.node))
        if bias is not None:
            least = np.abs(bias.astype(np.float64)) / (float(scales[use.input_name][0]) * 2**30)
            found = least if found is None else np.maximum(found, least)
    return found


def products(site: Site, codes: Codes, scales: Scales, names: edit.Names) -> None:
    """Let the products with a weight read its codes, and their biases 32-bit integers."""
    channels = codes.scale.astype(np.float32).reshape(-1)
    if codes.zero is None:  # ONNX Runtime finds a Gemm only with its zero points
        codes = dataclasses.replace(codes, zero=np.zeros(codes.scale.shape, codes.grid.dtype.numpy()))
    stored = store.store(site, codes, names)
    value = ir.Value(
        name=names.fresh(f"{site.name}.dequantized"), shape=site.value.shape, type=ir.TensorType(ir.DataType.FLOAT)
    )
    node = ir.node(
        "DequantizeLinear", stored.operands, codes.granularity.attributes(), outputs=[value], name=value.name
    )
    graph = store.home(site.value)
    producer = site.value.producer()
    if producer is not None:
        graph.insert_after(producer, node)
    else:
        graph.insert_before(graph[0], node)
    for use in site.uses:
        use.node.replace_input_with(1, value)
        bias = bias_of(use.node)
        if bias is not None:
            _bias(use.node, bias, channels * scales[use.input_name][0], names)


def _bias(node: ir.Node, bias: ir.Value, scale: Array, names: edit.Names) -> None:
    held = edit.constant(bias)
    graph = node.graph
    assert held is not None and isinstance(graph, ir.Graph)
    scale = np.broadcast_to(scale, held.shape).astype(np.float32)
    limits = np.iinfo(np.int32)
    codes = np.clip(np.rint(held.astype(np.float64) / scale), limits.min, limits.max).astype(np.int32)
    stored = [
        edit.initializer(graph, array, names.fresh(f"{bias.name}.{hint}"))
        for array, hint in ((codes, "quantized"), (np.ascontiguousarray(scale), "scale"))
    ]
    value = ir.Value(name=names.fresh(f"{bias.name}.dequantized"), shape=bias.shape, type=bias.type)
    made = ir.node("DequantizeLinear", stored, {"axis": 0}, outputs=[value], name=value.name)
    graph.insert_before(node, made)
    node.replace_input_with(2, value)
    edit.drop_unused(bias)


def inputs(sites: Iterable[Site]) -> set[str]:
    """The names of what the products with some weights read."""
    return {use.input_name for site in sites for use in site.uses}
