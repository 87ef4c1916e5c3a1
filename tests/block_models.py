"""Networks of residual blocks in every topology, and what the tests of ``drop-blocks`` do with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from graphc import runtime
from graphc.collection import Collector
from graphc.contract import Capabilities, Context, PassResult
from graphc.depth.silence import Silencing
from graphc.depth.structure import find
from graphc.passes.drop_blocks import DropBlocks

CONTEXT = Context(Capabilities("portable", 10, {"": 21}))

DATA = Path(__file__).parent / "data"

WIDTH, HEADS = 8, 2


class Net:
    """Writes small networks node by node, with random weights of a fixed seed."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.random = np.random.default_rng(0)

    def op(self, operator: str, *inputs: str, out: str = "", outputs: int = 1, **attributes: Any) -> str:
        name = out or f"{operator.lower()}_{len(self.nodes)}"
        outs = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, outs, name=f"n_{name}", **attributes))
        return name if outputs == 1 else outs[0]

    def weight(self, name: str, *shape: int, values: Any = None) -> str:
        array = self.random.normal(0, 0.5, shape).astype(np.float32) if values is None else np.asarray(values)
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def ints(self, name: str, *values: int) -> str:
        if all(w.name != name for w in self.weights):
            self.weight(name, values=np.array(values, dtype=np.int64))
        return name

    def norm(self, x: str, name: str) -> str:
        return self.op("LayerNormalization", x, self.weight(f"{name}.g", WIDTH), self.weight(f"{name}.b", WIDTH))

    def linear(self, x: str, name: str, inputs: int = WIDTH, outputs: int = WIDTH) -> str:
        y = self.op("MatMul", x, self.weight(f"{name}.weight", inputs, outputs))
        return self.op("Add", y, self.weight(f"{name}.bias", outputs))

    def heads(self, x: str, *order: int) -> str:
        y = self.op("Reshape", x, self.ints("split", 0, -1, HEADS, WIDTH // HEADS))
        return self.op("Transpose", y, perm=list(order))

    def attention(self, x: str, name: str, source: str = "", mask: str = "", cache: bool = False) -> str:
        source = source or x
        q = self.heads(self.linear(x, f"{name}.q"), 0, 2, 1, 3)
        k = self.heads(self.linear(source, f"{name}.k"), 0, 2, 1, 3)
        v = self.heads(self.linear(source, f"{name}.v"), 0, 2, 1, 3)
        if cache:
            layer = name.split(".")[1]
            k = self.op("Concat", f"past.{layer}.key", k, axis=2, out=f"present.{layer}.key")
            v = self.op("Concat", f"past.{layer}.value", v, axis=2, out=f"present.{layer}.value")
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        if mask:
            scores = self.op("Add", scores, mask)
        y = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        y = self.op("Reshape", self.op("Transpose", y, perm=[0, 2, 1, 3]), self.ints("join", 0, -1, WIDTH))
        return self.linear(y, f"{name}.o")

    def mlp(self, x: str, name: str) -> str:
        return self.linear(self.op("Gelu", self.linear(x, f"{name}.up", WIDTH, 12)), f"{name}.down", 12, WIDTH)

    def model(self, inputs: dict[str, Sequence[Any]], outputs: dict[str, Sequence[Any]]) -> ir.Model:
        def infos(of: dict[str, Sequence[Any]]) -> list[Any]:
            return [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in of.items()]

        graph = helper.make_graph(self.nodes, "net", infos(inputs), infos(outputs), self.weights)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        return ir.from_proto(proto)


SEQUENCE = {"x": ["n", "s", WIDTH]}


def pre_norm(layers: int = 3, mask: bool = False, cache: bool = False) -> ir.Model:
    net = Net()
    h = net.linear("x", "embed.first")
    inputs: dict[str, Sequence[Any]] = dict(SEQUENCE)
    outputs: dict[str, Sequence[Any]] = {"y": ["n", "s", 5]}
    bias = ""
    if mask:
        # From the same input as the stream: it must not be taken for a stream itself.
        bias = net.op("Unsqueeze", net.op("ReduceMean", h, net.ints("last", -1), keepdims=0), net.ints("one2", 1, 2))
    for i in range(layers):
        name = f"layers.{i}"
        a = net.attention(net.norm(h, f"{name}.norm1"), f"{name}.attention", mask=bias, cache=cache)
        h = net.op("Add", h, a)
        h = net.op("Add", net.mlp(net.norm(h, f"{name}.norm2"), f"{name}.mlp"), h)
        if cache:
            for kind in ("key", "value"):
                inputs[f"past.{i}.{kind}"] = ["n", HEADS, "p", WIDTH // HEADS]
                outputs[f"present.{i}.{kind}"] = ["n", HEADS, "p + s", WIDTH // HEADS]
    net.op("MatMul", net.norm(h, "final.norm"), net.weight("final.head", WIDTH, 5), out="y")
    return net.model(inputs, outputs)


def post_norm() -> ir.Model:
    net = Net()
    h = net.linear("x", "embed.first")
    for i in range(3):
        name = f"layers.{i}"
        h = net.norm(net.op("Add", net.attention(h, f"{name}.attention"), h), f"{name}.norm1")
        h = net.norm(net.op("Add", net.mlp(h, f"{name}.mlp"), h), f"{name}.norm2")
    net.op("MatMul", h, net.weight("final.head", WIDTH, 5), out="y")
    return net.model(SEQUENCE, {"y": ["n", "s", 5]})


def sandwich() -> ir.Model:
    """A norm behind each branch, as well."""
    net = Net()
    h = net.linear("x", "embed.first")
    for i in range(2):
        name = f"layers.{i}"
        a = net.attention(net.norm(h, f"{name}.norm1"), f"{name}.attention")
        h = net.op("Add", h, net.norm(a, f"{name}.norm2"))
        h = net.op("Add", h, net.norm(net.mlp(net.norm(h, f"{name}.norm3"), f"{name}.mlp"), f"{name}.norm4"))
    net.op("MatMul", h, net.weight("final.head", WIDTH, 5), out="y")
    return net.model(SEQUENCE, {"y": ["n", "s", 5]})


def parallel(first: bool) -> ir.Model:
    """Attention and MLP side by side, added to the stream together or one after the other."""
    net = Net()
    h = net.linear("x", "embed.first")
    for i in range(3):
        name = f"layers.{i}"
        z = net.norm(h, f"{name}.norm")
        a, m = net.attention(z, f"{name}.attention"), net.mlp(z, f"{name}.mlp")
        h = net.op("Add", net.op("Add", a, m), h) if first else net.op("Add", net.op("Add", h, a), m)
    net.op("MatMul", h, net.weight("final.head", WIDTH, 5), out="y")
    return net.model(SEQUENCE, {"y": ["n", "s", 5]})


def encoder_decoder() -> ir.Model:
    net = Net()
    h = net.linear("x", "embed.first")
    for i in range(2):
        name = f"encoder.{i}"
        h = net.op("Add", h, net.attention(net.norm(h, f"{name}.n1"), f"{name}.attention"))
        h = net.op("Add", h, net.mlp(net.norm(h, f"{name}.n2"), f"{name}.mlp"))
    memory = net.norm(h, "encoder.final")
    h = net.linear("t", "embed.out")
    for i in range(2):
        name = f"decoder.{i}"
        h = net.op("Add", h, net.attention(net.norm(h, f"{name}.n1"), f"{name}.attention"))
        h = net.op("Add", h, net.attention(net.norm(h, f"{name}.n2"), f"{name}.cross", memory))
        h = net.op("Add", h, net.mlp(net.norm(h, f"{name}.n3"), f"{name}.mlp"))
    net.op("MatMul", h, net.weight("final.head", WIDTH, 5), out="y")
    return net.model({**SEQUENCE, "t": ["n", "u", WIDTH]}, {"y": ["n", "u", 5]})


def convolutional() -> ir.Model:
    """Identity blocks, a stage with a projected shortcut, identity blocks."""
    net = Net()

    def conv(x: str, name: str, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> str:
        weights = net.weight(f"{name}.w", outputs, inputs, kernel, kernel), net.weight(f"{name}.b", outputs)
        return net.op("Conv", x, *weights, pads=[kernel // 2] * 4, strides=[stride] * 2)

    def block(x: str, name: str, inputs: int, outputs: int) -> str:
        stride = outputs // inputs
        y = conv(net.op("Relu", conv(x, f"{name}.c1", inputs, outputs, 3, stride)), f"{name}.c2", outputs, outputs)
        return net.op("Relu", net.op("Add", y, conv(x, f"{name}.sc", inputs, outputs, 1, 2) if stride > 1 else x))

    h = net.op("Relu", conv("x", "stem.0", 3, 4))
    for i, (inputs, outputs) in enumerate([(4, 4), (4, 4), (4, 8), (8, 8)]):
        h = block(h, f"layers.{i}", inputs, outputs)
    flat = net.op("Flatten", net.op("GlobalAveragePool", h))
    net.op("MatMul", flat, net.weight("final.head", 8, 5), out="y")
    return net.model({"x": ["n", 3, 8, 8]}, {"y": ["n", 5]})


def shared() -> ir.Model:
    """One MLP in every layer, as in ALBERT."""
    net = Net()
    h = net.linear("x", "embed.first")
    up, down = net.weight("shared.0.up", WIDTH, 12), net.weight("shared.0.down", 12, WIDTH)
    for i in range(3):
        z = net.norm(h, f"layers.{i}.norm")
        h = net.op("Add", h, net.op("MatMul", net.op("Relu", net.op("MatMul", z, up)), down))
    net.op("MatMul", h, net.weight("final.head", WIDTH, 5), out="y")
    return net.model(SEQUENCE, {"y": ["n", "s", 5]})


TOPOLOGIES = {
    "pre_norm": pre_norm,
    "masked": lambda: pre_norm(mask=True),
    "cached": lambda: pre_norm(2, cache=True),
    "post_norm": post_norm,
    "sandwich": sandwich,
    "parallel": lambda: parallel(True),
    "parallel_in_a_row": lambda: parallel(False),
    "encoder_decoder": encoder_decoder,
    "convolutional": convolutional,
    "shared": shared,
}


def without(model: ir.Model, gone: Sequence[int]) -> tuple[ir.Model, int]:
    """The model with some branches written to zero, and how many parameters these have."""
    model = model.clone()
    branches = [find(model).branches[i] for i in gone]
    for branch in branches:
        silencing = Silencing.of(branch.value, branch.node)
        assert silencing.why == ""
        silencing.write(model)
    return model, sum(branch.parameters for branch in branches)


SIZES = {"n": 2, "s": 5, "u": 4, "p": 3}


def assert_same(a: ir.Model, b: ir.Model) -> None:
    """Both compute the same up to some float32 roundings."""
    random = np.random.default_rng(1)
    sizes = {v.name: [SIZES.get(str(d), d) for d in v.shape] for v in a.graph.inputs}
    given = {name: random.normal(size=shape).astype(np.float32) for name, shape in sizes.items()}
    want, got = (runtime.session(m, optimise=False).run(given) for m in (a, b))
    assert want.keys() == got.keys()
    for name, array in want.items():
        np.testing.assert_allclose(got[name], array, rtol=0, atol=1e-5 * np.abs(array).max())


def samples(count: int = 4, seed: int = 3) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    return [{"x": random.normal(size=(2, 7, WIDTH)).astype(np.float32)} for _ in range(count)]


def context(given: list[dict[str, np.ndarray]], labels: Sequence[np.ndarray] = ()) -> Context:
    collector = Collector(given, labels)
    return Context(CONTEXT.target, collect=collector.collect, calibration=given, labels=labels)


def outputs(model: ir.Model, given: Sequence[dict[str, np.ndarray]], name: str = "y") -> np.ndarray:
    session = runtime.session(model, optimise=False)
    return np.concatenate([session.run(each)[name] for each in given])


def dropped(model: ir.Model, ctx: Context = CONTEXT, **options: Any) -> tuple[list[str], PassResult]:
    """The names of the blocks or branches that a run wrote to zero."""
    before = {b.name: b for b in find(model.clone()).branches}
    result = DropBlocks(**options).run(model, ctx)
    constants = model.graph.initializers
    gone = []
    for name, branch in before.items():
        zeros = [value for value, _ in Silencing.of(branch.value, branch.node).zeros]
        if zeros and not any(constants[value.name].const_value.numpy().any() for value in zeros):
            gone.append(name)
    return gone, result
