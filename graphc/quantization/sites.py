"""The weights that can be quantized, each with all that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from graphc import contraction, edit
from graphc.contract import PassResult
from graphc.contraction import Contraction
from graphc.moves import VIEWS
from graphc.sparsity import layers

KINDS = ("MatMul", "Gemm", "Conv", "Gather")
"""The operators whose weights are looked at; Gather for embeddings."""

QUANTIZED = "its weight is quantized already"

INTEGERS = frozenset(
    "ConvInteger DynamicQuantizeLSTM DynamicQuantizeMatMul GatherBlockQuantized MatMulInteger MatMulIntegerToFloat "
    "MatMulBnb4 MatMulFpQ4 MatMulNBits QAttention QGemm QLinearConv QLinearMatMul QMoE".split()
)
"""Operators whose weights are integers."""

OTHERS = ("ConvTranspose", "Einsum", "GRU", "LSTM", "RNN")
"""Other operators with weights."""

_HELD = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


@dataclass
class Site:
    """A constant weight.

    Attributes:
        value: The weight.
        uses: The contractions that read it.
        gathers: The lookups of its rows.
        views: Transpositions of it, which products read: of a head, say, that is tied to an embedding.
        inner: Whether the body of an If or Loop reads it.
    """

    value: ir.Value
    uses: list[Contraction] = field(default_factory=list)
    gathers: list[ir.Node] = field(default_factory=list)
    views: list[ir.Node] = field(default_factory=list)
    inner: bool = False

    @property
    def name(self) -> str:
        return self.value.name or ""

    @property
    def held(self) -> ir.TensorProtocol:
        held = edit.tensor(self.value)
        assert held is not None
        return held

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.held.shape.numpy())

    @property
    def readers(self) -> list[ir.Node]:
        return [*(use.node for use in self.uses), *self.gathers, *self.views]

    @property
    def names(self) -> set[str]:
        """What patterns may call it."""
        return {self.name, *(node.name or "" for node in self.readers)}

    @property
    def axis(self) -> int:
        """The axis along which its elements are summed up: blocks lie along it."""
        return self.uses[0].axis if self.uses else 1

    @property
    def channel(self) -> int | None:
        """The axis of outputs; None if several axes tell outputs apart."""
        if not self.uses:
            return 0
        use = self.uses[0]
        if use.node.op_type == "Conv":
            return 0
        return None if len(self.shape) > 2 else 1 - use.axis

    @property
    def depth(self) -> int:
        """How many elements are summed up in an output, kernel elements aside."""
        return self.shape[self.axis]

    @property
    def embeds(self) -> bool:
        """Whether it is that of a convolution of an input of the model: it embeds patches, say."""
        return any(edit.is_op(use.node, "Conv") and _is_given(use.activation) for use in self.uses)

    @property
    def calibrated(self) -> bool:
        """Whether statistics of its input can be collected."""
        return bool(self.uses) and not self.gathers and not self.views and not self.inner


def find(
    model: ir.Model,
    kinds: Sequence[str],
    include: Sequence[str],
    exclude: Sequence[str],
    least: int,
    result: PassResult,
) -> list[Site]:
    """The weights that options name, in the order in which they are first read; those of bodies, too.

    Args:
        model: The model.
        kinds: Operators.
        include: Patterns of weight or node names; all if empty.
        exclude: Patterns of those that stay.
        least: Elements that a weight has at least.
        result: What cannot be quantized is refused here.

    Raises:
        BadInput: A pattern names nothing.
    """
    sites: dict[ir.Value, Site] = {}
    graphs = (model.graph, *edit.bodies(model.graph))
    for node in (node for graph in graphs for node in graph):
        if not edit.is_op(node, *kinds):
            if _is_quantized(node):
                result.refuse(node, QUANTIZED)
            elif edit.is_op(node, *OTHERS) and any(_is_large(v, least) for v in node.inputs):
                result.refuse(node, f"weights of {node.op_type} are not looked at")
            continue
        if node.op_type == "Gather":
            if _holds_codes(node.inputs[0]):
                result.refuse(node, QUANTIZED)
            elif not _embedding(node, sites) and _is_large(node.inputs[0], least):
                result.refuse(node, "what is looked up are not rows of a matrix")
            continue
        found = contraction.of(node)
        if not isinstance(found, str):
            site = sites.setdefault(found.weight, Site(found.weight))
            site.uses.append(found)
            site.inner |= node.graph is not model.graph
        elif any(_from_codes(v) for v in node.inputs):
            result.refuse(node, QUANTIZED)
        elif _tied(node, sites):
            continue
        elif any(edit.tensor(v) is not None for v in node.inputs[:2]):
            result.refuse(node, found)
        elif any(_is_folded(v) for v in node.inputs[:2]):
            result.refuse(node, "its weight is computed from constants: put simplify before it")
    for function in model.functions.values():
        if any(edit.is_op(inner, *kinds) for inner in function):
            result.refuse(function.name or "", "weights in local functions stay: inline them with simplify")
    wanted = layers.chooser(include, exclude, {name for site in sites.values() for name in site.names}, "quantize")
    chosen = []
    for site in sites.values():
        if not wanted(site.names):
            continue
        why = _why_not(site, least)
        if why:
            result.refuse(site.name, why)
        elif site.readers:
            chosen.append(site)
    return chosen


def _is_given(value: ir.Value) -> bool:
    """Whether a value is an input of the model, perhaps scaled and laid out anew."""
    for _ in range(8):
        node = value.producer()
        if node is None:
            return value.is_graph_input()
        read = [v for v in node.inputs if v is not None and edit.tensor(v) is None]
        if not edit.is_op(node, *_LAID_OUT) or len(read) != 1:
            return False
        value = read[0]
    return False


_LAID_OUT = ("Add", "Cast", "Div", "Mul", "Pad", "Sub", "Transpose", *VIEWS)


def _embedding(node: ir.Node, sites: dict[ir.Value, Site]) -> bool:
    """Whether rows of a matrix of floats are looked up; it is then noted, unless the rows are always the same."""
    table = node.inputs[0]
    held = edit.tensor(table)
    if table is None or held is None or len(held.shape) != 2 or edit.attribute(node, "axis", 0) != 0:
        return False
    if held.dtype in _HELD and edit.tensor(node.inputs[1]) is None:
        sites.setdefault(table, Site(table)).gathers.append(node)
    return True


def _holds_codes(table: ir.Value | None) -> bool:
    """Whether rows of a matrix of integers of up to 8 bits are looked up."""
    held = edit.tensor(table)
    return held is not None and len(held.shape) == 2 and held.dtype.is_integer() and held.dtype.bitwidth <= 8


def _is_large(value: ir.Value | None, least: int) -> bool:
    """Whether a value is a constant of floats that is large enough to be quantized."""
    held = edit.tensor(value)
    return held is not None and held.dtype in _HELD and len(held.shape) > 1 and held.size >= max(least, 1)


def _is_folded(value: ir.Value | None, depth: int = 8) -> bool:
    """Whether a value is computed from constants alone, by a few operators."""
    node = value.producer() if value is not None else None
    if value is None or node is None or not depth:
        return value is not None and edit.tensor(value) is not None
    inputs = [v for v in node.inputs if v is not None]
    return bool(inputs) and all(edit.tensor(v) is not None or _is_folded(v, depth - 1) for v in inputs)


def _tied(node: ir.Node, sites: dict[ir.Value, Site]) -> bool:
    """Whether a product reads an embedding through a transposition, which is then noted."""
    for value in node.inputs[:2]:
        view = value.producer() if value is not None else None
        table = view.inputs[0] if view is not None and edit.is_op(view, "Transpose") else None
        held = edit.tensor(table)
        if view is not None and table is not None and held is not None and len(held.shape) == 2:
            site = sites.setdefault(table, Site(table))
            if view not in site.views:
                site.views.append(view)
            return True
    return False


def _is_quantized(node: ir.Node) -> bool:
    """Whether a node computes with integer weights itself."""
    return node.op_type in INTEGERS


def _from_codes(value: ir.Value | None) -> bool:
    """Whether a value is made of constants by any DequantizeLinear, or of integers of up to 8 bits by Cast and Mul."""
    for _ in range(6):
        node = value.producer() if value is not None else None
        if node is None:
            held = edit.tensor(value)
            return held is not None and held.dtype.bitwidth <= 8 and held.dtype != ir.DataType.BOOL
        if node.op_type == "DequantizeLinear":
            return edit.tensor(node.inputs[0]) is not None
        if not edit.is_op(node, "Cast", "Div", "Mul", "Sub", "Transpose", "Reshape"):
            return False
        value = node.inputs[0]
        if node.op_type in ("Div", "Mul", "Sub") and value is not None and value.producer() is None:
            value = next((v for v in node.inputs if v is not None and v.producer() is not None), value)
    return False


def _why_not(site: Site, least: int) -> str:
    held = site.held
    if held.dtype not in _HELD:
        return f"it holds {held.dtype.name.lower()}"
    if held.size < least:
        return f"it has fewer than {least} elements"
    if site.value.is_graph_output():
        return "the weight is an output of the model"
    if len({(use.axis, use.node.op_type == "Conv") for use in site.uses}) > 1 or (site.gathers and site.axis != 1):
        return "operators read it in different ways"
    return ""
