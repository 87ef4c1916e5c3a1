"""``drop-blocks``: which blocks go, by each criterion."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphc.depth.structure import find
from graphc.passes.drop_blocks import DropBlocks
from tests.block_models import (
    CONTEXT,
    WIDTH,
    context,
    dropped,
    outputs,
    pre_norm,
    samples,
    without,
)


def test_influence_takes_the_block_that_turns_the_stream_least() -> None:
    model = pre_norm()
    for name in ("attention.o", "mlp.down"):
        held = model.graph.initializers[f"layers.1.{name}.weight"]
        held.const_value = ir.tensor(held.const_value.numpy() * 0.01)
        model.graph.initializers[f"layers.1.{name}.bias"].const_value = ir.tensor(
            np.zeros(WIDTH, np.float32), name=f"layers.1.{name}.bias"
        )
    for criterion in ("influence", "angular", "probe", "magnitude"):
        gone, result = dropped(model.clone(), context(samples()), count=1, criterion=criterion)
        assert gone == ["layers.1#0", "layers.1#1"], criterion
        assert result.changes == ["block layers.1 written to zero"]


def test_influence_equals_the_dense_computation() -> None:
    from graphc.depth import scores

    model, given = pre_norm(), samples()
    structure = find(model)
    found = scores.similarity(scores.units(structure.blocks, "block"), model, context(given))
    tapped = model.clone()
    made = {v.name: v for node in tapped.graph for v in node.outputs}
    names = [structure.blocks[0].start.name, *(block.end.name for block in structure.blocks)]
    tapped.graph.outputs.extend(made[name] for name in names)
    streams = [outputs(tapped, given, name).reshape(-1, WIDTH).astype(np.float64) for name in names]
    for i, score in enumerate(found):
        a, b = streams[i], streams[i + 1]
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert score == pytest.approx(1 - cosines.mean(), rel=1e-5)


def test_a_probe_is_what_dropping_costs() -> None:
    from graphc.checking import metrics
    from graphc.depth import scores

    model, given = pre_norm(), samples()
    ctx = context(given)
    units = scores.units(find(model).blocks, "branch")
    found = scores.probed(model, units, 1, "error", False, ctx)
    want = outputs(model, given)
    for i, score in enumerate(found):
        zeroed, _ = without(model, [i])
        assert score == pytest.approx(metrics.error([{"y": want}], [{"y": outputs(zeroed, given)}], given), rel=1e-4)


def test_greedy_chooses_given_what_went_before() -> None:
    model, given = pre_norm(4), samples()
    gone, _ = dropped(model.clone(), context(given), count=2, unit="branch", criterion="probe", greedy=True)
    first, _ = dropped(model.clone(), context(given), count=1, unit="branch", criterion="probe")
    assert len(gone) == 2
    assert set(first) <= set(gone)
    second = {}
    for i, branch in enumerate(find(model).branches):
        if branch.name not in first:
            at = [b.name for b in find(model).branches].index(first[0])
            zeroed, _ = without(model, [at, i])
            second[branch.name] = np.linalg.norm(outputs(zeroed, given) - outputs(model, given))
    assert set(gone) == {*first, min(second, key=lambda name: second[name])}


def test_taylor_scores_are_weight_times_gradient() -> None:
    torch = pytest.importorskip("torch")
    from graphc.depth import scores
    from graphc.fx import to_torch

    model, given = pre_norm(2), samples(2)
    labels = [np.zeros((2, 7), np.int64)] * 2
    units = scores.units(find(model).blocks, "block")
    found = scores.taylor(units, model, context(given, labels))
    module = to_torch(model)
    for sample in given:
        logits = next(iter(module(torch.from_numpy(sample["x"])).values()))
        torch.nn.functional.cross_entropy(logits.reshape(-1, 5), torch.zeros(14, dtype=torch.long)).backward()
    held = dict(module.named_parameters())
    by_name = {name: held[key] for key, name in module.meta["initializers"].items() if key in held}
    for unit, score in zip(units, found, strict=True):
        own = [by_name[value.name] for value in unit.constants]
        want = sum((w * w.grad).abs().sum().item() for w in own if w.grad is not None)
        assert score == pytest.approx(want, rel=1e-4)


def test_angular_takes_consecutive_blocks() -> None:
    gone, _ = dropped(pre_norm(5), context(samples()), count=3, criterion="angular")
    blocks = sorted({int(name.split(".")[1][0]) for name in gone})
    assert len(blocks) == 3
    assert blocks[-1] - blocks[0] == 2


@pytest.mark.parametrize(("half", "counts"), [("large", [1, 2]), ("small", [2, 3])])
def test_depth_drops_the_end_where_the_loss_is_least(half: str, counts: list[int]) -> None:
    model, given = pre_norm(4), samples()
    labels = [np.random.default_rng(i).integers(0, 5, (2, 7)) for i in range(4)]
    right = np.concatenate(labels)

    def loss(of: ir.Model) -> float:
        scores = outputs(of, given).astype(np.float64)
        logs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        return -float(np.take_along_axis(logs, right[..., None], -1).mean())

    losses = {n: loss(without(model, range(8 - 2 * n, 8))[0]) for n in counts}
    best = min(losses, key=lambda n: losses[n])
    gone, _ = dropped(model, context(given, labels), criterion="depth", half=half)
    assert gone == [f"layers.{i}#{k}" for i in range(4 - best, 4) for k in (0, 1)]


def test_ends_and_patterns_are_kept() -> None:
    ctx = CONTEXT
    gone, _ = dropped(pre_norm(5), ctx, count=2, criterion="magnitude", first=2, last=1)
    assert {name[:8] for name in gone} == {"layers.2", "layers.3"}
    gone, result = dropped(pre_norm(4), ctx, count=3, criterion="random", include=("layers.1", "layers.2"))
    assert {name[:8] for name in gone} == {"layers.1", "layers.2"}
    assert "only 2 of 3 can go" in result.refusals[0].reason
    gone, _ = dropped(pre_norm(3), ctx, ratio=0.67, criterion="random", exclude=("layers.1.mlp.up.weight",))
    assert {name[:8] for name in gone} == {"layers.0", "layers.2"}


def test_levels_give_blocks_back_one_by_one() -> None:
    levels = DropBlocks(ratio=0.75, criterion="random").levels(pre_norm(4))
    assert [level.spec() for level in levels[1:]] == [
        "drop-blocks{count=2 criterion=random}",
        "drop-blocks{count=1 criterion=random}",
    ]
