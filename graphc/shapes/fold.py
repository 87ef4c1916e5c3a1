"""Computes operators on constants, with the semantics of the ONNX specification to the letter.

The operators that shape arithmetic and weight preparation are made of are written in numpy here; everything
else is left to ONNX Runtime where it is installed. Nothing is computed that the specification, or runtimes,
leave undefined (a cast out of range, a division by zero): :class:`CannotFold` says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array, subgraphs
from graphc.shapes.kernels import DTYPES, KERNELS, CannotFold, Inputs

RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
KEPT = frozenset({"DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"})
"""Operators that say how a tensor is stored: computing them ahead would undo a quantization."""


def deterministic(node: ir.Node) -> bool:
    """Whether a node of the standard domain gives the same outputs for the same inputs, every time."""
    if node.op_type in RANDOM:
        return False
    if node.op_type == "Dropout":
        return not may_train(node)
    return all(deterministic(inner) for graph in subgraphs(node) for inner in graph)


def may_train(node: ir.Node) -> bool:
    """Whether a Dropout may be in training mode (an input that is not constantly false, from opset 12 on)."""
    return len(node.inputs) > 2 and node.inputs[2] is not None and edit.scalar(node.inputs[2]) is not False


def evaluate(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    """The outputs of a node for these inputs.

    Args:
        node: A deterministic node of the standard domain without subgraphs.
        inputs: Its inputs; they are not changed, and outputs may be views of them.
        version: The opset version of the standard domain.

    Raises:
        CannotFold: It is not known how, it is not defined, or it failed.
    """
    for array in inputs:
        if array is not None and array.dtype not in DTYPES:
            raise CannotFold(f"constants of dtype {array.dtype} are left alone")
    kernel = KERNELS.get(node.op_type)
    try:
        with np.errstate(all="ignore"):
            outputs = None if kernel is None else kernel(node, inputs, version)
        return _by_runtime(node, inputs, version) if outputs is None else [np.asarray(x) for x in outputs]
    except (IndexError, OverflowError, TypeError, ValueError, np.exceptions.AxisError) as error:
        raise CannotFold(f"the operator does not accept its constant inputs: {error}") from error


def _by_runtime(node: ir.Node, inputs: Inputs, version: int) -> Sequence[Array]:
    from graphc import runtime
    from graphc.errors import GraphcError

    values: list[ir.Value | None] = []
    feeds: dict[str, Array] = {}
    for i, array in enumerate(inputs):
        if array is None:
            values.append(None)
            continue
        dtype = ir.DataType.from_numpy(array.dtype)
        values.append(ir.Value(name=f"x{i}", type=ir.TensorType(dtype), shape=ir.Shape(array.shape)))
        feeds[f"x{i}"] = np.ascontiguousarray(array)
    outputs = [ir.Value(name=f"y{i}" if value.name else "") for i, value in enumerate(node.outputs)]
    clone = ir.Node("", node.op_type, values, list(node.attributes.values()), outputs=outputs, name="node")
    wanted = [value for value in outputs if value.name]
    graph = ir.Graph(
        [value for value in values if value is not None],
        wanted,
        nodes=[clone],
        opset_imports={"": version},
        name="fold",
    )
    for old, new in zip(node.outputs, outputs, strict=True):
        new.type = old.type
    try:
        found = runtime.session(ir.Model(graph, ir_version=10), optimise=False, threads=1).run(feeds)
    except GraphcError as error:
        raise CannotFold(f"the runtime does not compute {node.op_type} on constants: {error.what}") from error
    return [found[value.name] if value.name else np.empty(0) for value in outputs]
