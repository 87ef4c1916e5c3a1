"""What a session really runs as one operator, and how many attentions a model has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphc import frontends, inspection, model, runtime
from graphc.passes.recognise import Recognise
from graphc.recognition.census import attentions
from graphc.runtime import realised
from tests.recognised_models import CONTEXT, FRAGMENTS
from tests.small_models import build
from tests.test_recognise_attention import plain


def missing(each: ir.Model, folder: Path) -> list[str]:
    path = folder / "model.onnx"
    model.save(each, path)
    return realised.unrealised(each, path, provider=runtime.CPU, options={})


def test_operators_with_a_kernel_are_realised(tmp_path: Path) -> None:
    each = frontends.load(FRAGMENTS / "llama-dynamo.onnx").model
    Recognise().run(each, CONTEXT)
    assert missing(each, tmp_path) == []


def test_weights_may_stand_in_a_file_of_their_own(tmp_path: Path) -> None:
    weight = np.arange(1 << 16, dtype=np.float32).reshape(256, 256)
    models = {name: build("t = MatMul(x, w) y = Gelu(t)", x="float[1,256] x", w=weight) for name in ("one", "two")}
    model.save_together(models, tmp_path)
    path = tmp_path / "one.onnx"
    assert [p for p in tmp_path.iterdir() if p.suffix == ".data"]
    assert realised.unrealised(model.load(path), path, provider=runtime.CPU, options={}) == []


def test_an_operator_without_a_kernel_is_not(tmp_path: Path) -> None:
    each = build("a = Swish<alpha=0.3>(x) b = Gelu(a) y = Swish<alpha=0.7>(b)", opset=24)
    assert missing(each, tmp_path) == ["2 of 2 Swish"]


def test_the_census_counts_what_can_be_recognised() -> None:
    assert inspection.inspect(FRAGMENTS / "transformer-torchscript.onnx")["summary"]["attention"] == "1 of 1 recognised"
    assert "attention" not in inspection.inspect(FRAGMENTS / "resnet-dynamo.onnx")["summary"]
    bad = plain("t = MatMul(a, b) s = Mul(t, m)")
    words = attentions(bad, CONTEXT.target)
    assert words == "0 of 1 recognised (1: the scores are multiplied by something that is not one constant)"
    assert attentions(build("y = Softmax(x)"), CONTEXT.target) == ""
