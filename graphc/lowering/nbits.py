"""Where products and lookups of rows read dequantized weights, and MatMulNBits and GatherBlockQuantized in their place.

A unit is one tensor of codes with all that reads what they stand for: only if all of it can read packed codes, the
weight is not stored twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array, attribute, is_op
from graphc.lowering.packed import blocks, pack, unsigned
from graphc.recognition.graph import Graph
from graphc.rewrites.base import Refused

PRODUCT, LOOKUP = "MatMulNBits", "GatherBlockQuantized"

LARGEST = 128
"""Inputs in a block where all inputs of an output share a scale."""

_CODES = {ir.DataType[f"{sign}INT{bits}"] for sign in ("", "U") for bits in (2, 4, 8)}
_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16}


@dataclass(frozen=True)
class Weight:
    """A matrix of codes, and all that reads what it stands for.

    Attributes:
        codes: The constant.
        scale: Its scales as ``(outputs, blocks)``, constant.
        zero: Its zero points in that shape, in the dtype of the codes; None for zeros.
        block: Inputs of an output that share a scale, a power of two.
        turned: Whether the codes are ``(inputs, outputs)``.
        nodes: What goes: DequantizeLinear and transpositions.
        products: MatMul and Gemm, whose right side it is.
        lookups: Gathers of rows.
    """

    codes: ir.Value
    scale: Array
    zero: Array | None
    block: int
    turned: bool
    nodes: tuple[ir.Node, ...]
    products: tuple[ir.Node, ...]
    lookups: tuple[ir.Node, ...]

    @property
    def held(self) -> ir.TensorProtocol:
        held = edit.tensor(self.codes)
        assert held is not None
        return held

    @property
    def size(self) -> tuple[int, int]:
        """Outputs and inputs."""
        first, second = self.held.shape.numpy()
        return (int(second), int(first)) if self.turned else (int(first), int(second))

    @property
    def bits(self) -> int:
        return self.held.dtype.bitwidth

    def text(self) -> str:
        """It in words: what is equal is equally fast."""
        outputs, inputs = self.size
        zeros = "" if self.zero is None else " with zero points"
        flipped = f", {sum(is_op(node, 'Transpose') for node in self.nodes)} transposed"
        return (
            f"{self.held.dtype.name.lower()} {outputs} x {inputs} in blocks of {self.block}{zeros}: "
            f"{len(self.products)} products, {len(self.lookups)} lookups, {len(self.nodes)} nodes{flipped}"
        )


def weights(graph: Graph) -> Iterator[Weight | tuple[ir.Node, str]]:
    """Every weight that can be read packed, or a node and why its weight cannot."""
    seen: set[ir.Value] = set()
    for node in [node for node in graph.model.graph if is_op(node, "DequantizeLinear")]:
        codes = _source(node.inputs[0])
        held = edit.tensor(codes)
        if codes is None or held is None or codes in seen or held.dtype not in _CODES or len(held.shape) != 2:
            continue
        seen.add(codes)
        try:
            yield _weight(codes, graph)
        except Refused as refusal:
            yield node, refusal.reason


def _source(value: ir.Value | None) -> ir.Value | None:
    """What a value is the transposition of, else itself."""
    node = value.producer() if value is not None else None
    return node.inputs[0] if node is not None and _flips(node) else value


def _flips(node: ir.Node) -> bool:
    return is_op(node, "Transpose") and attribute(node, "perm", (1, 0)) == (1, 0)


@dataclass
class _Reads:
    """What was found: the nodes between codes and readers, and for each reader whether it sees codes turned over."""

    nodes: list[ir.Node]
    readers: list[tuple[ir.Node, bool]]
    dequantizers: list[tuple[ir.Node, bool]]


def _weight(codes: ir.Value, graph: Graph) -> Weight:
    found = _Reads([], [], [])
    _follow(codes, False, None, found)
    turned = {_is_turned(node, flipped) for node, flipped in found.readers}
    if len(turned) != 1:
        raise Refused("its rows and its columns are read as inputs")
    (way,) = turned
    scale, zero, block = _scales(codes, found.dequantizers, way)
    products = tuple(node for node, _ in found.readers if not is_op(node, "Gather"))
    lookups = tuple(node for node, _ in found.readers if is_op(node, "Gather"))
    for node in products:
        if graph.rank(node.inputs[0]) == 1:
            raise Refused("it is multiplied with a vector")
    depth = int(codes.shape[0 if way else 1]) if codes.shape is not None else 0  # type: ignore[arg-type]
    if lookups and depth % block:
        raise Refused("its rows are looked up, and do not divide into blocks")
    beside = [v.producer() for node, _ in found.dequantizers for v in node.inputs[1:] if v is not None]
    nodes = dict.fromkeys([node for node in beside if node is not None and _flips(node)] + found.nodes)
    return Weight(codes, scale, zero, block, way, tuple(nodes), products, lookups)


def _follow(value: ir.Value, flipped: bool, source: ir.Node | None, found: _Reads) -> None:
    """Collect what reads codes, or what they stand for behind the DequantizeLinear ``source``."""
    if value.is_graph_output():
        raise Refused("it is an output of the model")
    for node, index in value.uses():
        if _flips(node):
            found.nodes.append(node)
            _follow(node.outputs[0], not flipped, source, found)
        elif source is None:
            if not is_op(node, "DequantizeLinear") or index:
                raise Refused("something else reads its codes")
            found.nodes.append(node)
            found.dequantizers.append((node, flipped))
            _follow(node.outputs[0], flipped, node, found)
        elif _multiplies(node, index) or (not flipped and _looks_up(node, index)):
            found.readers.append((node, flipped))
        else:
            raise Refused(f"{node.op_type} reads what it stands for")


def _multiplies(node: ir.Node, index: int) -> bool:
    """Whether an input of a node is the right side of a product, to which at most something is added."""
    plain = attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1 and not attribute(node, "transA", 0)
    return index == 1 and (is_op(node, "MatMul") or (is_op(node, "Gemm") and plain))


def _looks_up(node: ir.Node, index: int) -> bool:
    return is_op(node, "Gather") and index == 0 and not attribute(node, "axis", 0)


def _is_turned(node: ir.Node, flipped: bool) -> bool:
    """Whether codes are (inputs, outputs) for a reader that sees them turned over or as they are."""
    if is_op(node, "Gather"):
        return False
    return flipped == bool(is_op(node, "Gemm") and attribute(node, "transB", 0))


def _scales(
    codes: ir.Value, dequantizers: Sequence[tuple[ir.Node, bool]], turned: bool
) -> tuple[Array, Array | None, int]:
    """Scales and zero points as (outputs, blocks), and the size of blocks; the same for all DequantizeLinears."""
    held = edit.tensor(codes)
    assert held is not None
    shape = held.shape.numpy()
    outputs, inputs = (shape[1], shape[0]) if turned else (shape[0], shape[1])
    first: tuple[Array, Array | None, int] | None = None
    for node, flipped in dequantizers:
        known = [_constant(value) for value in node.inputs[1:]]
        if any(value is None and given is not None for value, given in zip(known, node.inputs[1:], strict=True)):
            raise Refused("its scales are no constants")
        scale = known[0]
        assert scale is not None
        zero = known[1] if len(known) > 1 else None
        if ir.DataType.from_numpy(scale.dtype) not in _FLOATS:
            raise Refused("its scales are neither float32 nor float16")
        # The axis of inputs as the node sees it.
        axis, block = int(turned == flipped), attribute(node, "block_size", 0)
        along = attribute(node, "axis", 1) % 2
        if block:
            if along != axis:
                raise Refused("its blocks lie along the outputs")
            if block < 16 or block & (block - 1):
                raise Refused("its blocks are no power of two from 16 on")
            made = tuple(None if v is None else (v if axis else v.T) for v in (scale, zero))
        else:
            if scale.size > 1 and along == axis:
                raise Refused("its scales differ along the inputs")
            # Rows that are looked up must divide into blocks; others are filled up.
            whole = next((size for size in (LARGEST, LARGEST // 2, LARGEST // 4) if not inputs % size), 0)
            block = whole or max(16, 1 << (min(inputs, LARGEST) - 1).bit_length())
            sizes = (outputs, -(-inputs // block))
            made = tuple(None if v is None else np.broadcast_to(v.reshape(-1, 1), sizes) for v in (scale, zero))
        if first is None:
            first = (np.asarray(made[0]), made[1], block)
        elif first[2] != block or any(not _same(a, b) for a, b in zip(first[:2], made, strict=True)):
            raise Refused("it is dequantized in different ways")
    assert first is not None
    return first


def _same(a: Array | None, b: Array | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)


def _constant(value: ir.Value | None) -> Array | None:
    held = edit.tensor(_source(value))
    if held is None:
        return None
    return held.numpy() if _source(value) is value else held.numpy().T


def write(weight: Weight, graph: Graph, level: int) -> None:
    """Let products and lookups read packed codes.

    Args:
        weight: The weight.
        graph: The graph that it is in.
        level: The ``accuracy_level`` of MatMulNBits: 4 rounds activations to 8 bits in blocks, 1 does not.
    """
    home = graph.model.graph
    outputs, inputs = weight.size
    name, bits, dtype = weight.codes.name or "", weight.bits, weight.held.dtype
    packed = edit.initializer(
        home, blocks(weight.held, turned=weight.turned, block=weight.block), graph.fresh(f"{name}.packed")
    )
    scale = edit.initializer(home, np.ascontiguousarray(weight.scale), graph.fresh(f"{name}.scales"))
    zero = None
    signed = dtype in (ir.DataType.INT2, ir.DataType.INT4, ir.DataType.INT8)
    if weight.zero is not None or not signed:
        points = np.zeros(weight.scale.shape, np.uint8) if weight.zero is None else unsigned(weight.zero, dtype)
        zero = edit.initializer(home, pack(points, bits), graph.fresh(f"{name}.zeros"))
    operands = [packed, scale, *([] if zero is None else [zero])]
    for node in weight.products:
        attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": weight.block, "accuracy_level": level}
        bias = node.inputs[2] if is_op(node, "Gemm") and len(node.inputs) > 2 else None
        _put(node, PRODUCT, [node.inputs[0], *operands], attributes, bias, graph)
    if weight.lookups:
        # A session reads packed codes as rows at its start.
        rows = graph.ints(weight.lookups[0], [outputs, inputs * bits // 8])
        table = graph.insert(weight.lookups[0], "Reshape", [packed, rows], {}, name=graph.fresh(f"{name}.rows"))
        attributes = {"bits": bits, "block_size": weight.block, "gather_axis": 0, "quantize_axis": 1}
        for node in weight.lookups:
            read = [table, node.inputs[1], scale, *([] if zero is None else [zero])]
            _put(node, LOOKUP, read, attributes, None, graph)
    graph.sweep([value for node in weight.nodes for value in node.outputs])


def _put(
    node: ir.Node,
    operator: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, int],
    bias: ir.Value | None,
    graph: Graph,
) -> None:
    """An operator, and what is added to it, in the place of a node."""
    where, out = node.graph, node.outputs[0]
    assert where is not None
    made = ir.node(operator, inputs, attributes, domain="com.microsoft", name=node.name)
    where.insert_before(node, made)
    result = made.outputs[0]
    result.name, result.type, result.shape = graph.fresh(f"{out.name}.packed"), out.type, out.shape
    if bias is not None:
        result = graph.insert(node, "Add", [result, bias], {}, name=graph.fresh(f"{out.name}.sum"))
        result.type, result.shape = out.type, out.shape
    edit.replace(out, result)
    edit.remove(node)


def model(weight: Weight, rows: int, version: int) -> tuple[ir.Model, dict[str, Array]]:
    """The weight and all that reads it as a model of its own, and inputs for it.

    Args:
        weight: The weight.
        rows: What a product is multiplied with, and rows that are looked up.
        version: The opset.
    """
    outputs, inputs = weight.size
    rng = np.random.default_rng(0)
    kept: dict[ir.Value, ir.Value] = {}
    constants: list[ir.Value] = []
    nodes: list[ir.Node] = []
    given: list[ir.Value] = []
    results: list[ir.Value] = []
    arrays: dict[str, Array] = {}

    def copied(value: ir.Value | None) -> ir.Value | None:
        if value is None or value in kept:
            return None if value is None else kept[value]
        held = edit.tensor(value)
        assert held is not None
        copy = ir.Value(
            name=value.name, type=ir.TensorType(held.dtype), shape=ir.Shape(held.shape.numpy()), const_value=held
        )
        constants.append(copy)
        kept[value] = copy
        return copy

    for node in (*weight.nodes, *weight.products, *weight.lookups):
        read = list(node.inputs)
        reads = node in weight.products or node in weight.lookups
        if reads:
            position = int(node in weight.lookups)
            dtype = ir.DataType.from_numpy(weight.scale.dtype) if not position else ir.DataType.INT64
            flat = is_op(node, "Gemm")
            shape = (rows, inputs) if flat else (1, rows) if position else (1, rows, inputs)
            x = ir.Value(name=f"x{len(given)}", type=ir.TensorType(dtype), shape=ir.Shape(shape))
            given.append(x)
            made = rng.integers(0, outputs, shape) if position else rng.standard_normal(shape).astype(dtype.numpy())
            arrays[x.name or ""] = made
            operands = [copied(v) if i != position else x for i, v in enumerate(read[:2])]
        else:
            operands = [copied(v) for v in read]
        copy = ir.node(node.op_type, operands, dict(node.attributes), name=node.name)
        copy.outputs[0].name = f"y{len(results)}" if reads else node.outputs[0].name
        kept[node.outputs[0]] = copy.outputs[0]
        nodes.append(copy)
        if reads:
            copy.outputs[0].type = ir.TensorType(ir.DataType.from_numpy(weight.scale.dtype))
            results.append(copy.outputs[0])
    body = ir.Graph(
        given,
        results,
        nodes=nodes,
        initializers=constants,
        name="probe",
        opset_imports={"": version, "com.microsoft": 1},
    )
    return ir.Model(body, ir_version=10), arrays
