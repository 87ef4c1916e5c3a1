"""Double precision judges where single precision alone moves an output far."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphc import compiled, runtime
from graphc.checking import doubles
from graphc.contract import Runnable
from tests.small_models import hold

pytest.importorskip("onnxruntime")

Array = np.ndarray[Any, np.dtype[Any]]


def text(body: str) -> ir.Model:
    head = '<ir_version: 10, opset_import: ["" : 21]> g (float[64,8] x) => (float[64,8] y)'
    return ir.from_onnx_text(f"{head} {{ {body} }}")


def cancelling(function: str = "Identity") -> ir.Model:
    """A function of ``x`` times ``w``, less the same times ``w`` without 1 on the diagonal: ``w`` costs digits."""
    model = text(f"z = {function}(x)\n a = MatMul(z, w)\n b = MatMul(z, v)\n y = Sub(a, b)")
    w = np.random.default_rng(0).integers(-9000, 9000, (8, 8)).astype(np.float32)
    return hold(model, w=w, v=w - np.eye(8, dtype=np.float32))


class Exact(Runnable):
    """Computes what the products amount to."""

    provider = "exact"

    def run(self, inputs: Any) -> dict[str, Array]:
        return {"y": inputs["x"]}


def test_a_difference_is_said_with_who_is_nearer() -> None:
    found = compiled.compare(cancelling(), Exact())
    assert found.ok, found.why
    (note,) = [note for note in found.notes if "double precision" in note]
    assert note.endswith("exact 0") and "output 'y' differs by 0.00" in note


def test_where_there_is_no_double_kernel_the_noise_is_said() -> None:
    """ONNX Runtime has no Mish of float64."""

    class Near(Runnable):
        provider = "near"

        def run(self, inputs: Any) -> dict[str, Array]:
            x = inputs["x"].astype(np.float64)
            return {"y": (x * np.tanh(np.logaddexp(0, x))).astype(np.float32)}

    found = compiled.compare(cancelling("Mish"), Near())
    assert found.ok, found.why
    assert any(note.endswith("of what rounding explains") for note in found.notes)


def test_constants_attributes_and_bodies_are_widened() -> None:
    body = """
        c = Constant<value_floats: floats = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]>()
        t = Constant<value: tensor = float {0.1}>()
        whole = Cast<to: int = 7>(x)
        back = Cast<to: int = 1>(whole)
        shape = Shape(x)
        filled = ConstantOfShape<value: tensor = float[1] {0.7}>(shape)
        truth = Constant<value: tensor = bool {1}>()
        chosen = If(truth)<
            then_branch: graph = yes () => (float[64,8] p) { p = Add(x, t) },
            else_branch: graph = no () => (float[64,8] q) { q = Sub(x, t) }
        >
        a = Add(back, c)
        b = Add(filled, chosen)
        y = Add(a, b)
    """
    model = text(body)
    wide = doubles.doubled(model)
    assert model.graph.inputs[0].dtype == ir.DataType.FLOAT, "the model itself stays as it is"
    x = np.random.default_rng(0).standard_normal((64, 8))
    found = runtime.session(wide, optimise=False).run({"x": x})["y"]
    single = np.float64(np.float32(0.1)), np.float64(np.float32(0.7))
    wanted = np.trunc(x) + np.arange(1, 9, dtype=np.float32) / np.float32(10) + single[1] + x + single[0]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found[0, 0], np.trunc(x[0, 0]) + 2 * single[0] + single[1] + x[0, 0], atol=1e-14)
