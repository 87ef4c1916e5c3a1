"""The pass ``fold-lora``: every spelling of an adapter before and after, and what looks like one but must stay."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc import edit, runtime
from graphc.contract import Capabilities, Context, PassResult
from graphc.passes.fold_lora import FoldLora
from graphc.rewrites import weights

CONTEXT = Context(target=Capabilities("portable", 10, {"": 21}))
ROWS = "float[N,3,8] x"
MATRIX = "float[N,8] x"
IMAGE = "float[N,4,9,8] x"


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


W, V, A, B = numbers(8, 6), numbers(6), numbers(8, 2, seed=1), numbers(2, 6, seed=2)
LORA = {"w": W, "a": A, "b": B}
BRANCH = "h = MatMul(x, a) d = MatMul(h, b) "


def build(body: str, inputs: str = ROWS, outputs: str = "y", **constants: object) -> ir.Model:
    """A model from ONNX text; ``constants`` become initializers, float32 unless they are arrays."""
    element = "float16" if "float16" in inputs else "float"
    declared = ", ".join(f"{element} {name}" for name in outputs.split())
    text = f'<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]> g ({inputs}) => ({declared}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    arrays = {name: data if isinstance(data, np.ndarray) else np.float32(data) for name, data in constants.items()}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items())
    return ir.from_proto(proto)


def feeds(model: ir.Model) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    found = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        shape = [d if isinstance(d, int) else 2 for d in value.shape]
        dtype = value.dtype.numpy()
        found[value.name] = (rng.integers(0, 2, shape) if dtype.kind in "ib" else rng.standard_normal(shape)).astype(
            dtype
        )
    return found


def folded(model: ir.Model) -> tuple[ir.Model, PassResult]:
    """Run the pass on a copy, and check in ONNX Runtime, unoptimised, that it computes the same."""
    after = model.clone()
    result = FoldLora().run(after, CONTEXT)
    inputs = feeds(model)
    wanted = runtime.session(model, optimise=False, threads=1).run(inputs)
    found = runtime.session(after, optimise=False, threads=1).run(inputs)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        atol = 64 * np.finfo(array.dtype).eps * (1 + np.abs(array).max())
        np.testing.assert_allclose(found[name], array, rtol=0, atol=atol)
    assert not FoldLora().run(after, CONTEXT).changed
    return after, result


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in edit.nodes(model) if node.op_type != "Constant"]


def reasons(result: PassResult) -> list[str]:
    return [refusal.reason for refusal in result.refusals]


SCALED = {**LORA, "s": 2.5}
ZERO = np.zeros((1,), np.float32)


@pytest.mark.parametrize(
    "body, inputs, constants, expected",
    [
        (BRANCH + "p = MatMul(x, w) y = Add(p, d)", ROWS, LORA, ["MatMul"]),
        (BRANCH + "e = Mul(d, s) p = MatMul(x, w) y = Add(e, p)", ROWS, SCALED, ["MatMul"]),
        (BRANCH + "e = Div(d, s) p = MatMul(x, w) y = Sub(p, e)", ROWS, SCALED, ["MatMul"]),
        (BRANCH + "p = MatMul(x, w) y = Sub(d, p)", ROWS, LORA, ["MatMul", "Neg"]),
        (BRANCH + "p = MatMul(x, w) y = Sum(d, x0, p)", ROWS, {**LORA, "x0": V}, ["MatMul", "Sum"]),
        ("z = Mul(s, x) h = MatMul(z, a) d = MatMul(h, b) p = MatMul(x, w) y = Add(p, d)", ROWS, SCALED, ["MatMul"]),
        ("h = MatMul(x, a) g = Mul(h, s) d = MatMul(g, b) p = MatMul(x, w) y = Add(p, d)", ROWS, SCALED, ["MatMul"]),
        (
            "h = MatMul(x, a) g = Mul(h, s) d = MatMul(g, b) p = MatMul(x, w) y = Add(p, d)",
            ROWS,
            {**LORA, "s": np.array([2.0, -3.0], np.float32)},
            ["MatMul"],
        ),
        (BRANCH + "e = Mul(d, s) p = MatMul(x, w) y = Add(p, e)", ROWS, {**LORA, "s": numbers(1, 1, 1)}, ["MatMul"]),
        (BRANCH + "p = MatMul(x, w) q = Mul(p, s) y = Add(q, d)", ROWS, SCALED, ["MatMul", "Mul"]),
        # the bias before and after the branch joins
        (BRANCH + "p = MatMul(x, w) q = Add(p, v) y = Add(q, d)", ROWS, {**LORA, "v": V}, ["MatMul", "Add"]),
        (BRANCH + "p = MatMul(x, w) q = Add(d, p) y = Add(v, q)", ROWS, {**LORA, "v": V}, ["MatMul", "Add"]),
        # several adapters
        (
            BRANCH + "h2 = MatMul(x, a2) d2 = MatMul(h2, b2) e2 = Mul(d2, s) "
            "p = MatMul(x, w) q = Add(p, d) y = Add(q, e2)",
            ROWS,
            {**SCALED, "a2": numbers(8, 3, seed=4), "b2": numbers(3, 6, seed=5)},
            ["MatMul"],
        ),
        (
            BRANCH
            + "h2 = MatMul(x, a2) d2 = MatMul(h2, b2) t = Add(d, d2) e = Mul(t, s) p = MatMul(x, w) y = Add(e, p)",
            ROWS,
            {**SCALED, "a2": numbers(8, 3, seed=4), "b2": numbers(3, 6, seed=5)},
            ["MatMul"],
        ),
        (
            BRANCH + "h2 = MatMul(x, a2) d2 = MatMul(h2, b2) p = MatMul(x, w) y = Sum(d, p, d2)",
            ROWS,
            {**LORA, "a2": numbers(8, 3, seed=4), "b2": numbers(3, 6, seed=5)},
            ["MatMul"],
        ),
        # Transpose in front of weights
        (
            "wt = Transpose(w) at = Transpose<perm=[1,0]>(a) bt = Transpose(b) "
            "h = MatMul(x, at) d = MatMul(h, bt) p = MatMul(x, wt) y = Add(p, d)",
            ROWS,
            {"w": W.T.copy(), "a": A.T.copy(), "b": B.T.copy()},
            ["Transpose", "MatMul"],
        ),
        # nodes that do nothing
        (
            "i = Identity(x) r = Dropout(i) h = MatMul(r, a) j = Identity(h) d = MatMul(j, b) e = Cast<to=1>(d) "
            "k = Identity(e) p = MatMul(x, w) o = Identity(p) y = Add(o, k)",
            ROWS,
            LORA,
            ["MatMul", "Identity"],
        ),
        # Gemm
        (
            "h = Gemm<transB=1, alpha=0.5>(x, a) d = Gemm<alpha=3.0>(h, b) "
            "p = Gemm<transB=1, alpha=2.0, beta=0.5>(x, w, v) y = Add(p, d)",
            MATRIX,
            {"w": W.T.copy(), "a": A.T.copy(), "b": B, "v": V},
            ["Gemm"],
        ),
        (
            "h = Gemm<transA=1>(x, a) d = MatMul(h, b) p = Gemm<transA=1>(x, w, v) y = Add(p, d)",
            "float[8,5] x",
            {**LORA, "v": V},
            ["Gemm"],
        ),
        (BRANCH + "y = Gemm<beta=2.0>(x, w, d)", MATRIX, LORA, ["Gemm"]),
        ("p = MatMul(x, w) h = MatMul(x, a) y = Gemm<alpha=2.0>(h, b, p)", MATRIX, LORA, ["MatMul"]),
        ("p = MatMul(x, w) h = MatMul(x, a) y = Gemm<beta=2.0>(h, b, p)", MATRIX, LORA, ["MatMul", "Mul"]),
        # some channels of a merged product
        (
            BRANCH + "e = Pad(d, n) p = MatMul(x, w) y = Add(p, e)",
            ROWS,
            {"w": numbers(8, 18), "a": A, "b": B, "n": np.array([0, 0, 6, 0, 0, 6])},
            ["MatMul"],
        ),
        (
            BRANCH + "e = Pad(d, n, , ax) p = MatMul(x, w) y = Add(p, e)",
            ROWS,
            {"w": numbers(8, 18), "a": A, "b": B, "n": np.array([12, 0]), "ax": np.array([-1])},
            ["MatMul"],
        ),
        (
            BRANCH + "h2 = MatMul(x, a2) d2 = MatMul(h2, b2) l = Shape<end=2>(x) m = Concat<axis=0>(l, six) "
            "z = ConstantOfShape(m) c = Concat<axis=-1>(d, z, d2) e = Mul(c, s) p = MatMul(x, w) y = Add(p, e)",
            ROWS,
            {**SCALED, "w": numbers(8, 17), "a2": numbers(8, 3), "b2": numbers(3, 5), "six": np.array([6])},
            ["MatMul"],
        ),
        # convolutions
        (
            "h = Conv<pads=[1,1,1,1], strides=[2,2]>(x, a) d = Conv(h, b) e = Mul(d, s) "
            "p = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w, v) y = Add(p, e)",
            IMAGE,
            {"w": numbers(6, 4, 3, 3), "a": numbers(2, 4, 3, 3), "b": numbers(6, 2, 1, 1), "v": V, "s": 0.5},
            ["Conv"],
        ),
        # an adapter with a bias of its own
        (
            "h = Gemm(x, a) d = Gemm(h, b, v) p = MatMul(x, w) y = Add(p, d)",
            MATRIX,
            {**LORA, "v": V},
            ["MatMul", "Add"],
        ),
        (
            BRANCH + "e = Add(d, v) f = Mul(e, s) p = Gemm(x, w, v) y = Add(f, p)",
            MATRIX,
            {**LORA, "s": 2.0, "v": V},
            ["Gemm"],
        ),
        # DoRA: linear, convolution, embedding
        (
            BRANCH + "p = MatMul(x, w) r = Add(p, v) q = Sub(r, v) t = Mul(m1, q) u = Mul(m, d) z = Mul(u, s) "
            "n = Add(t, z) y = Add(r, n)",
            ROWS,
            {**LORA, "s": 2.0, "v": V, "m1": numbers(1, 6, seed=4), "m": numbers(1, 6, seed=5)},
            ["MatMul", "Add"],
        ),
        (
            "h = Conv<pads=[1,1,1,1]>(x, a) d = Conv(h, b) p = Conv<pads=[1,1,1,1]>(x, w, v) q = Sub(p, v4) "
            "t = Mul(m1, q) u = Mul(m, d) n = Add(t, u) y = Add(p, n)",
            IMAGE,
            {
                "w": numbers(6, 4, 3, 3),
                "a": numbers(2, 4, 3, 3),
                "b": numbers(6, 2, 1, 1),
                "v": V,
                "v4": V.reshape(1, 6, 1, 1),
                "m1": numbers(1, 6, 1, 1, seed=4),
                "m": numbers(1, 6, 1, 1, seed=5),
            },
            ["Conv"],
        ),
        (
            "at = Transpose(a) h = Gather(at, i) d = MatMul(h, b) e = Mul(m, d) p = Gather(w, i) q = Mul(m, p) "
            "y = Add(q, e)",
            "int64[N,5] i, float[1] x",
            {"w": W, "a": A.T.copy(), "b": B, "m": numbers(6, seed=4)},
            ["Gather"],
        ),
        # rows behind a Reshape
        (
            BRANCH + "f = Reshape(x, flat) g = Gemm(f, w, v) p = Reshape(g, back) y = Add(p, d)",
            "float[4,3,8] x",
            {**LORA, "v": V, "flat": np.array([-1, 8]), "back": np.array([4, 3, 6])},
            ["Reshape", "Gemm", "Reshape"],
        ),
        # embeddings
        (
            "at = Transpose(a) h = Gather(at, i) d = MatMul(h, b) e = Mul(d, s) p = Gather(w, i) y = Add(p, e)",
            "int64[N,5] i, float[1] x",
            {"w": W, "a": A.T.copy(), "b": B, "s": 0.5},
            ["Gather"],
        ),
    ],
)
def test_spellings(body: str, inputs: str, constants: dict[str, object], expected: list[str]) -> None:
    model = build(body, inputs, **constants)
    after, result = folded(model)
    assert operators(after) == expected
    assert result.changed and not result.refusals
    assert after.graph.initializers["w"].shape == model.graph.initializers["w"].shape
    assert "a" not in after.graph.initializers and "b" not in after.graph.initializers


MANY = {**LORA, "s": 2.0}


@pytest.mark.parametrize(
    "body, inputs, outputs, constants, reason",
    [
        (BRANCH + "p = MatMul(x, w) y = Add(p, d) z = MatMul(x, w)", ROWS, "y z", LORA, "other readers, which have no"),
        (BRANCH + "p = MatMul(x, w) y = Add(p, d) z = Identity(h)", ROWS, "y z", LORA, "read elsewhere"),
        (BRANCH + "p = MatMul(x, w) y = Add(p, d)", ROWS, "y p", LORA, "without the adapter is read elsewhere"),
        ("h = MatMul(x, a) g = Relu(h) d = MatMul(g, b) p = MatMul(x, w) y = Add(p, d)", ROWS, "y", LORA, "Relu"),
        (BRANCH + "e = Tanh(d) p = MatMul(x, w) y = Add(p, e)", ROWS, "y", LORA, "Tanh in the branch is not linear"),
        (BRANCH + "p = MatMul(x2, w) y = Add(p, d)", ROWS + ", float[N,3,8] x2", "y", LORA, "something else"),
        (
            BRANCH + "e = Mul(d, k) p = MatMul(x, w) y = Add(p, e)",
            ROWS + ", float k",
            "y",
            LORA,
            "scale is not constant",
        ),
        (
            "h = MatMul(x, a) d = MatMul(h, k) p = MatMul(x, w) y = Add(p, d)",
            ROWS + ", float[2,6] k",
            "y",
            {"w": W, "a": A},
            "input of the graph",
        ),
        (
            BRANCH + "q = DequantizeLinear(w, s) p = MatMul(x, q) y = Add(p, d)",
            ROWS,
            "y",
            {**MANY, "w": np.ones((8, 6), np.int8)},
            "dequantize first",
        ),
        (
            BRANCH + "p = MatMul(x, w) y = Add(p, d) z = MatMul(a, c) u = MatMul(b, c)",
            ROWS,
            "y z u",
            {"w": W, "a": numbers(8, 6), "b": numbers(6, 6), "c": numbers(6, 6)},
            "rank is as large",
        ),
        (
            "h = Conv<pads=[1,1,1,1]>(x, a) d = Conv<pads=[1,1,1,1]>(h, b) "
            "p = Conv<pads=[2,2,2,2]>(x, w) y = Add(p, d)",
            IMAGE,
            "y",
            {"w": numbers(6, 4, 5, 5), "a": numbers(2, 4, 3, 3), "b": numbers(6, 2, 3, 3)},
            "another window",
        ),
        (
            BRANCH + "p = MatMul(x, w) y = Add(p, d)",
            ROWS,
            "y",
            {"w": W, "a": A, "b": numbers(2, 1)},
            "another number of channels",
        ),
    ],
)
def test_near_misses(body: str, inputs: str, outputs: str, constants: dict[str, object], reason: str) -> None:
    model = build(body, inputs, outputs, **constants)
    after, result = folded(model)
    assert not result.changed and operators(after) == operators(model)
    assert len(reasons(result)) == 1 and reason in reasons(result)[0]


@pytest.mark.parametrize(
    "body, reason",
    [
        ("y = Add(r, n) z = Identity(q)", "read elsewhere"),
        ("y = Add(r, n) z = MatMul(x, w)", "other readers"),
    ],
)
def test_near_misses_of_dora(body: str, reason: str) -> None:
    dora = BRANCH + "p = MatMul(x, w) r = Add(p, v) q = Sub(r, v) t = Mul(m1, q) u = Mul(m, d) n = Add(t, u) "
    model = build(dora + body, ROWS, "y z", **LORA, v=V, m1=numbers(1, 6, seed=4), m=numbers(1, 6, seed=5))
    after, result = folded(model)
    assert not result.changed and operators(after) == operators(model)
    assert any(reason in each for each in reasons(result))


def test_rows_that_are_arranged_in_another_way_stay() -> None:
    body = BRANCH + "f = Reshape(x, flat) g = Gemm(f, w) p = Reshape(g, back) y = Add(p, d)"
    held = {**LORA, "flat": np.array([-1, 8]), "back": np.array([1, 3, 6])}
    _, result = folded(build(body, "float[3,1,8] x", **held))
    assert not result.changed and "arranged in another way" in reasons(result)[0]


@pytest.mark.parametrize("name", ["w", "a", "b"])
def test_weights_that_callers_may_override_stay(name: str) -> None:
    model = build(BRANCH + "p = MatMul(x, w) y = Add(p, d)", **LORA)
    model.graph.inputs.append(model.graph.initializers[name])
    _, result = folded(model)
    assert not result.changed and "overridden" in reasons(result)[0]


@pytest.mark.parametrize(
    "body",
    [
        BRANCH + "y = Add(x6, d)",
        BRANCH + "y = Identity(d)",
        "h = MatMul(x, a) d = MatMul(h, b) h2 = MatMul(x, a) d2 = MatMul(h2, b) y = Add(d, d2)",
        "p = MatMul(x, w) q = MatMul(x, w) y = Add(p, q)",
    ],
)
def test_what_is_no_adapter_is_not_mentioned(body: str) -> None:
    used = {name: data for name, data in LORA.items() if f" {name})" in body}
    _, result = folded(build(body, ROWS + (", float[N,3,6] x6" if "x6" in body else ""), **used))
    assert not result.changed and not result.refusals


def test_a_block_beside_its_shortcut_is_not_mentioned() -> None:
    body = "c = Conv(x, a) r = Relu(c) d = Conv(r, b) p = Conv(x, w) y = Add(p, d)"
    held = {"w": numbers(6, 4, 1, 1), "a": numbers(6, 4, 1, 1), "b": numbers(6, 6, 1, 1)}
    _, result = folded(build(body, IMAGE, **held))
    assert not result.changed and not result.refusals


def test_a_weight_whose_every_reader_has_the_same_adapter() -> None:
    body = (
        BRANCH + "p = MatMul(x, w) y = Add(p, d) "
        "h2 = MatMul(x2, a) d2 = MatMul(h2, b) p2 = MatMul(x2, w) y2 = Add(p2, d2)"
    )
    after, _ = folded(build(body, ROWS + ", float[N,3,8] x2", "y y2", **LORA))
    assert operators(after) == ["MatMul", "MatMul"]
    body = body.replace("y2 = Add(p2, d2)", "e2 = Neg(d2) y2 = Add(p2, e2)")
    _, result = folded(build(body, ROWS + ", float[N,3,8] x2", "y y2", **LORA))
    assert not result.changed and "another adapter" in reasons(result)[0]


def test_in_a_subgraph() -> None:
    branch = BRANCH + "p = MatMul(x, w) y1 = Add(p, d)"
    body = f"y = If(c) <then_branch = t () => (float[N,3,6] y1) {{ {branch} }}, "
    body += "else_branch = e () => (float[N,3,6] y2) { y2 = MatMul(x, u) }>"
    after, result = folded(build(body, ROWS + ", bool c", **LORA, u=W))
    assert result.changed and operators(after) == ["If", "MatMul", "MatMul"]


def test_weights_in_constant_nodes() -> None:
    body = "w = Constant<value = float[2,2] {1,2,3,4}>() a = Constant<value = float[2,1] {1,2}>() "
    body += "b = Constant<value = float[1,2] {3,1}>() " + BRANCH + "p = MatMul(x, w) y = Add(p, d)"
    after, _ = folded(build(body, "float[N,2] x"))
    assert [node.op_type for node in after.graph] == ["Constant", "MatMul"]


def test_float16() -> None:
    half = {name: data.astype(np.float16) for name, data in LORA.items()}
    after, _ = folded(build(BRANCH + "p = MatMul(x, w) y = Add(p, d)", "float16[N,3,8] x", **half))
    exact = half["w"].astype(np.float64) + half["a"].astype(np.float64) @ half["b"].astype(np.float64)
    assert np.array_equal(after.graph.initializers["w"].const_value.numpy(), exact.astype(np.float16))


def test_a_float32_adapter_of_a_float16_weight() -> None:
    body = "c = Cast<to=1>(x) h = MatMul(c, a) d = MatMul(h, b) e = Cast<to=10>(d) p = MatMul(x, w) y = Add(p, e)"
    after, _ = folded(build(body, "float16[N,3,8] x", w=W.astype(np.float16), a=A, b=B))
    assert operators(after) == ["MatMul"]
    body = body.replace("to=1>", "to=2>").replace("to=10", "to=3").replace("to=2>", "to=10>").replace("to=3", "to=1")
    half = {"a": A.astype(np.float16), "b": B.astype(np.float16)}
    _, result = (
        folded(build(body, ROWS, w=W, **half)) if False else folded_without_check(build(body, ROWS, w=W, **half))
    )
    assert not result.changed and reasons(result) == ["the branch is computed in another dtype"]


def folded_without_check(model: ir.Model) -> tuple[ir.Model, PassResult]:
    return model, FoldLora().run(model, CONTEXT)


def test_a_float16_weight_that_would_overflow_stays() -> None:
    half = {
        "w": np.full((8, 6), 6e4, np.float16),
        "a": np.full((8, 2), 1e2, np.float16),
        "b": np.full((2, 6), 1e2, np.float16),
    }
    model = build(BRANCH + "p = MatMul(x, w) y = Add(p, d)", "float16[N,3,8] x", **half)
    result = FoldLora().run(model, CONTEXT)
    assert not result.changed and operators(model) == ["MatMul", "MatMul", "MatMul", "Add"]
    assert reasons(result) == ["the folded weight does not fit in float16"]


def test_big_weights_are_computed_when_they_are_read() -> None:
    size = int(weights.LAZY**0.5) + 1
    held = {"w": numbers(size, 2 * size), "a": numbers(size, 2), "b": numbers(2, 2 * size)}
    after, _ = folded(build(BRANCH + "p = MatMul(x, w) y = Add(p, d)", f"float[N,{size}] x", **held))
    tensor = after.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.LazyTensor) and tensor.name == "w"
    exact = held["w"] + held["a"].astype(np.float64) @ held["b"].astype(np.float64)
    assert np.array_equal(tensor.numpy(), exact.astype(np.float32))


SCALE = st.sampled_from(["", "Mul({}, s)", "Mul(s, {})", "Div({}, s)", "Neg({})", "Identity({})", "Dropout({})"])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_random_spellings(data: st.DataObject) -> None:
    """Any scale at any place, weights stored either way, products of either kind, summands in any order."""
    lines: list[str] = []
    held: dict[str, object] = {"s": np.full((1,) * data.draw(st.integers(0, 2)), 1.5, np.float32)}

    def scaled(value: str) -> str:
        spelling = data.draw(SCALE)
        if spelling:
            lines.append(f"t{len(lines)} = {spelling.format(value)}")
        return lines[-1].split(" ")[0] if spelling else value

    def product(value: str, name: str, weight: np.ndarray) -> str:
        how = data.draw(st.sampled_from(["MatMul", "Gemm", "Gemm<transB=1>", "Gemm<alpha=-2.0>", "Transpose"]))
        transposed = how in ("Gemm<transB=1>", "Transpose")
        held[name] = weight.T.copy() if transposed else weight
        if how == "Transpose":
            lines.append(f"{name}t = Transpose({name})")
            how, name = "MatMul", f"{name}t"
        lines.append(f"t{len(lines)} = {how}({value}, {name})")
        return lines[-1].split(" ")[0]

    terms = [scaled(product(scaled("x"), "w", W))]
    for i in range(data.draw(st.integers(1, 2))):
        inner = scaled(product(scaled("x"), f"a{i}", numbers(8, 2, seed=i)))
        terms.append(scaled(product(inner, f"b{i}", numbers(2, 6, seed=i + 9))))
    if data.draw(st.booleans()):
        held["v"] = V
        terms.append("v")
    terms = data.draw(st.permutations(terms))
    total = terms[0]
    for term in terms[1:]:
        lines.append(f"t{len(lines)} = {data.draw(st.sampled_from(['Add', 'Sub']))}({total}, {term})")
        total = lines[-1].split(" ")[0]
    lines.append(f"y = Relu({total})")
    body = " ".join(lines)
    after, result = folded(
        build(body, MATRIX, **{k: v for k, v in held.items() if k != "s" or ", s)" in body or "(s," in body})
    )
    assert result.changed and not result.refusals
    assert sum(op in ("MatMul", "Gemm") for op in operators(after)) == 1


def test_a_large_graph_without_adapters_costs_little() -> None:
    lines, last = [], "x"
    for i in range(1000):
        lines.append(f"p{i} = MatMul({last}, w) q{i} = Add(p{i}, v) r{i} = Relu(q{i}) x{i} = Add(r{i}, {last})")
        last = f"x{i}"
    model = build(" ".join(lines) + f" y = Identity({last})", w=numbers(8, 8), v=numbers(8))
    times = []
    for _ in range(3):
        start = time.process_time()
        result = FoldLora().run(model, CONTEXT)
        times.append(time.process_time() - start)
    assert not result.changed and not result.refusals
    assert min(times) < 0.2, "it takes 20 to 40 ms; the rest is for slow machines"


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False])
def test_exported_by_torch(dynamo: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if dynamo:
        pytest.importorskip("onnxscript")

    class Adapted(torch.nn.Module):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.base = torch.nn.Linear(8, 6)
            self.first = torch.nn.Linear(8, 2, bias=False)
            self.second = torch.nn.Linear(2, 6, bias=False)
            self.dropout = torch.nn.Dropout(0.1)

        def forward(self, x):  # type: ignore[no-untyped-def]
            return self.base(x) + self.second(self.first(self.dropout(x))) * 2.0

    path = tmp_path / "m.onnx"
    module = Adapted().eval()
    torch.onnx.export(module, (torch.randn(2, 3, 8),), path, dynamo=dynamo, verbose=False)
    after, result = folded(ir.load(path))
    assert result.changed and not result.refusals
    assert sum(op in ("MatMul", "Gemm") for op in operators(after)) == 1


def test_norms_that_the_graph_computes() -> None:
    body = (
        BRANCH + "p = MatMul(x, w) q = MatMul(a, b) t = Mul(q, s) n = Add(w, t) l = ReduceL2<keepdims=0>(n, ax) "
        "f = Div(m, l) r = Mul(p, f) e = Mul(d, s) g = Mul(e, f) y = Add(r, g)"
    )
    held = {**LORA, "s": 2.0, "ax": np.array([0]), "m": numbers(6, seed=7)}
    after, result = folded(build(body, **held))
    assert operators(after) == ["MatMul"] and result.changed and not result.refusals
    assert list(after.graph.initializers) == ["w"]
    _, result = folded(build(body + " z = Identity(n)", outputs="y z", **held))
    assert not result.changed and "the adapter's norm is read elsewhere" in reasons(result)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora", "bias", "adalora"])
def test_unfolded_peft_models(kind: str, tmp_path: Path) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    pytest.importorskip("onnxscript")
    nn = torch.nn

    class Net(nn.Module):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.q, self.v = nn.Embedding(11, 8), nn.Linear(8, 6), nn.Linear(6, 7)
            self.conv = nn.Conv2d(3, 4, 3, padding=1, stride=2)

        def forward(self, ids, image):  # type: ignore[no-untyped-def]
            return self.v(torch.relu(self.q(self.emb(ids)))), self.conv(image)

    every = ["emb", "q", "v", "conv"]
    config = {
        "lora": lambda: peft.LoraConfig(r=2, target_modules=every),
        "dora": lambda: peft.LoraConfig(r=2, target_modules=every, use_dora=True),
        "bias": lambda: peft.LoraConfig(r=2, target_modules=["q", "v"], lora_bias=True),
        "adalora": lambda: peft.AdaLoraConfig(init_r=3, target_modules=["q", "v"], total_step=10),
    }[kind]()
    module = peft.get_peft_model(Net(), config).eval()
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.3
    inputs = (torch.tensor([[1, 2, 3]]), torch.randn(1, 3, 7, 7))
    torch.onnx.export(module, inputs, tmp_path / "m.onnx", dynamo=True, verbose=False)
    after, result = folded(ir.load(tmp_path / "m.onnx"))
    assert result.changed and not result.refusals
    assert sum(op in ("MatMul", "Gemm", "Conv", "Gather") for op in operators(after)) == len(every)
