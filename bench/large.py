"""A decoder-like transformer of 2.4 GB, written without ever holding more than one weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LAYERS, WIDTH, HIDDEN, HEADS, VOCABULARY = 11, 2048, 8192, 16, 25000
OPSET, IR = 17, 8


class _Writer:
    """Collects nodes and small constants; streams the big weights into the data file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.location = path.name + ".data"
        self.data = (path.parent / self.location).open("wb")
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def weight(self, name: str, *shape: int) -> str:
        """A random weight in external data, scaled by its first axis, aligned to pages."""
        self.data.seek(-self.data.tell() % 4096, 1)
        offset = self.data.tell()
        values = self.random.standard_normal(shape, dtype=np.float32)
        values *= np.float32(shape[0] ** -0.5)
        self.data.write(values)
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self.location), ("offset", offset), ("length", values.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def node(self, operator: str, *inputs: str, **attributes: object) -> str:
        output = f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def linear(self, value: str, name: str, inputs: int, outputs: int) -> str:
        bias = self.constant(f"{name}.bias", self.random.standard_normal(outputs, dtype=np.float32))
        return self.node("Add", self.node("MatMul", value, self.weight(f"{name}.weight", inputs, outputs)), bias)

    def norm(self, value: str, name: str) -> str:
        """LayerNormalization spelt out, as the TorchScript exporter writes it before opset 17."""
        centred = self.node("Sub", value, self.node("ReduceMean", value, axes=[-1]))
        two = self.constant(f"{name}.two", np.float32(2))
        variance = self.node("ReduceMean", self.node("Pow", centred, two), axes=[-1])
        epsilon = self.constant(f"{name}.epsilon", np.float32(1e-5))
        scaled = self.node("Div", centred, self.node("Sqrt", self.node("Add", variance, epsilon)))
        gamma = self.constant(f"{name}.weight", np.ones(WIDTH, np.float32))
        beta = self.constant(f"{name}.bias", self.random.standard_normal(WIDTH, dtype=np.float32))
        return self.node("Add", self.node("Mul", scaled, gamma), beta)

    def heads(self, value: str, name: str) -> str:
        """``[batch, seq, width]`` to ``[batch, heads, seq, width / heads]``, sizes read from the value."""
        shape = self.node("Shape", value)
        sizes = []
        for axis in (0, 1):
            index = self.constant(f"{name}.axis{axis}", np.int64(axis))
            axes = self.constant(f"{name}.axes{axis}", np.array([0], np.int64))
            sizes.append(self.node("Unsqueeze", self.node("Gather", shape, index), axes))
        split = self.constant(f"{name}.split", np.array([HEADS, WIDTH // HEADS], np.int64))
        target = self.node("Concat", *sizes, split, axis=0)
        return self.node("Transpose", self.node("Reshape", value, target), perm=[0, 2, 1, 3])

    def layer(self, value: str, name: str) -> str:
        normed = self.norm(value, f"{name}.norm1")
        query, key, values = (
            self.heads(self.linear(normed, f"{name}.{role}", WIDTH, WIDTH), f"{name}.{role}") for role in "qkv"
        )
        scores = self.node("MatMul", query, self.node("Transpose", key, perm=[0, 1, 3, 2]))
        scale = self.constant(f"{name}.scale", np.float32((WIDTH // HEADS) ** 0.5))
        mixed = self.node("MatMul", self.node("Softmax", self.node("Div", scores, scale), axis=-1), values)
        merged = self.node("Transpose", mixed, perm=[0, 2, 1, 3])
        shape = self.constant(f"{name}.merge", np.array([0, 0, WIDTH], np.int64))
        merged = self.node("Reshape", merged, shape)
        value = self.node("Add", value, self.linear(merged, f"{name}.out", WIDTH, WIDTH))
        hidden = self.linear(self.norm(value, f"{name}.norm2"), f"{name}.up", WIDTH, HIDDEN)
        hidden = self.node("Identity", self.node("Relu", hidden))
        return self.node("Add", value, self.linear(hidden, f"{name}.down", HIDDEN, WIDTH))


def write(path: Path) -> None:
    """Write the model to ``path`` and its 2.42 GB of weights beside it.

    Input ``input_ids``: int64 ``[batch, seq]`` < 25,000. Output ``hidden``: float32 ``[batch, seq, 2048]``.
    """
    writer = _Writer(path)
    with writer.data:
        value = writer.node("Gather", writer.weight("embedding", VOCABULARY, WIDTH), "input_ids")
        for layer in range(LAYERS):
            value = writer.layer(value, f"layer.{layer}")
    writer.nodes.append(helper.make_node("Identity", [value], ["hidden"], name="result"))
    graph = helper.make_graph(
        writer.nodes,
        "large",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"])],
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "seq", WIDTH])],
        writer.initializers,
    )
    model = helper.make_model(graph, ir_version=IR, opset_imports=[helper.make_opsetid("", OPSET)])
    path.write_bytes(model.SerializeToString())
