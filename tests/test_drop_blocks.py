"""``drop-blocks``: what zeroing a block means in every topology, what is refused, the gate, and the recipes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc.cli import main
from graphc.depth.structure import find
from graphc.errors import BadInput
from graphc.model import parameters
from graphc.passes.drop_blocks import DropBlocks
from graphc.passes.shrink import Shrink
from graphc.recipe import Recipe
from tests.block_models import (
    CONTEXT,
    SEQUENCE,
    TOPOLOGIES,
    WIDTH,
    Net,
    assert_same,
    context,
    dropped,
    pre_norm,
    samples,
    without,
)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_shrink_after_it_computes_what_the_zeroed_model_does(data: st.DataObject) -> None:
    """Any branches of any topology go, with all of their weights, and nothing else changes."""
    model = TOPOLOGIES[data.draw(st.sampled_from(sorted(TOPOLOGIES)))]()
    count = len(find(model).branches)
    gone = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count)))
    zeroed, removed = without(model, gone)
    small = zeroed.clone()
    Shrink().run(small, CONTEXT)
    assert_same(zeroed, small)
    caches = sum(bool(find(model).branches[i].exits) for i in gone)
    # Norm, keys and values of a cache that is an output stay.
    kept = caches * (2 * WIDTH + 2 * (WIDTH * WIDTH + WIDTH))
    assert parameters(model) - parameters(small) >= removed - kept


@pytest.mark.parametrize("name", sorted(TOPOLOGIES))
def test_a_zeroed_branch_adds_nothing_and_the_others_still_do(name: str) -> None:
    """Against the same network with the branch's value multiplied by zero."""
    model = TOPOLOGIES[name]()
    for i, branch in enumerate(find(model).branches):
        other = model.clone()
        made = {v.name: v for node in other.graph for v in node.outputs}
        value, total = made[branch.value.name], made[branch.node.outputs[0].name].producer()
        zero = ir.Value(name="none", const_value=ir.tensor(np.zeros((), np.float32), name="none"))
        other.graph.register_initializer(zero)
        scaled = ir.Node("", "Mul", [value, zero], num_outputs=1)
        scaled.outputs[0].name = "silent"
        assert total is not None
        other.graph.insert_before(total, [scaled])
        total.replace_input_with(list(total.inputs).index(value), scaled.outputs[0])
        assert_same(other, without(model, [i])[0])


def test_quantized_weights_become_their_zero_point() -> None:
    net = Net()
    h = net.linear("x", "embed.first")
    for i in range(2):
        q = net.weight(
            f"layers.{i}.q", values=np.random.default_rng(i).integers(0, 255, (WIDTH, WIDTH), dtype=np.uint8)
        )
        scale = net.weight(f"layers.{i}.s", values=np.full(WIDTH, 0.02, np.float32))
        zero = net.weight(f"layers.{i}.z", values=np.arange(120, 120 + WIDTH, dtype=np.uint8))
        h = net.op("Add", h, net.op("MatMul", h, net.op("DequantizeLinear", q, scale, zero, axis=1)))
    net.op("Identity", h, out="y")
    model = net.model(SEQUENCE, {"y": ["n", "s", WIDTH]})
    zeroed, _ = without(model, [1])
    written = zeroed.graph.initializers["layers.1.q"].const_value.numpy()
    np.testing.assert_array_equal(written, np.broadcast_to(np.arange(120, 120 + WIDTH), written.shape))


def test_what_cannot_be_zeroed_is_refused() -> None:
    net = Net()
    h = net.linear("x", "embed.first")
    h = net.op("Add", h, net.op("Sigmoid", net.linear(h, "layers.0.w")))
    branch = net.linear(h, "layers.1.w")
    net.op("Add", h, branch, out="y")
    net.op("Identity", branch, out="z")
    model = net.model(SEQUENCE, {"y": ["n", "s", WIDTH], "z": ["n", "s", WIDTH]})
    gone, result = dropped(model, count=2, criterion="random")
    assert gone == []
    assert {refusal.reason for refusal in result.refusals} == {
        "its last operator is Sigmoid, which cannot be written to zero",
        "what it ends with is also read elsewhere",
        "only 0 of 2 can go: the rest is kept by options or cannot be zero",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, "ratio cannot be 1"),
        ({"count": -1}, "count cannot be -1"),
        ({"count": 1, "ratio": 0.5}, "either count or ratio"),
        ({"unit": "branch", "criterion": "angular"}, "whole blocks"),
        ({"unit": "branch", "replace": "linear"}, "whole blocks"),
        ({"greedy": True}, "criterion=probe"),
        ({"count": 1, "criterion": "depth"}, "counts the blocks itself"),
        ({"merge": 1}, "merge cannot be 1"),
        ({"ridge": -1.0}, "ridge cannot be -1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        DropBlocks(**options)


def test_an_unknown_name_has_the_nearest_one() -> None:
    with pytest.raises(BadInput, match=r"layers\.1"):
        DropBlocks(count=1, criterion="random", include=("layer.1",)).run(pre_norm(), CONTEXT)


def test_nothing_to_drop_is_said() -> None:
    net = Net()
    net.op("Relu", net.linear("x", "a.0.b"), out="y")
    model = net.model(SEQUENCE, {"y": ["n", "s", WIDTH]})
    assert dropped(model, count=1, criterion="random")[1].refusals[0].reason == "no residual branch was found"
    assert "neither a count nor a ratio" in dropped(pre_norm())[1].refusals[0].reason


def test_the_gate_gives_blocks_back(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    ir.save(pre_norm(4), path)
    out = tmp_path / "o.onnx"
    recipe = "drop-blocks{count=3 criterion=magnitude},shrink"
    common = ["optimize", str(path), "-o", str(out), "-p", recipe, "--no-measure", "-q"]
    assert main([*common, "--max-drop", "error=10"]) == 0
    assert len(find(ir.load(out)).blocks) == 1
    assert main([*common, "--max-drop", "error=1e-9"]) == 0
    assert len(find(ir.load(out)).blocks) == 4


@pytest.mark.parametrize(
    "name",
    [
        "shortgpt",
        "shortened-llama",
        pytest.param("shortened-llama-taylor", marks=pytest.mark.slow),
        "uidl",
        "replaceme",
        "laco",
        "laco-released",
        "l3prune",
    ],
)
def test_presets_make_a_shallower_model(name: str) -> None:
    if name.endswith("taylor"):
        pytest.importorskip("torch")
    recipe = Recipe.named(name)
    assert "20" in recipe.description
    model, ctx = pre_norm(8), context(samples(2))
    changes = []
    for step in recipe.passes:
        if isinstance(step, DropBlocks) and step.replace in ("sum", "last"):
            step = dataclasses.replace(step, threshold=-1.0)
        changes += step.run(model, ctx).changes
    assert changes
    left = len(find(model).blocks)
    assert left == 6 if name != "l3prune" else 4 <= left < 8
