"""The Python interface: what README and examples use."""

from __future__ import annotations

from pathlib import Path

import pytest

import graphc

RESNET = Path(__file__).parent / "data/fmnist_resnet.onnx"


def test_the_public_names_are_functions_and_classes_whatever_was_imported_before() -> None:
    graphc.groups(RESNET)
    for name in graphc.__all__:
        assert name == "__version__" or callable(getattr(graphc, name)), name
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        _ = graphc.optimise


def test_a_loaded_model_can_be_optimized_analysed_and_verified(tmp_path: Path) -> None:
    source = graphc.load(str(RESNET))
    assert len(graphc.groups(source)) == len(graphc.groups(source.model)) == len(graphc.groups(str(RESNET)))
    report = graphc.optimize(source, tmp_path / "o.onnx", recipe="prune{ratio=0.25},shrink", measure=False, cache=False)
    assert isinstance(report, graphc.Report) and report.ok and report.approximation["error"] > 0
    assert report.output["parameters"] < report.input["parameters"]
    assert not graphc.verify(RESNET, tmp_path / "o.onnx").ok
    assert graphc.verify(tmp_path / "o.onnx", tmp_path / "o.onnx").ok


def test_without_an_output_nothing_is_written_and_the_model_is_in_the_report() -> None:
    report = graphc.optimize(RESNET, recipe="simplify", measure=False, cache=False)
    assert report.model is not None and len(report.model.graph) == report.output["nodes"]
