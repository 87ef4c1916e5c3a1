"""The inserted errors have the size of rounding, reach every part of a model, and nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphc import runtime
from graphc.checking.closeness import Closeness, NoiseMeter, guessed_noise
from graphc.checking.grids import steps
from graphc.checking.noise import GAIN, contraction_length, noisy

pytest.importorskip("onnxruntime")

EPS = {"float": 2.0**-23, "double": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def parse(text: str, opset: int = 21) -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : {opset}]> {text}')


def outputs(model: ir.Model, inputs: dict[str, Any], count: int, **options: Any) -> list[np.ndarray]:
    """The first output of some runs with noise."""
    session = runtime.session(noisy(model, **options), optimise=False, threads=1)
    return [next(iter(session.run(inputs).values())) for _ in range(count)]


def spread(arrays: list[np.ndarray], exact: np.ndarray) -> float:
    """The standard deviation of the noise, relative to the output, without the gain."""
    wide = exact.astype(np.float64)
    errors = [np.mean(np.square(a.astype(np.float64) - wide)) for a in arrays]
    return float(np.sqrt(np.mean(errors) / np.mean(np.square(wide)))) / GAIN


class TestSize:
    @pytest.mark.parametrize("length", [64, 256, 4096])
    def test_it_is_that_of_real_sums(self, length: int) -> None:
        """The runtime's own error, against double precision, lies within a factor of 4 of what is assumed."""
        rng = np.random.default_rng(0)
        x, w = (rng.standard_normal(s).astype(np.float32) for s in ((64, length), (length, 32)))
        model = parse(f"g (float[N,{length}] x, float[{length},32] w) => (float[N,32] y) {{ y = MatMul(x, w) }}")
        exact = x.astype(np.float64) @ w.astype(np.float64)
        real = runtime.session(model, optimise=False).run({"x": x, "w": w})["y"]
        assumed = spread(outputs(model, {"x": x, "w": w}, 4), exact)
        actual = float(np.sqrt(np.mean((real - exact) ** 2) / np.mean(exact**2)))
        assert actual < assumed < 4 * actual

    @pytest.mark.parametrize("dtype", list(EPS))
    def test_it_follows_the_dtype(self, dtype: str) -> None:
        model = parse(f"g ({dtype}[N] x) => ({dtype}[N] y) {{ y = Identity(x) }}")
        x = np.random.default_rng(0).uniform(1, 2, 4000).astype(ir.DataType[dtype.upper()].numpy())
        assert 0.6 < spread(outputs(model, {"x": x}, 2), x) / EPS[dtype] < 2.5

    def test_bounded_functions_have_an_absolute_error(self) -> None:
        model = parse("g (float[N] x) => (float[N] y) { y = Sigmoid(x) }")
        x = np.full(1000, -30, np.float32)
        found = outputs(model, {"x": x}, 1)[0]
        assert found.std() / GAIN > 0.5 * EPS["float"]


class TestReach:
    @pytest.mark.parametrize("opset", [9, 11, 12, 13, 18, 21, 22, 24])
    def test_every_opset(self, opset: int) -> None:
        model = parse("g (float[N,4] x) => (float[N,4] y) { y = Exp(x) }", opset)
        x = np.ones((100, 4), np.float32)
        first, second = outputs(model, {"x": x}, 2)
        assert first.std() > 0
        assert (first != second).any()

    def test_the_same_seed_gives_the_same_runs(self) -> None:
        model = parse("g (float[N] x) => (float[N] y) { y = Exp(x) }")
        x = {"x": np.ones(50, np.float32)}
        same, again, other = (outputs(model, x, 2, seed=seed) for seed in (1, 1, 2))
        assert all((a == b).all() for a, b in zip(same, again, strict=True))
        assert (same[0] != other[0]).any()

    def test_branches_and_functions(self) -> None:
        """The input is an integer: only the errors inside can show."""
        branch = parse("""g (int64[N] i, bool c) => (float[N] y) {
            f = Cast<to=1>(i)
            y = If (c) <then_branch = t () => (float[N] a) { a = Exp(f) },
                        else_branch = e () => (float[N] b) { b = Log(f) }>
        }""")
        function = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
            g (int64[N] i, bool c) => (float[N] y) { f = Cast<to=1>(i) y = own.f(f) }
            <domain: "own", opset_import: ["" : 21]> f (k) => (r) { r = Exp(k) }""")
        for model in (branch, function):
            assert outputs(model, {"i": np.full(50, 2), "c": np.array(True)}, 1)[0].std() > 0

    def test_infinities_stay(self) -> None:
        model = parse("g (float[N] x) => (float[N] y) { y = Log(x) }")
        found = outputs(model, {"x": np.array([0, np.inf, 1], np.float32)}, 1)[0]
        assert found[0] == -np.inf and found[1] == np.inf

    def test_the_original_stays(self) -> None:
        model = parse("g (float[N] x) => (float[N] y) { y = Exp(x) }")
        copy = noisy(model)
        assert [n.op_type for n in model.graph] == ["Exp"]
        assert [v.name for v in copy.graph.outputs] == ["y"]
        assert len(copy.graph) > 3

    def test_sizes_are_left_exact(self) -> None:
        model = parse("""g (float[1,1,H,W] x, float[4] s) => (float[A,B,C,D] y) {
            y = Resize<mode="nearest">(x, , s) }""")
        inputs = {"x": np.ones((1, 1, 8, 8), np.float32), "s": np.array([1, 1, 1.5, 1.5], np.float32)}
        assert {a.shape for a in outputs(model, inputs, 3)} == {(1, 1, 12, 12)}


def test_contraction_length() -> None:
    model = parse("""g (float[N,12,H,W] x, float[8,4,3,5] w, float[12,16] m, float[16,12] t, float[A,12] a)
        => (float[N,8,H2,W2] y, float[A,16] p, float[A,16] q) {
            y = Conv<group=3>(x, w) p = MatMul(a, m) q = Gemm<transB=1>(a, t) }""")
    assert [contraction_length(node) for node in model.graph] == [60, 12, 12]


def test_steps() -> None:
    assert steps(parse("g (float[N] x) => (float[N] y) { y = Round(x) }"))
    assert not steps(parse("g (float[N] x) => (float[N] y) { y = Relu(x) }"))


class TestCloseness:
    def verdict(self, want: Any, got: Any, noise: Any) -> Any:
        closeness = Closeness("y", noise_runs=3)
        noise = noise if isinstance(noise, np.ndarray) else np.array(noise, np.float32)
        closeness.add("case", np.asarray(want), np.asarray(got), noise)
        return closeness.verdict()

    def test_a_small_multiple_of_the_noise_passes(self) -> None:
        want = np.ones((10, 10))
        assert self.verdict(want, want + 2e-6, np.full((10, 10), 1e-6)).ok
        assert not self.verdict(want, want + 1e-5, np.full((10, 10), 1e-6)).ok

    def test_one_slice(self) -> None:
        want, noise = np.ones((50, 50)), np.full((50, 50), 1e-6)
        noise[0] = 1e-3
        got = want.copy()
        got[:, 7] += 1e-4
        got[0, 7] = 1
        assert not self.verdict(want, got, noise).ok
        assert "index" in self.verdict(want, got, noise).why

    def test_slices_of_many_small_cases_are_pooled(self) -> None:
        closeness = Closeness("y", noise_runs=3)
        noise = np.where(np.arange(10) == 0, 1e-3, 1e-6)[None].astype(np.float32)
        for number in range(10):
            want = np.ones((1, 10))
            got = want.copy()
            got[0, 5] += 1e-4
            closeness.add(f"case {number}", want, got, noise)
        found = closeness.verdict()
        assert not found.ok
        assert "index 5 of axis 1" in found.why and found.case == "all cases together"

    def test_what_is_unstable_is_left_out(self) -> None:
        found = self.verdict([1.0, 2.0], [1.0, 7.0], [1e-6, np.inf])
        assert found.ok and found.skipped == 0.5

    def test_large_outputs_are_read_in_blocks(self) -> None:
        want = np.zeros((3, 400_000), np.float32)
        want[1, 399_999] = 1
        meter = NoiseMeter(want)
        meter.add(want * np.float32(1.001))
        noise = meter.noise()
        assert noise[1, 399_999] == pytest.approx(1e-3 / GAIN, rel=1e-3)
        got = want.copy()
        got[2, 300_000] = 1e-2
        found = self.verdict(want, got, noise)
        assert not found.ok and found.max_abs == pytest.approx(1e-2)

    @pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3)])
    @pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.bool_])
    def test_scalars_and_empty_outputs(self, shape: tuple[int, ...], dtype: Any) -> None:
        want = np.ones(shape, dtype)
        meter = NoiseMeter(want)
        meter.add(want)
        assert self.verdict(want, want, meter.noise()).ok
        assert guessed_noise(want).shape == shape
        if want.size:
            assert not self.verdict(want, np.zeros(shape, dtype), meter.noise()).ok

    def test_a_guess_where_nothing_could_be_measured(self) -> None:
        array = np.array([1, 100, -np.inf], np.float32)
        noise = guessed_noise(array)
        assert noise[1] == pytest.approx(20 * EPS["float"] * 100)
        assert noise[0] < noise[1] and np.isfinite(noise).all()

    def test_shapes_that_rounding_decides(self) -> None:
        meter = NoiseMeter(np.array([1, 2]))
        meter.add(np.array([1, 2, 3]))
        assert meter.noise().all()
