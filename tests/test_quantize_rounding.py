"""Rounding that looks at what layers are given: GPTQ, projected descent, corrected biases."""

from __future__ import annotations

import numpy as np
import pytest

from tests.quantized_models import build, context, held, images, mlp, normal, pictures, quantized, rows, run

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("block", [0, 16])
def test_gptq_changes_outputs_less_than_nearest(bits: int, block: int) -> None:
    samples = rows()
    x = np.concatenate([sample["x"] for sample in samples]).astype(np.float64)
    w = held(mlp(), "w").copy()
    losses = []
    for how in ("nearest", "gptq"):
        model = mlp()
        quantized(model, context(samples), bits=bits, block=block, rounding=how, include=("w",))
        scale = held(model, "w.scale")
        values = held(model, "w").astype(np.float32) * (np.repeat(scale, 16, 0) if block else scale)
        losses.append(np.square(x @ (values - w)).sum(axis=0))
    assert (losses[1] <= losses[0] * (1 + 1e-6)).all()
    assert losses[1].sum() < 0.8 * losses[0].sum()


def test_gptq_of_convolutions_and_layer_after_layer() -> None:
    samples = pictures()
    model = images(2)
    want = run(model, x=samples[0]["x"])["y"]
    errors = {}
    for how in ("nearest", "gptq"):
        model = images(2)
        quantized(model, context(samples), bits=4, rounding=how, sequential=how == "gptq", kinds=("Conv",))
        errors[how] = np.square(run(model, x=samples[0]["x"])["y"] - want).sum()
    assert errors["gptq"] < errors["nearest"]


@pytest.mark.parametrize("seen", [0, 40])
def test_gptq_keeps_weights_of_inputs_that_calibration_never_had(seen: int) -> None:
    """Other data may have them; and an expert may never have been picked."""
    model = build("y = MatMul(x, w)", "float[N,64] x", "float[N,48] y", w=normal(64, 48))
    data = [{"x": np.concatenate([normal(20, seen), np.zeros((20, 64 - seen), np.float32)], axis=1)}]
    for rounded in ("nearest", "gptq"):
        one = model.clone()
        quantized(one, context(data), bits=4, rounding=rounded)
        got = run(one, x=np.eye(64, dtype=np.float32))["y"]
        error = np.abs(got - held(model, "w"))[seen:]
        assert (error < np.abs(held(model, "w")).max(axis=0) / 7).all()


@pytest.mark.parametrize("rounded", ["gptq", "awp"])
def test_zeros_stay_zeros(rounded: str) -> None:
    """Half of the weights, and the inputs vary together, so that a sweep would fill them."""
    w = normal(64, 48)
    w[RANDOM.random(w.shape) < 0.5] = 0
    model = build("y = MatMul(x, w)", "float[N,64] x", "float[N,48] y", w=w)
    data, errors = rows(), []
    want = run(model, x=data[0]["x"])["y"]
    for rounding_ in ("nearest", rounded):
        one = model.clone()
        quantized(one, context(data), bits=3, rounding=rounding_)
        assert (run(one, x=np.eye(64, dtype=np.float32))["y"][w == 0] == 0).all()
        errors.append(float(np.square(run(one, x=data[0]["x"])["y"] - want).sum()))
    assert errors[1] < 0.8 * errors[0]


def test_gptq_of_depthwise_convolutions_changes_outputs_less_than_nearest() -> None:
    model = build(
        "y = Conv<pads=[1,1,1,1],group=16>(x, w)", "float[N,16,8,8] x", "float[N,16,8,8] y", w=normal(16, 1, 3, 3)
    )
    samples = [{"x": np.maximum(normal(4, 16, 8, 8, seed=i), 0)} for i in range(4)]
    want, errors = run(model, **samples[0])["y"], []
    for rounded in ("nearest", "gptq"):
        one = model.clone()
        quantized(one, context(samples), bits=4, rounding=rounded)
        errors.append(float(np.square(run(one, **samples[0])["y"] - want).sum()))
    assert errors[1] < 0.95 * errors[0]


def test_biases_make_up_for_the_means() -> None:
    samples = [{"x": sample["x"] + 3} for sample in pictures()]
    shifts = []
    for correct in (False, True):
        model = images(2)
        want = np.concatenate([run(model, **sample)["y"] for sample in samples])
        quantized(model, context(samples), correct=correct, bits=4)
        got = np.concatenate([run(model, **sample)["y"] for sample in samples])
        shifts.append(np.abs((got - want).mean(0)).max())
    assert shifts[1] < 0.5 * shifts[0]


def test_a_bias_is_corrected_exactly() -> None:
    samples = rows()
    model = build("y = MatMul(x, w)", "float[N,64] x", "float[N,48] y", w=normal(64, 48))
    want = np.concatenate([run(model, **sample)["y"] for sample in samples]).mean(0)
    quantized(model, context(samples), bits=3, scheme="weights", correct=True)
    got = np.concatenate([run(model, **sample)["y"] for sample in samples]).mean(0)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_biases_of_layers_with_tiny_weights_do_not_overflow() -> None:
    """Weights of a channel so small that its bias on their scale would leave 32 bits."""
    w, b = normal(4, 32, 1, 1), np.full(4, 5.0, np.float32)
    w[1] *= 1e-12
    w[2] = 0
    for how in ("nearest", "gptq"):
        model = build("y = Conv(x, w, b)", "float[N,32,1,1] x", "float[N,4,1,1] y", w=w, b=b)
        samples = [{"x": normal(20, 32, 1, 1)}]
        want = run(model, **samples[0])["y"]
        quantized(model, context(samples), scheme="static", rounding=how)
        got = run(model, True, **samples[0])["y"]
        assert np.abs(got - want).max() < 0.03 * np.abs(want).max()
