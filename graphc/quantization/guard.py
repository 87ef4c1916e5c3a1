"""Layers that stay precise between quantized activations, kept from ONNX Runtime's own hands.

Where a convolution or Gemm with a float weight stands between DequantizeLinear and QuantizeLinear, ONNX Runtime (its
``WeightBiasQuantization``, on by default) rounds the weight to 8 bits with one scale for the whole tensor, which is
worse than anything that ``quantize`` would have done. It leaves weights alone that come from a DequantizeLinear, so
they are stored in 16 bits, which is as good as float here.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from graphc import edit
from graphc.edit import is_op
from graphc.quantization import rounding, static
from graphc.quantization.granularity import Granularity
from graphc.quantization.grid import Grid

KINDS = ("Conv", "ConvTranspose", "Gemm")
"""What ONNX Runtime would quantize."""

GRID = Grid(16)


def keep(model: ir.Model, planned: static.Plan, spared: Collection[ir.Value], names: edit.Names) -> int:
    """Store the float weights between planned activations in 16 bits; returns how many.

    Args:
        model: The model, its activations not quantized yet.
        planned: Those that will be.
        spared: Weights that will be codes by themselves.
        names: For what is new.
    """
    count = 0
    for node in list(model.graph):
        held = edit.tensor(node.inputs[1]) if is_op(node, *KINDS) else None
        if held is None or held.dtype != ir.DataType.FLOAT or not static.between(node, planned):
            continue
        if node.inputs[1] in spared:
            continue
        if not rounding.finite(held):
            continue
        granularity = Granularity(0) if node.op_type == "Conv" else Granularity()
        codes = rounding.nearest(held, GRID, granularity)
        name = node.inputs[1].name if node.inputs[1] is not None else ""
        operands = [
            edit.initializer(model.graph, tensor, names.fresh(f"{name}.{hint}"))
            for tensor, hint in ((codes.codes, "int16"), (codes.scale, "scale"))
        ]
        value = ir.Value(
            name=names.fresh(f"{name}.dequantized"),
            shape=ir.Shape(codes.codes.shape.numpy()),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        made = ir.node("DequantizeLinear", operands, granularity.attributes(), outputs=[value], name=value.name)
        model.graph.insert_before(node, made)
        old = node.inputs[1]
        node.replace_input_with(1, value)
        edit.drop_unused(old)
        count += 1
    return count
