"""Inputs that are made where nobody gave data: what quality is read on, and what calibration sees."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphc import caches, measure
from graphc.checking import inputs
from graphc.gate import Judge
from graphc.passes.quantize import Quantize
from tests.quantized_models import build, context, mlp, normal, run


def test_values_that_no_data_has_are_for_checks_only() -> None:
    model = mlp()
    strange = [case for case in inputs.generate(model) if case.strange]
    assert {case.description.split(", ")[1] for case in strange} == {inputs.ZEROS, inputs.WIDE}
    made = measure.samples(model)
    assert len(made) == len(inputs.generate(model)) - len(strange)
    assert all(0 < np.abs(arrays["x"]).max() < 6 for arrays in made)


def test_numbers_alone_are_arrays() -> None:
    model = build("h = MatMul(x, w) y = Mul(h, s)", "float[N,64] x, float s", "float[N,48] y", w=normal(64, 48))
    assert all(isinstance(arrays["s"], np.ndarray) and arrays["s"].shape == () for arrays in measure.samples(model))


@pytest.mark.parametrize("new", [1, 3, 9])
def test_caches_hold_what_the_model_makes(new: int) -> None:
    model = build(
        "k = Mul(x, s) present = Concat<axis=2>(past, k) y = ReduceSum<keepdims=0>(present, a)",
        f"float[B,2,{new},4] x, float[B,2,P,4] past",
        "float[B,2,T,4] present, float[B,2,4] y",
        s=np.full((), 1e-3, np.float32),
        a=np.array([2]),
    )
    made = measure.samples(model)
    assert len({arrays["past"].shape for arrays in made}) > 1
    for arrays in made:
        assert np.abs(arrays["past"]).max() < 0.01, "what was made up is as large as x"
        one = min(new, arrays["past"].shape[2])
        np.testing.assert_array_equal(run(model, **arrays)["present"][:, :, :one], arrays["past"][:, :, :one])
        np.testing.assert_array_equal(arrays["past"][:, :, :one], (arrays["x"] * np.float32(1e-3))[:, :, :one])


def test_caches_of_other_lengths_stay() -> None:
    held = {"past": np.ones((1, 2, 4, 8), np.float32)}
    short = {"present": np.zeros((1, 2, 3, 8), np.float32)}
    assert caches.lived({"past": "present"}, held, lambda arrays: short) is held
    assert caches.lived({}, held, lambda arrays: short) is held


def test_static_quantization_without_data_is_judged_fairly() -> None:
    """A case with values up to 100 would be all that counts in the error, and all that ranges are for."""
    model = mlp()
    after: ir.Model = model.clone()
    Quantize(scheme="static", least=0).run(after, context(measure.samples(model)))
    assert Judge(model, [], 0, lambda *a: None).costs(after, ["error"])["error"] < 0.03
