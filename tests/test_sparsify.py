"""``sparsify``: which weights become zero, against dense references; what the sweep makes of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphc import runtime
from graphc.cli import main
from graphc.collection import Collector
from graphc.contract import Capabilities, Context, PassResult
from graphc.errors import BadInput
from graphc.passes.sparsify import Sparsify
from graphc.recipe import Recipe
from graphc.sparsity.curve import Curve, shared_threshold
from graphc.sparsity.pattern import Pattern, erk, lowest_gone, n_of_m, outliers
from graphc.sparsity.ratios import BUCKETS, knapsack
from graphc.sparsity.sweep import Masked, Saliency, no_worse, sweep
from tests.fashion import batches, fashion

CONTEXT = Context(Capabilities("portable", 10, {"": 21}))
DATA = Path(__file__).parent / "data"


def network() -> ir.Model:
    """Two MatMuls and a Gemm of 16 -> 24 -> 16 -> 8 channels; a table that is also the head of 8 words."""
    random = np.random.default_rng(0)
    weights = {
        "w1": random.normal(size=(16, 24)),
        "w2": random.normal(size=(24, 16)) * np.linspace(0.2, 2, 24)[:, None],
        "w3": random.normal(size=(8, 16)) * 0.1,
        "b3": random.normal(size=8),
        "table": random.normal(size=(8, 16)),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w2"], ["c"], name="second"),
        helper.make_node("Gemm", ["c", "w3", "b3"], ["y"], transB=1, name="third"),
        helper.make_node("Gemm", ["c", "table"], ["z"], transB=1, name="head"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 8]) for n in ("y", "z")],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def image_network() -> ir.Model:
    """A plain and a grouped convolution."""
    random = np.random.default_rng(0)
    weights = {"w1": random.normal(size=(8, 4, 3, 3)), "w2": random.normal(size=(8, 4, 3, 3))}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["y"], group=2, pads=[1] * 4),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8, 6, 6])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def given_ids() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(5)
    return [{"ids": random.integers(0, 8, 40).astype(np.int64)} for _ in range(3)]


def given_images() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(5)
    return [{"x": random.normal(size=(3, 4, 6, 6)).astype(np.float32)} for _ in range(2)]


def context(samples: list[dict[str, np.ndarray]], labels: list[np.ndarray] | None = None) -> Context:
    collector = Collector(samples, labels or [])
    return Context(CONTEXT.target, collect=collector.collect, calibration=samples, labels=labels or [])


def arrays(model: ir.Model) -> dict[str, np.ndarray]:
    return {n: v.const_value.numpy().copy() for n, v in model.graph.initializers.items()}


def sparsified(model: ir.Model, ctx: Context = CONTEXT, **options: Any) -> tuple[dict[str, np.ndarray], PassResult]:
    result = Sparsify(**options).run(model, ctx)
    return arrays(model), result


def values(model: ir.Model, samples: list[dict[str, np.ndarray]], name: str) -> np.ndarray:
    tapped = model.clone()
    made = {v.name: v for node in tapped.graph for v in node.outputs}
    if made[name] not in tapped.graph.outputs:
        tapped.graph.outputs.append(made[name])
    session = runtime.session(tapped, optimise=False)
    return np.concatenate([session.run(sample)[name] for sample in samples]).astype(np.float64)


# Which weights go.


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 7), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**31), st.booleans())
def test_n_of_m_keeps_exactly_n_of_every_m(rows: int, groups: int, kept: int, seed: int, ties: bool) -> None:
    random = np.random.default_rng(seed)
    size = kept + int(random.integers(1, 5))
    scores = random.integers(0, 2, (rows, groups * size)) if ties else random.random((rows, groups * size))
    keep = n_of_m(scores, kept, size)
    assert (keep.reshape(rows, groups, size).sum(-1) == kept).all()
    masked = np.where(keep, scores, -1).reshape(rows, groups, size)
    best = np.sort(scores.reshape(rows, groups, size), axis=-1)[..., -kept:].sum()
    assert masked[masked >= 0].sum() == pytest.approx(best)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.floats(0, 1), st.booleans(), st.integers(0, 2**31))
def test_counts_are_exact_and_the_lowest_go(rows: int, columns: int, ratio: float, by_row: bool, seed: int) -> None:
    scores = np.random.default_rng(seed).random((rows, columns))
    keep = lowest_gone(scores, ratio, by_row=by_row)
    if by_row:
        assert ((~keep).sum(1) == round(ratio * columns)).all()
        for row, kept in zip(scores, keep, strict=True):
            assert not (~kept).any() or not kept.any() or row[~kept].max() <= row[kept].min()
    else:
        assert (~keep).sum() == round(ratio * keep.size)
        assert keep.all() or not keep.any() or scores[~keep].max() <= scores[keep].min()


def test_magnitude_takes_the_smallest_of_each_layer_and_leaves_embeddings() -> None:
    before = arrays(network())
    after, result = sparsified(network(), ratio=0.25)
    for name in ("w1", "w2", "w3"):
        gone = after[name] == 0
        assert gone.sum() == round(0.25 * gone.size)
        assert np.abs(before[name][gone]).max() <= np.abs(before[name][~gone]).min()
        np.testing.assert_array_equal(after[name][~gone], before[name][~gone])
    for name in ("table", "b3"):
        np.testing.assert_array_equal(after[name], before[name])
    assert result.refusals[0].reason == "it is an embedding as well"
    assert "the model is not faster" in result.notes[0]
    assert result.changes == [f"weight of 3 layers written to zero (×{round(0.25 * (16 * 24 * 2 + 128))})"]


def test_wanda_is_weight_times_input_norm_by_row() -> None:
    """Against the definition, with rows being outputs in whichever way the weight lies."""
    model, samples = network(), given_ids()
    after, _ = sparsified(network(), context(samples), ratio=0.5, criterion="wanda")
    before = arrays(model)
    for name, source, transposed in (("w1", "x", True), ("w2", "b", True), ("w3", "c", False)):
        norms = np.linalg.norm(values(model, samples, source), axis=0)
        weight = before[name].T if transposed else before[name]
        scores = np.abs(weight) * norms
        keep = np.ones(weight.shape, dtype=bool)
        np.put_along_axis(keep, np.argsort(scores, axis=1)[:, : weight.shape[1] // 2], False, axis=1)
        want = np.where(keep, weight, 0)
        np.testing.assert_array_equal(after[name], want.T if transposed else want)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_n_of_m_lies_along_the_contracted_axis(criterion: str) -> None:
    after, _ = sparsified(network(), context(given_ids()), pattern="2:4", criterion=criterion)
    assert ((after["w1"].T.reshape(24, -1, 4) != 0).sum(-1) <= 2).all()
    assert ((after["w3"].reshape(8, -1, 4) != 0).sum(-1) == 2).all()
    images, _ = sparsified(image_network(), context(given_images()), pattern="2:4", criterion=criterion)
    for name in ("w1", "w2"):
        # Of a convolution, consecutive channels at one place of the kernel.
        channels = np.moveaxis(images[name], 1, -1).reshape(-1, 4)
        assert ((channels != 0).sum(-1) <= 2).all()
        assert (channels != 0).sum() == pytest.approx(channels.size / 2, abs=2)


def test_what_the_pattern_does_not_fit_is_refused() -> None:
    after, result = sparsified(network(), pattern="3:5")
    assert {r.reason for r in result.refusals} >= {"its contracted axis is no multiple of 5"}
    assert (after["w1"] != 0).all()


def test_tiles_go_as_a_whole() -> None:
    before = arrays(network())
    after, _ = sparsified(network(), pattern="2x4", ratio=0.5, include=("w3",))
    tiles = np.abs(before["w3"]).reshape(4, 2, 4, 4).sum(axis=(1, 3))
    gone = (after["w3"].reshape(4, 2, 4, 4) == 0).all(axis=(1, 3))
    assert gone.sum() == 8
    assert tiles[gone].max() <= tiles[~gone].min()


def test_gblm_adds_the_gradients() -> None:
    torch = pytest.importorskip("torch")
    from graphc.fx import to_torch

    samples = given_ids()
    labels = [np.zeros(40, np.int64)] * 3
    model = network()
    after, _ = sparsified(network(), context(samples, labels), ratio=0.5, criterion="gblm", include=("w2",), alpha=2.0)
    module = to_torch(model)
    held = dict(module.named_parameters())
    by_name = {name: held[key] for key, name in module.meta["initializers"].items() if key in held}
    squares = np.zeros((24, 16))
    for sample in samples:
        outputs = next(iter(module(torch.from_numpy(sample["ids"])).values()))
        loss = torch.nn.functional.cross_entropy(outputs, torch.zeros(40, dtype=torch.long))
        squares += np.square(torch.autograd.grad(loss, by_name["w2"])[0].numpy())
    gradient = np.sqrt(squares).T
    norms = np.linalg.norm(values(model, samples, "b"), axis=0)
    scores = np.abs(arrays(model)["w2"].T) * (norms + 2.0 * norms.mean() / gradient.mean() * gradient)
    order = np.argsort(scores, axis=1)
    gone = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(gone, order[:, :12], True, axis=1)
    assert ((after["w2"].T == 0) == gone).mean() > 0.99


def test_random_depends_on_the_seed_alone() -> None:
    def gone(seed: int) -> bytes:
        model = network()
        Sparsify(criterion="random").run(model, Context(CONTEXT.target, seed=seed))
        return (arrays(model)["w1"] == 0).tobytes()

    assert gone(1) == gone(1) != gone(2)


# What the others make of it.


def gram_of(columns: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    x = random.normal(size=(4 * columns, columns)) @ random.normal(size=(columns, columns))
    return np.asarray(x.T @ x)


def damped(gram: np.ndarray, damp: float) -> np.ndarray:
    return np.asarray(gram + damp * np.mean(np.diagonal(gram)) * np.eye(len(gram)))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 10), st.integers(1, 4), st.integers(1, 12), st.integers(0, 2**31))
def test_the_sweep_is_optimal_brain_surgery_column_by_column(columns: int, rows: int, block: int, seed: int) -> None:
    """Brute force: each column in turn is set, and a dense solve gives the best later columns for it."""
    random = np.random.default_rng(seed)
    weight = random.normal(size=(rows, columns))
    keep = random.random((rows, columns)) < 0.5
    gram = gram_of(columns, seed)
    found = sweep(weight, gram, Masked(keep), damp=0.01, block=block)
    h = damped(gram, 0.01)
    want = weight.copy()
    for i in range(columns):
        new = np.where(keep[:, i], want[:, i], 0.0)
        step = new - want[:, i]
        if i + 1 < columns:
            # Least (d H dT) with the change of column i given, over the columns after it.
            want[:, i + 1 :] -= np.outer(step, np.linalg.solve(h[i + 1 :, i + 1 :], h[i + 1 :, i]))
        want[:, i] = new
    np.testing.assert_allclose(found, want, atol=1e-6 * np.abs(want).max() + 1e-9)
    assert (found[~keep] == 0).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(4, 40), st.sampled_from([0.25, 0.5, 0.75]), st.integers(0, 2**31))
def test_the_sweep_never_loses_to_plain_zeros_at_the_same_places(columns: int, ratio: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    weight = random.normal(size=(5, columns))
    gram = gram_of(columns, seed)
    keep = lowest_gone(np.abs(weight), ratio, by_row=False)

    def error(new: np.ndarray) -> float:
        return float(np.trace((weight - new) @ gram @ (weight - new).T))

    new = no_worse(weight, sweep(weight, gram, Masked(keep), damp=1e-4), gram)
    assert (new[~keep] == 0).all()
    assert error(new) <= error(np.where(keep, weight, 0.0)) * (1 + 1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.sampled_from([(1, 2), (2, 4), (4, 8)]), st.integers(0, 2**31))
def test_the_sweep_keeps_the_pattern(groups: int, pattern: tuple[int, int], seed: int) -> None:
    kept, size = pattern
    weight = np.random.default_rng(seed).normal(size=(3, groups * size))
    new = sweep(weight, gram_of(groups * size, seed), Saliency(Pattern(kept, size), 0.0, by_row=False), block=2 * size)
    assert ((new.reshape(3, groups, size) != 0).sum(-1) == kept).all()


def test_a_grid_can_be_projected_to_in_the_same_sweep() -> None:
    """GPTQ: rounding by the sweep loses less than rounding to nearest."""

    class Rounded:
        def begin(self, start: int, weights: np.ndarray, diagonal: np.ndarray) -> None:
            pass

        def column(self, index: int, weights: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
            return np.round(weights[:, 0] * 2) / 2

    weight, gram = np.random.default_rng(0).normal(size=(8, 32)), gram_of(32, 0)
    errors = [
        float(np.trace((weight - new) @ gram @ (weight - new).T))
        for new in (sweep(weight, gram, Rounded()), np.round(weight * 2) / 2)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_inputs_that_are_always_zero_cost_nothing() -> None:
    gram = gram_of(6, 1)
    gram[2], gram[:, 2] = 0.0, 0.0
    weight = np.random.default_rng(0).normal(size=(3, 6))
    new = sweep(weight, gram, Masked(np.ones((3, 6), dtype=bool)))
    assert (new[:, 2] == 0).all()
    np.testing.assert_allclose(np.delete(new, 2, axis=1), np.delete(weight, 2, axis=1))


def test_on_calibration_data_sparsegpt_beats_wanda_with_and_without_update() -> None:
    model, samples = network(), given_ids()
    want = values(model, samples, "a")
    errors = {}
    for name, options in {
        "magnitude": {"criterion": "magnitude"},
        "same": {"criterion": "magnitude", "update": "obs"},
        "sparsegpt": {"criterion": "sparsegpt"},
    }.items():
        clone = model.clone()
        after, _ = sparsified(clone, context(samples), ratio=0.5, include=("w1",), **options)
        assert (after["w1"] == 0).sum() == 192
        errors[name] = float(np.square(values(clone, samples, "a") - want).sum())
    assert errors["same"] < errors["magnitude"]
    assert errors["sparsegpt"] < errors["magnitude"]


def test_grouped_convolutions_have_a_gram_for_each_group() -> None:
    model, samples = image_network(), given_images()
    want = values(model, samples, "y")
    errors = []
    for update in ("none", "obs"):
        clone = model.clone()
        sparsified(clone, context(samples), ratio=0.6, include=("w2",), update=update)
        errors.append(float(np.square(values(clone, samples, "y") - want).sum()))
    assert errors[1] < 0.9 * errors[0]


def test_sequential_statistics_are_those_of_what_came_before() -> None:
    """The last layer sees the sparse ones before it: its own error is then less."""
    model, samples = network(), given_ids()
    first = model.clone()
    sparsified(first, context(samples), ratio=0.7, include=("w1", "w2"), criterion="sparsegpt")
    expected = first.clone()
    sparsified(expected, context(samples), ratio=0.7, include=("w3",), criterion="wanda")
    both = model.clone()
    after, _ = sparsified(both, context(samples), ratio=0.7, criterion="sparsegpt", sequential=True)
    norms = [np.linalg.norm(values(m, samples, "c"), axis=0) for m in (model, both)]
    assert not np.allclose(norms[0], norms[1], rtol=1e-3)
    again = model.clone()
    plain, _ = sparsified(again, context(samples), ratio=0.7, criterion="sparsegpt")
    np.testing.assert_array_equal(after["w1"], plain["w1"])
    assert not np.array_equal(after["w2"], plain["w2"])


# How much of each layer.


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6000), min_size=1, max_size=6), st.floats(0.05, 0.9), st.integers(0, 2**31))
def test_one_threshold_meets_the_budget_to_one_weight(sizes: list[int], ratio: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    curves = [Curve.of(np.abs(random.normal(size=n)) * (i + 1)) for i, n in enumerate(sizes)]
    parts = shared_threshold(curves, ratio, 1.0)
    gone = sum(round(part * n) for part, n in zip(parts, sizes, strict=True))
    assert gone == round(ratio * sum(sizes))


def test_one_threshold_is_that_of_all_scores() -> None:
    random = np.random.default_rng(0)
    scores = [np.abs(random.normal(size=n)) * scale for n, scale in ((900, 1.0), (3000, 0.3), (50, 5.0))]
    parts = shared_threshold([Curve.of(each) for each in scores], 0.5, 1.0)
    threshold = np.sort(np.concatenate(scores))[1975]
    for part, each in zip(parts, scores, strict=True):
        assert part == pytest.approx((each < threshold).mean(), abs=2 / len(each))


def test_lamp_is_its_definition() -> None:
    weight = np.abs(np.random.default_rng(0).normal(size=300))
    curve = Curve.of(weight, lamp=True)
    ordered = np.sort(weight)
    want = [w**2 / np.sum(weight[weight >= w] ** 2) for w in ordered]
    np.testing.assert_allclose(curve.scores, want)
    # The largest weight of each layer has score 1: no layer collapses.
    small = Curve.of(weight * 1e-3, lamp=True)
    parts = shared_threshold([curve, small], 0.9, 1.0)
    assert parts[0] == pytest.approx(parts[1], abs=0.01)


def test_erk_meets_the_budget_and_spares_small_layers() -> None:
    shapes = [(64, 64, 9), (256, 256, 9), (10, 256, 1), (64, 3, 49)]
    for ratio in (0.3, 0.5, 0.8, 0.95):
        parts = erk(shapes, ratio)
        sizes = [a * b * c for a, b, c in shapes]
        assert np.dot(parts, sizes) / sum(sizes) == pytest.approx(ratio)
        assert all(0 <= part <= 1 for part in parts)
    assert parts[2] < parts[0] < parts[1]


def test_layers_with_outliers_lose_less() -> None:
    parts = outliers([0.01, 0.05, 0.02], [100, 100, 200], 0.6, 0.08)
    assert parts[1] < parts[2] < parts[0]
    assert np.average(parts, weights=[100, 100, 200]) == pytest.approx(0.6)
    assert max(parts) - min(parts) == pytest.approx(0.16)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_the_knapsack_finds_the_best_of_all_choices(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes, parts = random.integers(1, 5, 3) * 100, np.array([0.0, 0.25, 0.5, 0.75])
    costs = np.cumsum(random.random((3, 4)), axis=1)
    costs[:, 0] = 0
    found = knapsack([int(n) for n in sizes], parts, costs, 0.5)

    def cost(choice: Any) -> float:
        return float(sum(costs[i, k] for i, k in enumerate(choice)))

    every = [
        choice
        for choice in np.ndindex(4, 4, 4)
        if sum(round(parts[k] * n / sizes.sum() * BUCKETS) for k, n in zip(choice, sizes, strict=True)) >= BUCKETS // 2
    ]
    chosen = tuple(int(np.flatnonzero(parts == part)[0]) for part in found)
    assert chosen in every
    assert cost(chosen) == pytest.approx(min(map(cost, every)))


@pytest.mark.parametrize("allocation", ["global", "lamp", "erk", "owl", "curves"])
def test_allocations_meet_the_budget(allocation: str) -> None:
    after, _ = sparsified(network(), context(given_ids()), ratio=0.5, allocation=allocation)
    zeros = [int((after[name] == 0).sum()) for name in ("w1", "w2", "w3")]
    slack = 128 if allocation == "curves" else 2
    assert abs(sum(zeros) - 448) <= slack
    assert len({round(z / n, 3) for z, n in zip(zeros, (384, 384, 128), strict=True)}) > 1


# The pass.


def test_a_gate_gives_weights_back_and_patterns_wider() -> None:
    assert [level.spec() for level in Sparsify(ratio=0.8).levels(network())][1] == "sparsify{ratio=0.6}"
    assert [level.spec() for level in Sparsify(pattern="1:4").levels(network())] == [
        'sparsify{pattern="1:4"}',
        'sparsify{pattern="2:4"}',
        'sparsify{pattern="3:4"}',
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, "ratio cannot be 1"),
        ({"pattern": "4:2"}, "no pattern '4:2'"),
        ({"pattern": "dense"}, "no pattern 'dense'"),
        ({"pattern": "2:4", "allocation": "erk"}, "N:M takes the same of every layer"),
        ({"pattern": "2x2", "criterion": "sparsegpt"}, "single weights"),
        ({"criterion": "sparsegpt", "update": "none"}, "sparsegpt is an update"),
        ({"damp": 0.0}, "damp cannot be 0"),
        ({"most": 0.0}, "most cannot be 0"),
        ({"kinds": ("Add",)}, "weights of 'Add'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Sparsify(**options)


def test_bad_names_and_weights_are_named() -> None:
    with pytest.raises(BadInput, match="'w2'"):
        sparsified(network(), include=("w22",))
    model = network()
    broken = arrays(model)["w1"]
    broken[3, 4] = np.nan
    model.graph.initializers["w1"].const_value = ir.tensor(broken, name="w1")
    with pytest.raises(BadInput, match="NaN"):
        sparsified(model)


def test_the_report_says_what_the_target_gains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "m.onnx", tmp_path / "o.onnx"
    ir.save(network(), path)
    assert main(["optimize", str(path), "-o", str(out), "-p", "sparsify{pattern=2:4}", "--no-measure"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "sparsify wrote 50.0% of the weights of 3 layers to zero" in shown
    assert "the model is not faster" in shown


@pytest.mark.slow
def test_orderings_on_a_trained_network() -> None:
    """Held-out accuracy of a ViT: wanda and sparsegpt over magnitude, free over N:M."""
    test, classes = fashion("test")
    ctx = context(batches("calib", 500, 50))
    accuracy = {}
    for name, options in {
        "magnitude": {"pattern": "2:4"},
        "wanda": {"pattern": "2:4", "criterion": "wanda"},
        "sparsegpt": {"pattern": "2:4", "criterion": "sparsegpt"},
        "free": {"criterion": "sparsegpt"},
    }.items():
        model = ir.load(DATA / "fmnist_vit_tiny.onnx")
        Sparsify(**options).run(model, ctx)  # type: ignore[arg-type]
        logits = runtime.session(model, optimise=False).run({"image": test})["logits"]
        accuracy[name] = float((logits.argmax(-1) == classes).mean())
    assert accuracy["magnitude"] < accuracy["sparsegpt"]
    assert accuracy["free"] >= accuracy["sparsegpt"] - 0.01


PRESETS = "magnitude-global lamp erk rd-dp-weights wanda wanda-2-4 sparsegpt sparsegpt-2-4 owl mosaic".split()


@pytest.mark.parametrize("name", [*PRESETS, pytest.param("gblm", marks=pytest.mark.slow)])
def test_presets_write_half_of_the_weights_to_zero(name: str) -> None:
    if name == "gblm":
        pytest.importorskip("torch")
    recipe = Recipe.named(name)
    assert "20" in recipe.description
    model = network()
    for step in recipe.passes:
        step.run(model, context(given_ids()))
    zeros = sum(int((array == 0).sum()) for key, array in arrays(model).items() if key.startswith("w"))
    assert abs(zeros - 448) <= (128 if name == "rd-dp-weights" else 8)
