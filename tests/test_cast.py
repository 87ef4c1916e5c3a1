"""The pass ``cast``: types inside change, types at the border do not, and what would break stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import graphc
from graphc import edit, runtime
from graphc.contract import Capabilities, Context
from graphc.errors import BadInput
from graphc.passes.cast import Cast
from graphc.recipe import Recipe
from tests.small_models import hold

CONTEXT = Context(target=Capabilities("portable", 10, {"": 21}))
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def build(body: str, inputs: str = "float[N,4] x", outputs: str = "float[N,5] y", **constants: np.ndarray) -> ir.Model:
    text = f'<ir_version: 10, opset_import: ["": 21]> g ({inputs}) => ({outputs}) {{ {body} }}'
    return hold(ir.from_onnx_text(text), **constants)


def run(model: ir.Model, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    return runtime.session(model, optimise=False, threads=1).run(feeds)


W = np.random.default_rng(0).uniform(-1, 1, (4, 5)).astype(np.float32)
X = np.random.default_rng(1).uniform(-1, 1, (3, 4)).astype(np.float32)
MLP = "h = MatMul(x, w) a = Add(h, b) y = Relu(a)"
B = np.linspace(-1, 1, 5, dtype=np.float32)


def dtypes(model: ir.Model) -> dict[str, ir.DataType | None]:
    return {v.name or "": v.dtype for node in edit.nodes(model) for v in node.outputs}


def test_half_precision_inside_and_the_interface_as_it_was() -> None:
    model = build(MLP, w=W, b=B)
    wanted = run(model, x=X)["y"]
    result = Cast().run(model, CONTEXT)
    assert result.changes == ["MatMul computes in float16", "Add computes in float16", "Relu computes in float16"]
    assert {v.dtype for v in model.graph.initializers.values()} == {HALF}
    assert set(model.graph.initializers) == {"w", "b"}
    assert (model.graph.inputs[0].dtype, model.graph.outputs[0].dtype, model.graph.outputs[0].name) == (
        FLOAT,
        FLOAT,
        "y",
    )
    found = run(model, x=X)["y"]
    assert found.dtype == np.float32
    assert 0 < np.abs(found - wanted).max() < 4 * 2**-10
    assert any("CPU provider computes these in float32" in refusal.reason for refusal in result.refusals)


def test_the_interface_changes_on_request() -> None:
    model = build(MLP, w=W, b=B)
    Cast(io=True).run(model, CONTEXT)
    assert "Cast" not in [node.op_type for node in edit.nodes(model)]
    assert run(model, x=X.astype(np.float16))["y"].dtype == np.float16


def test_back_to_float32() -> None:
    model = build(MLP, w=W, b=B)
    wanted = run(model, x=X)["y"]
    Cast(io=True).run(model, CONTEXT)
    Cast(to="float32", io=True).run(model, CONTEXT)
    np.testing.assert_allclose(run(model, x=X)["y"], wanted, atol=4 * 2**-10)
    assert {v.dtype for v in model.graph.initializers.values()} == {FLOAT}


@pytest.mark.parametrize(
    "body, constants, kept, reason",
    [
        (
            "h = MatMul(x, w) y = Add(h, big)",
            {"w": W, "big": np.float32(1e6)},
            "Add",
            "a constant is too large for float16",
        ),
        (
            "h = MatMul(x, w) y = Add(h, eps)",
            {"w": W, "eps": np.float32(1e-12)},
            "Add",
            "a constant is too small for float16",
        ),
        (
            "h = MatMul(x, w) y = If (k) <then_branch = t () => (float[N,5] u) { u = Relu(h) }, "
            "else_branch = e () => (float[N,5] v) { v = Exp(h) }>",
            {"w": W, "k": np.array(True)},
            "If",
            "",
        ),
        (
            "h = MatMul(x, w) q = QuantizeLinear(h, s, z) y = DequantizeLinear(q, s, z)",
            {"w": W, "s": np.float32(0.1), "z": np.uint8(128)},
            "QuantizeLinear",
            "quantization scales keep their type",
        ),
        (
            "h = MatMul(x, w) n = EyeLike<dtype=1>(h) y = Add(h, n)",
            {"w": W},
            "EyeLike",
            "an attribute fixes the type of the result",
        ),
    ],
)
def test_what_keeps_its_type(body: str, constants: dict[str, np.ndarray], kept: str, reason: str) -> None:
    model = build(body, **{name: np.asarray(array) for name, array in constants.items()})
    wanted = run(model, x=X)["y"]
    result = Cast().run(model, CONTEXT)
    node = next(node for node in edit.nodes(model) if node.op_type == kept)
    assert node.outputs[0].dtype != HALF
    assert reason in [refusal.reason for refusal in result.refusals] or not reason
    assert dtypes(model)["h"] == HALF
    # With quantization one step may tip over.
    np.testing.assert_allclose(
        run(model, x=X)["y"], wanted, rtol=4 * 2**-10, atol=0.101 if kept[0] == "Q" else 4 * 2**-10
    )


def test_a_constant_that_stays_in_one_place_serves_both() -> None:
    body = "h = MatMul(x, w) n = Add(h, big) m = Mul(h, c) k = Mul(n, c) r = Sub(m, k) y = Sub(r, big)"
    model = build(body, w=W, big=np.asarray(np.float32(1e5)), c=np.asarray(np.float32(0.5)))
    wanted = run(model, x=X)["y"]
    Cast().run(model, CONTEXT)
    assert model.graph.initializers["big"].dtype == FLOAT
    np.testing.assert_allclose(run(model, x=X)["y"], wanted, rtol=4 * 2**-10)


def test_resize_keeps_its_scales_and_constants_as_nodes_work() -> None:
    body = """s = Constant<value = float[4] {1.0, 1.0, 2.0, 2.0}>() c = Constant<value = float {0.5}>()
              r = Resize<mode="nearest">(x, , s) z = ConstantOfShape<value = float[1] {0.25}>(d)
              m = Mul(r, c) y = Add(m, z)"""
    model = build(body, inputs="float[1,1,2,2] x", outputs="float[1,1,4,4] y", d=np.array([1, 1, 4, 4]))
    x = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    wanted = run(model, x=x)["y"]
    result = Cast().run(model, CONTEXT)
    assert "Resize computes in float16" in result.changes
    np.testing.assert_array_equal(run(model, x=x)["y"], wanted)


def test_big_weights_are_converted_when_they_are_read() -> None:
    model = build(
        "y = MatMul(x, w)", inputs="float[N,600] x", outputs="float[N,600] y", w=np.zeros((600, 600), np.float32)
    )
    Cast().run(model, CONTEXT)
    assert isinstance(model.graph.initializers["w"].const_value, ir.LazyTensor)


def test_levels_go_from_everything_to_nothing() -> None:
    model = build("h = MatMul(x, w) s = Softmax(h) y = Relu(s)", w=W)
    counts = []
    for level in Cast().levels(model):
        after = model.clone()
        level.run(after, CONTEXT)
        computing = [node for node in edit.nodes(after) if node.op_type != "Cast"]
        counts.append(sum(node.outputs[0].dtype == HALF for node in computing))
        run(after, x=X)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[1] > 0 and counts[-1] == 0
    assert Cast().levels(model)[0] == Cast()


def test_options() -> None:
    model = build(MLP, w=W, b=B)
    Cast(keep=("Relu",)).run(model, CONTEXT)
    assert [node.op_type for node in model.graph] == ["Cast", "MatMul", "Add", "Cast", "Relu"]
    assert Recipe.parse("cast{to=bfloat16 io=true}").passes == (Cast(to="bfloat16", io=True),)
    with pytest.raises(BadInput, match="share"):
        Recipe.parse("cast{share=2}")


@pytest.mark.parametrize("name", ["fmnist_resnet", "fmnist_vit_tiny"])
def test_real_models(name: str) -> None:
    path = Path(__file__).parent / "data" / f"{name}.onnx"
    model = ir.load(path)
    x = np.random.default_rng(0).random([1 if not isinstance(d, int) else d for d in model.graph.inputs[0].shape or ()])
    feed = {model.graph.inputs[0].name or "": x.astype(np.float32)}
    wanted = run(model, **feed)
    Cast().run(model, CONTEXT)
    for output, array in run(model, **feed).items():
        assert 0 < np.abs(array - wanted[output]).max() < 0.01 * np.abs(wanted[output]).max()


@pytest.mark.parametrize("factor, kept", [(1.0, []), (2e4, ["Mul", "Relu", "Mul"])])
def test_what_measures_too_large_keeps_its_type(tmp_path: Path, factor: float, kept: list[str]) -> None:
    up, down = np.asarray([factor], np.float32), np.asarray([1 / factor], np.float32)
    model = build("h = MatMul(x, w) a = Mul(h, up) r = Relu(a) d = Mul(r, down) y = Relu(d)", w=W, up=up, down=down)
    samples = tmp_path / "x.npz"
    np.savez(samples, x=4 * X)
    ir.save(model, tmp_path / "m.onnx")
    found = graphc.optimize(tmp_path / "m.onnx", recipe="cast", data=str(samples), cache=False).model
    assert found is not None
    ours = [node for node in edit.nodes(found) if node.op_type != "Cast"]
    assert [node.op_type for node in ours if node.outputs[0].dtype == FLOAT] == kept and len(ours) == 5
    wanted = run(model, x=4 * X)["y"]
    np.testing.assert_allclose(run(found, x=4 * X)["y"], wanted, rtol=0, atol=8 * 2**-10 * np.abs(wanted).max())
