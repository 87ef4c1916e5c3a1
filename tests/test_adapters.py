"""Adapters: every kind that PEFT saves, folded into a graph of the same names and compared with PEFT's own merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc.adapters import Adapter, Adapters, adapted
from graphc.errors import BadInput
from tests.adapter_models import (
    FLOAT,
    NET,
    L,
    base,
    build,
    delta,
    fold,
    lora,
    merged,
    numbers,
    peft,
    plain,
    same,
    source,
    trained,
    weights,
)


@pytest.mark.parametrize(
    "config",
    [
        L(r=2, target_modules=["q", "v", "qkv", "head"]),
        L(r=3, lora_alpha=5, target_modules=["q", "v"], use_rslora=True),
        L(r=2, target_modules=["emb", "conv", "line", "q"]),
        L(r=2, target_modules=["emb", "conv", "line", "q", "v"], use_dora=True),
        L(r=2, target_modules=["c_attn"], fan_in_fan_out=True),
        L(r=2, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True),
        L(r=2, lora_alpha=3, target_modules=["q", "v", "qkv"], rank_pattern={"q": 4, "^v": 1}, alpha_pattern={"q": 7}),
        L(r=2, target_modules=["q", "conv"], bias="all", modules_to_save=["head"]),
        L(r=2, target_modules=["q", "v"], bias="lora_only"),
        L(r=2, target_modules=["q", "conv"], lora_bias=True),
        L(r=2, target_modules=["mha"]),
        L(r=2, target_modules=["q"], target_parameters=["experts.gate", "experts.up"]),
        L(r=2, target_modules=[], target_parameters=["experts.gate"]),
        L(r=2, target_modules=["q"], trainable_token_indices={"emb": [7, 2]}),
        L(r=2, target_modules=["q", "v"], init_lora_weights="gaussian"),
        peft.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, target_modules=["q", "v"], total_step=10),
        peft.AdaLoraConfig(init_r=3, target_modules=["c_attn"], fan_in_fan_out=True, total_step=10),
        peft.IA3Config(target_modules=["q", "v", "conv", "qkv"], feedforward_modules=["v"]),
        peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True),
        peft.TrainableTokensConfig(target_modules=["emb"], token_indices=[1, 3]),
    ],
    ids=lambda config: f"{config.peft_type.value}",
)
def test_folded_equals_what_peft_merges(config: Any, tmp_path: Path) -> None:
    model = trained(NET, config, tmp_path / "a")
    found, done = fold(base(NET), tmp_path / "a")
    wanted = merged(model)
    before = weights(base(NET))
    assert any(not np.array_equal(wanted[name], before[name]) for name in wanted if name in before)
    same(weights(found), wanted)
    assert done.adapted is not None and done.adapted.changes and done.adapted.effect == "exact"


def test_names_may_have_another_front(tmp_path: Path) -> None:
    model = trained(NET, L(r=2, target_modules=["q", "v"]), tmp_path / "a")
    found, _ = fold(base(NET, prefix="wrapped.model."), tmp_path / "a")
    wanted = merged(model)
    got = found.graph.initializers["wrapped.model.v.weight"].const_value.numpy()
    same({"v.weight": got}, {"v.weight": wanted["v.weight"]})


@settings(max_examples=25, deadline=None, derandomize=True)
@given(weight=FLOAT, config=st.sampled_from(["plain", "rslora", "embedding"]))
def test_what_is_folded_and_then_taken_away_leaves_the_base(
    weight: float, config: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"law-{config}"
    if not folder.exists():
        options = {"plain": {"target_modules": ["q", "conv"]}, "rslora": {"target_modules": ["v"], "use_rslora": True}}
        trained(NET, L(r=2, **options.get(config, {"target_modules": ["emb"]})), folder)
    there, _ = fold(base(NET), f"{folder}={weight}")
    back, _ = fold(there, f"{folder}={-weight}")
    before = weights(base(NET))
    same(weights(back), {name: array for name, array in before.items() if array.dtype == np.float32}, 2e-6)


def test_dora_by_halves_lies_between(tmp_path: Path) -> None:
    trained(NET, L(r=2, target_modules=["q"], use_dora=True), tmp_path / "a")
    none, half, whole = (weights(fold(base(NET), f"{tmp_path / 'a'}={w}")[0])["q.weight"] for w in (0, 0.5, 1))
    assert np.array_equal(none, weights(base(NET))["q.weight"])
    np.testing.assert_allclose(half, (none + whole) / 2, rtol=1e-5, atol=1e-6)


def test_big_weights_are_computed_when_they_are_read(tmp_path: Path) -> None:
    folder = lora(tmp_path / "a", q=(600, 500))
    model = build("y = MatMul(x, q__weight)", "float[N,500] x", q__weight=numbers(500, 600))
    done = adapted(source(model), Adapters.of([folder]))
    tensor = done.model.graph.initializers["q.weight"].const_value
    assert isinstance(tensor, ir.LazyTensor) and tensor is done.original.graph.initializers["q.weight"].const_value
    np.testing.assert_allclose(tensor.numpy(), numbers(500, 600) + delta(folder, "q").T, rtol=1e-5, atol=1e-6)


def test_weights_of_adapters(tmp_path: Path) -> None:
    assert Adapter.parse("a/b=0.5") == Adapter(Path("a/b"), 0.5)
    assert Adapter.parse("a=-1e-1").text() == "a=-0.1"
    (tmp_path / "x=2").mkdir()
    assert Adapter.parse(str(tmp_path / "x=2")).weight == 1
    with pytest.raises(BadInput, match="is a number"):
        Adapter.parse("a=half")
    with pytest.raises(BadInput, match="no adapter to combine"):
        Adapters.of([], combine="ties")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from graphc.cli import main

    monkeypatch.setenv("GRAPHC_CACHE_DIR", str(tmp_path / "cache"))
    onnx.save(ir.to_proto(plain()), tmp_path / "m.onnx")
    folder = lora(tmp_path / "a", layer__q=(6, 8))
    command = ["optimize", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "o.onnx"), "--no-measure"]
    command += ["--depfile", str(tmp_path / "o.d"), "--report", str(tmp_path / "o.json")]

    def written(*more: str) -> np.ndarray:
        assert main([*command, *more]) == 0
        return weights(ir.load(tmp_path / "o.onnx"))["layer.q.weight"]

    before = numbers(8, 6)
    change = delta(folder, "layer.q").T
    np.testing.assert_allclose(written("--adapter", str(folder)), before + change, rtol=1e-5, atol=1e-6)
    assert "adapter" in capsys.readouterr().out
    depends = (tmp_path / "o.d").read_text()
    assert "adapter_config.json" in depends and "adapter_model.safetensors" in depends
    entry = json.loads((tmp_path / "o.json").read_text())["passes"][0]
    assert entry["name"] == "adapter" and entry["changes"] == ["LoRA of rank 2 folded"]
    # The cache tells weights and contents of adapters apart.
    np.testing.assert_allclose(written("--adapter", f"{folder}=0.5"), before + change / 2, rtol=1e-5, atol=1e-6)
    lora(folder, seed=7, layer__q=(6, 8))
    other = delta(folder, "layer.q").T
    np.testing.assert_allclose(written("--adapter", str(folder)), before + other, rtol=1e-5, atol=1e-6)
    assert main([*command, "--adapter", str(folder), "--stop-after", "simplify"]) == 0
    capsys.readouterr()
    resumed = ["optimize", str(tmp_path / "o.onnx"), "-o", str(tmp_path / "p.onnx"), "--resume"]
    assert main([*resumed, "--adapter", str(folder)]) == 2
    assert "leave --adapter out" in capsys.readouterr().err
    assert main([*resumed, "--no-measure"]) == 0
    assert main([*command, "--adapter", str(tmp_path / "none")]) == 2
    assert "there is no such adapter" in capsys.readouterr().err
