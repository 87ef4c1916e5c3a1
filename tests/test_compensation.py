"""What remains makes up for what goes: laws of the fits, and whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from graphc import runtime, shapes
from graphc.axes.groups import analyse
from graphc.collection import Collector
from graphc.contract import Capabilities, Context
from graphc.passes.prune import Prune
from graphc.passes.shrink import Shrink
from graphc.pipeline import optimize
from graphc.pruning import compensation
from graphc.pruning.compensation import Seen
from graphc.recipe import Recipe
from graphc.stats import Gram
from tests.fashion import batches, fashion

DATA = Path(__file__).parent / "data"
HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
TARGET = Capabilities("portable", 10, {"": 21})


def parse(text: str, seed: int = 0) -> ir.Model:
    """A model from its text, in which what stands in angle brackets are weights; they get random values."""
    proto = onnx.parser.parse_model(f"{HEAD} g {text}")
    rng = np.random.default_rng(seed)
    for info in proto.graph.value_info:
        shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        proto.graph.initializer.append(
            numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), info.name)
        )
    proto.graph.ClearField("value_info")
    model = ir.from_proto(proto)
    shapes.infer(model)
    return model


def tokens(length: int) -> list[dict[str, np.ndarray]]:
    return [{"input_ids": np.random.default_rng(0).integers(0, 256, (1, length))}]


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows that vary together around a mean, a matrix, and which columns go."""
    n, m, rows = draw(st.integers(2, 9)), draw(st.integers(1, 5)), draw(st.integers(3, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mixing = rng.standard_normal((n, n)) * 10.0 ** rng.uniform(-2, 1, n)
    x = rng.standard_normal((rows, n)) @ mixing + rng.standard_normal(n) * draw(st.sampled_from([0, 1, 20]))
    gone = np.zeros(n, dtype=bool)
    gone[rng.permutation(n)[: draw(st.integers(1, n - 1))]] = True
    return x, rng.standard_normal((m, n)), gone


def seen(x: np.ndarray) -> Seen:
    found = Gram.of(x)
    return Seen(found.mean, found.centred)


def error(x: np.ndarray, weight: np.ndarray, fitted: np.ndarray, bias: Any) -> float:
    return float(np.square(x @ weight.T - (x @ fitted.T + bias)).sum())


class TestLaws:
    @settings(deadline=None, max_examples=60)
    @given(problems())
    def test_none_then_mean_then_least_squares(self, problem: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        x, weight, gone = problem
        known = seen(x)
        none = error(x, weight, np.where(gone, 0, weight), 0)
        mean = error(x, weight, *compensation.mean_bias(weight, known, gone))
        best = error(x, weight, *compensation.least_squares(weight, known, gone))
        slack = 1e-9 * float(np.square(x @ weight.T).sum())
        assert best <= mean + slack and mean <= none + slack

    @settings(deadline=None, max_examples=60)
    @given(problems())
    def test_a_sweep_comes_to_least_squares(self, problem: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        x, weight, gone = problem
        known = seen(x)
        for a, b in zip(
            compensation.least_squares(weight, known, gone), compensation.sweep(weight, known, gone), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * max(1.0, float(np.abs(a).max())))

    @settings(deadline=None, max_examples=60)
    @given(problems())
    def test_what_goes_is_zero(self, problem: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        x, weight, gone = problem
        for fit in compensation.FITS.values():
            fitted, bias = fit(weight, seen(x), gone)
            assert not fitted[:, gone].any() and np.isfinite(fitted).all() and bias.shape == (len(weight),)

    def test_a_twin_is_merged_into_its_twin(self) -> None:
        x = np.random.default_rng(0).standard_normal((50, 3))
        x[:, 2] = 2 * x[:, 0] + 3
        weight = np.array([[1.0, 2.0, 5.0]])
        gone = np.array([False, False, True])
        fitted, bias = compensation.merge_similar(weight, seen(x), gone)
        assert error(x, weight, fitted, bias) == pytest.approx(0, abs=1e-18)


def outputs(model: ir.Model, x: np.ndarray) -> np.ndarray:
    (y,) = runtime.session(model, optimise=False).run({"x": x}).values()
    return y


def pruned(model: ir.Model, x: np.ndarray, **options: Any) -> tuple[ir.Model, list[str]]:
    """A pruned copy and what was refused; budgets are met to one unit unless ``multiple_of`` is given."""
    copy = model.clone()
    each = Prune(**{"multiple_of": 1} | options)
    collector = Collector([{"x": x}])
    wanted = each.needs(copy)
    context = Context(
        TARGET, statistics=collector.collect(copy, wanted.statistics), collect=collector.collect, calibration=[{"x": x}]
    )
    result = each.run(copy, context)
    return copy, [refusal.reason for refusal in result.refusals]


MODELS = {
    "matmul": """(float[N,6] x) => (float[N,4] y) <float[6,12] a, float[12,4] b>
        { h = MatMul(x,a) r = Relu(h) y = MatMul(r,b) }""",
    "with a bias": """(float[N,6] x) => (float[N,4] y) <float[6,12] a, float[12,4] b, float[4] c>
        { h = MatMul(x,a) r = Relu(h) m = MatMul(r,b) y = Add(m,c) }""",
    "left": """(float[6,N] x) => (float[4,N] y) <float[12,6] a, float[4,12] b>
        { h = MatMul(a,x) r = Relu(h) y = MatMul(b,r) }""",
    "gemm": """(float[N,6] x) => (float[N,4] y) <float[6,12] a, float[4,12] b>
        { h = MatMul(x,a) r = Relu(h) y = Gemm<transB=1,alpha=0.5>(r,b) }""",
    "conv": """(float[N,3,6,6] x) => (float[N,4,a,b] y) <float[12,3,3,3] a, float[4,12,3,3] b>
        { h = Conv<pads=[1,1,1,1]>(x,a) r = Relu(h) y = Conv<pads=[1,1,1,1]>(r,b) }""",
    "grouped conv": """(float[N,4,6,6] x) => (float[N,4,a,b] y) <float[12,4,1,1] a, float[4,6,3,3] b>
        { h = Conv(x,a) r = Relu(h) y = Conv<group=2>(r,b) }""",
    "two readers": """(float[N,6] x) => (float[N,4] y) <float[6,12] a, float[12,4] b, float[12,4] c>
        { h = MatMul(x,a) r = Relu(h) p = MatMul(r,b) q = MatMul(r,c) t = Tanh(q) y = Mul(p,t) }""",
}  # fmt: skip
SHAPES = {"conv": (5, 3, 6, 6), "grouped conv": (5, 4, 6, 6), "left": (6, 200)}


@pytest.mark.parametrize("name", MODELS)
def test_errors_fall_and_shrink_stays_exact(name: str) -> None:
    model = parse(MODELS[name])
    rng = np.random.default_rng(1)
    shape = SHAPES.get(name, (200, 6))
    x = rng.standard_normal(shape).astype(np.float32)
    if len(shape) == 2:
        x = (np.linalg.qr(rng.standard_normal((6, 6)))[0] * [3, 2, 1, 0.3, 0.2, 0.1] @ x.T).T if shape[1] == 6 else x
        x = x.astype(np.float32)
    wanted = outputs(model, x)
    errors = {}
    for method in ("none", "mean", "ls", "obs", "merge"):
        found, refusals = pruned(model, x, ratio=0.34, criterion="l2", compensate=method)
        assert not refusals
        y = outputs(found, x)
        errors[method] = float(np.square(y - wanted).sum())
        small = found.clone()
        Shrink().run(small, Context(TARGET))
        assert sum(v.const_value.size for v in small.graph.initializers.values()) < sum(  # type: ignore[union-attr]
            v.const_value.size
            for v in found.graph.initializers.values()  # type: ignore[union-attr]
        )
        np.testing.assert_allclose(outputs(small, x), y, rtol=1e-4, atol=1e-4 * np.abs(y).max())
    if name != "two readers":
        assert errors["ls"] < errors["mean"] < errors["none"]
    assert errors["obs"] == pytest.approx(errors["ls"], rel=1e-3)


@pytest.mark.parametrize(("rows", "noted"), [(11, True), (40, False)])
def test_too_few_rows_are_told_of(rows: int, noted: bool) -> None:
    """Twelve channels cannot be told apart by eleven rows."""
    model = parse(MODELS["matmul"])
    x = np.random.default_rng(0).standard_normal((rows, 6)).astype(np.float32)
    each = Prune(ratio=0.25, compensate="ls")
    statistics = Collector([{"x": x}]).collect(model, each.needs(model).statistics)
    result = each.run(model, Context(TARGET, statistics=statistics, calibration=[{"x": x}]))
    assert any("fewer rows" in note for note in result.notes) == noted


def test_where_nothing_can_make_up_for_it() -> None:
    model = parse("(float[N,6] x) => (float[N,N] y) <float[6,8] a, float[6,8] b>"
                  "{ p = MatMul(x,a) q = MatMul(x,b) t = Transpose<perm=[1,0]>(q) y = MatMul(p,t) }")  # fmt: skip
    x = np.random.default_rng(0).standard_normal((9, 6)).astype(np.float32)
    _, refusals = pruned(model, x, ratio=0.25, kinds=("all",), compensate="ls")
    assert refusals == ["nothing can make up for its units: no weight reads it: two activations meet"]


@pytest.mark.parametrize("criterion", ["wanda", "obs", "flap", "projection", "fluctuation", "activation"])
def test_criteria_see_what_magnitude_does_not(criterion: str) -> None:
    """Four neurons have large weights and never fire: calibrated criteria take them first."""
    model = parse(MODELS["matmul"])
    a = model.graph.initializers["a"].const_value.numpy().copy()  # type: ignore[union-attr]
    x = np.abs(np.random.default_rng(0).standard_normal((64, 6))).astype(np.float32)
    a[:, [1, 4, 6, 9]] = -9
    model.graph.initializers["a"].const_value = ir.tensor(a, name="a")
    found, _ = pruned(model, x, ratio=1 / 3, criterion=criterion)
    gone = np.flatnonzero(~found.graph.initializers["a"].const_value.numpy().any(axis=0))  # type: ignore[union-attr]
    assert gone.tolist() == [1, 4, 6, 9]
    np.testing.assert_allclose(outputs(found, x), outputs(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("criterion", ["taylor", "taylor-second", "taylor-mix", "taylor-vector", "heapr", "surgeon"])
def test_gradients_see_what_the_loss_ignores(criterion: str) -> None:
    pytest.importorskip("torch")
    model = parse(MODELS["matmul"])
    b = model.graph.initializers["b"].const_value.numpy().copy()  # type: ignore[union-attr]
    b[[2, 5, 7]] = 1e-6
    model.graph.initializers["b"].const_value = ir.tensor(b, name="b")
    x = np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)
    found, _ = pruned(model, x, ratio=0.25, criterion=criterion)
    gone = np.flatnonzero(~found.graph.initializers["a"].const_value.numpy().any(axis=0))  # type: ignore[union-attr]
    assert gone.tolist() == [2, 5, 7]


@pytest.mark.slow
def test_heads_by_groups_of_queries() -> None:
    """A real model with grouped queries: heads go, their reader makes up for them, and shrink removes them exactly."""
    report = optimize(
        DATA / "tiny_mixtral_bytes.onnx",
        recipe="simplify,fuse,prune{ratio=0.4 kinds=head criterion=projection compensate=ls allocate=global},shrink",
        calibrate=tokens(24),
        cache=False,
        measure=False,
    )
    assert report.ok, [p.error for p in report.passes]
    changes = {p.name: p.changes for p in report.passes}
    assert any("head" in change for change in changes["shrink"]) and any("refitted" in c for c in changes["prune"])


@pytest.mark.slow
def test_experts_refit_without_a_bias() -> None:
    errors = {}
    for method in ("none", "ls"):
        report = optimize(
            DATA / "tiny_mixtral_bytes.onnx",
            recipe=f"simplify,fuse,prune{{ratio=0.2 kinds=neuron criterion=wanda compensate={method}}},shrink",
            calibrate=tokens(24),
            cache=False,
            measure=False,
        )
        assert report.ok, [p.error for p in report.passes]
        errors[method] = report.approximation["error"]
    assert errors["ls"] < errors["none"]


def test_sequential_refits_on_what_earlier_layers_have_become() -> None:
    model = parse("""(float[N,6] x) => (float[N,4] y) <float[6,16] a, float[16,16] b, float[16,4] c>
        { h = MatMul(x,a) r = Relu(h) g = MatMul(r,b) s = Relu(g) y = MatMul(s,c) }""")  # fmt: skip
    x = np.random.default_rng(2).standard_normal((300, 6)).astype(np.float32)
    wanted = outputs(model, x)
    once, _ = pruned(model, x, ratio=0.5, compensate="ls")
    again, refusals = pruned(model, x, ratio=0.5, compensate="ls", sequential=True)
    assert not refusals
    errors = [float(np.square(outputs(m, x) - wanted).sum()) for m in (once, again)]
    assert errors[0] != errors[1]
    assert len(analyse(again).groups) == len(analyse(model).groups)


@pytest.mark.parametrize("allocate", ["uniform", "global", "per-cost", "erk", "owl", "influence"])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
def test_budgets_are_met_to_one_unit(allocate: str, ratio: float) -> None:
    model = parse("""(float[N,6] x) => (float[N,6] y) <float[6,16] a, float[16,6] b, float[6,40] c, float[40,6] d> {
        h = MatMul(x,a) r = Relu(h) m = MatMul(r,b) z = Add(x,m)
        g = MatMul(z,c) s = Relu(g) n = MatMul(s,d) y = Add(z,n) }""")
    x = np.random.default_rng(2).standard_normal((30, 6)).astype(np.float32)
    found, _ = pruned(model, x, ratio=ratio, allocate=allocate, criterion="wanda")
    gone = sum(
        int((~found.graph.initializers[n].const_value.numpy().any(axis=0)).sum())  # type: ignore[union-attr]
        for n in ("a", "c")
    )
    assert abs(gone - ratio * 56) <= 1


PRESETS = ["magnitude", "wanda-structured", "flap", "cfsp", "amp", "llm-pruner", "obs-ls", "surgeon", "darwin-search",
           "rd-dp", "adapt-pruner"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset: str) -> None:
    """Each named method runs on a trained model, takes what it should, and leaves it far better than chance."""
    if preset in ("llm-pruner", "adapt-pruner", "surgeon"):
        pytest.importorskip("torch")
    _, classes = fashion("calib")
    cases = [(each, classes[50 * i :][:50]) for i, each in enumerate(batches("calib", 200, 50))]
    test, labels = fashion("test")
    report = optimize(
        DATA / "fmnist_vit_tiny.onnx",
        recipe=Recipe.named(preset),
        calibrate=cases,
        data=[{"image": test[:20]}],
        cache=False,
        measure=False,
    )
    assert report.ok, [p.error for p in report.passes]
    assert report.model is not None
    before = sum(v.const_value.size for v in ir.load(DATA / "fmnist_vit_tiny.onnx").graph.initializers.values())  # type: ignore[union-attr]
    after = sum(v.const_value.size for v in report.model.graph.initializers.values())  # type: ignore[union-attr]
    assert after < (0.95 if preset == "cfsp" else 0.85) * before
    (scores,) = runtime.session(report.model, optimise=True).run({"image": test}).values()
    assert (scores.argmax(axis=1) == labels).mean() > 0.5
