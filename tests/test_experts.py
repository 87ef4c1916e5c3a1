"""Experts: clusters of router rows, what stands for a cluster, and neurons in an order of each expert's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphc import runtime
from graphc.axes.groups import analyse
from graphc.checking import Checker
from graphc.collection import Collector
from graphc.contract import Capabilities, Context, Pass, PassResult
from graphc.model import parameters
from graphc.passes.prune import Prune
from graphc.passes.shrink import Shrink
from graphc.passes.sort_experts import SortExperts
from graphc.pruning import experts
from graphc.recipe import Recipe

CONTEXT = Context(Capabilities("portable", 10, {"": 21}))
DATA = Path(__file__).parent / "data"
WIDTH, NEURONS, EXPERTS = 6, 5, 4


def mixture(*, renormalised: bool = True, seed: int = 0) -> ir.Model:
    """A router that picks 2 of 4 experts, each two matrices around a Relu, as exporters write it."""
    random = np.random.default_rng(seed)
    weights = {
        "router": random.normal(size=(EXPERTS, WIDTH)),
        "up": random.normal(size=(EXPERTS, NEURONS, WIDTH)),
        "down": random.normal(size=(EXPERTS, WIDTH, NEURONS)),
    }
    ints = {"two": [2], "last": [-1], "one": [1], "flat": [-1], "col": [-1, 1]}
    ints |= {"rows": [-1, WIDTH], "shape": [-1, 2, WIDTH], "tile": [1, 2, 1]}
    n = helper.make_node
    nodes = [
        n("Gemm", ["x", "router"], ["logits"], transB=1),
        n("Softmax", ["logits"], ["p"], axis=-1),
        n("TopK", ["p", "two"], ["weight", "index"]),
        n("ReduceSum", ["weight", "last"], ["sum"]),
        n("Div" if renormalised else "Mul", ["weight", "sum" if renormalised else "half"], ["share"]),
        n("Unsqueeze", ["x", "one"], ["x1"]),
        n("Expand", ["x1", "tile"], ["x2"]),
        n("Reshape", ["x2", "rows"], ["x3"]),
        n("Reshape", ["index", "flat"], ["i1"]),
        n("Unsqueeze", ["i1", "last"], ["i2"]),
        n("GatherND", ["up", "i2"], ["u"]),
        n("Unsqueeze", ["x3", "last"], ["x4"]),
        n("MatMul", ["u", "x4"], ["h1"]),
        n("Squeeze", ["h1", "last"], ["h2"]),
        n("Relu", ["h2"], ["h3"]),
        n("GatherND", ["down", "i2"], ["d"]),
        n("Unsqueeze", ["h3", "last"], ["h4"]),
        n("MatMul", ["d", "h4"], ["e1"]),
        n("Squeeze", ["e1", "last"], ["e2"]),
        n("Reshape", ["share", "col"], ["s1"]),
        n("Mul", ["e2", "s1"], ["e3"]),
        n("Reshape", ["e3", "shape"], ["e4"]),
        n("ReduceSum", ["e4", "one"], ["y"], keepdims=0),
    ]
    held = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    held += [numpy_helper.from_array(np.array(v, np.int64), name) for name, v in ints.items()]
    held.append(numpy_helper.from_array(np.array(0.5, np.float32), "half"))
    graph = helper.make_graph(
        nodes,
        "moe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", WIDTH])],
        held,
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def samples(count: int = 3) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(2)
    return [{"x": random.normal(size=(30, WIDTH)).astype(np.float32)} for _ in range(count)]


def run(step: Pass, model: ir.Model, given: list[dict[str, np.ndarray]] | None = None) -> PassResult:
    given = samples() if given is None else given
    collector = Collector(given)
    wanted = step.needs(model)
    statistics = collector.collect(model, wanted.statistics)
    context = Context(CONTEXT.target, statistics=statistics, collect=collector.collect, calibration=given)
    return step.run(model, context)


def arrays(model: ir.Model) -> dict[str, np.ndarray]:
    return {n: v.const_value.numpy().copy() for n, v in model.graph.initializers.items()}


def alive(model: ir.Model) -> list[int]:
    """The experts that the router may still choose."""
    tapped = model.clone()
    node = next(n for n in tapped.graph if n.op_type == "TopK")
    tapped.graph.outputs.append(node.inputs[0])
    found = runtime.session(tapped, optimise=False).run(samples(1)[0])[node.inputs[0].name]
    return np.flatnonzero((found > 0).any(axis=0)).tolist()


def outputs(model: ir.Model) -> np.ndarray:
    return np.concatenate([runtime.session(model, optimise=False).run(each)["y"] for each in samples()])


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(0, 2**31))
def test_clusters_are_those_of_complete_linkage(count: int, seed: int) -> None:
    """Against the definition: the pair of clusters whose farthest members are nearest merges first."""
    points = np.random.default_rng(seed).normal(size=(count, 3))
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)
    clusters = [{i} for i in range(count)]
    heights = []
    for height, a, b in experts.links(apart):
        pairs = {
            (i, j): max(apart[p, q] for p in clusters[i] for q in clusters[j])
            for i in range(len(clusters))
            for j in range(i)
        }
        assert height == pytest.approx(min(pairs.values()))
        assert max(apart[p, q] for p in a for q in b) == pytest.approx(height)
        clusters = [c for c in clusters if c not in (set(a), set(b))] + [set(a) | set(b)]
        heights.append(height)
    assert len(clusters) == 1
    assert heights == sorted(heights)


def test_of_two_experts_alike_to_the_router_the_one_further_from_their_mean_goes() -> None:
    model = mixture()
    router = arrays(model)["router"]
    router[3] = router[1] + 0.01
    model.graph.initializers["router"].const_value = ir.tensor(router, name="router")
    gone = run(Prune(kinds=("expert",), ratio=0.25, criterion="stun"), model)
    assert gone.changes == ["expert written dead"]
    # Of a pair both are equally far from the mean: the first stays.
    assert alive(model) == [0, 1, 2]


def test_the_representative_is_nearest_to_the_mean_of_weights() -> None:
    model = mixture()
    held = arrays(model)
    for i, shift in ((1, 0.0), (2, 0.01), (3, 0.03)):
        held["router"][i] = held["router"][1] + shift
        held["up"][i] = held["up"][1] + 5 * shift
        held["down"][i] = held["down"][1] + 5 * shift
    for name in ("router", "up", "down"):
        model.graph.initializers[name].const_value = ir.tensor(held[name], name=name)
    run(Prune(kinds=("expert",), ratio=0.5, criterion="stun"), model)
    # The mean of all three is nearer to 1 and 2 than to 3, and 1 stands for both of these.
    assert alive(model) in ([0, 1], [0, 2])


def test_merged_experts_are_the_mean_of_their_cluster() -> None:
    model = mixture()
    before = arrays(model)
    before["router"][3] = before["router"][1] + 0.01
    model.graph.initializers["router"].const_value = ir.tensor(before["router"], name="router")
    result = run(Prune(kinds=("expert",), ratio=0.25, criterion="stun", compensate="merge"), model)
    assert "experts merged into those that stay" in result.changes
    assert alive(model) == [0, 1, 2]
    Shrink().run(model, CONTEXT)
    after = arrays(model)
    for name in ("up", "down", "router"):
        assert after[name].shape[0] == 3
        np.testing.assert_allclose(after[name][1], (before[name][1] + before[name][3]) / 2, atol=1e-6)
        np.testing.assert_array_equal(after[name][2], before[name][2])


def test_a_router_that_does_not_share_out_is_told_of() -> None:
    for renormalised in (True, False):
        model = mixture(renormalised=renormalised)
        result = run(Prune(kinds=("expert",), ratio=0.25, criterion="frequency"), model)
        assert bool(result.notes) is not renormalised
    assert "to a sum of 1" in result.notes[0]


def test_an_expert_that_nobody_chose_goes_without_loss_only_where_weights_are_shared_out() -> None:
    given = [{"x": np.abs(each["x"])} for each in samples()]
    for renormalised in (True, False):
        model = mixture(renormalised=renormalised)
        router = np.abs(arrays(model)["router"])
        router[2] = 0.0  # The least logit of all for positive inputs.
        model.graph.initializers["router"].const_value = ir.tensor(router, name="router")
        before = runtime.session(model, optimise=False).run(given[0])["y"]
        result = run(Prune(kinds=("expert",), ratio=0.25, criterion="frequency"), model, given)
        assert result.changes == ["expert written dead"]
        assert alive(model) == [0, 1, 3]
        after = runtime.session(model, optimise=False).run(given[0])["y"]
        error = float(np.abs(after - before).max() / np.abs(before).max())
        assert error < 1e-5 if renormalised else error > 1e-3


def test_as_many_experts_stay_as_are_chosen() -> None:
    model = mixture()
    result = run(Prune(kinds=("expert",), ratio=0.9, criterion="mass"), model)
    assert len(alive(model)) == 2
    assert any("keeps the least it may: 2 units" in r.reason for r in result.refusals)
    Shrink().run(model, CONTEXT)
    assert arrays(model)["router"].shape == (2, WIDTH)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31))
def test_the_order_of_an_experts_neurons_means_nothing(seed: int) -> None:
    model = mixture(seed=seed % 7)
    want = outputs(model)
    groups = analyse(model)
    nested = next(n for g in groups if not isinstance(n := experts.Nested.of(groups, g), str))
    assert (nested.experts, nested.group.size) == (EXPERTS, NEURONS)
    random = np.random.default_rng(seed)
    before = arrays(model)
    order = np.stack([random.permutation(NEURONS) for _ in range(EXPERTS)])
    from graphc import edit

    nested.reorder(order, edit.Names(model))
    np.testing.assert_allclose(outputs(model), want, atol=1e-5 * np.abs(want).max())
    after = arrays(model)
    for e in range(EXPERTS):
        np.testing.assert_array_equal(after["up"][e], before["up"][e][order[e]])
        np.testing.assert_array_equal(after["down"][e], before["down"][e][:, order[e]])


def test_after_sorting_each_expert_loses_its_own_least_neurons() -> None:
    model = mixture()
    before = arrays(model)
    want = outputs(model)
    worth = np.square(before["up"]).sum(2) + np.square(before["down"]).sum(1)
    result = run(SortExperts(criterion="l2"), model)
    assert result.changes == ["expert's neurons sorted (×4)"]
    np.testing.assert_allclose(outputs(model), want, atol=1e-5 * np.abs(want).max())
    run(Prune(kinds=("neuron",), ratio=0.4), model)
    Shrink().run(model, CONTEXT)
    after = arrays(model)
    assert after["up"].shape == (EXPERTS, 3, WIDTH)
    for e in range(EXPERTS):
        order = np.argsort(-worth[e])[:3]
        np.testing.assert_array_equal(after["up"][e], before["up"][e][order])


def test_energy_is_the_mean_square_times_the_norm() -> None:
    model = mixture()
    tapped = model.clone()
    made = {v.name: v for n in tapped.graph for v in n.outputs}
    tapped.graph.outputs.extend([made["h3"], made["i1"]])
    session = runtime.session(tapped, optimise=False)
    found = [session.run(each) for each in samples()]
    h = np.concatenate([f["h3"] for f in found]).astype(np.float64)
    index = np.concatenate([f["i1"] for f in found])
    before = arrays(model)
    run(SortExperts(criterion="energy"), model)
    after = arrays(model)
    for e in range(EXPERTS):
        score = np.square(h[index == e]).mean(0) * np.square(before["down"][e]).sum(0)
        np.testing.assert_array_equal(after["up"][e], before["up"][e][np.argsort(-score)])


def test_without_experts_it_says_so() -> None:
    model = ir.load(DATA / "fmnist_vit_tiny.onnx")
    result = run(SortExperts(criterion="l2"), model)
    assert not result.changed
    assert result.refusals[0].reason == "there are no stacked experts with neurons of their own"


def test_a_trained_mixture_computes_the_same_in_another_order() -> None:
    model = ir.load(DATA / "tiny_mixtral_bytes.onnx")
    given = [{"input_ids": np.random.default_rng(0).integers(0, 256, (1, 32))}]
    sorted_model = model.clone()
    result = run(SortExperts(criterion="energy"), sorted_model, given)
    assert result.changes == ["expert's neurons sorted (×24)"]
    verdict = Checker(model, data=given).compare(sorted_model)
    assert verdict.checked and verdict.ok, verdict.why
    before = parameters(sorted_model)
    run(Prune(kinds=("neuron",), ratio=0.25), sorted_model, given)
    Shrink().run(sorted_model, CONTEXT)
    assert before - parameters(sorted_model) == 3 * 64 * 8 * 3 * 128


@pytest.mark.parametrize("name", ["stun", "uncurl"])
def test_presets_leave_three_of_four_experts(name: str) -> None:
    recipe = Recipe.named(name)
    assert "20" in recipe.description
    model = mixture()
    for step in recipe.passes:
        run(step, model)
    assert arrays(model)["up"].shape == (3, NEURONS, WIDTH)
    assert name != "stun" or (arrays(model)["up"] == 0).mean() > 0.3


@pytest.mark.slow
def test_atomic_experts_are_better_than_whole_ones() -> None:
    """At equal parameters, in cross-entropy on text of this repository that was not calibrated on."""
    pytest.importorskip("torch")
    root = Path(__file__).parent.parent
    data = np.frombuffer((root / "README.md").read_bytes(), np.uint8).astype(np.int64)
    rows = data[: len(data) // 128 * 128].reshape(-1, 128)
    given, held_out = [{"input_ids": rows[:16]}], rows[16:]
    losses = {}
    for name, steps in {
        "whole": [Prune(kinds=("expert",), ratio=0.25, criterion="frequency")],
        "atomic": [step for step in Recipe.named("heapr").passes if step.name != "simplify"],
    }.items():
        model = ir.load(DATA / "tiny_mixtral_bytes.onnx")
        for step in steps:
            run(step, model, given)
        logits = runtime.session(model, optimise=False).run({"input_ids": held_out})["logits"][:, :-1]
        logits = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        picked = np.take_along_axis(logits, held_out[:, 1:, None], -1)[..., 0]
        losses[name] = float((np.log(np.exp(logits).sum(-1)) - picked).mean())
    assert losses["atomic"] < losses["whole"]
