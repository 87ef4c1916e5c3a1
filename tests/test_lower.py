"""The pass ``lower``: every form before and after, and the timing table that decides."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphc import edit, runtime
from graphc.cache import Store
from graphc.cli import main
from graphc.contract import PassResult, Probe
from graphc.errors import BadInput
from graphc.passes.lower import Lower
from graphc.runtime import timing
from graphc.runtime.timing import Timing
from graphc.timings import FASTER, Table, digest
from tests.recognised_models import CONTEXT, FRAGMENTS, TARGET, always
from tests.small_models import build, feeds, numbers, operators, reasons, run


def lowered(model: ir.Model, ratio: float = 0.5, **options: object) -> tuple[ir.Model, PassResult]:
    after = model.clone()
    result = Lower(**options).run(after, always(ratio))
    inputs = feeds(model)
    wanted, found = run(model, inputs), run(after, inputs)
    assert list(wanted) == list(found)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5)
    return after, result


ROWS = "float[B,S,8] x, float[B,S,8] z"
CASES = [
    ("a = Add(x, z) y = RMSNormalization(a, g)", ["SkipSimplifiedLayerNormalization"]),
    ("a = Add(x, z) n = RMSNormalization(a, g) y = Add(n, a)", ["SkipSimplifiedLayerNormalization", "Add"]),
    (
        "a = Add(x, z) b = Relu(a) n = LayerNormalization(a, g, h) y = Mul(n, b)",
        ["SkipLayerNormalization", "Relu", "Mul"],
    ),
    ("s = Sigmoid(x) y = Mul(x, s)", ["QuickGelu"]),
    ("c = Mul(x, q) s = Sigmoid(c) y = Mul(s, x)", ["QuickGelu"]),
    ("a = Add(x, h) y = Gelu(a)", ["BiasGelu"]),
    ("y = Attention<q_num_heads=2, kv_num_heads=2, scale=0.4>(x, z, x)", ["MultiHeadAttention"]),
]


@pytest.mark.parametrize("body, expected", CASES)
def test_each_form(body: str, expected: list[str]) -> None:
    known = {"g": numbers(8, low=0.5, high=2), "h": numbers(8, seed=1), "q": np.float32(1.702)}
    used = {name: array for name, array in known.items() if f"{name})" in body or f"{name}," in body.replace("x, ", "")}
    model = build(body, x=ROWS, opset=23, **used)
    after, result = lowered(model)
    assert operators(after) == expected and result.changed
    slow, result = lowered(model, ratio=1.0)
    assert operators(slow) == operators(model)
    assert all(reason.endswith("is not faster than what the session makes by itself") for reason in reasons(result))


@pytest.mark.parametrize(
    "body, reason",
    [
        ("y = Attention<q_num_heads=4, kv_num_heads=2>(x, k, k)", "keys have fewer heads than queries"),
        ("y = Attention<q_num_heads=2, kv_num_heads=2, softcap=2.0>(x, z, x)", "MultiHeadAttention has no soft cap"),
        ("a = Add(x, g) y = RMSNormalization(a, g)", "what is added before the normalisation is broadcast"),
    ],
)
def test_what_does_not_fit(body: str, reason: str) -> None:
    used = {"g": numbers(8)} if " g)" in body else {}
    model = build(body, x=f"{ROWS}, float[B,S,4] k", opset=23, **used)
    after, result = lowered(model)
    assert operators(after) == operators(model)
    assert reasons(result)[0].startswith(reason)


def test_a_factor_with_more_axes_than_the_value_is_no_gate() -> None:
    model = build("c = Mul(x, q) s = Sigmoid(c) y = Mul(s, x)", x=ROWS, q=np.full((1, 1, 1, 1), 1.702, np.float32))
    assert operators(lowered(model)[0]) == operators(model)


def test_a_portable_target_keeps_the_standard_operators() -> None:
    model = build("s = Sigmoid(x) y = Mul(x, s)", x=ROWS)
    result = Lower(only=("quick-gelu",)).run(model, CONTEXT)
    assert reasons(result) == ["only standard operators may be written: see portable=false of the target"]
    untimed = dataclasses.replace(CONTEXT, target=TARGET)
    assert reasons(Lower().run(model, untimed)) == ["nothing can be timed here"]


@pytest.mark.parametrize("left", ["x", "h"])
def test_a_sum_that_is_normalised_is_left_apart_where_that_is_faster(left: str) -> None:
    known = {"g": numbers(8, low=0.5, high=2), "h": numbers(8, seed=1)}
    model = build(f"a = Add({left}, z) b = Relu(a) n = LayerNormalization(a, g, h) y = Mul(n, b)", x=ROWS, **known)
    for ratio in (0.5, 1.0):
        context = dataclasses.replace(always(ratio), target=runtime.capabilities())
        after = model.clone()
        result = Lower().run(after, context)
        faster = ratio < 1 and left == "x"
        assert operators(after) == ["Sum" if faster else "Add", "Relu", "LayerNormalization", "Mul"]
        assert result.changes == (["Sum written before LayerNormalization"] if faster else [])
        inputs = feeds(model)
        np.testing.assert_array_equal(run(after, inputs)["y"], run(model, inputs)["y"])


def test_sums_of_sums() -> None:
    """What a site reads may have been written by the one before it."""
    known = {"g": numbers(8, low=0.5, high=2), "h": numbers(8, seed=1)}
    body = "a = Add(x, z) n = LayerNormalization(a, g, h) b = Add(n, a) m = LayerNormalization(b, g, h) y = Add(m, b)"
    for skip in ((), ("sum-norm",)):
        after, _ = lowered(build(body, x=ROWS, **known), skip=skip)
        assert operators(after)[-1] == "Add" and "LayerNormalization" not in operators(after)[: -1 if skip else 0]
        after.clone()
    context = dataclasses.replace(always(0.5), target=runtime.capabilities())
    after = build(body, x=ROWS, **known)
    Lower().run(after, context)
    assert operators(after.clone()) == ["Sum", "LayerNormalization"] * 2 + ["Add"]


def probe() -> Probe:
    model = build("y = Relu(x)", x="float[2] x")
    return Probe("relu(float[2])", model, model.clone(), {"x": np.zeros(2, np.float32)})


def measured(low: float, high: float) -> Callable[..., dict[str, Timing]]:
    """What ``runtime.measure`` gives on a machine that is as quiet as the quartiles are near."""
    ratio = (low + high) / 2
    return lambda pair, inputs, **_: {
        "before": Timing(1.0, 1.0, 1.0, 9, 1.0, 1.0, 1.0),
        "after": Timing(ratio, low, high, 9, ratio, low, high),
    }


def test_what_was_disturbed_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "cache")
    for low, high, expected in ((0.8, 1.2, 1.209), (0.9, 0.92, 0.92), (0.1, 0.1, 0.92)):
        monkeypatch.setattr(runtime, "measure", measured(low, high))
        assert Table(None, store)([probe()]) == {probe().signature: expected}


def test_what_is_faster_is_found_however_much_single_rounds_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times as on a machine with other work: lognormal, every tenth disturbed. A quartile would refuse all of them."""
    rng = np.random.default_rng(0)
    for true, accepted in ((0.9, True), (0.97, False), (1.0, False), (1.03, False)):
        before, after = (
            seconds * rng.lognormal(0, 0.1, 400) * (1 + (rng.random(400) < 0.1) * rng.exponential(2, 400))
            for seconds in (1.0, true)
        )
        found = {"before": timing.summary(before, before), "after": timing.summary(after, before)}
        assert found["after"].ratio_high > FASTER
        monkeypatch.setattr(runtime, "measure", lambda *_, found=found, **__: found)
        (ratio,) = Table()([probe()]).values()
        assert (ratio <= FASTER) == accepted


def test_a_table_measures_once_and_is_pinned_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "measure", measured(0.94, 0.96))
    store, path = Store(tmp_path / "cache"), tmp_path / "times.json"
    table = Table(path, store)
    (ratio,) = table([probe()]).values()
    assert 0 < ratio < 100
    table.write()
    broken = dataclasses.replace(probe(), before=build("y = Relu(x)", x="float[3] x"))
    assert Table(None, store)([broken]) == {probe().signature: ratio}
    document = json.loads(path.read_text())
    document["ratios"] = {probe().signature: 0.25}
    path.write_text(json.dumps(document))
    pinned = Table(path, store)
    other = dataclasses.replace(probe(), signature="another")
    assert pinned([probe(), other]) == {probe().signature: 0.25}
    assert digest(pinned.used) == digest({probe().signature: 0.25}) != digest(table.used) and digest({}) == ""
    path.write_text("{}")
    with pytest.raises(BadInput, match="no timing table"):
        Table(path, store)


def test_the_manifest_names_what_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHC_CACHE_DIR", str(tmp_path / "cache"))
    model = str(FRAGMENTS / "transformer-dynamo.onnx")
    times, out = tmp_path / "times.json", tmp_path / "out"
    command = ["optimize", model, "-o", str(out), "-p", "simplify,recognise,lower", "-q", "--no-measure"]
    command += ["-t", "onnxruntime{portable=false}", "--timings", str(times)]
    assert main(command) == 0
    ratios = json.loads(times.read_text())["ratios"]
    assert json.loads((out / "graphc.json").read_text())["timings"] == digest(ratios)
    again = tmp_path / "again.json"
    assert main([*command[:-1], str(again)]) == 0
    assert json.loads(again.read_text())["ratios"] == ratios, "what comes from the cache was decided by these"
    pinned = json.loads(times.read_text()) | {"ratios": dict.fromkeys(ratios, 0.5)}
    times.write_text(json.dumps(pinned))
    assert main(command) == 0
    assert json.loads((out / "graphc.json").read_text())["timings"] == digest(pinned["ratios"])
    written = ir.load(out / "model.onnx")
    assert any(node.domain == "com.microsoft" for node in edit.nodes(written))
