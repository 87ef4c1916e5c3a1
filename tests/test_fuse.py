"""The pass ``fuse``: what it leaves alone, bodies and functions, options, and rows of maps around a linear one."""

from __future__ import annotations

import typing

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc import edit, runtime
from graphc.contract import Capabilities, Context, PassResult
from graphc.errors import BadInput
from graphc.passes import fuse
from graphc.passes.fuse import Fuse
from graphc.recipe import Recipe
from tests.small_models import IMAGE, build, numbers, operators, reasons

CONTEXT = Context(target=Capabilities("portable", 10, {"": 21}))
ROWS = "float[N,6] x"


def feeds(model: ir.Model, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        v.name: rng.standard_normal([d if isinstance(d, int) else 2 for d in v.shape]).astype(v.dtype.numpy())
        for v in model.graph.inputs
    }


def assert_same(before: ir.Model, after: ir.Model) -> None:
    """Both compute the same in ONNX Runtime, unoptimised, within 64 roundings of the largest value."""
    inputs = feeds(before)
    wanted = runtime.session(before, optimise=False, threads=1).run(inputs)
    found = runtime.session(after, optimise=False, threads=1).run(inputs)
    assert list(wanted) == list(found)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        eps = np.finfo(array.dtype).eps
        np.testing.assert_allclose(found[name], array, rtol=0, atol=64 * eps * (1 + np.abs(array).max()))


def fused(model: ir.Model, **options: object) -> tuple[ir.Model, PassResult]:
    """Run the pass on a copy, check that it computes the same, and that a second run changes nothing."""
    after = model.clone()
    result = Fuse(**options).run(after, CONTEXT)
    assert_same(model, after)
    assert not Fuse(**options).run(after, CONTEXT).changed
    return after, result


W = numbers(5, 4, 3, 3)
B = numbers(5, seed=1)
S = numbers(5, seed=2, low=0.5, high=2)
T = numbers(5, seed=3)
BN = {"g": S, "b": T, "m": numbers(5, seed=4), "v": numbers(5, seed=5, low=0.5, high=2)}
M = numbers(6, 5)


@pytest.mark.parametrize(
    "body, constants, reason",
    [
        (
            "c = Conv(x, w) r = Relu(c) y = BatchNormalization(r, g, b, m, v)",
            {"w": W, **BN},
            "the BatchNormalization follows Relu, not a convolution or product",
        ),
        (
            "y = BatchNormalization(x, s, s, s, s)",
            {"s": numbers(4, low=1, high=2)},
            "the BatchNormalization follows an input of the graph, not a convolution or product",
        ),
        (
            "c = Conv(x, w) d = Mul(c, s) y = Add(d, c)",
            {"w": W, "s": S.reshape(5, 1, 1)},
            "the intermediate result has 1 other reader",
        ),
        (
            'a = Sub(x, s) y = Conv<auto_pad="SAME_UPPER">(a, w)',
            {"w": W, "s": numbers(4, 1, 1)},
            "a shift before a zero-padded convolution does not fold",
        ),
        (
            "a = Sub(x, s) y = ConvTranspose(a, w)",
            {"w": numbers(4, 3, 3, 3), "s": numbers(4, 1, 1)},
            "a shift before a transposed convolution does not fold: the borders see less of it",
        ),
        (
            "c = Conv(x, w) y = Mul(c, s)",
            {"w": W, "s": numbers(1, 1, 7, 1)},
            "the constant does not vary along the channels",
        ),
        (
            "c = Conv(x, w) y = Mul(c, s)",
            {"w": W, "s": numbers(5, 7, 1)},
            "the constant varies along more than one axis",
        ),
        (
            "c = Conv(x, w) y = Mul(c, s)",
            {"w": W, "s": numbers(1, 1, 1, 1, 1)},
            "the constant has more axes than the tensor",
        ),
        (
            "c = Conv(x, w) y = Mul(c, s)",
            {"w": numbers(1, 4, 3, 3), "s": numbers(5, 1, 1)},
            "the constant broadcasts the result to more channels",
        ),
        (
            "c = Conv(x, w, z) y = Mul(c, s) z = Neg(t)",
            {"w": W, "s": S.reshape(5, 1, 1), "t": T},
            "the bias is not constant",
        ),
    ],
)
def test_left_with_a_reason(body: str, constants: dict, reason: str) -> None:
    if "z = Neg(t)" in body:
        body = "z = Neg(t) " + body.replace(" z = Neg(t)", "")
    model = build(body, **constants)
    after, result = fused(model)
    assert operators(after) == operators(model)
    assert reason in reasons(result)
    assert not result.changed


def test_an_intermediate_output_of_the_graph_stays() -> None:
    model = build("c = Conv(x, w) y = Mul(c, s)", outputs="c y", w=W, s=S.reshape(5, 1, 1))
    after, result = fused(model)
    assert operators(after) == ["Conv", "Mul"]
    assert reasons(result) == ["the intermediate result is an output of the graph"]


def test_training_mode_is_left() -> None:
    model = build("c = Conv(x, w) y, rm, rv = BatchNormalization<training_mode=1>(c, g, b, m, v)", w=W, **BN)
    result = Fuse().run(model, CONTEXT)
    assert not result.changed
    assert "the BatchNormalization is in training mode" in reasons(result)


def test_a_weight_that_callers_may_override_is_left() -> None:
    model = build("c = Conv(x, w) y = Mul(c, s)", w=W, s=S.reshape(5, 1, 1))
    model.graph.inputs.append(model.graph.initializers["w"])
    result = Fuse().run(model, CONTEXT)
    assert not result.changed
    assert reasons(result) == ["the weight is not constant"]


def test_branches_with_weights_of_the_outer_graph() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[N,4,9,8] x, bool k) => (float y) {
      y = If (k) <then_branch = a () => (float u) { c = Conv(x, w) u = Mul(c, s) },
                  else_branch = b () => (float o) { d = Conv(x, w) o = Relu(d) }> }"""
    model = ir.from_onnx_text(text)
    model.graph.outputs[0].shape = None
    for sub in model.graph.subgraphs():
        sub.outputs[0].shape = None
    for name, array in (("w", W), ("s", S.reshape(5, 1, 1))):
        value = ir.Value(
            name=name,
            const_value=ir.tensor(array, name=name),
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        model.graph.register_initializer(value)
        for node in edit.nodes(model):
            for i, old in enumerate(node.inputs):
                if old is not None and old.name == name and old is not value:
                    node.replace_input_with(i, value)
    after = model.clone()
    assert Fuse().run(after, CONTEXT).changes == ["Mul folded into the Conv before it"]
    for condition in (True, False):
        inputs = {"x": numbers(2, 4, 9, 8), "k": np.array(condition)}
        one, two = (runtime.session(m, optimise=False).run(inputs)["y"] for m in (model, after))
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_inside_local_functions_constants_stay_nodes() -> None:
    text = """<ir_version: 10, opset_import: ["": 21, "f": 1]>
      g (float[N,6] x) => (float[N,2] y) { y = f.lin(x) }
      <domain: "f", opset_import: ["": 21]> lin (u) => (o) {
        w = Constant<value = float[6,2] {1,2,3,4,5,6,7,8,9,10,11,12}>() s = Constant<value = float[2] {2,3}>()
        p = MatMul(u, w) o = Mul(p, s) }"""
    model = ir.from_onnx_text(text)
    after, _ = fused(model)
    assert sorted(operators(after)) == ["Constant", "MatMul", "lin"]


def test_attributes_given_by_the_caller_of_a_function_are_left() -> None:
    text = """<ir_version: 10, opset_import: ["": 21, "f": 1]>
      g (float[N,6] x) => (float[N,2] y) { y = f.lin<beta=2.0>(x) }
      <domain: "f", opset_import: ["": 21]> lin <beta> (u) => (o) {
        w = Constant<value = float[6,2] {1,2,3,4,5,6,7,8,9,10,11,12}>() s = Constant<value = float[2] {2,3}>()
        p = Gemm<beta: float = @beta>(u, w, s) o = Mul(p, s) }"""
    model = ir.from_onnx_text(text)
    after, result = fused(model)
    assert operators(after) == operators(model)
    assert "an attribute is given by the caller of the function" in reasons(result)


def test_the_documentation_names_every_rule() -> None:
    for name, sentence in ((n, t) for stage in fuse.STAGES for rule in stage for n, t in rule.names.items()):
        assert f"- ``{name}``: {sentence}" in " ".join((Fuse.__doc__ or "").split()), name


def test_options() -> None:
    rules = [name for stage in fuse.STAGES for rule in stage for name in rule.names]
    assert sorted(rules) == sorted(typing.get_args(fuse.RuleName))
    model = build("c = Conv(x, w) d = BatchNormalization(c, g, b, m, v) y = Mul(d, s)", w=W, s=[2.0], **BN)
    assert operators(fused(model, only=("conv-bn",))[0]) == ["Conv", "Mul"]
    assert operators(fused(model, skip=("conv-bn", "batchnorm-arithmetic"))[0]) == [
        "Conv",
        "BatchNormalization",
        "Mul",
    ]
    recipe = Recipe.parse("fuse{only=conv-bn}")
    assert recipe.passes == (Fuse(only=("conv-bn",)),) and Recipe.parse(recipe.text()) == recipe
    with pytest.raises(BadInput, match="conv-bn"):
        Recipe.parse("fuse{only=conv-nb}")


def test_old_opsets_are_left_with_a_reason() -> None:
    model = build("c = Conv(x, w) y = Mul(c, s)", opset=9, w=W, s=[2.0])
    result = Fuse().run(model, CONTEXT)
    assert not result.changed
    assert "opset 9" in reasons(result)[0]


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.data())
def test_any_row_of_affine_maps_around_a_linear_map(data: st.DataObject) -> None:
    """Whatever stands around a convolution or product, the model computes the same and no node is added."""
    draw = data.draw
    is_conv = draw(st.booleans())
    lines, constants, name = [], {}, "x"

    def affines(channels: int, count: int) -> None:
        nonlocal name
        for _ in range(count):
            op = draw(st.sampled_from(["Add", "Sub", "Mul", "Div", "BatchNormalization", "Relu"]))
            new, tail = f"v{len(lines)}", (1, 1) if is_conv else ()
            if op == "Relu":
                lines.append(f"{new} = Relu({name})")
            elif op == "BatchNormalization":
                keys = [f"{new}_{k}" for k in "gbmv"]
                constants.update(
                    {k: numbers(channels, seed=len(lines) + i, low=0.5, high=1.5) for i, k in enumerate(keys)}
                )
                lines.append(f"{new} = BatchNormalization({name}, {', '.join(keys)})")
            else:
                shape = draw(st.sampled_from([(1,), (channels, *tail), (1, channels, *tail)]))
                constants[f"{new}_c"] = numbers(*shape, seed=len(lines), low=0.5, high=1.5)
                first, second = (
                    draw(st.permutations([name, f"{new}_c"])) if op in ("Add", "Mul", "Sub") else (name, f"{new}_c")
                )
                lines.append(f"{new} = {op}({first}, {second})")
            name = new

    channels_in = 4 if is_conv else 6
    affines(channels_in, draw(st.integers(0, 3)))
    lines.append(
        f"l = Conv<pads=[{draw(st.integers(0, 1))},0,0,0]>({name}, w)" if is_conv else f"l = MatMul({name}, w)"
    )
    constants["w"] = numbers(5, 4, 3, 3) if is_conv else M
    name = "l"
    affines(5, draw(st.integers(0, 3)))
    model = build(" ".join(lines) + f" y = Identity({name})", x=IMAGE if is_conv else ROWS, **constants)
    after, _ = fused(model)
    assert len(operators(after)) <= len(operators(model))
