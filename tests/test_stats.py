"""Statistics: streamed sums equal dense ones, halves add up to the whole, an interruption changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from graphc import contraction, stats
from graphc.cache import Store
from graphc.collection import Collector
from graphc.collection.hashing import value_hashes
from graphc.contract import Arrays, Context, Effect, Needs, Pass, PassResult
from graphc.errors import BadInput
from graphc.pipeline import optimize
from graphc.stats import Rows, Valid, Window
from graphc.stats.range import BINS

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
DENSE = (
    "g (float[N,4] x) => (float[N,3] y) <float[4,5] a, float[5,3] b> { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }"
)
EVERYTHING = Valid()


def parse(text: str, seed: int = 0) -> ir.Model:
    """A model from its text, in which what stands in angle brackets are weights; they get random values."""
    proto = onnx.parser.parse_model(f"{HEAD} {text}")
    rng = np.random.default_rng(seed)
    for info in proto.graph.value_info:
        shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(array, info.name))
    proto.graph.ClearField("value_info")
    return ir.from_proto(proto)


def samples(count: int, rows: int = 6, width: int = 4, seed: int = 1) -> list[Arrays]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((rows, width), dtype=np.float32)} for _ in range(count)]


@st.composite
def blocks(draw: st.DrawFn) -> tuple[np.ndarray, list[int]]:
    """Rows, some with a large mean, and where they are cut into samples."""
    rows, width = draw(st.integers(2, 40)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** rng.uniform(-3, 3, width)
    array = (rng.standard_normal((rows, width)) + rng.choice([0, 30], width)) * scale
    cuts = draw(st.lists(st.integers(0, rows), max_size=4))
    return array.astype(np.float32), sorted(cuts)


def merged(request: Any, parts: Sequence[np.ndarray]) -> Any:
    whole = request.of([parts[0]], EVERYTHING)
    for part in parts[1:]:
        whole.merge(request.of([part], EVERYTHING))
    return whole


class TestLaws:
    @settings(deadline=None, max_examples=50)
    @given(blocks())
    def test_moments_are_those_of_two_passes(self, case: tuple[np.ndarray, list[int]]) -> None:
        rows, cuts = case
        found = merged(stats.MomentsOf("x"), np.split(rows, cuts))
        dense = rows.astype(np.float64)
        assert found.count == len(rows)
        np.testing.assert_allclose(found.mean, dense.mean(axis=0), rtol=1e-10, atol=1e-12 * np.abs(dense).max())
        np.testing.assert_allclose(found.variance, dense.var(axis=0), rtol=1e-8, atol=1e-14 * np.square(dense).max())
        np.testing.assert_allclose(found.squares, np.square(dense).sum(axis=0), rtol=1e-10)
        np.testing.assert_allclose(found.absolute, np.abs(dense).sum(axis=0), rtol=1e-10)
        np.testing.assert_array_equal(found.largest, np.abs(dense).max(axis=0))

    @settings(deadline=None, max_examples=50)
    @given(blocks())
    def test_a_gram_matrix_is_that_of_two_passes(self, case: tuple[np.ndarray, list[int]]) -> None:
        rows, cuts = case
        found = merged(stats.GramOf("x"), np.split(rows, cuts))
        dense = rows.astype(np.float64)
        around = dense - dense.mean(axis=0)
        # Products are made in float32 around the mean: the error is that of one rounding of each term.
        size = np.linalg.norm(np.abs(dense), axis=0)
        slack = 1e-6 * np.outer(size, size)
        assert (np.abs(found.centred - around.T @ around) <= slack).all()
        assert (np.abs(found.products - dense.T @ dense) <= slack).all()

    @settings(deadline=None, max_examples=50)
    @given(blocks())
    def test_a_range_does_not_depend_on_the_order(self, case: tuple[np.ndarray, list[int]]) -> None:
        rows, cuts = case
        parts = np.split(rows, cuts)
        a, b = merged(stats.RangeOf("x"), parts), merged(stats.RangeOf("x"), parts[::-1])
        for name, array in a.arrays().items():
            np.testing.assert_array_equal(array, b.arrays()[name])
        assert a.bins.sum() == rows.size and len(a.bins) == BINS

    @settings(deadline=None, max_examples=50)
    @given(blocks())
    def test_products_of_two_values(self, case: tuple[np.ndarray, list[int]]) -> None:
        rows, cuts = case
        request = stats.CrossOf("a", "b")
        other = rows[:, ::-1] * 2 + 1
        pairs = list(zip(np.split(rows, cuts), np.split(other, cuts), strict=True))
        found = request.of(pairs[0], EVERYTHING)
        for pair in pairs[1:]:
            found.merge(request.of(pair, EVERYTHING))
        a, b = rows.astype(np.float64), other.astype(np.float64)
        dense = (a - a.mean(axis=0)).T @ (b - b.mean(axis=0))
        np.testing.assert_allclose(found.centred, dense, rtol=1e-7, atol=1e-10 * np.abs(dense).max())

    @settings(deadline=None, max_examples=50)
    @given(blocks())
    def test_storing_keeps_everything(self, case: tuple[np.ndarray, list[int]]) -> None:
        for request in (stats.MomentsOf("x"), stats.GramOf("x"), stats.RangeOf("x")):
            found = request.of([case[0]], EVERYTHING)
            again = request.statistic.from_arrays(found.arrays())
            for name, array in found.arrays().items():
                np.testing.assert_array_equal(array, again.arrays()[name])


class TestKinds:
    def test_similarity(self) -> None:
        a = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        b = np.array([[0.0, 3.0], [0.0, 1.0], [1.0, 0.0]])
        found = stats.SimilarityOf("a", "b").of([a, b], EVERYTHING)
        assert (found.count, found.cosine, found.angle) == (2, 0.5, 0.25)
        assert found.change == pytest.approx((10 + 0.25) / 2)

    def test_routing(self) -> None:
        indices, weights = np.array([[0, 1], [1, 2], [1, 0]]), np.array([[0.7, 0.3], [0.9, 0.1], [0.6, 0.4]])
        found = stats.RoutingOf("i", 4, "w").of([indices, weights], EVERYTHING)
        np.testing.assert_array_equal(found.chosen, [2, 3, 1, 0])
        np.testing.assert_allclose(found.mass, [1.1, 1.8, 0.1, 0])
        assert found.together[0, 1] == found.together[1, 0] == 2 and found.together[0, 2] == 0

    @pytest.mark.parametrize("shape", [(2, 3, 5), (6, 5), (2, 4, 3, 5), (2, 3, 4, 5)])
    def test_padding_does_not_count(self, shape: tuple[int, ...]) -> None:
        mask = np.array([[True, True, False], [False, True, True]])
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        found = stats.MomentsOf("x").of([x], Valid(mask))
        count = int(np.prod(shape[:-1]) * 4 / 6)
        assert found.count == count
        at = {(2, 3, 5): mask[..., None], (6, 5): mask.reshape(6, 1)}.get(shape)
        if at is None:
            at = mask[:, None, :, None] if shape[2] == 3 else mask[:, :, None, None]
        kept = x[np.broadcast_to(at, shape)].reshape(-1, 5)
        np.testing.assert_allclose(found.mean, kept.mean(axis=0), rtol=1e-5, atol=1e-6)

    def test_rows_of_experts(self) -> None:
        x = np.arange(12, dtype=np.float32).reshape(4, 3, 1)
        rows = Rows(axis=-2, by="e", size=3)
        found = stats.MomentsOf("x", rows).of([x, np.array([[2], [0], [2], [2]])], EVERYTHING)
        np.testing.assert_array_equal(found.count, [1, 0, 3])
        np.testing.assert_allclose(found.mean[2], x[[0, 2, 3], :, 0].mean(axis=0))

    def test_nan_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="'x' has NaN"):
            stats.MomentsOf("x").of([np.array([[np.nan]])], EVERYTHING)


CONTRACTIONS = {
    "matmul": ("(float[N,2,4] x) => (float[N,2,3] y) <float[4,3] w> { y = MatMul(x, w) }", (5, 2, 4)),
    "left": ("(float[N,4,2] x) => (float[N,3,2] y) <float[3,4] w> { y = MatMul(w, x) }", (5, 4, 2)),
    "gemm": ("(float[N,4] x) => (float[N,3] y) <float[4,3] w> { y = Gemm(x, w) }", (5, 4)),
    "gemm transposed": (
        "(float[4,N] x) => (float[N,3] y) <float[3,4] w> { y = Gemm<transA=1,transB=1>(x, w) }",
        (4, 5),
    ),
    "stack": ("(float[2,N,4] x) => (float[2,N,3] y) <float[2,4,3] w> { y = MatMul(x, w) }", (2, 5, 4)),
    "shared by a stack": ("(float[1,N,4] x) => (float[2,N,3] y) <float[2,4,3] w> { y = MatMul(x, w) }", (1, 5, 4)),
    "conv": (
        "(float[N,2,7,6] x) => (float[N,3,a,b] y) <float[3,2,3,2] w>"
        "{ y = Conv<pads=[1,0,2,1],strides=[2,1],dilations=[1,2]>(x, w) }",
        (2, 2, 7, 6),
    ),
    "same": (
        '(float[N,2,7] x) => (float[N,3,a] y) <float[3,2,4] w> { y = Conv<auto_pad="SAME_LOWER",strides=[2]>(x, w) }',
        (2, 2, 7),
    ),
    "grouped": ("(float[N,4,5] x) => (float[N,6,a] y) <float[6,2,2] w> { y = Conv<group=2>(x, w) }", (2, 4, 5)),
}


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_rows_times_matrices_are_what_the_node_computes(name: str) -> None:
    """The sum of squares of the output is tr(W H WT), which holds for all rows only if rows and matrices are right."""
    text, shape = CONTRACTIONS[name]
    model = parse(f"g {text}")
    found = contraction.of(model.graph[0])
    assert not isinstance(found, str), found
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    weight = model.graph.initializers["w"].const_value.numpy()  # type: ignore[union-attr]
    matrices = found.matrices(weight)
    np.testing.assert_array_equal(found.restored(matrices), weight)

    gram = Collector([{"x": x}]).collect(model, [found.gram])[found.gram].products
    gram = gram if gram.ndim == 3 else gram[None]
    from graphc import runtime

    (y,) = runtime.session(model, optimise=False).run({"x": x}).values()
    assert np.einsum("gmi,gij,gmj->", matrices, gram, matrices) == pytest.approx(np.square(y).sum(), rel=1e-4)


def test_a_window_knows_its_padding() -> None:
    window = Window((3,), (2,), (1,), (0, 0), "SAME_UPPER")
    assert window.padding([6]) == [(0, 1)]


class TestCollector:
    def test_one_run_collects_everything(self, tmp_path: Path) -> None:
        model, data = parse(DENSE), samples(5)
        wanted = [stats.MomentsOf("r"), stats.GramOf("x"), stats.SimilarityOf("h", "r"), stats.RangeOf("y")]
        found = Collector(data, store=Store(tmp_path)).collect(model, wanted)
        x = np.concatenate([s["x"] for s in data]).astype(np.float64)
        a = model.graph.initializers["a"].const_value.numpy()  # type: ignore[union-attr]
        r = np.maximum(x @ a, 0)
        np.testing.assert_allclose(found[wanted[0]].mean, r.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(found[wanted[1]].products, x.T @ x, rtol=1e-5)
        assert set(found) == set(wanted) and found[wanted[3]].bins.sum() == 90

    def test_it_is_cached_by_what_it_depends_on(self, tmp_path: Path) -> None:
        data, request = samples(3), stats.MomentsOf("r")
        ran: list[str] = []
        collector = Collector(data, store=Store(tmp_path), progress=lambda what, done, total: ran.append(what))
        first = collector.collect(parse(DENSE), [request])[request]
        count = len(ran)
        later = parse(DENSE)
        later.graph.initializers["b"].const_value = ir.tensor(np.zeros((5, 3), np.float32))
        again = collector.collect(later, [request])[request]
        assert len(ran) == count, "what comes after the value does not matter"
        np.testing.assert_array_equal(first.mean, again.mean)
        earlier = parse(DENSE)
        earlier.graph.initializers["a"].const_value = ir.tensor(np.ones((4, 5), np.float32))
        assert not np.array_equal(collector.collect(earlier, [request])[request].mean, first.mean)
        other = Collector(samples(3, seed=9), store=Store(tmp_path)).collect(parse(DENSE), [request])[request]
        assert not np.array_equal(other.mean, first.mean)

    def test_names_do_not_matter(self) -> None:
        a, b = (
            parse(DENSE),
            parse(DENSE.replace("r", "renamed").replace("RenamedelU", "Relu").replace("Renamedelu", "Relu")),
        )
        hashes = [value_hashes(m, m.graph.outputs)[m.graph.outputs[0]] for m in (a, b)]
        assert hashes[0] == hashes[1]

    @settings(max_examples=5, deadline=None)
    @given(st.integers(0, 4))
    def test_resumed_equals_uninterrupted(self, at: int) -> None:
        import tempfile

        model, data = parse(DENSE), samples(6)
        wanted = [stats.MomentsOf("r"), stats.GramOf("r")]
        whole = Collector(data).collect(model, wanted)

        def interrupt(what: str, done: int, total: int) -> None:
            if done == at + 1:
                raise KeyboardInterrupt

        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder))
            with pytest.raises(KeyboardInterrupt):
                Collector(data, store=store, save_every=0, progress=interrupt).collect(model, wanted)
            ran: list[int] = []
            resumed = Collector(data, store=store, progress=lambda w, done, t: ran.append(done)).collect(model, wanted)
            assert ran == list(range(at + 1, 6)), "only what was left is run"
            for request in wanted:
                for name, array in whole[request].arrays().items():
                    np.testing.assert_array_equal(array, resumed[request].arrays()[name])

    def test_several_sweeps_where_memory_is_short(self) -> None:
        model, wanted = parse(DENSE), [stats.GramOf("x"), stats.GramOf("r")]
        ran: list[int] = []
        short = Collector(samples(2), memory=150, progress=lambda w, done, t: ran.append(done)).collect(model, wanted)
        assert ran == [0, 1, 0, 1]
        enough = Collector(samples(2)).collect(model, wanted)
        for request in wanted:
            np.testing.assert_array_equal(short[request].centred, enough[request].centred)

    def test_unknown_values(self) -> None:
        with pytest.raises(BadInput, match="nothing can be collected of 'q'"):
            Collector(samples(1)).collect(parse(DENSE), [stats.MomentsOf("q")])

    def test_no_data(self) -> None:
        with pytest.raises(BadInput, match="no calibration data"):
            Collector([]).collect(parse(DENSE), [stats.MomentsOf("x")])

    def test_a_bad_sample_is_named(self) -> None:
        data = samples(3)
        data[1]["x"][0, 0] = np.inf  # type: ignore[index]
        with pytest.raises(BadInput, match="sample 1 of the calibration data"):
            Collector(data).collect(parse(DENSE), [stats.MomentsOf("x")])


class TestGradients:
    def test_they_are_those_of_the_loss(self) -> None:
        pytest.importorskip("torch")
        model, data = parse(DENSE), samples(4)
        labels = [np.array([0, 1, 2, 0, 1, 2])] * 4
        wanted = [stats.GradientsOf("b"), stats.GradientGramOf("r")]
        found = Collector(data, labels).collect(model, wanted)
        a, b = (model.graph.initializers[n].const_value.numpy().astype(np.float64) for n in "ab")  # type: ignore[union-attr]
        total = np.zeros_like(b)
        gram = np.zeros((5, 5))
        for sample, label in zip(data, labels, strict=True):
            r = np.maximum(sample["x"] @ a, 0)
            y = r @ b
            p = np.exp(y) / np.exp(y).sum(axis=1, keepdims=True)
            p[np.arange(6), label] -= 1
            total += r.T @ (p / 6)
            g = (p / 6) @ b.T
            gram += g.T @ g
        np.testing.assert_allclose(found[wanted[0]].total, total, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(found[wanted[1]].products, gram, rtol=1e-3, atol=1e-6)

    def test_the_loss_of_a_language_model_is_that_of_the_next_token(self) -> None:
        pytest.importorskip("torch")
        model = parse(
            "g (int64[B,S] input_ids, int64[B,S] attention_mask) => (float[B,S,5] y)"
            "<float[5,5] w> { y = Gather(w, input_ids) m = Cast<to=9>(attention_mask) }"
        )
        ids, mask = np.array([[1, 3, 0, 0], [4, 2, 2, 1]]), np.array([[1, 1, 1, 0], [1, 1, 1, 1]])
        request = stats.GradientsOf("w")
        found = Collector([{"input_ids": ids, "attention_mask": mask}]).collect(model, [request])[request]
        w = model.graph.initializers["w"].const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
        expected = np.zeros((5, 5))
        pairs = [(1, 3), (3, 0), (4, 2), (2, 2), (2, 1)]
        for here, following in pairs:
            p = np.exp(w[here]) / np.exp(w[here]).sum()
            p[following] -= 1
            expected[here] += p / len(pairs)
        np.testing.assert_allclose(found.total, expected, rtol=1e-4, atol=1e-6)

    def test_labels_that_do_not_fit(self) -> None:
        pytest.importorskip("torch")
        with pytest.raises(BadInput, match="the labels have shape"):
            Collector(samples(1), [np.zeros(3, dtype=np.int64)]).collect(parse(DENSE), [stats.GradientsOf("b")])


@dataclass(frozen=True)
class Probe(Pass):
    """A pass that asks for statistics, and for more of the model as it has made it."""

    effect: ClassVar[Effect] = Effect.LOSSY
    seen: ClassVar[list[Any]] = []

    def needs(self, model: ir.Model) -> Needs:
        return Needs(frozenset({stats.MomentsOf("h")}))

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        before = ctx.statistics[stats.MomentsOf("h")]
        weight = model.graph.initializers["a"]
        assert weight.const_value is not None
        weight.const_value = ir.tensor(weight.const_value.numpy() * 2, name="a")
        after = ctx.collect(model, [stats.MomentsOf("h")])[stats.MomentsOf("h")]
        self.seen.append((before, after, len(ctx.calibration)))
        result = PassResult()
        result.change("doubled")
        return result


class TestRun:
    def write(self, folder: Path) -> tuple[Path, Path]:
        ir.save(parse(DENSE), folder / "m.onnx")
        np.savez(folder / "d.npz", x=np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32))
        return folder / "m.onnx", folder / "d.npz"

    def test_a_pass_gets_what_it_needs_and_may_ask_for_more(self, tmp_path: Path) -> None:
        model, data = self.write(tmp_path)
        held_out = [{"x": np.ones((3, 4), np.float32)}]
        report = optimize(model, recipe=[Probe()], calibrate=data, data=held_out, cache=False, measure=False)
        before, after, count = Probe.seen.pop()
        np.testing.assert_allclose(after.mean, 2 * before.mean, rtol=1e-5)
        assert (before.count, count) == (40, 3)
        assert not any("calibrated" in warning for warning in report.warnings)

    def test_quality_on_calibration_data_is_noted(self, tmp_path: Path) -> None:
        model, data = self.write(tmp_path)
        report = optimize(model, recipe=[Probe()], data=data, cache=False, measure=False)
        assert any("the data that quality was read on" in warning for warning in report.warnings)

    def test_generated_inputs_are_noted(self, tmp_path: Path) -> None:
        model, _ = self.write(tmp_path)
        report = optimize(model, recipe=[Probe()], cache=False, measure=False)
        assert any("do not trust the quality" in warning for warning in report.warnings)
