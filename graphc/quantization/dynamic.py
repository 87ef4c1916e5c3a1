"""Products in integers with activations that are quantized as they come: DynamicQuantizeLinear and MatMulInteger."""

from __future__ import annotations

import onnx_ir as ir

from graphc import edit
from graphc.edit import is_op
from graphc.quantization import store
from graphc.quantization.rounding import Codes
from graphc.quantization.sites import Site

NO_KERNEL = "ONNX Runtime has no fast product in integers for this operator with activations quantized as they come"


def why_not(site: Site) -> str:
    """Why the products of a weight cannot be done so; "" if they can."""
    if site.gathers or not site.uses:
        return "an embedding has no product to be done in integers"
    if site.views:
        return "a transposition reads the weight, too"
    if any(is_op(use.node, "Conv") for use in site.uses):
        return NO_KERNEL
    if len(site.value.uses()) != len(site.uses) or len(site.shape) != 2:
        return "the weight is no matrix that only products read"
    if site.held.dtype != ir.DataType.FLOAT:
        return "DynamicQuantizeLinear reads float32"
    for use in site.uses:
        plain = is_op(use.node, "MatMul") and use.node.inputs[1] is site.value
        if not (plain or (store.plain_gemm(use.node) and use.node.inputs[1] is site.value)):
            return NO_KERNEL
    turned = {bool(edit.attribute(use.node, "transB", 0)) for use in site.uses}
    return "" if len(turned) == 1 else "operators read it in different ways"


class Writer:
    """Rewrites products; what several products read is quantized once.

    Args:
        model: The model.
        names: For what is new.
    """

    def __init__(self, model: ir.Model, names: edit.Names) -> None:
        self._names = names
        self._quantized: dict[tuple[ir.Value, object], tuple[ir.Value, ir.Value, ir.Value]] = {}

    def write(self, site: Site, codes: Codes) -> None:
        """Let all products with a weight be done in integers.

        Args:
            site: One that :func:`why_not` has nothing against.
            codes: Its codes, int8 or uint8, with a scale for all or one for each output.
        """
        if edit.attribute(site.uses[0].node, "transB", 0):
            codes = store.transposed(codes)
        stored = store.store(site, codes, self._names)
        for use in site.uses:
            self._product(use.node, stored)

    def _product(self, node: ir.Node, stored: store.Stored) -> None:
        graph, out, x = node.graph, node.outputs[0], node.inputs[0]
        assert graph is not None and x is not None
        names = self._names
        rows, scale, zero = self._activation(node, x)

        def add(operator: str, inputs: list[ir.Value], hint: str, dtype: ir.DataType, **attributes: int) -> ir.Value:
            value = ir.Value(name=names.fresh(f"{out.name}.{hint}"), type=ir.TensorType(dtype))
            graph.insert_before(node, ir.node(operator, inputs, attributes, outputs=[value], name=value.name))
            return value

        operands = [rows, stored.codes, zero, *filter(None, (stored.zero,))]
        summed = add("MatMulInteger", operands, "integer", ir.DataType.INT32)
        summed.shape = out.shape
        floating = add("Cast", [summed], "float", ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
        factor = add("Mul", [scale, stored.scale], "scale", ir.DataType.FLOAT)
        made = add("Mul", [floating, factor], "scaled", ir.DataType.FLOAT)
        if is_op(node, "Gemm") and len(node.inputs) > 2 and node.inputs[2] is not None:
            made = add("Add", [made, node.inputs[2]], "biased", ir.DataType.FLOAT)
        made.shape = out.shape
        edit.replace(out, made)
        edit.remove(node)

    def _activation(self, node: ir.Node, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        key = (x, node.graph)
        if key not in self._quantized:
            types = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
            outs = [
                ir.Value(name=self._names.fresh(f"{x.name}.{hint}"), type=ir.TensorType(dtype))
                for hint, dtype in zip(("quantized", "scale", "zero"), types, strict=True)
            ]
            assert node.graph is not None
            made = ir.node("DynamicQuantizeLinear", [x], outputs=outs, name=outs[0].name)
            producer = x.producer()
            if producer is not None and producer.graph is node.graph:
                node.graph.insert_after(producer, made)
            else:
                node.graph.insert_before(node.graph[0], made)
            self._quantized[key] = (outs[0], outs[1], outs[2])
        return self._quantized[key]
