"""A Llama decoder as exporters write it, in any size, without data: weights point at a file that need not exist."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir


class Llama:
    """Builds the graph node by node, as TorchScript spells it: shape arithmetic, arithmetic norms, GQA by Expand."""

    def __init__(self, *, layers: int, width: int, hidden: int, heads: int, kv_heads: int, vocabulary: int) -> None:
        self.width, self.hidden, self.heads, self.kv_heads = width, hidden, heads, kv_heads
        self.size = width // heads
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []
        ids = ir.Value(name="ids", shape=ir.Shape(["batch", "seq"]), type=ir.TensorType(ir.DataType.INT64))
        table = self.weight("model.embed_tokens.weight", vocabulary, width)
        x = self.op("Gather", table, ids)
        cos, sin = self._rotary(ids)
        for i in range(layers):
            x = self._layer(f"model.layers.{i}", x, cos, sin)
        x = self._norm("model.norm.weight", x)
        logits = self.op("MatMul", x, self.op("Transpose", table, perm=[1, 0]))
        logits.name, logits.shape = "logits", ir.Shape(["batch", "seq", vocabulary])
        logits.type = ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph(
            [ids], [logits], nodes=self.nodes, initializers=self.weights, opset_imports={"": 17}, name="llama"
        )
        self.model = ir.Model(graph, ir_version=8)

    def weight(self, name: str, *shape: int) -> ir.Value:
        tensor = ir.ExternalTensor(
            Path("no.data"), 0, 4 * int(np.prod(shape)), ir.DataType.FLOAT, shape=ir.Shape(shape), name=name
        )
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
        self.weights.append(value)
        return value

    def constant(self, value: object, dtype: type[np.generic] = np.int64) -> ir.Value:
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(np.array(value, dtype=dtype)))])
        return self._add(node)

    def op(self, operator: str, *inputs: ir.Value, **attributes: int | Sequence[int]) -> ir.Value:
        attrs = [ir.AttrInt64(k, v) if isinstance(v, int) else ir.AttrInt64s(k, list(v)) for k, v in attributes.items()]
        return self._add(ir.Node("", operator, inputs, attrs))

    def _add(self, node: ir.Node) -> ir.Value:
        node.name = f"{node.op_type}_{len(self.nodes)}"
        node.outputs[0].name = f"{node.name}_out"
        self.nodes.append(node)
        return node.outputs[0]

    def _dim(self, x: ir.Value, axis: int) -> ir.Value:
        return self.op("Unsqueeze", self.op("Gather", self.op("Shape", x), self.constant(axis)), self.constant([0]))

    def _rotary(self, ids: ir.Value) -> tuple[ir.Value, ir.Value]:
        seq = self.op("Gather", self.op("Shape", ids), self.constant(1))
        positions = self.op("Range", self.constant(0), seq, self.constant(1))
        columns = self.op("Unsqueeze", self.op("Cast", positions, to=1), self.constant([1]))
        inverse = self.weight("inv_freq", self.size // 2)
        angles = self.op("Mul", columns, inverse)
        both = self.op("Concat", angles, angles, axis=-1)
        return self.op("Cos", both), self.op("Sin", both)

    def _norm(self, name: str, x: ir.Value) -> ir.Value:
        mean = self.op("ReduceMean", self.op("Pow", x, self.constant(2, np.float32)), axes=[-1])
        root = self.op("Sqrt", self.op("Add", mean, self.constant(1e-5, np.float32)))
        return self.op("Mul", self.weight(name, self.width), self.op("Mul", x, self.op("Reciprocal", root)))

    def _split_heads(self, x: ir.Value, heads: int) -> ir.Value:
        shape = self.op(
            "Concat",
            self._dim(x, 0),
            self._dim(x, 1),
            self.constant([heads]),
            self.constant([self.size]),
            axis=0,
        )
        return self.op("Transpose", self.op("Reshape", x, shape), perm=[0, 2, 1, 3])

    def _rotate(self, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
        half = self.op("Div", self._dim(x, 3), self.constant([2]))
        first = self.op("Slice", x, self.constant([0]), half, self.constant([3]))
        second = self.op("Slice", x, half, self.constant([2**63 - 1]), self.constant([3]))
        turned = self.op("Concat", self.op("Neg", second), first, axis=-1)
        return self.op("Add", self.op("Mul", x, cos), self.op("Mul", turned, sin))

    def _repeat(self, x: ir.Value) -> ir.Value:
        times = self.heads // self.kv_heads
        if times == 1:
            return x
        batch, seq = self._dim(x, 0), self._dim(x, 2)
        heads, size, repeats = (
            self.constant([self.kv_heads]),
            self.constant([self.size]),
            self.constant([times]),
        )
        wide = self.op("Concat", batch, heads, repeats, seq, size, axis=0)
        flat = self.op("Concat", batch, self.constant([self.heads]), seq, size, axis=0)
        return self.op("Reshape", self.op("Expand", self.op("Unsqueeze", x, self.constant([2])), wide), flat)

    def _layer(self, name: str, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
        n = self._norm(f"{name}.input_layernorm.weight", x)
        widths = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        made = {
            part: self._split_heads(
                self.op(
                    "MatMul",
                    n,
                    self.weight(f"{name}.self_attn.{part}_proj.weight", self.width, count * self.size),
                ),
                count,
            )
            for part, count in widths.items()
        }
        q, k = self._rotate(made["q"], cos, sin), self._repeat(self._rotate(made["k"], cos, sin))
        v = self._repeat(made["v"])
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        scaled = self.op("Div", scores, self.constant(self.size**0.5, np.float32))
        mixed = self.op("MatMul", self.op("Softmax", scaled, axis=-1), v)
        back = self.op("Transpose", mixed, perm=[0, 2, 1, 3])
        shape = self.op("Concat", self._dim(back, 0), self._dim(back, 1), self.constant([-1]), axis=0)
        o = self.op(
            "MatMul",
            self.op("Reshape", back, shape),
            self.weight(f"{name}.self_attn.o_proj.weight", self.width, self.width),
        )
        x = self.op("Add", x, o)
        n = self._norm(f"{name}.post_attention_layernorm.weight", x)
        gate = self.op("MatMul", n, self.weight(f"{name}.mlp.gate_proj.weight", self.width, self.hidden))
        up = self.op("MatMul", n, self.weight(f"{name}.mlp.up_proj.weight", self.width, self.hidden))
        inner = self.op("Mul", self.op("Mul", gate, self.op("Sigmoid", gate)), up)
        down = self.op("MatMul", inner, self.weight(f"{name}.mlp.down_proj.weight", self.hidden, self.width))
        return self.op("Add", x, down)


def llama_7b() -> ir.Model:
    """32 layers in the shape of Llama-2-7B with the grouped heads of Llama-3-8B."""
    return Llama(layers=32, width=4096, hidden=14336, heads=32, kv_heads=8, vocabulary=32000).model
