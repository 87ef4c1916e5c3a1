"""``quantize{scaling=flatten}``: channels that stand out are split, which changes nothing but what rounding costs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc import shapes
from graphc.contract import PassResult
from graphc.errors import BadInput
from graphc.passes.quantize import Quantize
from graphc.quantization import flattening, sensitivity
from graphc.quantization.ways import sites_of
from tests.quantized_models import build, context, held, normal, quantized, reasons, run
from tests.small_models import operators

Arrays = dict[str, np.ndarray]


def model(width: int = 64, seed: int = 0) -> ir.Model:
    """Two products that read the same activation, one as a Gemm whose weight is turned."""
    return build(
        "a = MatMul(x, w) b = Gemm<transB=1>(x, v, c) y = Add(a, b)",
        f"float[N,{width}] x",
        "float[N,32] y",
        w=normal(width, 32, seed=seed),
        v=normal(32, width, seed=seed + 1),
        c=normal(32, seed=seed + 2),
    )


def samples(scales: np.ndarray, count: int = 4) -> list[Arrays]:
    return [{"x": (normal(30, len(scales), seed=i) * scales).astype(np.float32)} for i in range(count)]


def outliers(width: int, where: list[int], size: float) -> np.ndarray:
    scales = np.ones(width, np.float32)
    scales[where] = size
    return scales


def pieces(x: np.ndarray, threshold: float, number: int) -> np.ndarray:
    """FlattenQuant's: ``sgn(x) clip(|x| - kT, 0, T)`` for each k, the last one without an end."""
    found = []
    for k in range(number):
        end = threshold if k < number - 1 else np.inf
        found.append(np.sign(x) * np.clip(np.abs(x) - k * threshold, 0, end))
    return np.stack(found)


@settings(max_examples=25, deadline=None)
@given(st.integers(8, 48), st.lists(st.integers(0, 7), min_size=1, max_size=4), st.floats(3, 200), st.integers(0, 9))
def test_splitting_changes_nothing(width: int, where: list[int], size: float, seed: int) -> None:
    before, after = model(width, seed), model(width, seed)
    data = samples(outliers(width, where, size))
    shapes.infer(after)
    result = PassResult()
    options = Quantize(scheme="static", least=0)
    flattening.apply(after, sites_of(options, after, PassResult()), 1.0, context(data), result)
    # Larger values than calibration saw are not cut off, infinite ones stay.
    for x in (data[0]["x"], 3 * data[1]["x"], -5 * data[2]["x"], np.zeros((2, width), np.float32)):
        wanted = run(before, x=x)["y"]
        np.testing.assert_allclose(run(after, x=x)["y"], wanted, rtol=0, atol=1e-4 * (1 + np.abs(x).max()))
    if result.changed:
        assert held(after, "w").shape[0] == held(after, "v").shape[1] > width
        assert held(after, "w").shape[0] <= 2 * width


def test_pieces_are_those_of_the_paper() -> None:
    x = np.linspace(-7, 9, 33, dtype=np.float32)
    largest = np.array([9.0, 1.0, 1.0, 1.0])
    split = flattening.best(largest, np.ones(4), 1.0)
    count = split.pieces[0]
    assert count > 1 and (split.pieces[1:] == 1).all()
    after = build("y = MatMul(x, w)", "float[N,4] x", "float[N,8] y", w=normal(4, 8))
    options = Quantize(scheme="dynamic", least=0)
    sites = sites_of(options, after, PassResult())
    flattening._write(sites, split, flattening.edit.Names(after))
    product = next(node for node in after.graph if node.op_type == "MatMul")
    after.graph.outputs.append(product.inputs[0])
    rows = np.concatenate([x[:, None], np.zeros((33, 3), np.float32)], 1)
    found = run(after, x=rows)[product.inputs[0].name]
    wanted = pieces(x, split.threshold, count)
    np.testing.assert_allclose(found[:, 0], wanted[0], atol=1e-6)
    np.testing.assert_allclose(found[:, 4:].T, wanted[1:], atol=1e-5)
    np.testing.assert_allclose(wanted.sum(0), x, atol=1e-5)


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_one_channel_that_stands_out_costs_less(scheme: str) -> None:
    data = samples(outliers(64, [5, 40], 40.0))
    wanted = run(model(), **data[-1])["y"]
    errors = {}
    for scaling in ("none", "flatten"):
        after = model()
        result = quantized(after, context(data), scheme=scheme, scaling=scaling, extra=1.0)
        errors[scaling] = np.square(run(after, **data[-1])["y"] - wanted).mean()
    assert result.changes[0].startswith("channel split (×") and "done for 1 of 1" in " ".join(result.notes)
    assert ("DynamicQuantizeLinear" if scheme == "dynamic" else "QuantizeLinear") in operators(after)
    assert errors["flatten"] < 0.5 * errors["none"]


def test_splitting_is_tried_before_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    data = samples(outliers(64, [5, 40], 40.0))
    monkeypatch.setattr(flattening, "_energy", lambda members: np.where(np.arange(64) % 2, 1.0, 1e-9))
    result = quantized(model(), context(data), scheme="dynamic", scaling="flatten")
    assert "squared error is" in " ".join(result.notes)
    losses = iter([0.1, 0.2])
    monkeypatch.setattr(sensitivity.Outputs, "loss", lambda self, model: next(losses))
    after = model()
    result = quantized(after, context(data), scheme="dynamic", scaling="flatten")
    why = "channels are not split: the outputs' squared error is 0.2 with split channels and 0.1 without"
    assert why in reasons(result) and "Concat" not in operators(after) and held(after, "w").shape == (64, 32)


def test_channels_that_are_alike_are_left_with_the_numbers() -> None:
    data = samples(np.ones(64, np.float32))
    after = model()
    result = quantized(after, context(data), scheme="dynamic", scaling="flatten")
    assert "12% more channels would not halve the error of rounding the others" in reasons(result)
    assert "done for 0 of 1" in " ".join(result.notes) and "Concat" not in operators(after)
    assert held(after, "w").shape == (64, 32)
    nothing = build("y = Conv(x, w)", "float[N,3,8,8] x", "float[N,8,6,6] y", w=normal(8, 3, 3, 3))
    result = quantized(nothing, context([{"x": normal(2, 3, 8, 8)}]), scheme="static", scaling="flatten")
    assert any(reason.startswith("no activation is read by products") for reason in reasons(result))


def test_there_must_be_activations_to_quantize() -> None:
    with pytest.raises(BadInput, match="scaling=flatten is for activations"):
        Quantize(scaling="flatten")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=40), st.floats(0, 1))
def test_the_split_is_never_worse_nor_larger_than_allowed(largest: list[float], extra: float) -> None:
    split = flattening.best(np.array(largest), np.ones(len(largest)), extra)
    assert split.ratio <= 1 and (split.pieces >= 1).all()
    assert split.pieces.sum() - len(largest) <= extra * len(largest)
    assert (np.array(largest) <= split.pieces * split.threshold * (1 + 1e-6)).all()
    assert len(split.source) == len(split.number) == split.pieces.sum() - len(largest)
