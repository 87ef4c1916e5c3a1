"""Trained models through the whole command: fewer nodes, the same outputs, the interface untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from graphc.cli import main

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests/data"
LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"

MODELS: dict[str, tuple[Path, int]] = {
    "ppocr-cls": (ROOT / "examples/models/ppocr_cls.onnx", 125),
    "ppocr-det": (DATA / "ppocr_det.onnx", 177),
    "silero-vad": (DATA / "silero_vad.onnx", 148),
    "resnet-8": (DATA / "fmnist_resnet.onnx", 21),
    "vit-tiny": (DATA / "fmnist_vit_tiny.onnx", 134),
    "mixtral-tiny": (DATA / "tiny_mixtral_bytes.onnx", 305),
    "light-squeezenet": (LIGHT / "light_squeezenet.onnx", 66),
    "light-shufflenet": (LIGHT / "light_shufflenet.onnx", 160),
}
"""Each model with the most nodes that it may be left with."""


def _interface(path: Path, ir_3: bool) -> list[Any]:
    model = ir.load(path)
    inputs = [v for v in model.graph.inputs if not (ir_3 and v.name in model.graph.initializers)]
    return [(v.name, v.dtype, str(v.shape)) for v in (*inputs, *model.graph.outputs)]


@pytest.mark.parametrize("name", MODELS)
def test_a_real_model_gets_smaller_and_stays_the_same(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, most = MODELS[name]
    before = path.read_bytes()
    assert main(["optimize", str(path), "-o", str(tmp_path / "o.onnx"), "--json", "--no-cache", "--no-measure"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rewrite"]["checked"] and report["rewrite"]["ok"], report["rewrite"]
    assert len(report["rewrite"]["cases"]) >= 2
    assert [p["error"] for p in report["passes"] if p["error"]] == []
    assert report["output"]["nodes"] <= most
    assert path.read_bytes() == before
    assert _interface(tmp_path / "o.onnx", True) == _interface(path, ir.load(path).ir_version < 4)
    assert ir.load(path).metadata_props.items() <= ir.load(tmp_path / "o.onnx").metadata_props.items()
    assert main(["verify", str(path), str(tmp_path / "o.onnx"), "--seed", "7"]) == 0


def test_optimizing_twice_changes_nothing(tmp_path: Path) -> None:
    source, timings = DATA / "silero_vad.onnx", ["--timings", str(tmp_path / "timings.json")]
    for a, b in ((source, "1.onnx"), (tmp_path / "1.onnx", "2.onnx")):
        assert main(["optimize", str(a), "-o", str(tmp_path / b), "-q", "--no-cache", "--no-measure", *timings]) == 0
    first, second = (ir.load(tmp_path / n) for n in ("1.onnx", "2.onnx"))
    assert [n.op_type for n in first.graph] == [n.op_type for n in second.graph]
