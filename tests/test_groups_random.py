"""Random graphs of movement, contraction, normalisation and elementwise operators: cutting equals zeroing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_groups import law

from graphc.axes.groups import analyse

Shape = tuple[int, ...]
LARGE = 600
"""Elements of a tensor from which on only operators that make it smaller are chosen."""


class Builder:
    """A graph that grows by random operators; shapes are without the batch axis."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.held: list[Any] = [numpy_helper.from_array(np.float32(0.1), "epsilon")]
        self.values: list[tuple[str, Shape]] = []

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.held)}"
        array = self.rng.standard_normal(shape) * 0.6
        self.held.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    def ints(self, *values: int) -> str:
        name = f"c{len(self.held)}"
        self.held.append(numpy_helper.from_array(np.array(values, dtype=np.int64), name))
        return name

    def op(self, kind: str, inputs: list[str], *shapes: Shape, **attributes: Any) -> str:
        names = [f"v{len(self.values) + i}" for i in range(len(shapes))]
        self.nodes.append(helper.make_node(kind, inputs, names, name=f"{kind}_{len(self.nodes)}", **attributes))
        self.values += zip(names, shapes, strict=True)
        return names[0]

    def pick(self, *options: Any) -> Any:
        return options[self.rng.integers(len(options))]

    def step(self) -> None:
        """Add one operator to one of the latest values."""
        v, shape = self.values[self.rng.integers(max(0, len(self.values) - 6), len(self.values))]
        at = int(self.rng.integers(len(shape)))
        if math.prod(shape) > LARGE:
            choice: Callable[..., None] = self.pick(Builder.reduce, Builder.cut)
        else:
            choice = self.pick(*STEPS)
        choice(self, v, shape, at)

    def matmul(self, v: str, shape: Shape, at: int) -> None:
        out = self.pick(4, 6, 8, 12)
        self.op("MatMul", [v, self.weight(shape[-1], out)], (*shape[:-1], out))

    def bias(self, v: str, shape: Shape, at: int) -> None:
        self.op("Add", [v, self.weight(shape[-1])], shape)

    def activate(self, v: str, shape: Shape, at: int) -> None:
        self.op(self.pick("Relu", "Tanh", "Sigmoid", "Abs"), [v], shape)

    def factor(self, v: str, shape: Shape, at: int) -> None:
        factors = [f for f in range(2, shape[at]) if shape[at] % f == 0]
        if factors and len(shape) < 4:
            f = self.pick(*factors)
            new = (*shape[:at], f, shape[at] // f, *shape[at + 1 :])
            self.op("Reshape", [v, self.ints(self.pick(0, -1), *new)], new)

    def merge(self, v: str, shape: Shape, at: int) -> None:
        if at + 1 < len(shape):
            new = (*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :])
            self.op("Reshape", [v, self.ints(0, *new[:-1], -1)], new)

    def transpose(self, v: str, shape: Shape, at: int) -> None:
        perm = self.rng.permutation(len(shape))
        self.op("Transpose", [v], tuple(shape[i] for i in perm), perm=[0, *(int(i) + 1 for i in perm)])

    def cut(self, v: str, shape: Shape, at: int) -> None:
        if shape[at] > 2:
            start = int(self.rng.integers(0, shape[at] - 1))
            stop = int(self.rng.integers(start + 1, shape[at] + 1))
            bounds = [self.ints(start), self.ints(stop), self.ints(at + 1)]
            self.op("Slice", [v, *bounds], (*shape[:at], stop - start, *shape[at + 1 :]))

    def flip(self, v: str, shape: Shape, at: int) -> None:
        bounds = [self.ints(-1), self.ints(-(1 << 40)), self.ints(at + 1), self.ints(-1)]
        self.op("Slice", [v, *bounds], shape)

    def stride(self, v: str, shape: Shape, at: int) -> None:
        if shape[at] % 2 == 0:
            bounds = [self.ints(self.pick(0, 1)), self.ints(1 << 40), self.ints(at + 1), self.ints(2)]
            self.op("Slice", [v, *bounds], (*shape[:at], shape[at] // 2, *shape[at + 1 :]))

    def concat(self, v: str, shape: Shape, at: int) -> None:
        fits = [
            (u, s)
            for u, s in self.values
            if len(s) == len(shape) and s[:at] == shape[:at] and s[at + 1 :] == shape[at + 1 :]
        ]
        u, other = self.pick(*fits)
        self.op("Concat", [v, u], (*shape[:at], shape[at] + other[at], *shape[at + 1 :]), axis=at + 1)

    def split(self, v: str, shape: Shape, at: int) -> None:
        if shape[at] > 1:
            first = int(self.rng.integers(1, shape[at]))
            parts = [(*shape[:at], n, *shape[at + 1 :]) for n in (first, shape[at] - first)]
            self.op("Split", [v, self.ints(first, shape[at] - first)], *parts, axis=at + 1)

    def join(self, v: str, shape: Shape, at: int) -> None:
        self.op(self.pick("Add", "Mul"), [v, self.pick(*(u for u, s in self.values if s == shape))], shape)

    def gather(self, v: str, shape: Shape, at: int) -> None:
        size = shape[at]
        order = self.rng.permutation(size)
        indices = self.pick(
            order, order[: max(2, size // 2)], np.repeat(np.arange(size), 2), np.tile(np.arange(size), 2)
        )
        new = (*shape[:at], len(indices), *shape[at + 1 :])
        self.op("Gather", [v, self.ints(*indices.tolist())], new, axis=at + 1)

    def pad(self, v: str, shape: Shape, at: int) -> None:
        pads = [0] * (2 * len(shape) + 2)
        pads[at + 1], pads[at + len(shape) + 2] = self.pick(0, 1, 2), self.pick(1, 2)
        total = shape[at] + sum(pads)
        self.op("Pad", [v, self.ints(*pads)], (*shape[:at], total, *shape[at + 1 :]))

    def tile(self, v: str, shape: Shape, at: int) -> None:
        repeats = [2 if i == at + 1 else 1 for i in range(len(shape) + 1)]
        self.op("Tile", [v, self.ints(*repeats)], (*shape[:at], 2 * shape[at], *shape[at + 1 :]))

    def reduce(self, v: str, shape: Shape, at: int) -> None:
        kind = self.pick("ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2")
        self.op(kind, [v, self.ints(at + 1)], (*shape[:at], 1, *shape[at + 1 :]), keepdims=1)

    def softmax(self, v: str, shape: Shape, at: int) -> None:
        self.op("Softmax", [v], shape, axis=at + 1)

    def layer_norm(self, v: str, shape: Shape, at: int) -> None:
        self.op("LayerNormalization", [v, self.weight(shape[-1]), self.weight(shape[-1])], shape, axis=-1)

    def rms(self, v: str, shape: Shape, at: int) -> None:
        one = (*shape[:at], 1, *shape[at + 1 :])
        mean = self.op("ReduceMean", [self.op("Mul", [v, v], shape), self.ints(at + 1)], one, keepdims=1)
        self.op("Div", [v, self.op("Sqrt", [self.op("Add", [mean, "epsilon"], one)], one)], shape)

    def conv(self, v: str, shape: Shape, at: int) -> None:
        if len(shape) > 1:
            groups = self.pick(*(g for g in (1, 2, 3, shape[0]) if shape[0] % g == 0))
            out = groups * self.pick(1, 2, 3)
            kernel = self.weight(out, shape[0] // groups, *[1] * (len(shape) - 1))
            self.op("Conv", [v, kernel, self.weight(out)], (out, *shape[1:]), group=groups)

    def attend(self, v: str, shape: Shape, at: int) -> None:
        if len(shape) > 1:
            u = self.pick(*(u for u, s in self.values if s == shape))
            perm = [*range(len(shape) - 1), len(shape), len(shape) - 1]
            turned = self.op("Transpose", [u], (*shape[:-2], shape[-1], shape[-2]), perm=perm)
            self.op("MatMul", [v, turned], (*shape[:-1], shape[-2]))

    def repeat(self, v: str, shape: Shape, at: int) -> None:
        if len(shape) < 4:
            wide = (*shape[: at + 1], 2, *shape[at + 1 :])
            one = self.op("Unsqueeze", [v, self.ints(at + 2)], (*shape[: at + 1], 1, *shape[at + 1 :]))
            expanded = self.op(
                "Expand", [one, self.ints(1, *(2 if i == at + 1 else 1 for i in range(len(wide))))], wide
            )
            new = (*shape[:at], 2 * shape[at], *shape[at + 1 :])
            self.op("Reshape", [expanded, self.ints(0, *new)], new)

    def finish(self, shape: Shape) -> ir.Model:
        """Flatten and join the last values, and map them to a fixed output."""
        ends = [(self.op("Reshape", [v, self.ints(0, -1)], (math.prod(s),)), math.prod(s)) for v, s in self.values[-3:]]
        width = sum(n for _, n in ends)
        joined = self.op("Concat", [name for name, _ in ends], (width,), axis=1)
        self.nodes.append(helper.make_node("MatMul", [joined, self.weight(width, 5)], ["y"], name="out"))
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *shape])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])
        graph = helper.make_graph(self.nodes, "random", [x], [y], self.held)
        return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


STEPS = (
    *(Builder.matmul, Builder.matmul, Builder.matmul, Builder.bias, Builder.activate, Builder.factor, Builder.merge),
    *(Builder.transpose, Builder.cut, Builder.flip, Builder.stride, Builder.concat, Builder.split, Builder.join),
    *(Builder.gather, Builder.pad, Builder.tile, Builder.reduce, Builder.softmax, Builder.layer_norm, Builder.rms),
    *(Builder.conv, Builder.attend, Builder.repeat),
)


def check(seed: int, steps: int) -> int:
    """Cut each exact group of a random graph; returns how many there were."""
    builder = Builder(seed)
    shape = builder.pick((6,), (4, 6), (6, 4), (3, 4, 6))
    builder.values.append(("x", shape))
    builder.matmul("x", shape, 0)
    for _ in range(steps):
        builder.step()
    model = builder.finish(shape)
    x = {"x": np.random.default_rng(seed).standard_normal((2, *shape)).astype(np.float32)}
    names = [g.name for g in analyse(model) if g.exact and not g.subsets]
    for number, name in enumerate(names):
        law(model, x, [name], seed + number)
    return len(names)


def test_cutting_equals_zeroing_on_random_graphs() -> None:
    assert sum(check(seed, 14) for seed in range(30)) > 60


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 600, 50))
def test_cutting_equals_zeroing_on_many_random_graphs(first: int) -> None:
    assert sum(check(seed, 18) for seed in range(first, first + 50)) > 100
