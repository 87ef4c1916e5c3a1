"""Transformers as exporters write them: everything that can be recognised is, and nothing else changes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest

from graphc import edit, frontends
from graphc.axes import coupled_groups
from graphc.checking import Checker
from graphc.passes.fuse import Fuse
from graphc.passes.recognise import Recognise
from graphc.passes.simplify import Simplify
from tests.fragments.transformers_export import COMMITTED, EXPECTED, FOLDER, export
from tests.recognised_models import CONTEXT


def check(path: Path, name: str) -> ir.Model:
    """What must be recognised is, groups are still found, and the model computes the same."""
    model = frontends.load(path).model
    for each in (Simplify(), Fuse(), Simplify()):
        each.run(model, CONTEXT)
    after = model.clone()
    result = Recognise().run(after, CONTEXT)
    found = Counter(node.op_type for node in edit.nodes(after))
    assert {operator: found[operator] for operator in EXPECTED[name]} == EXPECTED[name], result.refusals
    assert found["Softmax"] == (name == "mixtral")  # the router has one
    assert all("Swish" in refusal.reason for refusal in result.refusals)
    kinds = [Counter((group.kind, group.size) for group in coupled_groups(each)) for each in (model, after)]
    assert not kinds[0] - kinds[1]
    verdict = Checker(model).compare(after)
    assert verdict.ok, verdict.why
    return after


@pytest.mark.parametrize("name, attention, exporter", COMMITTED)
def test_committed_exports(name: str, attention: str, exporter: str) -> None:
    after = check(FOLDER / f"{name}-{attention}-{exporter}.onnx", name)
    for node in edit.nodes(after):
        if node.op_type == "Attention" and name not in ("encoder", "falcon"):
            # Heads are attributes, and no operand is turned for it.
            assert "q_num_heads" in node.attributes
            assert not any(edit.is_op(v.producer(), "Transpose") for v in node.inputs[:3] if v is not None)


_UNSUPPORTED = {("gemma2", "sdpa"), ("gptj", "sdpa"), ("swin", "sdpa"), ("t5", "sdpa")}
_SCRIPTED = ("bert", "distilbert", "gpt2", "llama", "vit", "t5")


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", EXPECTED)
def test_dynamo_exports(name: str, attention: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    if (name, attention) in _UNSUPPORTED:
        pytest.skip("transformers has no such attention, or torch cannot export it")
    export(name, attention, "dynamo", tmp_path / "model.onnx")
    check(tmp_path / "model.onnx", name)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", _SCRIPTED)
def test_torchscript_exports(name: str, attention: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    export(name, attention, "torchscript", tmp_path / "model.onnx")
    check(tmp_path / "model.onnx", name)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [20, 22, 24])
def test_other_opsets(opset: int, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    export("llama", "eager", "dynamo", tmp_path / "model.onnx", opset)
    check(tmp_path / "model.onnx", "llama")
