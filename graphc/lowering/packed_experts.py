"""Mixtures of experts whose weights are codes, as QMoE of ``com.microsoft``, which reads them packed.

What stands there dequantizes the weights of all experts for every token. QMoE multiplies in float32: which of its
settings computes the same is tried out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array
from graphc.lowering.experts import equal, settings, written
from graphc.lowering.packed import pack, unsigned
from graphc.lowering.site import Site
from graphc.lowering.steps import constant
from graphc.quantization.granularity import Granularity
from graphc.recognition import experts
from graphc.recognition.graph import Graph
from graphc.rewrites.base import Refused

_CODES = {ir.DataType[f"{sign}INT{bits}"] for sign in ("", "U") for bits in (4, 8)}

_LARGEST = 1 << 28
"""Bytes of codes up to which an equal is looked for: they are held in memory for it."""


@dataclass(frozen=True)
class _Stack:
    """Codes of all experts, and what they stand for.

    Attributes:
        node: What dequantizes them.
        held: ``(experts, a, b)``.
        scale, zero: Numbers of groups, as the codes' blocks lie; zero is None for zeros.
        granularity: What shares a scale.
    """

    node: ir.Node
    held: ir.TensorProtocol
    scale: Array
    zero: Array | None
    granularity: Granularity

    @property
    def bits(self) -> int:
        return self.held.dtype.bitwidth

    def depth(self, arrange: Callable[[Array], Array]) -> int:
        """How many inputs a row has."""
        return int(arrange(np.broadcast_to(np.zeros((), np.int8), tuple(self.held.shape.numpy()))).shape[2])

    def block(self, arrange: Callable[[Array], Array]) -> int:
        """The inputs in a block of a row; 0 where a row is one.

        Raises:
            Refused: Its size is none that QMoE has.
        """
        depth, block = self.depth(arrange), self.granularity.block
        if block >= depth:
            return 0
        if depth % block or block < 16 or block & (block - 1):
            raise Refused("blocks of experts are no power of two from 16 on, or do not divide their inputs")
        return block


def find(node: ir.Node, graph: Graph) -> Site | None:
    """The mixture of a router, if its weights are codes and QMoE computes the same."""
    found = experts.find(node, graph)
    if found is None:
        return None
    stacks = [_stack(value) for value in (found.first, found.second)]
    first, second = stacks
    if first is None or second is None:
        return None
    if first.bits != second.bits or graph.dtype(found.tokens) != ir.DataType.FLOAT:
        raise Refused("QMoE has as many bits for both products, and computes in float32 here")
    if first.held.nbytes + second.held.nbytes > _LARGEST:
        raise Refused("the weights of the experts are too large to try them out")
    dims = graph.dims(found.tokens)
    if dims is None or not isinstance(dims[-1], int):
        raise Refused("the width of the tokens is not known")
    shapes = tuple(first.held.shape.numpy()), tuple(second.held.shape.numpy())
    why = "no setting of QMoE computes the same"
    for setting, _ in settings(*shapes, dims[-1], found.chosen):
        if any(s.granularity.axis != 2 - turned for s, turned in zip((first, second), setting.turned, strict=True)):
            continue
        try:
            block = max(first.block(setting.first), second.block(setting.second))
            reads = _operands(first, setting.first, block)
            more = _operands(second, setting.second, block)
        except Refused as refusal:
            why = refusal.reason
            continue
        attributes = {**setting.attributes, "expert_weight_bits": first.bits}
        if block:
            attributes["block_size"] = block
        operands = [*reads[:2], None, *more[:2], None, None, None, None, reads[2], more[2]]
        while operands[-1] is None:
            operands.pop()
        nodes = list(dict.fromkeys((first.node, second.node)))
        site = written("qmoe", "QMoE", found, operands, attributes, graph, nodes, setting.shared)
        if equal(site, graph):
            return site
    raise Refused(why)


def _stack(value: ir.Value) -> _Stack | None:
    node = value.producer()
    if node is None or not edit.is_op(node, "DequantizeLinear") or value.is_graph_output():
        return None
    held, scale = edit.tensor(node.inputs[0]), edit.tensor(node.inputs[1])
    zero = edit.tensor(node.inputs[2]) if len(node.inputs) > 2 else None
    if held is None or scale is None or (zero is None and len(node.inputs) > 2 and node.inputs[2] is not None):
        return None
    if held.dtype not in _CODES or len(held.shape) != 3 or scale.dtype != ir.DataType.FLOAT or len(scale.shape) != 3:
        raise Refused("codes of experts have no 4 or 8 bits, or their scales are no blocks in float32")
    granularity = Granularity(edit.attribute(node, "axis", 1) % 3, edit.attribute(node, "block_size", 0))
    return _Stack(node, held, scale.numpy(), None if zero is None else zero.numpy(), granularity)


def _operands(stack: _Stack, arrange: Callable[[Array], Array], block: int) -> list[ir.Value | None]:
    """Packed codes, scales and zero points that are in no graph yet, for blocks of a size; 0: whole rows."""
    name, bits, dtype = stack.node.inputs[0].name or "", stack.bits, stack.held.dtype  # type: ignore[union-attr]
    times = 1
    if block and not stack.block(arrange):
        times, rest = divmod(stack.depth(arrange), block)
        if rest:
            raise Refused("QMoE has blocks of one size for both products")

    def groups(numbers: Array) -> Array:
        rows = np.repeat(arrange(numbers), times, axis=2)
        return np.ascontiguousarray(rows if block else rows[..., 0])

    codes = pack(unsigned(arrange(stack.held.numpy()), dtype), bits)
    found: list[ir.Value | None] = [
        constant(f"{name}.packed", ir.tensor(codes)),
        constant(f"{name}.scales", ir.tensor(groups(stack.scale))),
        None,
    ]
    if stack.zero is not None:
        found[2] = constant(f"{name}.zeros", ir.tensor(pack(unsigned(groups(stack.zero), dtype), bits)))
    elif dtype in (ir.DataType.UINT4, ir.DataType.UINT8):
        found[2] = constant(f"{name}.zeros", ir.tensor(pack(groups(np.zeros(stack.scale.shape, np.uint8)), bits)))
    return found
