"""Scales that move before weights are rounded: exact by themselves, and of use."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc import edit
from graphc.contract import PassResult
from graphc.quantization import scaling, sites, streams
from graphc.quantization.granularity import Granularity
from graphc.quantization.grid import Grid
from graphc.shapes import infer
from tests.quantized_models import build, context, held, normal, pictures, quantized, run


def normed() -> ir.Model:
    """A normalisation, one of whose channels is a hundred times as large, that two products read."""
    g = np.ones(64, np.float32)
    g[5] = 100
    return build(
        "n = LayerNormalization(x, g, d) a = MatMul(n, w) b = MatMul(n, v) y = Add(a, b)",
        "float[N,M,64] x",
        "float[N,M,48] y",
        g=g,
        d=normal(64),
        w=normal(64, 48),
        v=normal(64, 48, seed=2),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"scaling": "smooth", "scheme": "dynamic"},
        {"scaling": "smooth", "scheme": "static"},
        {"scaling": "awq", "bits": 3, "block": 16},
    ],
)
def test_scales_that_move_are_exact_and_help(options: dict[str, Any]) -> None:
    samples = [{"x": normal(2, 30, 64, seed=i)} for i in range(3)]
    want = run(normed(), **samples[0])["y"]
    errors = []
    for each in ({**options, "scaling": "none"}, options):
        model = normed()
        result = quantized(model, context(samples), **each)
        errors.append(np.square(run(model, **samples[0])["y"] - want).sum())
    assert "activation's scales moved to its weights" in result.changes
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("method", ["smooth", "awq"])
def test_moving_scales_alone_changes_nothing(method: Any) -> None:
    samples = [{"x": normal(2, 30, 64, seed=i)} for i in range(3)]
    model = normed()
    want = run(model, **samples[0])["y"]
    chosen = [(s, (Grid(3), Granularity(0, 16))) for s in sites.find(model, ("MatMul",), (), (), 0, PassResult())]
    members = scaling.groups(chosen)[0]
    statistics = context(samples).collect(model, {members[0][0].uses[0].moments})
    assert scaling.move(members, statistics, method, 0.5, edit.Names(model))
    np.testing.assert_allclose(run(model, **samples[0])["y"], want, atol=1e-5 * np.abs(want).max())
    assert held(model, "g")[5] < 90


def convolutions(clip: str = "") -> ir.Model:
    """A residual block with a depthwise convolution, as mobile networks have it."""
    constants = {
        "w": normal(8, 3, 3, 3),
        "b": normal(8),
        "e": normal(16, 8, 1, 1, seed=1) * np.geomspace(0.05, 2, 16, dtype=np.float32).reshape(-1, 1, 1, 1),
        "f": normal(16, seed=1),
        "v": normal(16, 1, 3, 3, seed=2),
        "c": normal(16, seed=2),
        "p": normal(8, 16, 1, 1, seed=3),
        "h": normal(10, 8, 1, 1, seed=4),
        "m": normal(8, 1, 1, seed=5),
    }
    act = "Clip(%s, low, high)" if clip else "Relu(%s)"
    if clip:
        constants |= {"low": np.array(0, np.float32), "high": np.array(clip, np.float32)}
    return build(
        f"a = Conv<pads=[1,1,1,1]>(x, w, b) r = Conv(a, e, f) s = {act % 'r'} "
        f"t = Conv<pads=[1,1,1,1],group=16>(s, v, c) u = {act % 't'} q = Conv(u, p) o = Add(q, a) k = Add(o, m) "
        "l = MaxPool<kernel_shape=[2,2]>(k) y = Conv(l, h)",
        "float[N,3,8,8] x",
        "float[N,10,7,7] y",
        **constants,
    )


def scaled_channels(model: ir.Model) -> list[streams.Stream]:
    infer(model)
    found = streams.find(sites.find(model, ("Conv", "MatMul", "Gemm"), (), (), 0, PassResult()))
    for i, stream in enumerate(found):
        streams.scale(stream, np.exp(normal(stream.channels, seed=i)).astype(np.float64), edit.Names(model))
    return found


def test_factors_of_channels_go_through_all_that_lies_between_products() -> None:
    model = convolutions()
    before = run(model, x=pictures()[0]["x"])["y"]
    found = scaled_channels(model)
    assert sorted((len(s.makers), len(s.readers), s.channels) for s in found) == [(1, 1, 16), (1, 1, 16), (2, 2, 8)]
    np.testing.assert_allclose(run(model, x=pictures()[0]["x"])["y"], before, rtol=1e-3, atol=1e-3)
    assert not np.allclose(held(model, "e"), held(convolutions(), "e"))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3), st.sampled_from(["Relu", "LeakyRelu", "Sigmoid"]), st.booleans())
def test_factors_of_channels_of_products_are_exact(seed: int, act: str, output: bool) -> None:
    """A Sigmoid lets none through, nor does a value that is an output."""
    model = build(
        f"h = MatMul(x, w) b = Add(h, c) r = {act}(b) y = Gemm<transB=1>(r, v, d) z = Relu(y)",
        "float[N,16] x",
        "float[N,8] z, float[N,12] r" if output else "float[N,8] z",
        w=normal(16, 12, seed=seed),
        c=normal(12, seed=seed),
        v=normal(8, 12, seed=seed),
        d=normal(8, seed=seed),
    )
    x = normal(5, 16, seed=seed)
    before = run(model, x=x)["z"]
    assert len(scaled_channels(model)) == (act != "Sigmoid" and not output)
    np.testing.assert_allclose(run(model, x=x)["z"], before, rtol=1e-3, atol=1e-3)


def test_equal_channels_lower_the_error_of_static_quantization() -> None:
    """Channels of which some are a hundred times smaller than others, and count as much."""
    sizes = np.geomspace(0.01, 1, 16).astype(np.float32).reshape(-1, 1, 1, 1)
    model = build(
        "a = Conv<pads=[1,1,1,1]>(x, w) r = Relu(a) y = Conv(r, v)",
        "float[N,3,8,8] x",
        "float[N,4,8,8] y",
        w=normal(16, 3, 3, 3) * sizes,
        v=normal(4, 16, 1, 1) / sizes.reshape(1, -1, 1, 1),
    )
    samples = pictures(6)
    want, errors = run(model, **samples[0])["y"], []
    for method in ("none", "channels"):
        one = model.clone()
        result = quantized(one, context(samples), scheme="static", scaling=method, full_range=True)
        errors.append(float(np.square(run(one, **samples[0])["y"] - want).mean()))
    assert any(change.startswith("channels brought") for change in result.changes)
    assert errors[1] < 0.2 * errors[0]


def test_no_factor_goes_through_a_limit_from_above() -> None:
    """A channel that calibration saw below it may be above it on other data."""
    model = convolutions("6.0")
    infer(model)
    found = streams.find(sites.find(model, ("Conv",), (), (), 0, PassResult()))
    assert len(found) == len(scaled_channels(convolutions())) - 2
