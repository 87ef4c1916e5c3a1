"""The runner: exact passes are checked and undone, lossy ones measured and backed off, work resumed and cached."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

import graphc
from graphc import edit, registry
from graphc.contract import Context, Effect, Pass, PassResult, option
from graphc.errors import BadInput, CheckFailed
from graphc.model import load, save

DATA = Path(__file__).parent / "data"


def _first_weight(model: ir.Model) -> ir.Value:
    return next(v for v in model.graph.initializers.values() if v.const_value is not None and v.const_value.size > 100)


def _scale(model: ir.Model, factor: float) -> PassResult:
    """Multiply one element of the first weight."""
    value, result = _first_weight(model), PassResult()
    array = np.array(edit.constant(value))
    array.flat[0] += (factor - 1) * array.std()
    value.const_value = ir.tensor(array, name=value.name)
    result.change("one weight changed")
    return result


class _Named(Pass):
    @property
    def name(self) -> str:
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Rename(_Named):
    """Harmless: changes a node's name."""

    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        result = PassResult()
        node = next(iter(model.graph))
        node.name = f"{node.name}_renamed"
        result.change("node renamed")
        return result


@dataclass(frozen=True)
class Wrong(_Named):
    """Claims to be exact and is not."""

    effect: ClassVar[Effect] = Effect.EXACT
    factor: float = option(2.0, "how wrong")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        return _scale(model, self.factor)


@dataclass(frozen=True)
class Broken(_Named):
    """Raises."""

    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        next(iter(model.graph)).op_type = "Nonsense"
        raise RuntimeError("a defect")


@dataclass(frozen=True)
class Blur(_Named):
    """Lossy, with a level per power of ten."""

    effect: ClassVar[Effect] = Effect.LOSSY
    amount: float = option(1.0, "relative noise")

    def levels(self, model: ir.Model) -> Sequence[Pass]:
        return [replace(self, amount=self.amount / 10**k) for k in range(4)]

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        result, rng = PassResult(), np.random.default_rng(ctx.seed)
        for value in model.graph.initializers.values():
            array = edit.constant(value)
            if array is not None and array.dtype == np.float32 and array.ndim > 1:
                noisy = array * (1 + self.amount * rng.standard_normal(array.shape, np.float32))
                value.const_value = ir.tensor(noisy.astype(np.float32), name=value.name)
                result.change("weight blurred")
        return result


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    modules = dict(registry._modules("passes"))
    modules |= {n: f"{__name__}:{n.capitalize()}" for n in ("rename", "wrong", "broken", "blur")}
    original = registry._modules
    monkeypatch.setattr(registry, "_modules", lambda kind: modules if kind == "passes" else original(kind))
    monkeypatch.setenv("GRAPHC_CACHE_DIR", str(tmp_path / "cache"))


def _optimize(recipe: str, output: Path | None = None, model: str = "fmnist_resnet.onnx", **more: Any) -> graphc.Report:
    more = {"measure": False, "cache": False, **more}
    return graphc.optimize(DATA / model, output, recipe=recipe, **more)


def test_an_exact_pass_that_is_right_is_kept() -> None:
    report = _optimize("rename")
    assert report.ok and report.rewrite["checked"] and report.rewrite["ok"]
    assert len(report.rewrite["cases"]) >= 3
    assert [p.changes for p in report.passes if p.name == "rename"] == [["node renamed"]]


def test_a_wrong_pass_between_right_ones_is_found_and_undone() -> None:
    report = _optimize("rename,wrong,rename")
    by_name = {p.name: p for p in report.passes if p.name != "load"}
    assert [p.name for p in report.passes if p.name != "load"] == ["rename", "wrong", "rename"]
    assert by_name["wrong"].rolled_back and "logits" in by_name["wrong"].error
    assert not any(p.rolled_back for p in report.passes if p.name == "rename")
    assert report.model is not None
    assert next(iter(report.model.graph)).name.endswith("_renamed_renamed")
    original = load(DATA / "fmnist_resnet.onnx")
    name = _first_weight(original).name
    kept = edit.constant(report.model.graph.initializers[name])
    np.testing.assert_array_equal(kept, edit.constant(original.graph.initializers[name]))


def test_two_wrong_passes_are_both_undone() -> None:
    report = _optimize("wrong,rename,wrong{factor=5.0}")
    assert [p.rolled_back for p in report.passes if p.name != "load"] == [True, False, True]
    assert report.rewrite["ok"] and report.rewrite["checked"]


def test_strict_fails_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="rolled back") as error:
        _optimize("wrong", tmp_path / "out.onnx", strict=True)
    assert error.value.exit_code == 1
    assert list(tmp_path.glob("*.onnx")) == []


def test_a_pass_that_raises_costs_only_itself() -> None:
    report = _optimize("broken,rename")
    broken, renamed = (p for p in report.passes if p.name != "load")
    assert "RuntimeError: a defect" in broken.error and broken.rolled_back
    assert renamed.changes and report.rewrite["ok"]


def test_without_checks_nothing_is_undone_and_the_report_says_so() -> None:
    report = _optimize("wrong", verify=False)
    assert not report.rewrite["checked"] and "switched off" in report.rewrite["why"]
    assert not any(p.rolled_back for p in report.passes)


def test_a_lossy_pass_is_measured() -> None:
    report = _optimize("blur{amount=0.001}")
    assert 1e-5 < report.approximation["error"] < 1e-1


def test_the_gate_backs_a_lossy_pass_off_to_the_strongest_level_that_holds() -> None:
    report = _optimize("blur", max_drop={"error": 0.05})
    (blur,) = (p for p in report.passes if p.name == "blur")
    assert blur.options in ("blur{amount=0.01}", "blur{amount=0.001}")
    assert report.approximation["error"] <= 0.05
    assert any("backed off" in w for w in report.warnings)
    stronger = _optimize(blur.options.replace("0.0", "0.", 1))
    assert stronger.approximation["error"] > 0.05


def test_a_gate_that_no_level_holds_leaves_the_model_alone() -> None:
    report = _optimize("blur,rename", max_drop={"error": 1e-12})
    (blur,) = (p for p in report.passes if p.name == "blur")
    assert blur.rolled_back and "error" in blur.error
    assert not report.ok and not report.approximation
    assert report.model is not None
    name = _first_weight(report.model).name
    original = load(DATA / "fmnist_resnet.onnx")
    np.testing.assert_array_equal(
        edit.constant(report.model.graph.initializers[name]), edit.constant(original.graph.initializers[name])
    )


def test_a_size_limit_that_does_not_hold_fails_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="max-size"):
        _optimize("rename", tmp_path / "out.onnx", max_size="0.5x")
    assert not (tmp_path / "out.onnx").exists()
    _optimize("rename", tmp_path / "out.onnx", max_size="2x")
    assert (tmp_path / "out.onnx").exists()


def test_a_run_can_stop_and_go_on(tmp_path: Path) -> None:
    whole = _optimize("rename,blur{amount=0.001},rename", tmp_path / "whole.onnx")
    _optimize("rename,blur{amount=0.001},rename", tmp_path / "part.onnx", stop_after="blur")
    report = graphc.optimize(tmp_path / "part.onnx", tmp_path / "done.onnx", resume=True, measure=False, cache=False)
    assert (tmp_path / "done.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    assert [p.options for p in report.passes] == [p.options for p in whole.passes]
    assert report.approximation == whole.approximation


def test_resume_needs_something_to_resume_and_the_same_recipe(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nothing to resume"):
        _optimize("rename", resume=True)
    _optimize("rename,blur", tmp_path / "part.onnx", stop_after="rename")
    with pytest.raises(BadInput, match="left to do: blur"):
        graphc.optimize(tmp_path / "part.onnx", recipe="rename", resume=True)
    with pytest.raises(BadInput, match="did you mean 'rename'"):
        _optimize("rename", stop_after="renam")


def test_finished_work_is_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _optimize("rename", tmp_path / "a.onnx", cache=True)
    monkeypatch.setattr(Rename, "run", lambda *_: pytest.fail("ran again"))
    second = _optimize("rename", tmp_path / "b.onnx", cache=True)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert [p.to_json() for p in first.passes] == [p.to_json() for p in second.passes]
    assert first.rewrite == second.rewrite


@pytest.mark.parametrize("changed", [{"seed": 1}, {"recipe": "rename,rename"}, {"model": "fmnist_vit_tiny.onnx"}])
def test_the_cache_knows_what_matters(monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]) -> None:
    _optimize("rename", cache=True)
    ran = []
    original = Rename.run
    monkeypatch.setattr(Rename, "run", lambda self, m, c: ran.append(1) or original(self, m, c))
    _optimize(**{"recipe": "rename", "cache": True, **changed})
    assert ran


CUSTOM = """
<ir_version: 10, opset_import: ["" : 21, "my.ops" : 1]>
agraph (float[N, 4] x) => (float[N, 4] y) {
    a = my.ops.Secret (x)
    b = Identity (a)
    y = Relu (b)
}
"""


def test_a_model_that_cannot_run_here_says_so_and_gets_only_what_needs_no_check(tmp_path: Path) -> None:
    path = tmp_path / "custom.onnx"
    save(ir.from_onnx_text(CUSTOM), path)
    report = graphc.optimize(path, recipe="rename", measure=False, cache=False)
    assert not report.rewrite["checked"] and "Secret" in report.rewrite["why"]
    (renamed,) = (p for p in report.passes if p.name == "rename")
    assert not renamed.changes and "--unchecked" in renamed.refusals[0].reason
    forced = graphc.optimize(path, recipe="rename", unchecked=True, measure=False, cache=False)
    assert any(p.changes for p in forced.passes if p.name == "rename")


def test_the_report_is_written_as_json_and_html(tmp_path: Path) -> None:
    from graphc.pipeline import run
    from graphc.recipe import Recipe, parse_backend
    from graphc.settings import Settings

    settings = Settings(Recipe.parse("rename"), parse_backend("onnxruntime"), measure=False, cache=False)
    for name in ("r.json", "r.html"):
        run(DATA / "fmnist_resnet.onnx", tmp_path / "o.onnx", settings, report_file=tmp_path / name)
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["schema"] == "graphc-report/1"
    keys = "schema input output target recipe passes rewrite approximation measurements warnings notes"
    assert set(document) == set(keys.split())
    keys = "name options effect changes refusals error rolled_back seconds losses"
    assert set(document["passes"][0]) == set(keys.split())
    assert "<svg" in (tmp_path / "r.html").read_text()


def test_cost_is_read_on_as_many_samples_as_fit_and_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    data = [{"image": rng.standard_normal((1, 1, 28, 28)).astype(np.float32)} for _ in range(3)]

    def notes() -> list[str]:
        report = graphc.optimize(
            DATA / "fmnist_resnet.onnx", recipe="prune{ratio=0.3 criterion=l2}", data=data, measure=False, cache=False
        )
        assert report.approximation
        return [note for note in report.notes if "samples" in note]

    assert notes() == []
    monkeypatch.setattr("graphc.gate.HELD", 60)  # the logits of a sample are 40 bytes
    assert notes() == ["what lossy passes cost was read on the first 2 of 3 samples: their outputs are large"]
