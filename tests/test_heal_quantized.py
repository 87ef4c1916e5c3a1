"""``heal`` of quantized models: their scales, on request their codes, and what must not move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

from graphc.cache import Store  # noqa: E402
from graphc.contract import Context, PassResult  # noqa: E402
from graphc.fx import codes, dtypes, from_torch, to_torch  # noqa: E402
from graphc.healing import training  # noqa: E402
from graphc.healing.weights import MOST_CODES, STRIDE, Weights  # noqa: E402
from graphc.passes.heal import Heal  # noqa: E402
from tests.quantized_models import CONTEXT, build, context, held, mlp, normal, quantized, rows, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

Array = np.ndarray[Any, Any]

CASES = rows(12)


def healed(model: ir.Model, original: ir.Model, **options: Any) -> PassResult:
    found = {"steps": 200, "learning_rate": 0.001, "loss": "mse", "hidden": 0.0, **options}
    return Heal(**found).run(model, Context(CONTEXT.target, original=original, calibration=CASES))


def distance(model: ir.Model, original: ir.Model) -> float:
    """The mean squared difference of the outputs on other data of the same kind."""
    x = rows(16)[-1]["x"]
    return float(np.square(run(model, x=x)["y"] - run(original, x=x)["y"]).mean())


def constants(model: ir.Model) -> dict[str, Array]:
    return {name: held(model, name).copy() for name in model.graph.initializers}


@pytest.mark.parametrize(
    "options", [{"bits": 4, "block": 16}, {"bits": 3}, {"bits": 4, "block": 16, "symmetric": False}]
)
def test_scales_learn_and_codes_stay(options: dict[str, Any]) -> None:
    original = mlp()
    model = original.clone()
    quantized(model, **options)
    before, start = constants(model), distance(model, original)
    result = healed(model, original)
    assert result.changed and distance(model, original) < 0.9 * start
    after = constants(model)
    assert {name: (array.dtype, array.shape) for name, array in after.items()} == {
        name: (array.dtype, array.shape) for name, array in before.items()
    }
    moved = {name for name in after if not np.array_equal(after[name], before[name])}
    assert moved == {"w.scale", "v.scale", "b", "c"}


def test_codes_learn_more_within_their_reach_and_zeros_stay() -> None:
    original = mlp()
    model = original.clone()
    quantized(model, bits=4, block=16)
    other, before = model.clone(), constants(model)
    healed(other, original)
    healed(model, original, weights="codes")
    assert distance(model, original) < distance(other, original)
    for name in ("w", "v"):
        old, new = (array.astype(np.int8) for array in (before[name], held(model, name)))
        assert model.graph.initializers[name].dtype == ir.DataType.INT4
        assert (new != old).any() and old.min() <= new.min() and new.max() <= old.max()
        assert not new[old == 0].any()


def test_zeros_may_move_if_told() -> None:
    original = mlp()
    model = original.clone()
    quantized(model, bits=4, block=16)
    before = constants(model)
    healed(model, original, weights="codes", keep_zeros=False)
    assert held(model, "w").astype(np.int8)[before["w"].astype(np.int8) == 0].any()


@pytest.mark.parametrize(("bits", "kept"), [(8, True), (4, False)])
def test_codes_of_8_bits_stay(bits: int, kept: bool) -> None:
    original = mlp()
    model = original.clone()
    quantized(model, bits=bits)
    before = constants(model)
    healed(model, original, weights="codes")
    assert np.array_equal(before["w"].astype(np.int8), held(model, "w").astype(np.int8)) == kept
    assert not np.array_equal(before["w.scale"], held(model, "w.scale"))


@pytest.mark.parametrize("weights", ["bias-norm", "lora"])
def test_the_other_ways_leave_scales_alone(weights: Any) -> None:
    model = mlp()
    quantized(model, bits=4)
    module = to_torch(model, quantized=True)
    scales = {module.meta["initializers"][path]: path for path in module.meta["scales"]}
    assert set(scales) == {"w.scale", "v.scale"} and set(scales.values()) <= dict(module.named_parameters()).keys()
    trained = {name.partition(":")[0] for name in Weights(module, weights).trained()}
    assert trained <= {"b", "c"}


def test_where_activations_are_quantized_scales_stay_since_those_of_biases_are_made_of_them() -> None:
    original = mlp()
    model = original.clone()
    quantized(model, context(CASES), scheme="static")
    before = constants(model)
    assert not codes.scales(model) and any(array.dtype == np.int32 for array in before.values())
    healed(model, original, weights="codes")
    after = constants(model)
    assert all(np.array_equal(after[name], array) for name, array in before.items() if "scale" in name)


def test_a_table_that_is_looked_up_and_multiplied_with_has_one_set_of_scales() -> None:
    text = "e = Gather(t, i) h = MatMul(e, w) k = Transpose<perm=[1,0]>(t) y = MatMul(h, k)"
    original = build(text, "int64[N] i", "float[N,100] y", t=normal(100, 32), w=normal(32, 32))
    model = original.clone()
    quantized(model, bits=4, block=16)
    assert {scale.name: held.name for scale, held in codes.scales(model).items()} == {"t.scale": "t", "w.scale": "w"}
    cases = [{"i": np.random.default_rng(seed).integers(0, 100, 50)} for seed in range(8)]
    before = constants(model)
    heal = Heal(steps=30, learning_rate=0.005, weights="codes")
    result = heal.run(model, Context(CONTEXT.target, original=original, calibration=cases))
    assert result.changed and np.array_equal(before["t"], held(model, "t"))
    assert not np.array_equal(before["t.scale"], held(model, "t.scale"))
    assert len(to_torch(model, quantized=True).meta["scales"]) == 2


@pytest.mark.parametrize("at", [2, 9])
def test_resumed_equals_uninterrupted(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    original = mlp()
    model = original.clone()
    quantized(model, bits=4, block=16)
    heal = Heal(steps=10, learning_rate=0.01, weights="codes", patience=0)
    given: dict[str, Any] = {"original": original, "calibration": CASES}

    def interrupt(what: str, done: int, total: int) -> None:
        if done == at:
            raise KeyboardInterrupt

    whole, half = model.clone(), model.clone()
    heal.run(whole, Context(CONTEXT.target, **given))
    with pytest.raises(KeyboardInterrupt):
        heal.run(half, Context(CONTEXT.target, store=Store(tmp_path), progress=interrupt, **given))
    heal.run(half, Context(CONTEXT.target, store=Store(tmp_path), **given))
    after = constants(whole)
    assert all(np.array_equal(after[name], array) for name, array in constants(half).items())


@pytest.mark.parametrize("bits", [3, 4])
def test_codes_are_written_back_as_they_were_or_as_they_became(bits: int) -> None:
    model = mlp()
    quantized(model, bits=bits)
    module = to_torch(model, quantized=True)
    back = constants(from_torch(module, model))
    assert all(np.array_equal(back[name], array) for name, array in constants(model).items())
    weights = Weights(module, "codes", keep_zeros=False)
    start = held(model, "w").astype(np.int8)
    leaves = weights.trained()
    leaves = {name: value.detach().clone() for name, value in leaves.items()}
    leaves["w"][:] = 1 / STRIDE
    weights.load(leaves)
    weights.fold(module)
    after = held(from_torch(module, model), "w").astype(np.int8)
    np.testing.assert_array_equal(after, np.minimum(start + 1, start.max()))
    assert MOST_CODES == 16


def test_without_a_request_scales_are_no_parameters() -> None:
    model = mlp()
    quantized(model, bits=4, block=16)
    module = to_torch(model)
    assert {name for name, _ in module.named_parameters()} == {"b", "c"} and module.meta["scales"] == {}


@pytest.mark.parametrize("dtype", [ir.DataType.INT2, ir.DataType.UINT2, ir.DataType.INT4, ir.DataType.UINT4])
def test_packed_integers_survive_torch(dtype: ir.DataType) -> None:
    array = np.arange(4).astype(np.int8) - (2 if dtype.is_signed() else 0)
    held = ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name="w")
    made = dtypes.to_ir(dtypes.to_tensor(held), held)
    assert made.dtype == dtype and made.tobytes() == held.tobytes()
