"""The pass simplify: before and after on small graphs, what must stay, and real models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphc import edit, runtime
from graphc.contract import Capabilities, Context, PassResult
from graphc.errors import BadInput
from graphc.passes.simplify import Simplify

DATA = Path(__file__).parent / "data"
CONTEXT = Context(Capabilities("test", 10, {"": 21}))
HEADER = '<ir_version: 10, opset_import: ["" : 21]>'


def read(body: str, header: str = HEADER) -> ir.Model:
    """The model ``g (inputs) => (outputs) {nodes}``."""
    return ir.from_onnx_text(f"{header} {body}")


def run(model: ir.Model, feeds: Mapping[str, Any]) -> dict[str, Any]:
    return runtime.session(model, optimise=False, threads=1).run(feeds)


def feeds_of(model: ir.Model, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.inputs:
        assert value.dtype is not None and value.shape is not None and value.name
        shape = [d if isinstance(d, int) else sizes.get(str(d), 2) for d in value.shape]
        dtype = value.dtype.numpy()
        feeds[value.name] = (
            rng.standard_normal(shape).astype(dtype) if dtype.kind == "f" else rng.integers(0, 2, shape).astype(dtype)
        )
    return feeds


def interface(model: ir.Model) -> list[tuple[str | None, str, str]]:
    return [(v.name, str(v.type), str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in edit.nodes(model)]


def check(
    model: ir.Model, *sizes: Mapping[str, int], context: Context = CONTEXT, exact: bool = True, **options: Any
) -> tuple[ir.Model, PassResult]:
    """Simplify a copy of the model; it must keep its interface, pass ONNX's checker, and compute the same."""
    after = model.clone()
    result = Simplify(**options).run(after, context)
    assert interface(after) == interface(model)
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    for each in sizes or ({},):
        feeds = feeds_of(model, each)
        want, got = run(model, feeds), run(after, feeds)
        assert want.keys() == got.keys()
        for name in want:
            assert want[name].shape == got[name].shape
            if exact:
                np.testing.assert_array_equal(got[name], want[name])
            else:
                tolerance = 64 * np.finfo(want[name].dtype).eps
                np.testing.assert_allclose(got[name], want[name], rtol=tolerance, atol=tolerance)
    return after, result


SIMPLER: dict[str, tuple[str, list[str]]] = {
    "identity": ("g (float[N] x) => (float[N] y) { a = Identity(x)  y = Relu(a) }", ["Relu"]),
    "identity before an output": ("g (float[N] x) => (float[N] y) { a = Relu(x)  y = Identity(a) }", ["Relu"]),
    "dropout": ("g (float[N] x) => (float[N] y) { a = Dropout(x)  y = Relu(a) }", ["Relu"]),
    "cast to the same": ("g (float[N] x) => (float[N] y) { a = Cast<to=1>(x)  y = Relu(a) }", ["Relu"]),
    "multiplied by one": (
        "g (float[N,3] x) => (float[N,3] y) <float[1] one = {1}> { a = Mul(one, x)  y = Relu(a) }",
        ["Relu"],
    ),
    "minus zero": ("g (float[N] x) => (float[N] y) <float z = {0}> { a = Sub(x, z)  y = Relu(a) }", ["Relu"]),
    "power of one": ("g (float[N] x) => (float[N] y) <float p = {1}> { a = Pow(x, p)  y = Relu(a) }", ["Relu"]),
    "reshape to the own shape": (
        "g (float[2,3] x) => (float[2,3] y) <int64[2] s = {2,-1}> { a = Reshape(x, s)  y = Relu(a) }",
        ["Relu"],
    ),
    "reshape by copies": (
        "g (float[N,M] x) => (float[N,M] y) <int64[2] s = {0,-1}> { a = Reshape(x, s)  y = Relu(a) }",
        ["Relu"],
    ),
    "expand to the own shape": (
        "g (float[N,M] x) => (float[N,M] y) { s = Shape(x)  a = Expand(x, s)  y = Relu(a) }",
        ["Relu"],
    ),
    "slice of everything": (
        """g (float[N,M] x) => (float[N,M] y)
        <int64[1] b = {0}, int64[1] e = {9223372036854775807}, int64[1] a = {1}> { c = Slice(x, b, e, a)
        y = Relu(c) }""",
        ["Relu"],
    ),
    "slice up to the own size": (
        """g (float[N,M] x) => (float[N,M] y) <int64[1] zero = {0}, int64[1] one = {1}> {
          s = Shape<start=1, end=2>(x)  c = Slice(x, zero, s, one)  y = Relu(c) }""",
        ["Relu"],
    ),
    "pad of nothing": (
        "g (float[N,M] x) => (float[N,M] y) <int64[4] p = {0,0,0,0}> { a = Pad(x, p)  y = Relu(a) }",
        ["Relu"],
    ),
    "concat of one": ("g (float[N] x) => (float[N] y) { a = Concat<axis=0>(x)  y = Relu(a) }", ["Relu"]),
    "sum of one": ("g (float[N] x) => (float[N] y) { a = Sum(x)  y = Relu(a) }", ["Relu"]),
    "resize by one": (
        """g (float[N,2,H,W] x) => (float[N,2,H,W] y) <float[4] s = {1,1,1,1}> {
          a = Resize<mode="linear">(x, , s)  y = Relu(a) }""",
        ["Relu"],
    ),
    "where always": (
        "g (float[N] x, float[N] z) => (float[N] y) <bool c = {1}> { a = Where(c, x, z)  y = Relu(a) }",
        ["Relu"],
    ),
    "inverse transposes": (
        """g (float[A,B,C] x) => (float[A,B,C] y) { a = Transpose<perm=[1,2,0]>(x)
          b = Transpose<perm=[2,0,1]>(a)  y = Relu(b) }""",
        ["Relu"],
    ),
    "composed transposes": (
        """g (float[A,B,C] x) => (float[C,B,A] y) { a = Transpose<perm=[1,2,0]>(x)
          b = Transpose<perm=[1,0,2]>(a)  y = Relu(b) }""",
        ["Transpose", "Relu"],
    ),
    "transpose of axes of size one": (
        """g (float[N,1,M] x) => (float[N,M] y) <int64[1] a = {2}> { t = Transpose<perm=[0,2,1]>(x)
          s = Squeeze(t, a)  y = Relu(s) }""",
        ["Squeeze", "Relu"],
    ),
    "reshapes": (
        """g (float[N,6] x) => (float[N,3,2] y) <int64[3] p = {-1,2,3}, int64[3] q = {-1,3,2}> {
          a = Reshape(x, p)  b = Reshape(a, q)  y = Relu(b) }""",
        ["Reshape", "Relu"],
    ),
    "inverse unsqueeze": (
        """g (float[N,M] x) => (float[N,M] y) <int64[1] a = {1}> { u = Unsqueeze(x, a)  s = Squeeze(u, a)
          y = Relu(s) }""",
        ["Relu"],
    ),
    "unsqueezes": (
        """g (float[N,M] x) => (float[N,1,1,M] y) <int64[1] one = {1}, int64[1] two = {2}> {
          a = Unsqueeze(x, one)  b = Unsqueeze(a, two)  y = Relu(b) }""",
        ["Unsqueeze", "Relu"],
    ),
    "casts that lose nothing": (
        "g (float16[N] x) => (double[N] y) { a = Cast<to=1>(x)  y = Cast<to=11>(a) }",
        ["Cast"],
    ),
    "inverse casts": (
        "g (int32[N] x) => (int32[N] y) { a = Cast<to=7>(x)  b = Cast<to=6>(a)  y = Neg(b) }",
        ["Neg"],
    ),
    "slices of two axes": (
        """g (float[6,8] x)
          => (float[2,3] y) <int64[1] zero={0}, int64[1] one={1}, int64[1] two={2}, int64[1] five={5}> {
          a = Slice(x, zero, two, zero)  b = Slice(a, two, five, one)  y = Relu(b) }""",
        ["Slice", "Relu"],
    ),
    "nested concats": (
        """g (float[N] x, float[M] z) => (float[K] y) { a = Concat<axis=0>(x, z)  b = Concat<axis=0>(a, x)
          y = Relu(b) }""",
        ["Concat", "Relu"],
    ),
    "concat of a split": (
        """g (float[N,4] x) => (float[N,4] y) {
          a, b = Split<axis=1, num_outputs=2>(x)  c = Concat<axis=-1>(a, b)  y = Relu(c) }""",
        ["Relu"],
    ),
    "common subexpressions": (
        "g (float[N] x) => (float[N] y) { a = Exp(x)  b = Exp(x)  c = Neg(a)  d = Neg(b)  y = Mul(c, d) }",
        ["Exp", "Neg", "Mul"],
    ),
    "commuted operands": (
        "g (float[N] x, float[N] z) => (float[N] y) { a = Add(x, z)  b = Add(z, x)  y = Mul(a, b) }",
        ["Add", "Mul"],
    ),
    "dead nodes": ("g (float[N] x) => (float[N] y) { a = Exp(x)  b = Neg(a)  y = Relu(x) }", ["Relu"]),
    "unused outputs": (
        "g (float[1,1,4] x) => (float[1,1,2] y) { y, i = MaxPool<kernel_shape=[2], strides=[2]>(x) }",
        ["MaxPool"],
    ),
    "constants": (
        """g (float[N] x) => (float[N] y) { a = Constant<value_float=2.0>()  b = Sqrt(a)  c = Mul(b, b)
          y = Mul(x, c) }""",
        ["Mul"],
    ),
    "shape arithmetic": (
        """g (float[B,S,12] x)
          => (float[B,S,3,4] y) <int64 zero={0}, int64 one={1}, int64[1] axis={0}, int64[2] rest={3,4}> {
          s = Shape(x)  b = Gather(s, zero)  n = Gather(s, one)  bb = Unsqueeze(b, axis)  nn = Unsqueeze(n, axis)
          t = Concat<axis=0>(bb, nn, rest)  y = Reshape(x, t) }""",
        ["Reshape"],
    ),
    "a division that cancels": (
        """g (float[B,12] x)
          => (float[B,12] y) <int64 zero={0}, int64 twelve={12}, int64[1] axis={0}, int64[1] last={12}> {
          s = Shape(x)  b = Gather(s, zero)  m = Mul(b, twelve)  d = Div(m, twelve)  u = Unsqueeze(d, axis)
          t = Concat<axis=0>(u, last)  r = Reshape(x, t)  y = Relu(r) }""",
        ["Relu"],
    ),
    "the idiom of expand": (
        """g (float[B,1,4] x) => (float[B,3,4] y) <int64[3] given={-1,3,4}, int64[1] minus={-1}, int64[1] n={3}> {
          ones = ConstantOfShape<value=int64[1]{1}>(n)  m = Mul(ones, minus)  e = Equal(given, m)
          w = Where(e, ones, given)  y = Expand(x, w) }""",
        ["Expand"],
    ),
    "equal sizes of different tensors": (
        """g (float[B,S] x, float[B,S] z) => (float[B,S] y) { a = Shape(x)  b = Shape(z)
          c = ConstantOfShape<value=float[1]{2}>(a)  d = ConstantOfShape<value=float[1]{2}>(b)  y = Mul(c, d) }""",
        ["Shape", "ConstantOfShape", "Mul"],
    ),
    "if with a constant condition": (
        """g (float[N] x) => (float[N] y) <bool c = {1}> {
          y = If (c) <then_branch = t () => (float[N] r) { r = Exp(x) }, else_branch = e ()
          => (float[N] r) { r = Neg(x) }> }""",
        ["Exp"],
    ),
    "if by a known rank": (
        """g (float[N,3] x) => (float[N,3] y) <int64 two = {2}> { s = Shape(x)  r = Size(s)  c = Equal(r, two)
          y = If (c) <then_branch = t () => (float[N,3] r1) { r1 = Exp(x) },
                      else_branch = e () => (float[N,3] r2) { r2 = Neg(x) }> }""",
        ["Exp"],
    ),
    "loop of one iteration": (
        """g (float[N] x) => (float[N] y, float[1,N] z) <int64 m = {1}, bool c = {1}> {
          y, z = Loop (m, c, x) <body = b (int64 i, bool k, float[N] v) => (bool k2, float[N] w, float[N] u) {
            k2 = Identity(k)  w = Exp(v)  u = Neg(v) }> }""",
        ["Exp", "Neg", "Unsqueeze"],
    ),
    "loop of no iterations": (
        """g (float[N] x) => (float[N] y) <int64 m = {0}, bool c = {1}> {
          a = Loop (m, c, x) <body = b (int64 i, bool k, float[N] v) => (bool k2, float[N] w) {
            k2 = Identity(k)  w = Exp(v) }>  y = Relu(a) }""",
        ["Relu"],
    ),
    "gather from a transpose": (
        """g (float[A,B,C] x) => (float[B,C] y) <int64 i = {0}> { t = Transpose<perm=[1,0,2]>(x)
          y = Gather<axis=1>(t, i) }""",
        ["Gather"],
    ),
    "double negation": ("g (float[N] x) => (float[N] y) { a = Neg(x)  b = Neg(a)  y = Relu(b) }", ["Relu"]),
}


@pytest.mark.parametrize("name", SIMPLER)
def test_simpler(name: str) -> None:
    text, expected = SIMPLER[name]
    model = read(text)
    after, result = check(model, {}, dict.fromkeys("ABCHKMNSW", 1), {**dict.fromkeys("ABCHMNSW", 3), "K": 9})
    assert operators(after) == expected
    assert result.changed
    again = Simplify().run(after, CONTEXT)
    assert operators(after) == expected and not again.changed


KEPT: dict[str, str] = {
    "adding +0.0 turns -0.0 into 0.0": """g (float[N] x) => (float[N] y) <float z = {0}> { a = Add(x, z)
      y = Identity(a) }""",
    "a factor that broadcasts": "g (float[N] x) => (float[2,N] y) <float[2,1] one = {1,1}> { y = Mul(x, one) }",
    "a cast that loses": "g (float[N] x) => (float[N] y) { a = Cast<to=7>(x)  y = Cast<to=1>(a) }",
    "a cast to a narrower float": "g (float[N] x) => (float[N] y) { a = Cast<to=10>(x)  y = Cast<to=1>(a) }",
    "a clip to the finite": "g (float[N] x) => (float[N] y) { y = Clip(x) }",
    "an output that is the input": "g (float[N] x) => (float[N] y) { y = Identity(x) }",
    "random numbers": """g (float[N] x) => (float[N] y) {
        a = RandomUniformLike(x)  b = RandomUniformLike(x)  c = Sub(a, b)  y = Mul(c, x) }""",
    "dropout in training": """g (float[N] x) => (float[N] y) <float r = {0.5}, bool t = {1}>
      { y = Dropout(x, r, t) }""",
    "two unknown dims": """g (float[B,S] x, int64[2] t) => (float[P,Q] y) { y = Reshape(x, t) }""",
    "an expand by an unknown size": "g (float[1] x, int64[1] t) => (float[N] y) { y = Expand(x, t) }",
    "a quantized constant": """g (float[N] x) => (float[N] y) <float s = {0.5}, int8[1] q = {3}, int8 z = {0}> {
        d = DequantizeLinear(q, s, z)  y = Mul(x, d) }""",
    "a slice with a step": """g (float[N] x) => (float[M] y)
        <int64[1] b = {0}, int64[1] e = {1000}, int64[1] a = {0}, int64[1] t = {2}> { y = Slice(x, b, e, a, t) }""",
}


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    model = read(KEPT[name])
    before = operators(model)
    after = model.clone()
    result = Simplify().run(after, CONTEXT)
    kept = [op for op in operators(after) if op != "Identity"]
    assert kept == [op for op in before if op != "Identity"]
    assert interface(after) == interface(model)
    assert all(r.reason for r in result.refusals)


def test_negative_zero_survives() -> None:
    model = read("g (float[N] x) => (float[N] y) <float z = {0}> { a = Add(x, z)  y = Identity(a) }")
    after, _ = check(model)
    zero = np.array([-0.0], np.float32)
    assert not np.signbit(run(after, {"x": zero})["y"])[0]


def test_equal_outputs_keep_both_names() -> None:
    after, _ = check(read("g (float[N] x) => (float[N] y, float[N] z) { y = Exp(x)  z = Exp(x) }"))
    assert operators(after) == ["Exp", "Identity"]


def test_a_value_that_is_read_and_returned() -> None:
    after, _ = check(
        read("""g (float[N] x) => (float[N] y, float[N] z) { a = Exp(x)  y = Identity(a)  b = Identity(a)
        z = Neg(b) }""")
    )
    assert operators(after) == ["Exp", "Neg"]


def test_nan_attributes_compare_by_bits() -> None:
    model = read("g (float[N] x) => (float[N] y) { a = LeakyRelu(x)  b = LeakyRelu(x)  y = Add(a, b) }")
    for node in list(model.graph)[:2]:
        node.attributes["alpha"] = ir.AttrFloat32("alpha", float("nan"))
    assert operators(check(model)[0]) == ["LeakyRelu", "Add"]
    next(iter(model.graph)).attributes["alpha"] = ir.AttrFloat32("alpha", -0.0)
    list(model.graph)[1].attributes["alpha"] = ir.AttrFloat32("alpha", 0.0)
    assert operators(check(model)[0]) == ["LeakyRelu", "LeakyRelu", "Add"]


def test_initializers_that_are_equal_share_one() -> None:
    model = read("g (float[2] x) => (float[2] y) { a = Add(x, p)  b = Mul(a, q)  c = Mul(b, r)  y = Mul(c, s) }")
    nan = np.array([np.nan, 1], np.float32)
    for name, data in {
        "p": nan,
        "q": nan.copy(),
        "r": np.array([0, 1], np.float32),
        "s": np.array([-0.0, 1], np.float32),
    }.items():
        dangling = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        dangling.const_value = ir.tensor(data, name=name)
        dangling.type, dangling.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape((2,))
        model.graph.register_initializer(dangling)
    after, result = check(model)
    assert sorted(after.graph.initializers) == ["p", "r", "s"]
    assert "duplicate initializer merged" in result.changes


def test_an_overridable_initializer_is_no_constant() -> None:
    model = read("g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}> { a = Neg(w)  y = Mul(x, a) }")
    after, result = check(model)
    assert operators(after) == ["Neg", "Mul"]
    assert any("overridden" in r.reason and r.node == "w" for r in result.refusals)
    frozen = model.clone()
    Simplify(freeze_initializers=True).run(frozen, CONTEXT)
    assert operators(frozen) == ["Mul"] and [v.name for v in frozen.graph.inputs] == ["x"]
    x = np.array([3, 4], np.float32)
    np.testing.assert_array_equal(run(frozen, {"x": x})["y"], [-3, -8])


def test_growth_is_bounded() -> None:
    model = read(
        "g (float[N] x) => (float[2048,2048] y) <int64[2] s = {2048, 2048}> { a = ConstantOfShape(s)  y = Add(a, x) }"
    )
    for node in list(model.graph):
        if node.op_type == "Add":
            node.inputs[1].shape = ir.Shape([2048])  # type: ignore[union-attr]
    after, result = check(model)
    assert operators(after) == ["ConstantOfShape", "Add"]
    assert any("grow" in r.reason for r in result.refusals)
    after, _ = check(model, growth=20.0)
    assert operators(after) == ["Add"]
    with pytest.raises(BadInput, match="growth"):
        Simplify(growth=-1)


def test_a_widening_cast_of_a_weight_stays() -> None:
    model = read(
        "g (float[N,128] x) => (float[N,128] y) <int64[2] s = {128,128}> { c = Cast<to=1>(w)  y = MatMul(x, c) }"
    )
    weight = next(iter(model.graph)).inputs[0]
    assert weight is not None
    weight.const_value = ir.tensor(np.arange(128 * 128).reshape(128, 128).astype(np.int8), name="w")
    weight.type, weight.shape = ir.TensorType(ir.DataType.INT8), ir.Shape((128, 128))
    model.graph.register_initializer(weight)
    after, result = check(model)
    assert operators(after) == ["Cast", "MatMul"]
    assert any("compression" in r.reason for r in result.refusals)


def test_a_folded_layout_keeps_the_name_of_the_weight() -> None:
    model = read(
        """g (float[N,2] x) => (float[N,3] y) <float[3,2] weight = {1,2,3,4,5,6}> { t = Transpose(weight)
          y = MatMul(x, t) }"""
    )
    after, _ = check(model)
    assert operators(after) == ["MatMul"] and list(after.graph.initializers) == ["weight"]


def test_a_folded_layout_is_a_view(tmp_path: Path) -> None:
    """All weights of a large model together are not copied, though each of them is small."""
    weight = np.random.default_rng(0).standard_normal((256, 512), np.float32)
    weight.tofile(tmp_path / "w")
    model = read("g (float[N,512] x) => (float[N,256] y) { t = Transpose(w) y = MatMul(x, t) }")
    shape = ir.Shape((256, 512))
    stored = ir.ExternalTensor(tmp_path / "w", 0, weight.nbytes, ir.DataType.FLOAT, shape=shape, name="w")
    model.graph[0].replace_input_with(0, edit.initializer(model.graph, stored, "w"))
    Simplify().run(model, CONTEXT)
    held = model.graph.initializers["w"].const_value
    assert held is not None and held.shape == (512, 256)
    assert np.shares_memory(held.numpy(), stored.numpy())


def test_a_declared_shape_is_only_a_hint() -> None:
    text = "g (float[N,M] x) => (float[P] y) <float[A] a> { a = Relu(x)  s = Shape(a)  y = ConstantOfShape(s) }"
    model = read(text.replace("<float[A] a>", "").replace("float[P] y", "float[P,Q] y"))
    relu = next(iter(model.graph)).outputs[0]
    relu.shape, relu.type = ir.Shape([7, 7]), ir.TensorType(ir.DataType.FLOAT)
    after = model.clone()
    Simplify().run(after, CONTEXT)
    assert run(after, {"x": np.zeros((2, 3), np.float32)})["y"].shape == (2, 3)


def test_what_emitted_files_declare_is_inferred_anew() -> None:
    model = read(
        "g (float[N,4] x) => (float[N,2,2] y) <int64[3] s = {-1,2,2}> { a = Exp(x)  b = Reshape(a, s)  y = Neg(b) }"
    )
    for node in model.graph:
        node.outputs[0].shape = ir.Shape([99]) if not node.outputs[0].is_graph_output() else node.outputs[0].shape
    Simplify().run(model, CONTEXT)
    assert [str(node.outputs[0].shape) for node in model.graph] == ["[N,4]", "[N,2,2]", "[N,2,2]"]


def test_custom_operators_are_opaque() -> None:
    model = read(
        """g (float[N] x) => (float[N] y) <float z = {1}> { a = own.Odd(z)  b = own.Odd(z)  c = Mul(a, b)
          d = Exp(x)  e = Identity(d)
        f = Exp(x)  g = Mul(e, f)  y = Add(c, g) }""",
        '<ir_version: 10, opset_import: ["" : 21, "own" : 1]>',
    )
    Simplify().run(model, Context(CONTEXT.target, checkable=False))
    assert operators(model) == ["Odd", "Odd", "Mul", "Exp", "Mul", "Add"]


def test_without_a_check_nothing_is_computed() -> None:
    model = read("g (float[N] x) => (float[N] y) <float z = {4}> { a = Sqrt(z)  b = Identity(x)  y = Mul(b, a) }")
    after, _ = check(model, context=Context(CONTEXT.target, checkable=False))
    assert operators(after) == ["Sqrt", "Mul"]


def test_metadata_survives() -> None:
    model = read("g (float[N] x) => (float[N] y) { a = Identity(x)  y = Relu(a) }")
    model.metadata_props["alphabet"] = "abc"
    relu = list(model.graph)[1]
    relu.name = "activation"
    relu.metadata_props["graphc.module"] = "block.0"
    after, result = check(model)
    assert after.metadata_props == {"alphabet": "abc"}
    assert [(n.name, n.metadata_props) for n in after.graph] == [("activation", {"graphc.module": "block.0"})]
    assert not any("note" in change for change in result.changes)


def test_size_zero() -> None:
    model = read(
        """g (float[B,S,6] x)
          => (float[B,6,S] y) <int64[1] axis={0}, int64 zero={0}, int64 one={1}, int64[1] six={6}> {
        s = Shape(x)  b = Gather(s, zero)  n = Gather(s, one)  bb = Unsqueeze(b, axis)  nn = Unsqueeze(n, axis)
        t = Concat<axis=0>(bb, six, nn)  y = Reshape(x, t) }"""
    )
    _, result = check(model, {"B": 0, "S": 3}, {"B": 2, "S": 3})
    assert any("-1" in r.reason for r in result.refusals)


@pytest.mark.parametrize("path", sorted(DATA.glob("**/*.onnx")), ids=lambda p: p.stem)
def test_real_models(path: Path) -> None:
    model = ir.load(path)
    before = len(operators(model))
    after = model.clone()
    Simplify().run(after, CONTEXT)
    assert len(operators(after)) <= before
    sizes = {str(d): 2 for v in model.graph.inputs for d in v.shape or () if not isinstance(d, int)}
    try:
        want = run(model, feeds_of(model, sizes))
    except runtime.CannotRun:
        pytest.skip("does not run on inputs of size 2")
    got = run(after, feeds_of(model, sizes))
    for name, array in want.items():
        scale = max(float(np.abs(array).max()), 1.0) if array.size else 1.0
        np.testing.assert_allclose(got[name], array, rtol=0, atol=scale * 1e-5)


def test_nodes_that_do_not_fit_their_inputs_are_left_to_the_runtime() -> None:
    model = read(
        """g (float[N,4] x) => (float[A,B] y) <int64[1] axis = {7}, int64[2] wrong = {5, -1}> {
        a = Transpose<perm=[3,1]>(x)  b = Squeeze(a, axis)  c = Gather<axis=9>(b, axis)  d = Unsqueeze(c, wrong)
        e = Reshape(d, wrong)  y = Concat<axis=5>(e, e) }"""
    )
    before = operators(model)
    Simplify().run(model, CONTEXT)
    assert operators(model) == before


def test_a_cast_to_text_shows_what_was_cast() -> None:
    model = read("g (int32[N] x) => (string[N] y) { a = Cast<to=1>(x)  y = Cast<to=8>(a) }")
    after = model.clone()
    Simplify().run(after, CONTEXT)
    assert operators(after) == ["Cast", "Cast"]


def test_a_cast_to_the_dtype_of_a_value_is_a_cast_where_that_dtype_is_known() -> None:
    model = read(
        """g (int64[N] x, float[M] y) => (int64[K] r, float[N] z) <float zero = {0.0}, float one = {1.0}> {
            s = Size (x) a = CastLike (zero, s) b = CastLike (one, s) r = Range (a, s, b) z = CastLike (x, y) }"""
    )
    after, _ = check(model, {"N": 3, "M": 2, "K": 3}, {"N": 1, "M": 1, "K": 1})
    assert operators(after) == ["Size", "Range", "Cast"]


def test_a_cast_to_the_dtype_of_a_value_that_is_not_known_stays() -> None:
    header = '<ir_version: 10, opset_import: ["" : 21, "my" : 1]>'
    model = read("g (float[N] x) => (float[N] y) { s = my.Op (x) a = CastLike (x, s) y = my.Op (a) }", header)
    Simplify().run(model, CONTEXT)
    assert "CastLike" in operators(model)
