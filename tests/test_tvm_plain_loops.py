"""Loops that no rule of ours takes are said, with the operator and the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphc import compiled, pipeline
from graphc.recipe import parse_backend
from tests.tvm_models import build, text

pytestmark = pytest.mark.usefixtures("tvm")

HEAD = "(float[3,5] x, int64[2,5] i, float[2,5] u) => (float[3,5] y)"


def test_they_are_counted_by_operator_in_the_report(tmp_path: Path) -> None:
    body = (
        "a = ScatterElements(x, i, u)\n b = Relu(a)\n"
        'y = ScatterElements<axis: int = 1, reduction: string = "add">(b, i, u)'
    )
    path = tmp_path / "m.onnx"
    ir.save(text(body, HEAD), path)
    rng = np.random.default_rng(0)
    given = {"x": rng.random((3, 5), np.float32), "i": rng.integers(0, 3, (2, 5)), "u": rng.random((2, 5), np.float32)}
    np.savez(tmp_path / "data.npz", **given)  # type: ignore[arg-type]
    target = parse_backend("tvm", {"runtime": False, "threads": 1})
    report = pipeline.optimize(path, tmp_path / "out", target=target, measure=False, data=str(tmp_path / "data.npz"))
    said = [warning for warning in report.warnings if "one number at a time" in warning]
    assert said == ["loops that TVM makes, one number at a time: 2 of scatter_elements (TVM writes it as one piece)"]


def test_those_that_rules_take_are_not(tmp_path: Path) -> None:
    """A vector times a stack of matrices, a product without rows, among them."""
    model = text(
        "a = MatMul(v, m)\n b = Softmax(a)\n y = Relu(b)", "(float[16] v, float[4,16,24] m) => (float[4,24] y)"
    )
    made = build(model.clone(), tmp_path / "out")
    assert parse_backend("tvm", {}).unrealised(tmp_path / "out") == []
    verdict = compiled.compare(model, made)
    assert verdict.checked and verdict.ok, verdict.why
