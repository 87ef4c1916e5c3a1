"""``drop-blocks``: what stands in for the blocks that go."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphc.depth.structure import find
from graphc.model import parameters
from graphc.passes.drop_blocks import DropBlocks
from graphc.passes.shrink import Shrink
from tests.block_models import (
    CONTEXT,
    DATA,
    SEQUENCE,
    WIDTH,
    Net,
    context,
    dropped,
    outputs,
    post_norm,
    pre_norm,
    samples,
)
from tests.fashion import batches, fashion


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_map_is_never_worse_than_plain_dropping(bias: bool) -> None:
    """On the calibration data, for any ridge, and as the fit says it is."""
    model, given = pre_norm(4), samples(6)
    if not bias:
        for node in list(model.graph):
            if node.op_type == "Add" and any((v.name or "").endswith("mlp.down.bias") for v in node.inputs if v):
                node.outputs[0].replace_all_uses_with(node.inputs[0])
                model.graph.remove(node, safe=True)
    blocks = find(model).blocks
    target = blocks[2].end.name

    def stream(of: ir.Model) -> np.ndarray:
        tapped = of.clone()
        tapped.graph.outputs.append({v.name: v for n in tapped.graph for v in n.outputs}[target])
        return outputs(tapped, given, target)

    want = stream(model)
    errors = {}
    for ridge in (None, 0.0, 0.01, 1.0, 100.0):
        clone = model.clone()
        options = {"replace": "linear", "ridge": ridge} if ridge is not None else {}
        gone, result = dropped(clone, context(given), count=2, include=("layers.1", "layers.2"), **options)
        assert len(gone) == 4
        errors[ridge] = float(np.square(stream(clone) - want).mean())
        if ridge is not None:
            assert result.changes[0].startswith("run of blocks replaced by a linear map")
            percent = int(result.changes[0].partition("(")[2].partition("%")[0])
            assert percent == pytest.approx(100 * errors[ridge] / errors[None], abs=1)
    assert errors[0.0] <= errors[0.01] <= errors[1.0] <= errors[100.0] <= errors[None]
    assert errors[0.0] < 0.9 * errors[None]


def test_a_linear_run_is_replaced_exactly() -> None:
    """Where the blocks that go are linear maps of what the projection before adds, nothing is lost."""
    net = Net()
    net.weight("layers.0.w", WIDTH, WIDTH)
    h = net.op("Add", net.op("MatMul", net.op("Tanh", "x"), "layers.0.w"), net.op("Mul", "x", "zero"))
    net.weight("zero", values=np.zeros((), np.float32))
    for i in (1, 2):
        h = net.op("Add", h, net.op("MatMul", h, net.weight(f"layers.{i}.w", WIDTH, WIDTH)))
    net.op("Identity", h, out="y")
    model, given = net.model(SEQUENCE, {"y": ["n", "s", WIDTH]}), samples(8)
    want = outputs(model, given)
    dropped(model, context(given), count=2, include=("layers.[12].w",), replace="linear", ridge=0.0)
    np.testing.assert_allclose(outputs(model, given), want, atol=1e-4 * np.abs(want).max())


def test_where_no_map_fits_the_run_is_dropped_and_it_says_why() -> None:
    gone, result = dropped(post_norm(), context(samples()), count=1, replace="linear", include=("layers.1",))
    assert gone == ["layers.1#0", "layers.1#1"]
    assert "a normalisation or an activation stands between" in result.refusals[0].reason
    net = Net()
    h = net.linear("x", "embed.first")
    for i in range(3):
        h = net.op("Add", h, net.attention(net.norm(h, f"layers.{i}.n1"), f"layers.{i}.attention"))
        h = net.op("Add", h, net.op("Relu", net.linear(net.norm(h, f"layers.{i}.n2"), f"layers.{i}.mlp")))
    net.op("Identity", h, out="y")
    model = net.model(SEQUENCE, {"y": ["n", "s", WIDTH]})
    # The projection of attention is no substitute: the MLP after it reads what it adds.
    _, result = dropped(model, context(samples()), count=1, replace="linear", include=("layers.1",))
    assert "does not end with a projection" in result.refusals[0].reason
    _, result = dropped(pre_norm(), context(samples()), count=1, replace="linear", include=("layers.0",))
    assert "no block comes before it" in result.refusals[0].reason


@pytest.mark.parametrize("how", ["sum", "last"])
def test_merged_weights_are_those_of_the_paper_or_of_the_code(how: str) -> None:
    model = pre_norm(4)
    before = {n: v.const_value.numpy().copy() for n, v in model.graph.initializers.items()}
    gone, result = dropped(model, context(samples()), count=2, replace=how, merge=3, threshold=-1.0)
    assert {name[:8] for name in gone} == {"layers.2", "layers.3"}
    assert result.changes == ["layers.2, layers.3 merged into layers.1"]
    after = {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}
    for part in ("attention.q.weight", "mlp.down.weight"):
        own, second, third = (before[f"layers.{i}.{part}"] for i in (1, 2, 3))
        want = own + (second - own) + (third - own) if how == "sum" else third
        np.testing.assert_allclose(after[f"layers.1.{part}"], want, atol=1e-5)
    norm = "layers.1.norm1.g"
    assert np.array_equal(after[norm], before[norm]) is (how == "last")
    np.testing.assert_array_equal(after["layers.0.mlp.up.weight"], before["layers.0.mlp.up.weight"])


def test_a_merge_that_changes_too_much_does_not_stand() -> None:
    model = pre_norm(4)
    before = outputs(model, samples())
    gone, result = dropped(model, context(samples()), count=2, replace="sum", merge=2, threshold=1.0)
    assert gone == []
    assert not result.changed
    np.testing.assert_array_equal(outputs(model, samples()), before)


def test_a_linear_map_beats_plain_dropping_on_held_out_images() -> None:
    test, labels = fashion("test")
    given = batches("calib", 300, 50)
    accuracy = {}
    for name in ("none", "linear"):
        model = ir.load(DATA / "fmnist_vit_tiny.onnx")
        DropBlocks(count=1, replace=name).run(model, context(given))  # type: ignore[arg-type]
        Shrink().run(model, CONTEXT)
        assert parameters(model) < 0.77 * parameters(ir.load(DATA / "fmnist_vit_tiny.onnx"))
        accuracy[name] = float((outputs(model, [{"image": test}], "logits").argmax(-1) == labels).mean())
    assert accuracy["linear"] > accuracy["none"] + 0.015
    assert accuracy["linear"] > 0.78
