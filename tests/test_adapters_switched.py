"""Adapters that are switched at run time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest

import graphc
from graphc.errors import BadInput
from graphc.frontends import load as load_source
from tests.adapter_models import (
    L,
    build,
    fold,
    lora,
    numbers,
    plain,
    run,
    torch,
    trained,
)

nn = torch.nn


def test_switchable_adapters(tmp_path: Path) -> None:
    import onnxruntime as ort

    model = build(
        "e = Gather(embed__weight, i) h = MatMul(e, q__weight) t = Transpose<perm=[1,0]>(v__weight) y = MatMul(h, t) "
        "c = Conv<pads=[1,1,1,1]>(image, conv__weight)",
        "int64[N,S] i, float[N,3,5,5] image",
        "y c",
        embed__weight=numbers(11, 6),
        q__weight=numbers(6, 7),
        v__weight=numbers(7, 7, seed=3),
        conv__weight=numbers(4, 3, 3, 3),
    )
    onnx.save(ir.to_proto(model), tmp_path / "m.onnx")
    config = L(r=2, target_modules=["embed", "q", "v", "conv"])

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.q, self.v = nn.Embedding(11, 6), nn.Linear(6, 7), nn.Linear(7, 7)
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

    trained(Small(), config, tmp_path / "first")
    trained(Small(), L(r=3, target_modules=["q"]), tmp_path / "second", seed=4)
    report = graphc.optimize(
        tmp_path / "m.onnx",
        tmp_path / "out",
        adapters=[tmp_path / "first", f"{tmp_path / 'second'}=0.5"],
        adapter_mode="dynamic",
        cache=False,
        measure=False,
    )
    assert report.rewrite["checked"] and report.ok
    assert {"first.onnx_adapter", "second.onnx_adapter"} <= {p.name for p in (tmp_path / "out").iterdir()}
    feeds = {"i": np.array([[1, 3, 7]]), "image": numbers(1, 3, 5, 5)}
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        options.log_severity_level = 3
        session = ort.InferenceSession(tmp_path / "out" / "model.onnx", options)
        plain_ = run(load_source(tmp_path / "m.onnx").model, **feeds)
        for got, wanted in zip(session.run(None, feeds), plain_, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
        for name, weight in (("first", 1), ("second", 0.5)):
            adapter = ort.LoraAdapter()
            adapter.Load(str(tmp_path / "out" / f"{name}.onnx_adapter"))
            chosen = ort.RunOptions()
            chosen.add_active_adapter(adapter)
            folded, _ = fold(ir.load(tmp_path / "m.onnx"), f"{tmp_path / name}={weight}")
            for got, wanted in zip(session.run(None, feeds, chosen), run(folded, **feeds), strict=True):
                np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_only_low_rank_updates_can_be_switched(tmp_path: Path) -> None:
    folder = lora(tmp_path / "a", config={"peft_type": "IA3"}, layer__q=(6, 8))
    from safetensors.numpy import save_file

    save_file({"base_model.model.layer.q.ia3_l": numbers(6, 1)}, folder / "adapter_model.safetensors")
    with pytest.raises(BadInput, match=r"cannot be switched(.|\n)*'layer\.q\.weight' has IA3"):
        fold(plain(), folder, mode="dynamic")
