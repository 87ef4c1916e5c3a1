"""Presets for people: what a model is taken for, what is chosen for it, and what a user sees of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphc import pipeline, presets, registry
from graphc.backends.onnxruntime import OnnxRuntime
from graphc.backends.tvm import Tvm
from graphc.cli import main
from graphc.contract import Capabilities, Effect
from graphc.errors import BadInput
from graphc.frontends import load
from graphc.presets import GOALS, Goal, choose, convolutional, kind_of
from graphc.recipe import DEFAULT, Recipe
from tests.fashion import batches

DATA = Path(__file__).parent / "data"
CPU = Capabilities(
    "onnxruntime", 11, {"": 23}, frozenset({("com.microsoft", "MatMulNBits", "CPUExecutionProvider")}),
    ("CPUExecutionProvider",),
)  # fmt: skip
GPU = Capabilities("onnxruntime", 11, {"": 23}, CPU.kernels, ("CUDAExecutionProvider", "CPUExecutionProvider"))

ENCODER = """
    <ir_version: 10, opset_import: ["": 21]>
    g (int64[B,S] tokens, int64[B,S] mask) => (float[B,S,8] h)
    <float[40,8] table = {}, float[8,8] w = {}> {{
        c = Cast<to=1>(mask)
        x = Gather(table, tokens)
        m = MatMul(x, w)
        a = Constant<value_ints=[-1]>()
        u = Unsqueeze(c, a)
        h = Mul(m, u)
    }}
"""
ROWS = """
    <ir_version: 10, opset_import: ["": 21]>
    g (float[B,8] rows, int64[B] count) => (float[B,8] y)
    <float[8,8] w = {}> {{
        m = MatMul(rows, w)
        c = Cast<to=1>(count)
        a = Constant<value_ints=[-1]>()
        u = Unsqueeze(c, a)
        y = Mul(m, u)
    }}
"""


def numbers(*shape: int) -> str:
    made = np.random.default_rng(0).normal(size=shape).ravel()
    return "{" + ", ".join(f"{x:.4f}" for x in made) + "}"


def names(recipe: Recipe) -> list[str]:
    return [each.name for each in recipe.passes]


def lossy(recipe: Recipe) -> list[str]:
    return [each.name for each in recipe.passes if each.effect is Effect.LOSSY]


@pytest.mark.parametrize(
    ("name", "kind", "convolves"),
    [
        ("tiny_mixtral_bytes", "language model", False),
        ("fmnist_resnet", "vision model", True),
        ("fmnist_vit_tiny", "vision model", False),
        ("ppocr_det", "vision model", True),
        ("silero_vad", "other", True),
    ],
)
def test_what_real_models_are_taken_for(name: str, kind: str, convolves: bool) -> None:
    model = load(DATA / f"{name}.onnx").model
    assert kind_of(model) == kind
    assert convolutional(model) is convolves


def test_what_has_no_logits_is_an_encoder_and_numbers_are_no_tokens() -> None:
    assert kind_of(ir.from_onnx_text(ENCODER.format(numbers(40, 8), numbers(8, 8)))) == "text encoder"
    assert kind_of(ir.from_onnx_text(ROWS.format(numbers(8, 8)))) == "other"


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("name", ["tiny_mixtral_bytes", "fmnist_resnet", "fmnist_vit_tiny", "silero_vad"])
@pytest.mark.parametrize("target", [CPU, GPU, Capabilities("other", 10, {"": 21})], ids=["cpu", "gpu", "plain"])
def test_what_is_chosen(name: str, goal: Goal, calibrated: bool, target: Capabilities) -> None:
    """Every choice can be written down; data are needed only where there are some; only balanced has a limit."""
    model = load(DATA / f"{name}.onnx").model
    found = choose(goal, model, target, calibrated=calibrated)
    assert Recipe.parse(found.recipe.text()) == found.recipe
    assert found.why and found.recipe.text()
    exact = [each for each in found.recipe.passes if each.effect is Effect.EXACT]
    assert [p for p in names(Recipe.named(DEFAULT)) if p not in {e.name for e in exact}] == []
    if not calibrated:
        assert not any(each.needs(model).calibration or each.needs(model).statistics for each in found.recipe.passes)
    limits = [gate.metric for gate in found.gates]
    assert limits == (["error"] if goal == "balanced" and lossy(found.recipe) else [])
    if goal == "balanced":
        assert "prune" not in names(found.recipe)


def test_choices_by_kind() -> None:
    def chosen(goal: Goal, name: str, calibrated: bool, target: Capabilities = CPU) -> str:
        return choose(goal, load(DATA / f"{name}.onnx").model, target, calibrated=calibrated).recipe.text()

    assert chosen("small", "tiny_mixtral_bytes", False) == Recipe.named("int4-weights").text()
    assert "rounding=gptq" in chosen("small", "tiny_mixtral_bytes", True)
    assert chosen("fast", "tiny_mixtral_bytes", False) == Recipe.named("int8-dynamic").text()
    assert chosen("fast", "tiny_mixtral_bytes", False, GPU).endswith("cast{ranges=false}")
    assert chosen("fast", "tiny_mixtral_bytes", True, GPU).endswith("cast")
    assert chosen("fast", "fmnist_resnet", False) == Recipe.named(DEFAULT).text()
    resnet = chosen("fast", "fmnist_resnet", True)
    assert "prune{ratio=0.3 of=flops" in resnet and "scheme=static" in resnet
    assert resnet.index("fuse") < resnet.index("prune") < resnet.index("shrink") < resnet.index("quantize")
    assert "of=params" in chosen("small", "fmnist_vit_tiny", True)
    plain = choose("fast", load(DATA / "fmnist_vit_tiny.onnx").model, Tvm().capabilities(), calibrated=False)
    assert plain.recipe == Recipe(Recipe.named(DEFAULT).passes) and "target" in plain.why


def test_a_warning_where_data_would_allow_more() -> None:
    resnet, mixtral = (load(DATA / f"{n}.onnx").model for n in ("fmnist_resnet", "tiny_mixtral_bytes"))
    assert "--calibrate" in choose("fast", resnet, CPU, calibrated=False).warning
    assert "--calibrate" in choose("small", mixtral, CPU, calibrated=False).warning
    assert choose("fast", resnet, CPU, calibrated=True).warning == ""
    assert choose("fast", mixtral, CPU, calibrated=False).warning == ""


def test_the_runtime_here_computes_with_short_weights() -> None:
    assert OnnxRuntime().capabilities().has_kernel("com.microsoft", "MatMulNBits")


def test_goals_are_no_shipped_recipes() -> None:
    assert not set(GOALS) & set(registry.recipe_files())
    assert presets.parse("small")[0] == "small"
    assert presets.parse("flap") == (None, Recipe.named("flap"))
    with pytest.raises(BadInput, match="small"):
        presets.parse("smal")


def test_balanced_keeps_its_limit(tmp_path: Path) -> None:
    report = pipeline.optimize(
        DATA / "fmnist_vit_tiny.onnx",
        tmp_path / "o.onnx",
        preset="balanced",
        data=batches("calib", 40, 20),
        measure=False,
    )
    assert report.approximation["error"] <= 0.05
    assert report.preset["kind"] == "vision model"
    assert (tmp_path / "o.onnx").stat().st_size < 0.4 * (DATA / "fmnist_vit_tiny.onnx").stat().st_size


def test_limits_of_the_user_take_the_place_of_balanceds(tmp_path: Path) -> None:
    report = pipeline.optimize(
        DATA / "fmnist_vit_tiny.onnx",
        None,
        preset="balanced",
        data=batches("calib", 20, 20),
        max_drop={"error": 1e-9},
        measure=False,
    )
    assert not any(each.changes and not each.error for each in report.passes if each.effect == "lossy")
    assert not any("0.05" in each.error for each in report.passes)


def test_small_makes_a_network_small_and_keeps_its_answers(tmp_path: Path) -> None:
    path = tmp_path / "o.onnx"
    report = pipeline.optimize(
        DATA / "fmnist_resnet.onnx",
        path,
        preset="small",
        calibrate=batches("calib", 200, 20),
        data=batches("test", 200, 20),
        measure=False,
        max_drop={"top1": 0.1},
    )
    assert report.approximation["top1"] <= 0.1
    assert path.stat().st_size < 0.3 * (DATA / "fmnist_resnet.onnx").stat().st_size


def test_what_a_user_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(DATA / "fmnist_vit_tiny.onnx")
    assert main(["optimize", model, "-o", str(tmp_path / "o.onnx"), "--preset", "small", "--no-measure"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "preset small, vision model: weights in 8 bits" in shown
    assert "quantize" in shown and "--calibrate" in shown
    assert main(["list", "recipes"]) == 0
    assert "--preset small" in capsys.readouterr().out
    assert main(["list", "fast"]) == 0
    assert "lowest latency" in " ".join(capsys.readouterr().out.split())


def test_options_that_a_goal_leaves_no_room_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = str(DATA / "fmnist_vit_tiny.onnx"), str(tmp_path / "o.onnx")
    assert main(["optimize", model, "-o", out, "--preset", "small", "--ratio", "0.3"]) == 2
    assert "chooses the options" in capsys.readouterr().err
    assert main(["optimize", model, "-o", out, "--preset", "quick"]) == 2
    assert "there is no preset 'quick'" in capsys.readouterr().err
    stopped = ["--stop-after", "fuse", "--no-measure", "--preset", "small"]
    assert main(["optimize", model, "-o", out, *stopped]) == 0
    again = str(tmp_path / "p.onnx")
    assert main(["optimize", out, "-o", again, "--resume", "--preset", "small"]) == 2
    assert "resumed" in capsys.readouterr().err
    assert main(["optimize", out, "-o", again, "--resume", "--no-measure"]) == 0
    assert "quantize" in capsys.readouterr().out
    with pytest.raises(BadInput, match="give one"):
        pipeline.optimize(model, None, preset="small", recipe="simplify")
