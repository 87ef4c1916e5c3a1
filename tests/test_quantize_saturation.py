"""Ranges of activations end where what reads them stops to tell values apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphc import runtime
from graphc.quantization import activations, saturation
from graphc.stats import Valid
from graphc.stats.range import BINS, RangeOf
from tests import quantized_models
from tests.quantized_models import context, held, normal, quantized, run
from tests.small_models import build

INF = float("inf")
CASES = {
    "y = HardSwish(x)": (-3.0, INF),
    "y = HardSigmoid<alpha=0.5, beta=0.25>(x)": (-0.5, 1.5),
    "y = HardSigmoid<alpha=0.0>(x)": (-INF, INF),
    "y = Relu(x)": (0.0, INF),
    "y = Clip(x, l, h)": (-1.0, 2.0),
    "y = Clip(x, l)": (-1.0, INF),
    "a = HardSwish(x) b = HardSigmoid<alpha=0.1, beta=0.5>(x) y = Add(a, b)": (-5.0, INF),
    "a = HardSwish(x) y = Add(a, x)": (-INF, INF),
    "y = Sigmoid(x)": (-INF, INF),
}


@pytest.mark.parametrize("body", CASES)
def test_limits(body: str) -> None:
    known = {"l": np.float32(-1), "h": np.float32(2)}
    model = build(body, x="float[N,4] x", **{name: value for name, value in known.items() if f", {name}" in body})
    low, high = saturation.limits(model.graph.inputs[0])
    assert (low, high) == pytest.approx(CASES[body])
    x = np.linspace(-20, 20, 400, dtype=np.float32).reshape(-1, 4)
    session = runtime.session(model, optimise=False, threads=1)
    clipped = session.run({"x": np.clip(x, np.float32(low), np.float32(high))})["y"]
    np.testing.assert_allclose(clipped, session.run({"x": x})["y"], rtol=0, atol=1e-6)


def test_an_output_has_no_limits() -> None:
    model = build("r = Neg(x) y = HardSwish(r)", x="float[N,4] x", outputs="y r")
    assert saturation.limits(model.graph[0].outputs[0]) == saturation.NONE


@given(st.integers(0, 2**32 - 1), st.floats(-6, 0), st.floats(0.5, 6))
def test_what_lies_beyond_is_seen_at_the_limits(seed: int, low: float, high: float) -> None:
    x = np.random.default_rng(seed).normal(0, 3, 500)
    whole = RangeOf("x").of([x], Valid())
    found, wanted = saturation.within(whole, low, high), RangeOf("x").of([np.clip(x, low, high)], Valid())
    assert (found.low, found.high) == (wanted.low, wanted.high) and found.bins.sum() == len(x)
    width = 2 * float(found.limit) / BINS
    centres = (np.arange(BINS) + 0.5) * width - float(found.limit)
    assert centres[found.bins > 0].min() >= low - width and centres[found.bins > 0].max() <= high + width


def test_no_limit_widens_a_range() -> None:
    seen = RangeOf("x").of([np.linspace(-1, 2, 50)], Valid())
    assert saturation.within(seen, -3.0, INF) is seen
    nothing = RangeOf("x").of([np.zeros((0, 4), np.float32)], Valid())
    assert activations.scale_of(saturation.within(nothing, -3.0, INF), "minmax", 99.9)[0] > 0


def test_codes_are_not_spent_on_what_hard_swish_makes_zero() -> None:
    constants = {"w": normal(8, 4, 1, 1) * 3}
    model = quantized_models.build(
        "c = Conv(x, w) y = HardSwish(c)", "float[N,4,6,6] x", "float[N,8,6,6] y", **constants
    )
    samples = [{"x": normal(2, 4, 6, 6, seed=seed)} for seed in range(4)]
    largest = max(float(run(model, x=each["x"])["y"].max()) for each in samples)
    quantized(model, context(samples), scheme="static", activations="minmax")
    assert largest > 3
    np.testing.assert_allclose(held(model, "c.scale"), (largest + 3) / 255, rtol=1e-5)
