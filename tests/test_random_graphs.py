"""Random graphs compute the same after ``simplify,fuse,simplify``, and those passes leave no more operators."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, Phase, given, note, reject, settings
from hypothesis import strategies as st

from graphc import edit, runtime
from graphc.contract import Capabilities, Context
from graphc.passes.cast import Cast
from graphc.passes.fuse import Fuse
from graphc.passes.simplify import Simplify

CONTEXT = Context(target=Capabilities("portable", 10, {"": 21}))
BATCHES = (1, 3)

Array = np.ndarray[Any, Any]
Shape = tuple[int | str, ...]
"""Sizes; "N" is the batch, which differs between runs."""


OPERATORS = (
    *("conv",) * 3,
    *("affine",) * 3,
    *("batch_normalization", "matmul", "activation") * 2,
    *("conv_transpose", "neutral", "gemm", "transpose", "reshape", "flatten", "squeeze", "slice", "split", "concat"),
    *("combine", "pad", "reduce", "normalisation", "gelu", "cast", "shape_arithmetic", "expand", "gather", "where"),
    "branch",
)
"""Methods of ``Builder``, as often as they should be drawn."""


class Builder:
    """Adds random operators, each on values made before it, so that every graph is valid.

    Args:
        data: Where hypothesis draws from.
    """

    def __init__(self, data: st.DataObject) -> None:
        self.draw = data.draw
        image = ir.Value(name="image", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", 3, 6, 5]))
        rows = ir.Value(name="rows", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", 4]))
        self.graph = ir.Graph([image, rows], [], nodes=[], opset_imports={"": 21}, name="random")
        self.pool: list[tuple[ir.Value, Shape]] = [(image, ("N", 3, 6, 5)), (rows, ("N", 4))]
        self.count = 0
        self.into = self.graph

    def name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def number(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    def one(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def constant(self, array: Array) -> ir.Value:
        """An initializer, or a Constant node."""
        if self.number(0, 3):
            return edit.initializer(self.graph, array, self.name())
        return self.node("Constant", [], value=ir.tensor(array))

    def weights(self, *shape: int) -> ir.Value:
        return self.constant(np.random.default_rng(self.count).uniform(-1, 1, shape).astype(np.float32))

    def integers(self, *numbers: int) -> ir.Value:
        return self.constant(np.array(numbers, dtype=np.int64))

    def node(self, op_type: str, inputs: list[ir.Value | None], outputs: int = 1, **attributes: Any) -> Any:
        made = ir.node(op_type, inputs, attributes, num_outputs=outputs)
        for value in made.outputs:
            value.name = self.name()
        self.into.append(made)
        return made.outputs[0] if outputs == 1 else list(made.outputs)

    def keep(self, value: ir.Value, shape: Shape) -> None:
        self.pool.append((value, shape))

    def pick(self, *ranks: int) -> tuple[ir.Value, Shape] | None:
        """A value of one of these ranks, recent ones more often."""
        fitting = [item for item in self.pool if not ranks or len(item[1]) in ranks]
        return fitting[-1 - min(self.number(0, 5), len(fitting) - 1)] if fitting else None

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """One size of a value as a vector of one, computed when the model runs."""
        shape = self.node("Shape", [value])
        if self.number(0, 1):
            return self.node("Gather", [shape, self.integers(axis)])
        return self.node("Slice", [shape, self.integers(axis), self.integers(axis + 1)])

    def conv(self, x: ir.Value, shape: Shape) -> None:
        if len(shape) != 4 or shape[0] != "N" or min(shape[1:]) < 1 or min(shape[2:]) < 3:  # type: ignore[type-var]
            return
        _, c, h, w = (int(d) if d != "N" else 0 for d in shape)
        k, pad, stride = self.one(1, 3), self.number(0, 1), self.number(1, 2)
        bias = [self.weights(4)] if self.number(0, 1) else []
        y = self.node("Conv", [x, self.weights(4, c, k, k), *bias], pads=[pad] * 4, strides=[stride] * 2)
        self.keep(y, ("N", 4, (h + 2 * pad - k) // stride + 1, (w + 2 * pad - k) // stride + 1))

    def conv_transpose(self, x: ir.Value, shape: Shape) -> None:
        if len(shape) != 4 or shape[0] != "N" or "N" in shape[1:] or shape[1] % 2:  # type: ignore[operator]
            return
        _, c, h, w = (int(d) if d != "N" else 0 for d in shape)
        y = self.node("ConvTranspose", [x, self.weights(c, 3, 2, 2)], group=2, strides=[2, 2])
        if h * w <= 64:
            self.keep(y, ("N", 6, 2 * h, 2 * w))

    def batch_normalization(self, x: ir.Value, shape: Shape) -> None:
        if len(shape) < 2 or shape[1] == "N":
            return
        c = int(shape[1])
        variance = self.constant(np.linspace(0.5, 2, c, dtype=np.float32))
        self.keep(self.node("BatchNormalization", [x, *(self.weights(c) for _ in range(3)), variance]), shape)

    def affine(self, x: ir.Value, shape: Shape) -> None:
        axis = self.number(0, len(shape) - 1)
        dims = [int(d) if i == axis and d != "N" else 1 for i, d in enumerate(shape)]
        dims = dims[self.number(0, axis) :] if self.number(0, 1) else dims
        if self.number(0, 2) == 0:
            dims = []
        c = self.constant(np.random.default_rng(self.count).uniform(0.5, 1.5, dims).astype(np.float32))
        op = self.one("Add", "Sub", "Mul", "Div")
        self.keep(self.node(op, [x, c] if op == "Div" or self.number(0, 1) else [c, x]), shape)

    def neutral(self, x: ir.Value, shape: Shape) -> None:
        number = np.float32(0)
        op = self.one("Add", "Sub", "Mul", "Div", "Identity", "Dropout", "Pow")
        if op in ("Identity", "Dropout"):
            self.keep(self.node(op, [x]), shape)
        else:
            number = np.float32(op in ("Mul", "Div", "Pow"))
            self.keep(self.node(op, [x, self.constant(np.asarray(number))]), shape)

    def matmul(self, x: ir.Value, shape: Shape) -> None:
        if shape[-1] == "N" or len(shape) < 2:
            return
        y = self.node("MatMul", [x, self.weights(int(shape[-1]), 4)])
        if self.number(0, 1):
            y = self.node("Add", [y, self.weights(4)])
        self.keep(y, (*shape[:-1], 4))

    def gemm(self, x: ir.Value, shape: Shape) -> None:
        if len(shape) != 2 or "N" not in shape:
            return
        by = shape.index("N")
        inner, trans = int(shape[1 - by]), self.number(0, 1)
        bias = [self.weights(*self.one((), (1,), (3,), (1, 3)))] if self.number(0, 1) else []
        weight = self.weights(3, inner) if trans else self.weights(inner, 3)
        y = self.node(
            "Gemm", [x, weight, *bias], transA=by, transB=trans, alpha=self.one(1.0, 0.5), beta=self.one(1.0, 2.0)
        )
        self.keep(y, ("N", 3))

    def activation(self, x: ir.Value, shape: Shape) -> None:
        op = self.one("Relu", "Sigmoid", "Tanh", "Neg", "Clip", "Softmax", "Abs")
        inputs: list[ir.Value | None] = [x]
        if op == "Clip":
            inputs += [self.constant(np.asarray(np.float32(b))) for b in (self.one(-0.5, 0, 0.2), self.one(0.5, 1))]
        self.keep(self.node(op, inputs, **({"axis": -1} if op == "Softmax" else {})), shape)

    def transpose(self, x: ir.Value, shape: Shape) -> None:
        perm = self.draw(st.permutations(range(len(shape))))
        self.keep(self.node("Transpose", [x], perm=list(perm)), tuple(shape[p] for p in perm))

    def reshape(self, x: ir.Value, shape: Shape) -> None:
        """Flatten all but the batch, by a constant or by arithmetic on the shape."""
        if shape[0] != "N" or "N" in shape[1:]:
            return
        rest = int(np.prod([int(d) for d in shape[1:]]))
        new = [rest] if rest % 2 or self.number(0, 1) else [2, rest // 2]
        match self.number(0, 2):
            case 0:
                wanted = self.integers(0, *new)
            case 1:
                wanted = self.integers(-1, *new)
            case _:
                wanted = self.node("Concat", [self.size(x, 0), self.integers(*new)], axis=0)
        self.keep(self.node("Reshape", [x, wanted]), ("N", *new))

    def flatten(self, x: ir.Value, shape: Shape) -> None:
        if shape[0] == "N" and "N" not in shape[1:]:
            self.keep(self.node("Flatten", [x]), ("N", int(np.prod([int(d) for d in shape[1:]]))))

    def squeeze(self, x: ir.Value, shape: Shape) -> None:
        axis = self.number(0, len(shape))
        if len(shape) > 4:
            return
        y = self.node("Unsqueeze", [x, self.integers(axis)])
        self.keep(y, (*shape[:axis], 1, *shape[axis:]))
        if self.number(0, 1):
            self.keep(self.node("Squeeze", [y, self.integers(axis)]), shape)

    def slice(self, x: ir.Value, shape: Shape) -> None:
        axis = self.number(0, len(shape) - 1)
        if shape[axis] == "N" or int(shape[axis]) < 2:
            return
        n = int(shape[axis])
        begin, step = self.number(0, n - 1), self.number(1, 2)
        end = self.one(n, 2**62) if self.number(0, 1) else self.number(begin + 1, n)
        y = self.node("Slice", [x, *(self.integers(i) for i in (begin, end, axis, step))])
        self.keep(y, (*shape[:axis], len(range(n)[begin:end:step]), *shape[axis + 1 :]))

    def split(self, x: ir.Value, shape: Shape) -> None:
        axis = self.number(0, len(shape) - 1)
        if shape[axis] == "N" or int(shape[axis]) < 2:
            return
        first = self.number(1, int(shape[axis]) - 1)
        sizes = (first, int(shape[axis]) - first)
        parts = self.node("Split", [x, self.integers(*sizes)], outputs=2, axis=axis)
        for part, size in zip(parts, sizes, strict=True):
            self.keep(part, (*shape[:axis], size, *shape[axis + 1 :]))
        if self.number(0, 1):
            self.keep(self.node("Concat", parts, axis=axis), shape)

    def concat(self, x: ir.Value, shape: Shape) -> None:
        axis = self.number(0, len(shape) - 1)
        other, size = next(((v, s) for v, s in self.pool if v is not x and s == shape), (x, shape))
        if size[axis] != "N" and int(size[axis]) < 12:
            self.keep(
                self.node("Concat", [x, other], axis=axis), (*shape[:axis], 2 * int(size[axis]), *shape[axis + 1 :])
            )

    def combine(self, x: ir.Value, shape: Shape) -> None:
        other = next((v for v, s in self.pool if v is not x and s == shape), x)
        self.keep(self.node(self.one("Add", "Sub", "Mul"), [x, other]), shape)

    def pad(self, x: ir.Value, shape: Shape) -> None:
        if len(shape) == 4 and shape[0] == "N" and "N" not in shape and max(map(int, shape[2:])) < 9:
            return
        if len(shape) == 4 and shape[0] == "N" and "N" not in shape[1:]:
            top, right = self.number(0, 1), self.number(0, 2)
            y = self.node("Pad", [x, self.integers(0, 0, top, 0, 0, 0, 0, right)])
            h, w = int(shape[2]) + top, int(shape[3]) + right
            self.keep(y, (*shape[:2], h, w))
            if min(h, w) >= 3 and self.number(0, 1):
                kind = self.one("AveragePool", "MaxPool")
                self.keep(self.node(kind, [y], kernel_shape=[3, 3]), (*shape[:2], h - 2, w - 2))

    def reduce(self, x: ir.Value, shape: Shape) -> None:
        axis, keepdims = self.number(0, len(shape) - 1), self.number(0, 1)
        if shape[axis] == "N" or (len(shape) == 1 and not keepdims):
            return
        y = self.node(self.one("ReduceMean", "ReduceSum", "ReduceMax"), [x, self.integers(axis)], keepdims=keepdims)
        self.keep(y, (*shape[:axis], *([1] if keepdims else []), *shape[axis + 1 :]))

    def normalisation(self, x: ir.Value, shape: Shape) -> None:
        """Layer normalisation written out."""
        if shape[-1] == "N" or int(shape[-1]) < 2:
            return
        last = self.integers(-1)
        centred = self.node("Sub", [x, self.node("ReduceMean", [x, last])])
        power = self.node("Pow", [centred, self.constant(np.asarray(np.float32(2)))])
        variance = self.node("ReduceMean", [power, last])
        eps = self.constant(np.asarray(np.float32(0.01)))
        root = self.node("Sqrt", [self.node("Add", [variance, eps])])
        y = self.node("Mul", [self.node("Div", [centred, root]), self.weights(int(shape[-1]))])
        self.keep(self.node("Add", [y, self.weights(int(shape[-1]))]), shape)

    def gelu(self, x: ir.Value, shape: Shape) -> None:
        root = self.constant(np.asarray(np.float32(np.sqrt(2))))
        one, half = (self.constant(np.asarray(np.float32(c))) for c in (1, 0.5))
        error = self.node("Add", [self.node("Erf", [self.node("Div", [x, root])]), one])
        self.keep(self.node("Mul", [self.node("Mul", [x, error]), half]), shape)

    def cast(self, x: ir.Value, shape: Shape) -> None:
        wide = self.node("Cast", [x], to=ir.DataType.DOUBLE.value)
        self.keep(self.node("Cast", [wide], to=ir.DataType.FLOAT.value), shape)

    def shape_arithmetic(self, x: ir.Value, shape: Shape) -> None:
        """Scale by a number computed from the shape."""
        size = self.node("Cast", [self.size(x, self.number(0, len(shape) - 1))], to=ir.DataType.FLOAT.value)
        scale = self.node("Div", [self.constant(np.asarray(np.float32(1))), size])
        self.keep(self.node("Mul", [x, scale]), shape)

    def expand(self, x: ir.Value, shape: Shape) -> None:
        if shape[0] == "N":
            ones = self.node("Expand", [self.constant(np.ones(1, np.float32)), self.node("Shape", [x])])
            self.keep(self.node("Add", [x, ones]), shape)

    def gather(self, x: ir.Value, shape: Shape) -> None:
        axis = self.number(0, len(shape) - 1)
        if shape[axis] != "N":
            indices = [self.number(-int(shape[axis]), int(shape[axis]) - 1) for _ in range(2)]
            y = self.node("Gather", [x, self.integers(*indices)], axis=axis)
            self.keep(y, (*shape[:axis], 2, *shape[axis + 1 :]))

    def where(self, x: ir.Value, shape: Shape) -> None:
        limit = self.constant(np.asarray(np.float32(0.1)))
        self.keep(self.node("Where", [self.node("Greater", [x, limit]), x, self.weights(1)]), shape)

    def branch(self, x: ir.Value, shape: Shape) -> None:
        """An If whose bodies read values and weights from outside."""
        if self.into is not self.graph:
            return
        if self.number(0, 1):
            condition = self.constant(np.asarray(bool(self.number(0, 1))))
        else:
            total = self.node("ReduceSum", [x], keepdims=0)
            condition = self.node("Greater", [total, self.constant(np.asarray(np.float32(0)))])
        bodies = []
        for _ in range(2):
            body = ir.Graph([], [], nodes=[], name=self.name())
            self.into, pool = body, self.pool
            self.pool = [*pool, (self.node("Mul", [x, self.weights(1)]), shape)]
            for _ in range(self.number(0, 2)):
                getattr(self, self.one("affine", "activation", "neutral"))(x, shape)
            result = next(v for v, s in reversed(self.pool) if s == shape and v.producer() in set(body))
            result.type = ir.TensorType(ir.DataType.FLOAT)
            body.outputs.append(result)
            self.pool, self.into = pool, self.graph
            bodies.append(body)
        self.keep(self.node("If", [condition], then_branch=bodies[0], else_branch=bodies[1]), shape)

    def model(self, steps: int) -> ir.Model:
        for _ in range(steps):
            found = self.pick()
            assert found is not None
            getattr(self, self.one(*OPERATORS))(*found)
        made = [v for v, _ in self.pool if v.producer() is not None]
        if not made:
            made = [self.node("Identity", [self.pool[0][0]])]
        chosen = [made[-1], *(v for v in made[:-1] if not self.number(0, 4))]
        for value in dict.fromkeys(chosen):
            value.type = ir.TensorType(ir.DataType.FLOAT)
            self.graph.outputs.append(value)
        return ir.Model(self.graph, ir_version=10)


def feeds(batch: int) -> dict[str, Array]:
    rng = np.random.default_rng(batch)
    return {
        "image": rng.standard_normal((batch, 3, 6, 5)).astype(np.float32),
        "rows": rng.standard_normal((batch, 4)).astype(np.float32),
    }


def check(data: st.DataObject, steps: int) -> None:
    model = Builder(data).model(steps)
    note(str(model))
    after = model.clone()
    for each in (Simplify(), Fuse(), Simplify()):
        each.run(after, CONTEXT)
    note(str(after))
    reference = runtime.session(model, optimise=False, threads=1)
    candidate = runtime.session(after, optimise=False, threads=1)
    for batch in BATCHES:
        inputs = feeds(batch)
        # How far the result moves when the inputs move by two roundings tells how well it is determined.
        nudged = {name: array * np.float32(1 + 2.0**-22) for name, array in inputs.items()}
        try:
            wanted, moved = reference.run(inputs), reference.run(nudged)
        except runtime.CannotRun:
            reject()  # without optimisation, too, ONNX Runtime drops Casts that only subgraphs read
        found = candidate.run(inputs)
        assert list(wanted) == list(found)
        for name, array in wanted.items():
            assert found[name].shape == array.shape and found[name].dtype == array.dtype
            scale = 1 + np.abs(array).max(initial=0)
            allowed = 64 * 2.0**-23 * scale + 64 * np.abs(moved[name] - array).max(initial=0)
            np.testing.assert_allclose(found[name], array, rtol=0, atol=allowed, err_msg=f"{name}, batch {batch}")
    assert sum(1 for _ in edit.nodes(after)) <= sum(1 for _ in edit.nodes(model))


_QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=_QUIET)
@given(st.data())
def test_random_graphs(data: st.DataObject) -> None:
    check(data, steps=12)


@settings(max_examples=10, derandomize=True, deadline=None, suppress_health_check=_QUIET)
@given(st.data())
def test_random_graphs_in_half_precision(data: st.DataObject) -> None:
    """They still run, with the interface that was asked for, and compute roughly the same."""
    model = Builder(data).model(steps=12)
    cast = Cast(
        io=data.draw(st.booleans()),
        keep=data.draw(st.sampled_from([(), ("Conv", "Add")])),
        share=data.draw(st.sampled_from([1.0, 0.5])),
    )
    after = model.clone()
    cast.run(after, CONTEXT)
    note(str(after))
    reference = runtime.session(model, optimise=False, threads=1)
    candidate = runtime.session(after, optimise=False, threads=1)
    inputs = feeds(2)
    halves = {name: array.astype(np.float16) for name, array in inputs.items()}
    nudged = {name: array * np.float32(1 + 2.0**-10) for name, array in inputs.items()}
    try:
        wanted, moved = reference.run(inputs), reference.run(nudged)
    except runtime.CannotRun:
        reject()
    for name, array in candidate.run(halves if cast.io else inputs).items():
        assert array.dtype == (np.float16 if cast.io else wanted[name].dtype)
        assert array.shape == wanted[name].shape
        scale = np.abs(wanted[name]).max(initial=0)
        if scale < 1e3 and np.isfinite(array).all():
            allowed = 0.1 * (1 + scale) + 100 * np.abs(moved[name] - wanted[name]).max(initial=0)
            assert np.abs(array - wanted[name]).max(initial=0) <= allowed


@pytest.mark.slow
@settings(
    max_examples=int(os.environ.get("GRAPHC_EXAMPLES", "1000")),
    derandomize="GRAPHC_EXAMPLES" not in os.environ,  # whoever asks for a number searches; a plain run repeats
    deadline=None,
    suppress_health_check=_QUIET,
    phases=[Phase.generate],  # shrinking such graphs takes many minutes
)
@given(st.data())
def test_many_random_graphs(data: st.DataObject) -> None:
    check(data, steps=25)
