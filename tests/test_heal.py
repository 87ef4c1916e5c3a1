"""``heal``: what it learns, what it must not touch, and that it can be interrupted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

import graphc  # noqa: E402
from graphc import runtime  # noqa: E402
from graphc.cache import Store  # noqa: E402
from graphc.contract import Capabilities, Context, PassResult  # noqa: E402
from graphc.errors import BadInput  # noqa: E402
from graphc.frontends.onnx import load  # noqa: E402
from graphc.fx import to_torch  # noqa: E402
from graphc.healing import points, training  # noqa: E402
from graphc.healing.objective import Objective  # noqa: E402
from graphc.healing.weights import Weights  # noqa: E402
from graphc.passes.heal import GENERATED, RATES, Heal  # noqa: E402
from graphc.passes.prune import Prune  # noqa: E402
from graphc.passes.shrink import Shrink  # noqa: E402
from tests.fashion import fashion  # noqa: E402
from tests.small_models import hold  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

Array = np.ndarray[Any, Any]

DATA = Path(__file__).parent / "data"
CAPABILITIES = Capabilities("portable", 10, {"": 21})
RNG = np.random.default_rng(0)
CASES = [{"x": RNG.standard_normal((8, 6), np.float32)} for _ in range(12)]


def mlp(last: str = "y = MatMul(e, w3)") -> ir.Model:
    """Two hidden layers with a residual sum; 12 neurons that can go."""
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[n, 6] x) => (float[n, 5] y)
    {{ a = MatMul(x, w1) b = Add(a, b1) c = Relu(b) d = MatMul(c, w2) e = Add(d, x) {last} }}""")
    rng = np.random.default_rng(1)
    shapes = {"w1": (6, 12), "b1": (12,), "w2": (12, 6), "w3": (6, 5)}
    return hold(model, **{name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})


def context(original: ir.Model | None, **more: Any) -> Context:
    return Context(CAPABILITIES, original=original, **{"calibration": CASES, **more})


def pruned(original: ir.Model, ratio: float = 0.5) -> ir.Model:
    model = original.clone()
    Prune(ratio=ratio, kinds=("neuron",)).run(model, context(original))
    return model


def arrays(model: ir.Model) -> dict[str, Array]:
    return {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}


def distance(model: ir.Model, original: ir.Model) -> float:
    """The mean squared difference of the outputs on other data than is healed on."""
    x = np.random.default_rng(9).standard_normal((64, 6)).astype(np.float32)
    a, b = (runtime.session(m, optimise=False, threads=1).run({"x": x})["y"] for m in (model, original))
    return float(np.square(a - b).mean())


def healed(model: ir.Model, original: ir.Model, **options: Any) -> tuple[ir.Model, PassResult]:
    copy = model.clone()
    return copy, Heal(**{"steps": 60, "learning_rate": 0.02, "loss": "mse", **options}).run(copy, context(original))


@pytest.mark.parametrize("weights", ["all", "lora"])
def test_the_pruned_model_comes_closer_and_dead_units_stay_dead(weights: str) -> None:
    original = mlp()
    model = pruned(original)
    before = arrays(model)
    after, result = healed(model, original, weights=weights)
    assert distance(after, original) < 0.6 * distance(model, original)
    assert any("loss on held-out data" in change for change in result.changes)
    for name, array in arrays(after).items():
        assert (array[before[name] == 0] == 0).all()
    Shrink().run(after, context(original))
    assert after.graph.initializers["w1"].const_value.shape == (6, 6)


def test_healing_may_come_after_shrink() -> None:
    original = mlp()
    model = pruned(original)
    Shrink().run(model, context(original))
    after, _ = healed(model, original)
    assert distance(after, original) < 0.6 * distance(model, original)


def test_only_biases_and_norms_are_trained_when_asked_for() -> None:
    original = mlp()
    model = pruned(original)
    after, _ = healed(model, original, weights="bias-norm")
    before, now = arrays(model), arrays(after)
    assert [name for name in before if not np.array_equal(before[name], now[name])] == ["b1"]


def test_no_steps_change_nothing() -> None:
    original = mlp()
    model = pruned(original)
    after, result = healed(model, original, steps=0)
    assert not result.changed and "nothing was asked for" in result.refusals[0].reason
    assert all(np.array_equal(array, arrays(after)[name]) for name, array in arrays(model).items())


def test_an_absurd_learning_rate_leaves_the_model_as_it_was() -> None:
    original = mlp()
    model = pruned(original)
    after, result = healed(model, original, learning_rate=1e4, clip=0.0)
    assert not result.changed and "nothing was better on held-out data" in result.refusals[0].reason
    assert all(np.array_equal(array, arrays(after)[name]) for name, array in arrays(model).items())


def test_where_the_usual_learning_rate_does_not_help_a_lower_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    original = mlp()
    model = pruned(original)
    monkeypatch.setitem(RATES, "all", 1.0)
    monkeypatch.setattr("graphc.passes.heal.GENTLER", 0.02)
    after, result = healed(model, original, learning_rate=0.0)
    assert any(change == "at 1 nothing was better: learning rate 0.02" for change in result.changes)
    assert distance(after, original) < 0.6 * distance(model, original)


def test_the_original_itself_needs_no_healing() -> None:
    original = mlp()
    _, result = healed(original, original)
    assert not result.changed and "nothing to heal" in result.refusals[0].reason


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("weights", ["all", "lora"])
@pytest.mark.parametrize("at", [3, 17, 30])
def test_resumed_equals_uninterrupted(weights: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    original = mlp()
    model = pruned(original)
    heal = Heal(steps=31, learning_rate=0.01, weights=weights, patience=0)  # type: ignore[arg-type]
    whole = model.clone()
    heal.run(whole, context(original))

    steps: list[int] = []

    def interrupt(what: str, done: int, total: int) -> None:
        if done == at:
            raise Interrupted

    def count(what: str, done: int, total: int) -> None:
        steps.append(done)

    store = Store(tmp_path)
    half = model.clone()
    with pytest.raises(Interrupted):
        heal.run(half, context(original, store=store, progress=interrupt))
    assert all(np.array_equal(array, arrays(half)[name]) for name, array in arrays(model).items())
    heal.run(half, context(original, store=store, progress=count))
    assert steps[0] == at
    for name, array in arrays(whole).items():
        np.testing.assert_array_equal(arrays(half)[name], array)
    # What was finished leaves nothing behind, and other options begin anew.
    assert not list(tmp_path.glob("??/*"))


def test_other_options_do_not_go_on_with_what_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    original = mlp()
    model = pruned(original)
    store, steps = Store(tmp_path), []

    def interrupt(what: str, done: int, total: int) -> None:
        if done == 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        Heal(steps=9).run(model.clone(), context(original, store=store, progress=interrupt))
    ctx = context(original, store=store, progress=lambda what, done, total: steps.append(done))
    Heal(steps=9, learning_rate=0.5).run(model.clone(), ctx)
    assert steps[0] == 0


def test_lora_folded_equals_unfolded() -> None:
    module = to_torch(pruned(mlp()))
    weights = Weights(module, "lora", rank=2)
    generator = torch.Generator().manual_seed(3)
    weights.load({n: torch.randn(v.shape, generator=generator) for n, v in weights.trained().items()})
    effective = {name: value.detach().clone() for name, value in weights.effective().items()}
    x = torch.from_numpy(CASES[0]["x"])
    unfolded = torch.func.functional_call(module, effective, (x,))["y"]
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    weights.fold(module)
    assert torch.equal(module(x)["y"], unfolded)
    changed = {n: p.detach() - before[n] for n, p in module.named_parameters()}
    assert set(effective) == {"w1", "w2", "w3"} and not changed["b1"].any()
    assert torch.linalg.matrix_rank(changed["w3"], atol=1e-4) == 2


def test_integers_and_masks_are_not_touched() -> None:
    original = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21]>
    g (float[n, 6] x) => (float[n, 6] y)
    <int8[6, 6] q = {1,2,3,4,5,6,1,2,3,4,5,6,1,2,3,4,5,6,1,2,3,4,5,6,1,2,3,4,5,6,1,2,3,4,5,6}, float s = {0.1},
     float[6] mask = {0, 0, -1e9, 0, 0, 0}, float[6] b = {1, 1, 1, 1, 1, 1}>
    { w = DequantizeLinear(q, s) a = MatMul(x, w) c = Add(a, b) m = Add(c, mask) y = Softmax(m) }""")
    model = original.clone()
    model.graph.initializers["b"].const_value = ir.tensor(np.array([9, 1, 1, 1, 1, 1], np.float32), name="b")
    after, result = healed(model, original, loss="auto", steps=20)
    assert result.changed
    for name in ("q", "s", "mask"):
        np.testing.assert_array_equal(arrays(after)[name], arrays(model)[name])


def test_half_precision_is_trained_in_single() -> None:
    original = mlp()
    for value in original.graph.initializers.values():
        value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=value.name)
        value.dtype = ir.DataType.FLOAT16
    for value in (*original.graph.inputs, *original.graph.outputs):
        value.dtype = ir.DataType.FLOAT16
    cases = [{"x": case["x"].astype(np.float16)} for case in CASES]
    model = pruned(original)
    result = Heal(steps=40, loss="mse", learning_rate=0.02).run(model, context(original, calibration=cases))
    assert result.changed
    assert {array.dtype.name for array in arrays(model).values()} == {"float16"}


def test_labels_count() -> None:
    original = mlp()
    labels = [RNG.integers(0, 5, 8) for _ in CASES]
    model = pruned(original)
    plain, with_labels = model.clone(), model.clone()
    Heal(steps=10).run(plain, context(original))
    Heal(steps=10, labels=5.0).run(with_labels, context(original, labels=labels))
    assert not np.array_equal(arrays(plain)["w3"], arrays(with_labels)["w3"])


def test_without_data_it_says_so() -> None:
    original = mlp()
    model = pruned(original)
    result = Heal(steps=20, learning_rate=0.01).run(model, context(original, calibration=()))
    assert GENERATED in [refusal.reason for refusal in result.refusals]


def test_a_time_limit_ends_it() -> None:
    original = mlp()
    _, result = healed(pruned(original), original, steps=10**6, minutes=0.02)
    assert result.changed


def test_a_time_limit_is_a_schedule_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate rises and falls, and held-out data is read, over the time that there is."""
    clock = iter(np.arange(0.0, 1e4, 0.5).tolist())
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))
    rates, read = [], []
    rate, evaluate = training.Trainer._rate, training.Trainer._evaluate

    def noted(self: training.Trainer, spent: float, step: int) -> float:
        rates.append(rate(self, spent, step))
        return rates[-1]

    def counted(self: training.Trainer, leaves: Any, state: training.State, held: Any) -> None:
        read.append(state.step)
        evaluate(self, leaves, state, held)

    monkeypatch.setattr(training.Trainer, "_rate", noted)
    monkeypatch.setattr(training.Trainer, "_evaluate", counted)
    original = mlp()
    healed(pruned(original), original, steps=10**6, minutes=1, patience=0, learning_rate=1e-3)
    assert 30 < len(rates) < 200 and 9 <= len(read) <= 11
    highest = int(np.argmax(rates))
    assert 0 < highest < len(rates) // 4 and rates[highest] > 0.8e-3
    assert rates[0] < 0.3e-3 and rates[-1] < 0.05e-3


@pytest.mark.parametrize(
    ("last", "kind"),
    [
        ("y = MatMul(e, w3)", "logits"),
        ("f = MatMul(e, w3) y = Softmax(f)", "probabilities"),
        ("f = MatMul(e, w3) y = LogSoftmax(f)", "log-probabilities"),
        ("f = MatMul(e, w3) y = Sigmoid(f)", "chances"),
        ("f = MatMul(e, w3) y = Tanh(f)", "values"),
        ("f = MatMul(e, w3) y = Softmax<axis = 0>(f)", "values"),
    ],
)
def test_outputs_are_compared_as_what_they_hold(last: str, kind: str) -> None:
    original = mlp(last)
    assert points.kind(original.graph.outputs[0]) == kind
    after, _ = healed(pruned(original), original, loss="auto")
    assert distance(after, original) < distance(pruned(original), original)


def test_long_texts_make_small_batches() -> None:
    assert training.batch_of({"image": np.zeros((16, 1, 28, 28), np.float32)}) == 32
    assert training.batch_of({"input_ids": np.zeros((1, 512), np.int64)}) == 4
    assert training.batch_of({"input_ids": np.zeros((1, 5000), np.int64)}) == 1


def test_hidden_states_of_both_models_are_found() -> None:
    original = mlp()
    model = pruned(original)
    assert points.hidden(model, original, 4) == ["e"]
    assert points.hidden(model, original, 0) == []


def test_padding_does_not_count() -> None:
    objective = Objective({"y": "values"}, mask="mask")
    wanted = {"y": torch.ones(1, 3, 2)}
    got = {"y": torch.tensor([[[1.0, 1], [1, 1], [7, 9]]])}
    assert objective(got, wanted, {"mask": np.array([[1, 1, 0]])}).item() == 0
    assert objective(got, wanted, {"mask": np.array([[1, 1, 1]])}).item() > 1


def test_equal_distributions_have_no_distance() -> None:
    scores = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    shifted = scores + 3
    assert abs(Objective({"y": "logits"}, temperature=2.0)({"y": shifted}, {"y": scores}, {}).item()) < 1e-6
    softmax, softer = torch.softmax(scores, -1), torch.softmax(scores / 2, -1)
    of_logits = Objective({"y": "logits"})({"y": scores / 2}, {"y": scores}, {})
    of_chances = Objective({"y": "probabilities"})({"y": softer}, {"y": softmax}, {})
    assert of_logits.item() == pytest.approx(of_chances.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps cannot be -1"),
        ({"batch": -1}, "batch cannot be -1"),
        ({"temperature": 0}, "temperature cannot be 0"),
        ({"held_out": 1.0}, "held-out cannot be 1"),
        ({"learning_rate": float("nan")}, "learning-rate cannot be nan"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Heal(**options)


def test_bad_surroundings() -> None:
    original = mlp()
    with pytest.raises(BadInput, match="no original"):
        Heal().run(original.clone(), context(None))
    other = mlp()
    other.graph.inputs[0].name = "image"
    with pytest.raises(BadInput, match="the original has no input 'x'"):
        Heal().run(original.clone(), context(other))
    with pytest.raises(BadInput, match="its loss on held-out data is nan"):
        Heal(steps=1).run(pruned(original), context(original, calibration=[{"x": np.full((8, 6), np.nan, np.float32)}]))
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="no CUDA"):
            Heal(device="cuda").run(original.clone(), context(original))


def test_the_pipeline_gives_the_model_as_it_came(tmp_path: Path) -> None:
    path, out = tmp_path / "mlp.onnx", tmp_path / "out.onnx"
    original = mlp()
    ir.save(original, path)
    np.savez(tmp_path / "data.npz", x=np.concatenate([case["x"] for case in CASES]))
    recipe = "prune{ratio=0.5 kinds=neuron},heal{steps=60 learning-rate=0.02},shrink"
    report = graphc.optimize(path, out, recipe=recipe, data=tmp_path / "data.npz", measure=False, cache=False)
    assert report.ok
    heal = next(each for each in report.passes if each.name == "heal")
    assert heal.changes
    assert distance(load(out).model, original) < 0.7 * distance(pruned(original), original)
    again = graphc.optimize(
        out, None, recipe=f'heal{{steps=5 teacher="{path}"}}', data=tmp_path / "data.npz", measure=False, cache=False
    )
    assert again.ok and again.passes[-1].name == "heal"


def accuracy(model: ir.Model) -> float:
    images, classes = fashion("test")
    session = runtime.session(model, optimise=True, threads=1)
    name = model.graph.inputs[0].name
    found = [next(iter(session.run({name: images[i : i + 100]}).values())).argmax(-1) for i in range(0, 1000, 100)]
    return float((np.concatenate(found) == classes).mean())


@pytest.mark.slow
@pytest.mark.parametrize("shrunk", [False, True])
def test_half_of_a_networks_channels_are_missed_no_longer(shrunk: bool) -> None:
    original = load(DATA / "fmnist_resnet.onnx").model
    images, classes = fashion("calib")
    cases = [{"image": images[i : i + 16]} for i in range(0, 1000, 16)]
    labels = [classes[i : i + 16] for i in range(0, 1000, 16)]
    ctx = context(original, calibration=cases, labels=labels)
    model = original.clone()
    Prune(ratio=0.5).run(model, ctx)
    if shrunk:
        Shrink().run(model, ctx)
    before = accuracy(model)
    Heal().run(model, dataclasses.replace(ctx, labels=() if shrunk else labels))
    after = accuracy(model)
    assert before < 0.4 and after > 0.8
    if not shrunk:
        nodes = accuracy(model)
        Shrink().run(model, ctx)
        assert accuracy(model) == pytest.approx(nodes, abs=0.002)
        assert sum(v.const_value.size for v in model.graph.initializers.values()) < 150_000
