"""Models from a few lines of ONNX text, with arrays for constants and for inputs, for the tests of many passes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphc import edit, runtime
from graphc.contract import PassResult

IMAGE = "float[N,4,9,8] x"


def numbers(*shape: int, seed: int = 0, low: float = -1.0, high: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def hold(model: ir.Model, **constants: np.ndarray | ir.TensorProtocol) -> ir.Model:
    """The model, in which what nodes read under these names is constant."""
    for name, held in constants.items():
        value = edit.initializer(model.graph, held, name)
        for node in edit.nodes(model):
            for i, old in enumerate(node.inputs):
                if old is not None and old.name == name and old is not value:
                    node.replace_input_with(i, value)
    return model


def build(body: str, x: str = IMAGE, outputs: str = "y", opset: int = 21, **constants: object) -> ir.Model:
    """A model from ONNX text; ``constants`` become initializers, float32 unless they are arrays."""
    declared = ", ".join(f"float {name}" for name in outputs.split())
    text = f'<ir_version: 10, opset_import: ["": {opset}]> g ({x}) => ({declared}) {{ {body} }}'
    model = ir.from_onnx_text(text)
    for output in model.graph.outputs:
        output.shape = None
        output.dtype = next(v.dtype for v in model.graph.inputs)
    arrays = {k: v if isinstance(v, np.ndarray) else np.asarray(v, dtype=np.float32) for k, v in constants.items()}
    return hold(model, **arrays)


def feeds(model: ir.Model, seed: int = 1, **sizes: int) -> dict[str, np.ndarray]:
    """Random inputs; symbolic sizes are those given, or 3."""
    rng = np.random.default_rng(seed)
    found = {}
    for value in model.graph.inputs:
        shape = [d if isinstance(d, int) else sizes.get(str(d.value), 3) for d in value.shape]
        if value.dtype == ir.DataType.BOOL:
            found[value.name] = rng.random(shape) < 0.7
        else:
            found[value.name] = rng.standard_normal(shape).astype(value.dtype.numpy())
    return found


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return runtime.session(model, optimise=False, threads=1).run(feeds)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in edit.nodes(model)]


def reasons(result: PassResult) -> list[str]:
    return [refusal.reason for refusal in result.refusals]
