"""Bars of what layers cost: in a terminal, in HTML, in the report."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc.cli import main
from graphc.views import losses

DATA = Path(__file__).parent / "data"


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e3), max_size=30), st.integers(0, 90))
def test_lines_fit_and_are_in_order(costs: list[float], length: int) -> None:
    found = {f"{'é' * length}.{i}": cost for i, cost in enumerate(costs)}
    lines = losses.text(found)
    assert len(lines) == min(len(found), losses.MOST + 1)
    assert all(len(line) <= 80 for line in lines)
    shown = [float(line.split()[-1]) for line in lines[: losses.MOST]]
    assert shown == sorted(shown, reverse=True)
    assert losses.table(found).count("<tr><td>") == len(found)


def test_bars_are_logarithmic() -> None:
    assert losses.share(1.0, 1.0) == 1 and losses.share(0.01, 1.0) == pytest.approx(0.5)
    assert losses.share(1e-9, 1.0) == losses.share(0.0, 1.0) == losses.share(0.0, 0.0) == 0


def test_what_a_user_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    recipe = "simplify,quantize{bits=4 block=32 rank=true sensitivity=layers}"
    command = ["optimize", str(DATA / "fmnist_vit_tiny.onnx"), "-o", str(tmp_path / "out.onnx"), "-p", recipe]
    assert main([*command, "--no-measure", "--no-cache", "-v", "--report", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "relative error that each layer alone causes" in shown and "█" in shown
    assert (
        "<h2>What each layer alone costs: quantize{bits=4 block=32 rank=true sensitivity=layers}</h2>"
        in page.read_text()
    )
