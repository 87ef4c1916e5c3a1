"""A model in double precision: the judge between two evaluations in single precision that differ."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graphc import edit, runtime
from graphc.contract import Arrays

SINGLE, DOUBLE = ir.DataType.FLOAT, ir.DataType.DOUBLE


def doubled(model: ir.Model) -> ir.Model:
    """A copy with float64 in the place of float32, interface included; large constants are widened when read."""
    copy = model.clone()
    for graph in edit.graphs(copy):
        for value in (*graph.inputs, *graph.initializers.values()):
            _widen(value)
            if value.const_value is not None and value.const_value.dtype == SINGLE:
                value.const_value = _wide(value.const_value)
    for node in edit.nodes(copy):
        for value in node.outputs:
            _widen(value)
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == SINGLE:
                node.attributes[name] = ir.AttrTensor(name, _wide(attribute.value))
            elif name in ("to", "dtype") and attribute.value == SINGLE:
                node.attributes[name] = ir.AttrInt64(name, DOUBLE)
            elif name in ("value_float", "value_floats"):
                del node.attributes[name]
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.array(attribute.value, np.float64)))
    return copy


def distances(model: ir.Model, inputs: Arrays, found: Mapping[str, Arrays], output: str) -> dict[str, float]:
    """How far evaluations are from the model in double precision, as ``OutputError.max_rel`` measures.

    Args:
        model: The model in single precision.
        inputs: What was evaluated.
        found: The outputs of each evaluation.
        output: The output to look at.

    Raises:
        CannotRun: The runtime does not compute the model in double precision; it has no convolutions that do.
    """
    session = runtime.session(doubled(model), optimise=False, frugal=True)
    try:
        wide = {name: a.astype(np.float64) if a.dtype == np.float32 else a for name, a in inputs.items()}
        exact = session.run(wide)[output]
    finally:
        session.close()
    size = float(np.sqrt(np.mean(np.square(exact)))) or 1.0
    return {name: float(np.max(np.abs(arrays[output] - exact), initial=0.0)) / size for name, arrays in found.items()}


def _widen(value: ir.Value) -> None:
    if isinstance(value.type, ir.TensorType) and value.dtype == SINGLE:
        value.type = ir.TensorType(DOUBLE)


def _wide(held: ir.TensorProtocol) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        array = held.numpy().astype(np.float64)
        edit.release(held)
        return ir.tensor(array)

    return ir.LazyTensor(read, dtype=DOUBLE, shape=ir.Shape(held.shape.numpy()), name=held.name, cache=False)
