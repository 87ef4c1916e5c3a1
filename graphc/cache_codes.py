"""Caches in 8-bit codes: the operators that make codes of keys and values, and what a model's codes are times.

A code is a multiple of a scale, which each head has, or each channel of each head: symmetric, rounded to even, from
-128 to 127. A scale for each head is an axis of QuantizeLinear and DequantizeLinear; one for each channel of
``b h t d`` is not, so that keys and values are divided before and multiplied after them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graphc import caches, edit
from graphc.edit import Array, is_op

HEADS, CHANNELS = 1, 3
"""The axes of a cache ``b h t d`` that scales differ along."""

_GROUP_QUERY_SCALES = {3: 12, 4: 13}
"""At which input GroupQueryAttention has the scales of the cache at another one."""


class Coder:
    """Writes the operators for one cache.

    Args:
        graph: The graph to write into.
        name: What new values are called after.
        scale: ``(heads, 1)`` or ``(heads, channels)``, float32.
        channels: The size of a head.
        names: For what is new.
    """

    def __init__(self, graph: ir.Graph, name: str, scale: Array, channels: int, names: edit.Names) -> None:
        self._graph, self._name, self._scale, self._channels = graph, name, scale, channels
        self._names = names
        self._constants: dict[str, ir.Value] = {}

    def encode(self, value: ir.Value) -> list[ir.Node]:
        """Nodes whose last makes codes of keys or values ``b h t d``, or ``b t (h d)`` with heads side by side."""
        hint, (scale, axis) = f"{value.name}.codes", self._scales(value)
        nodes = []
        if axis is None:
            nodes.append(self._node("Div", [value, self._factor()], f"{value.name}.divided", ir.DataType.FLOAT))
            value = nodes[-1].outputs[0]
        zero = self._constant(f"zeros.{scale.size}", np.zeros(scale.shape, np.int8))
        return [*nodes, self._node("QuantizeLinear", [value, self._held(scale), zero], hint, ir.DataType.INT8, axis)]

    def decode(self, codes: ir.Value) -> list[ir.Node]:
        """Nodes whose last gives what codes stand for, ``b h t d`` or ``b t (h d)``."""
        hint, (scale, axis) = f"{codes.name}.dequantized", self._scales(codes)
        # Without zero points: ONNX Runtime 1.31 moves others through a Transpose as unsigned ones, and fails.
        operands = [codes, self._held(scale)]
        if axis is not None:
            return [self._node("DequantizeLinear", operands, hint, ir.DataType.FLOAT, axis)]
        whole = self._node("DequantizeLinear", operands, f"{codes.name}.multiples", ir.DataType.FLOAT)
        return [whole, self._node("Mul", [whole.outputs[0], self._factor()], hint, ir.DataType.FLOAT)]

    def _scales(self, value: ir.Value) -> tuple[Array, int | None]:
        """Scales along an axis; 1, and None, where no axis has them."""
        assert value.shape is not None
        flat, by_head = len(value.shape) == 3, self._scale.shape[1] == 1
        if flat:
            return np.repeat(self._scale[:, 0], self._channels) if by_head else self._scale.reshape(-1), 2
        return (self._scale[:, 0], HEADS) if by_head else (np.asarray(1, np.float32), None)

    def _factor(self) -> ir.Value:
        return self._constant("scale", self._scale[None, :, None, :])

    def _held(self, scale: Array) -> ir.Value:
        return self._constant(f"scales.{scale.size}", scale)

    def _constant(self, hint: str, array: Array) -> ir.Value:
        if hint not in self._constants:
            name = self._names.fresh(f"{self._name}.{hint}")
            self._constants[hint] = edit.initializer(self._graph, np.ascontiguousarray(array), name)
        return self._constants[hint]

    def _node(
        self, kind: str, inputs: list[ir.Value], hint: str, dtype: ir.DataType, axis: int | None = None
    ) -> ir.Node:
        made = ir.Value(name=self._names.fresh(hint), type=ir.TensorType(dtype), shape=inputs[0].shape)
        return ir.node(kind, inputs, {} if axis is None else {"axis": axis}, outputs=[made], name=made.name)


def scales(model: ir.Model) -> dict[str, Array]:
    """What the codes of caches are times, ``(1, heads, 1, channels or 1)``, by the names of inputs and outputs.

    Of caches in 8-bit integers that the model itself makes floats of; others are left out.
    """
    found = {}
    for past, present, node in caches.joins(model):
        if past.dtype != ir.DataType.INT8:
            continue
        scale = _group_query(node, past) if node.op_type == "GroupQueryAttention" else _dequantized(past, present)
        if scale is not None:
            found[str(past.name)] = found[str(present.name)] = scale
    for output in model.graph.outputs:
        if output.name not in found and output.dtype == ir.DataType.INT8 and (scale := _rounded(output)) is not None:
            found[output.name or ""] = scale
    return found


def _rounded(codes: ir.Value) -> Array | None:
    """The scale of codes ``b h t d`` that are an output without a past."""
    node = codes.producer()
    scale = edit.constant(node.inputs[1]) if node is not None and is_op(node, "QuantizeLinear") else None
    if node is None or scale is None or codes.shape is None or len(codes.shape) != 4:
        return None
    if scale.size > 1:
        return scale.reshape([-1 if i == edit.attribute(node, "axis", 1) % 4 else 1 for i in range(4)])
    divided = node.inputs[0].producer() if node.inputs[0] is not None else None
    factor = edit.constant(divided.inputs[1]) if divided is not None and is_op(divided, "Div") else None
    return np.asarray(scale * factor) if factor is not None and factor.ndim == 4 else scale.reshape((1,) * 4)


def _group_query(node: ir.Node, past: ir.Value) -> Array | None:
    at = _GROUP_QUERY_SCALES[3 if node.inputs[3] is past else 4]
    scale = edit.constant(node.inputs[at]) if at < len(node.inputs) else None
    if scale is None or edit.attribute(node, "kv_cache_bit_width", 8) != 8:
        return None
    heads = edit.attribute(node, "kv_num_heads") if scale.size > 1 else 1
    return scale.reshape(1, heads, 1, -1)


def _dequantized(*codes: ir.Value) -> Array | None:
    """What some of these codes are multiplied with where they become floats."""
    for node in (node for value in codes for node in value.consumers()):
        scale = edit.constant(node.inputs[1]) if is_op(node, "DequantizeLinear") else None
        if scale is None:
            continue
        zero = edit.constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if zero is not None and zero.any():
            continue
        if scale.size > 1:
            axis = edit.attribute(node, "axis", 1) % 4
            return scale.reshape([-1 if i == axis else 1 for i in range(4)])
        scale = scale.reshape((1,) * 4)
        uses = list(node.outputs[0].uses())
        factor = (
            edit.constant(uses[0].node.inputs[1 - uses[0].idx])
            if len(uses) == 1 and is_op(uses[0].node, "Mul")
            else None
        )
        return np.asarray(scale * factor) if factor is not None and factor.ndim == 4 else scale
    return None


def encoded(array: Array, scale: Array) -> Array:
    """Codes of floats, int8."""
    return np.clip(np.rint(array / scale), -128, 127).astype(np.int8)


def with_floats(model: ir.Model, wanted: Mapping[str, ir.DataType | None]) -> ir.Model:
    """A model that takes and gives caches as floats where it has them in codes; itself where nothing is to be changed.

    Args:
        model: The model; it is not changed.
        wanted: The dtypes of inputs and outputs.
    """
    known = {name: scale for name, scale in scales(model).items() if wanted.get(name) == ir.DataType.FLOAT}
    if not known:
        return model
    copy = model.clone()
    names, graph = edit.Names(copy), copy.graph
    for place, value in enumerate(graph.inputs):
        if value.name not in known:
            continue
        outer = ir.Value(name=value.name, type=ir.TensorType(ir.DataType.FLOAT), shape=value.shape)
        nodes = _coder(graph, value, known[str(value.name)], names).encode(outer)
        graph.insert_before(graph[0], nodes)
        value.name = names.fresh(f"{value.name}.inner")
        value.replace_all_uses_with(nodes[-1].outputs[0])
        graph.inputs[place] = outer
    for place, value in enumerate(graph.outputs):
        if value.name not in known:
            continue
        nodes = _coder(graph, value, known[str(value.name)], names).decode(value)
        for node in nodes:
            graph.append(node)
        outer = nodes[-1].outputs[0]
        outer.name, value.name = value.name, names.fresh(f"{value.name}.inner")
        graph.outputs[place] = outer
    return copy


def _coder(graph: ir.Graph, value: ir.Value, scale: Array, names: edit.Names) -> Coder:
    assert value.shape is not None
    heads, channels = value.shape[HEADS], value.shape[CHANNELS]
    assert isinstance(heads, int) and isinstance(channels, int)
    return Coder(
        graph, str(value.name), np.broadcast_to(scale, (1, heads, 1, scale.shape[3]))[0, :, 0], channels, names
    )
