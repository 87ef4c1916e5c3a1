"""The metrics of the gate: their values on cases that can be computed by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc.checking.metrics import METRICS, metric
from graphc.errors import BadInput

NOTHING: dict[str, np.ndarray] = {}


def case(values: object, name: str = "y") -> dict[str, np.ndarray]:
    return {name: np.array(values, np.float32)}


def test_error_is_relative_to_the_norm_over_all_cases() -> None:
    reference, outputs = [case([3, 0]), case([0, 4])], [case([3, 0.3]), case([0.4, 4])]
    assert metric("error")(reference, outputs, [NOTHING] * 2) == pytest.approx(0.1)


def test_error_is_that_of_the_worst_output() -> None:
    reference = [case([100]) | case([1], "z")]
    assert metric("error")(reference, [case([100]) | case([1.5], "z")], [NOTHING]) == pytest.approx(0.5)


def test_error_of_a_zero_reference() -> None:
    assert metric("error")([case([0])], [case([0])], [NOTHING]) == 0
    assert metric("error")([case([0])], [case([1e-9])], [NOTHING]) == math.inf


def test_top1_counts_positions() -> None:
    reference = [case([[[1, 2], [2, 1]]]), case([[[1, 2], [1, 2]]])]
    outputs = [case([[[5, 6], [0, 1]]]), case([[[0, 1], [0, 1]]])]
    assert metric("top1")(reference, outputs, [NOTHING] * 2) == pytest.approx(1 / 4)


def test_top1_takes_the_first_output_with_scores() -> None:
    reference, outputs = [case([[1]]) | case([[1, 2]], "z")], [case([[9]]) | case([[2, 1]], "z")]
    assert metric("top1")(reference, outputs, [NOTHING]) == 1


def test_kl_of_known_distributions() -> None:
    p, q = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    expected = float((p * np.log(p / q)).sum())
    found = metric("kl")([case(np.log(p) + 7)], [case(np.log(q) - 3)], [NOTHING])
    assert found == pytest.approx(expected, rel=1e-5)


def test_kl_where_the_reference_excludes_a_class() -> None:
    assert metric("kl")([case([0, 0, -np.inf])], [case([0, 0, -np.inf])], [NOTHING]) == 0
    assert metric("kl")([case([0, 0])], [case([0, 0])], [NOTHING]) == 0


def test_perplexity_of_next_tokens() -> None:
    tokens = np.array([[0, 1, 1]])
    reference = [case(np.log([[[0.5, 0.5], [0.5, 0.5], [1, 1]]]))]
    outputs = [case(np.log([[[0.75, 0.25], [0.5, 0.5], [1, 1]]]))]
    found = metric("perplexity")(reference, outputs, [{"input_ids": tokens}])
    assert found == pytest.approx(math.sqrt(4 * 2) / 2 - 1, rel=1e-5)


def test_perplexity_leaves_out_padding() -> None:
    inputs = [{"input_ids": np.array([[0, 1, 1]]), "attention_mask": np.array([[1, 1, 0]])}]
    reference = [case(np.log([[[0.5, 0.5], [0.5, 0.5], [1, 1]]]))]
    outputs = [case(np.log([[[0.5, 0.5], [0.01, 0.99], [1, 1]]]))]
    assert metric("perplexity")(reference, outputs, inputs) == pytest.approx(0, abs=1e-6)


def test_perplexity_needs_a_language_model() -> None:
    with pytest.raises(BadInput, match="language model"):
        metric("perplexity")([case([[1, 2]])], [case([[1, 2]])], [{"x": np.ones((1, 2), np.float32)}])


@pytest.mark.parametrize("name", ["error", "top1", "kl"])
@pytest.mark.parametrize("wrong", [[np.nan, 1], [np.inf, 1], [1, 2, 3]])
def test_what_cannot_be_compared_passes_no_gate(name: str, wrong: list[float]) -> None:
    assert metric(name)([case([1, 2])], [case(wrong)], [NOTHING]) == math.inf
    assert metric(name)([case([1, 2])], [NOTHING], [NOTHING]) == math.inf


@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=8), st.floats(-10, 10))
@settings(max_examples=50)
def test_laws(values: list[float], shift: float) -> None:
    reference = [case(values)]
    for name in ("error", "top1", "kl"):
        assert metric(name)(reference, reference, [NOTHING]) == 0
    moved = [case(np.array(values) + shift)]
    assert metric("kl")(reference, moved, [NOTHING]) == pytest.approx(0, abs=1e-4)
    for name in ("error", "kl"):
        assert metric(name)(reference, [case(values[::-1])], [NOTHING]) >= 0


class TestUserFunctions:
    def write(self, folder: Path, text: str) -> Path:
        path = folder / "check.py"
        path.write_text(text)
        return path

    def test_a_function_of_a_file(self, tmp_path: Path) -> None:
        path = self.write(
            tmp_path,
            "def gap(outputs, reference, inputs):\n    return abs(outputs[0]['y'] - reference[0]['y']).max()\n",
        )
        assert metric(f"{path}:gap")([case([1, 2])], [case([1, 5])], [NOTHING]) == 3

    def test_a_function_of_a_module(self) -> None:
        assert callable(metric("graphc.checking.metrics:error"))

    @pytest.mark.parametrize(
        ("text", "function", "message"),
        [
            ("def gap(o, r, i): return 1", "gab", "did you mean 'gap'"),
            ("def gap(o): return 1", "gap", "TypeError"),
            ("def gap(o, r, i): return 'much'", "gap", "ValueError"),
            ("import nowhere_to_be_found", "gap", "cannot be loaded"),
            ("def gap(:", "gap", "SyntaxError"),
        ],
    )
    def test_errors_are_the_users(self, tmp_path: Path, text: str, function: str, message: str) -> None:
        with pytest.raises(BadInput, match=message):
            metric(f"{self.write(tmp_path, text)}:{function}")([case([1])], [case([1])], [NOTHING])

    def test_nan_passes_no_gate(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "def gap(o, r, i): return float('nan')")
        assert metric(f"{path}:gap")([case([1])], [case([1])], [NOTHING]) == math.inf

    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match="no such file"):
            metric(f"{tmp_path / 'none.py'}:gap")


def test_unknown_metric() -> None:
    with pytest.raises(BadInput, match="did you mean 'perplexity'"):
        metric("perplexty")
    assert set(METRICS) == {"error", "kl", "perplexity", "top1"}
