"""``drop-blocks`` in models with a cache, whose inputs and outputs belong to blocks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphc import runtime
from graphc.cli import main
from graphc.passes.drop_blocks import DropBlocks
from graphc.passes.shrink import Shrink
from tests.block_models import (
    CONTEXT,
    SIZES,
    dropped,
    pre_norm,
)


def interface(model: ir.Model) -> tuple[list[str], list[str]]:
    return [v.name or "" for v in model.graph.inputs], [v.name or "" for v in model.graph.outputs]


def test_caches_stay_unless_the_interface_may_change() -> None:
    model = pre_norm(3, cache=True)
    before = interface(model)
    _, result = dropped(model, count=1, criterion="random", include=("layers.1",))
    assert interface(model) == before
    assert [(r.node, r.count) for r in result.refusals] == [("present.1.key", 2)]
    assert "allow-interface" in result.refusals[0].reason


def test_a_length_that_was_read_from_a_cache_that_goes_is_read_from_another() -> None:
    model = pre_norm(3, cache=True)
    past = next(v for v in model.graph.inputs if v.name == "past.0.key")
    size = ir.Node("", "Shape", [past], num_outputs=1)
    size.outputs[0].name = "length"
    model.graph.append(size)
    model.graph.outputs.append(size.outputs[0])
    step = DropBlocks(count=1, criterion="random", include=("layers.0",), allow_interface=True)
    assert step.run(model, CONTEXT).changes[-1] == "input or output removed (×4)"
    assert interface(model)[0] == ["x", "past.0.key", "past.0.value", "past.1.key", "past.1.value"]
    assert size.inputs[0] is model.graph.inputs[1]


def test_caches_of_a_layer_that_goes_leave_and_the_others_are_counted_anew() -> None:
    model = pre_norm(4, cache=True)
    plain = model.clone()
    dropped(plain, count=1, criterion="random", include=("layers.1",))
    step = DropBlocks(count=1, criterion="random", include=("layers.1",), allow_interface=True)
    result = step.run(model, CONTEXT)
    assert result.changes == ["block layers.1 written to zero", "input or output removed (×4)"]
    inputs, names = interface(model)
    kinds = [f"{i}.{kind}" for i in range(3) for kind in ("key", "value")]
    assert inputs == ["x", *(f"past.{kind}" for kind in kinds)]
    assert names == ["y", *(f"present.{kind}" for kind in kinds)]
    Shrink().run(model, CONTEXT)
    assert not [n for n in model.graph.initializers if n.startswith("layers.1.")]
    random = np.random.default_rng(0)
    old = {v.name: [SIZES.get(str(d), d) for d in v.shape] for v in plain.graph.inputs}
    given = {name: random.normal(size=shape).astype(np.float32) for name, shape in old.items()}
    want = runtime.session(plain, optimise=False).run(given)
    moved = {0: 0, 1: 2, 2: 3}
    fed = {"x": given["x"]}
    for new, was in moved.items():
        fed |= {f"past.{new}.{kind}": given[f"past.{was}.{kind}"] for kind in ("key", "value")}
    got = runtime.session(model, optimise=False).run(fed)
    np.testing.assert_allclose(got["y"], want["y"], atol=1e-5)
    for new, was in moved.items():
        for kind in ("key", "value"):
            np.testing.assert_allclose(got[f"present.{new}.{kind}"], want[f"present.{was}.{kind}"], atol=1e-5)


@pytest.mark.parametrize("data", [False, True])
def test_a_model_with_fewer_caches_is_checked_measured_and_written(data: bool, tmp_path: Path) -> None:
    path, out = tmp_path / "m.onnx", tmp_path / "o.onnx"
    model = pre_norm(4, cache=True)
    ir.save(model, path)
    recipe = "drop-blocks{count=2 criterion=magnitude first=1 last=1 allow-interface=true},shrink"
    flags = ["--max-drop", "error=5", "--report", str(tmp_path / "r.json"), "-q"]
    if data:
        random = np.random.default_rng(0)
        shapes = {v.name: [SIZES.get(str(d), d) for d in v.shape] for v in model.graph.inputs}
        arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        np.savez(tmp_path / "d.npz", **arrays)
        flags += ["--data", str(tmp_path / "d.npz")]
    assert main(["optimize", str(path), "-o", str(out), "-p", recipe, *flags]) == 0
    written = ir.load(out)
    assert len(written.graph.inputs) == 5
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["rewrite"].get("ok", True)
    assert 0 < report["approximation"]["error"] < 5
    assert not [each for each in report["passes"] if each["error"]]
