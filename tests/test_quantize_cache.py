"""``quantize-cache``: codes against numpy, what lower makes of them, what stays and why, and models that are run so."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc import cache_codes, caches, checking, cli, frontends, pipeline, runtime
from graphc.backends.onnxruntime import OnnxRuntime
from graphc.checking.interface import as_came, fitting
from graphc.collection import Collector
from graphc.contract import Context, PassResult
from graphc.errors import BadInput
from graphc.model import save
from graphc.passes.lower import Lower
from graphc.passes.quantize_cache import QuantizeCache
from graphc.passes.simplify import Simplify
from graphc.recipe import Recipe
from tests import test_recognise_cache, test_run_script
from tests.fragments.foreign_export import FOLDER
from tests.recognised_models import CONTEXT, always
from tests.small_models import build, feeds, operators, reasons, run
from tests.test_lower_decoders import ONLY, decoder, example

Arrays = dict[str, np.ndarray]


def calibrated(samples: list[Arrays]) -> Context:
    return dataclasses.replace(CONTEXT, collect=Collector(samples, []).collect, calibration=samples, data=samples)


def quantized(model: ir.Model, samples: list[Arrays], **options: Any) -> tuple[ir.Model, PassResult]:
    """A copy in codes, whose caches come back as they are."""
    after = model.clone()
    return after, QuantizeCache(**options).run(after, calibrated(samples))


def prompts(model: ir.Model, seed: int, batch: int, new: int, past: int) -> Arrays:
    """Random inputs of the decoder of several tokens, the first sequence padded."""
    found = feeds(model, seed, B=batch, S=new, P=past, **{"P + S": past + new})
    found["m"] = np.ones_like(found["m"])
    found["m"][0, : past // 2] = 0
    return found


def rounded(new: np.ndarray, past: np.ndarray, by_channel: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scales ``(heads, channels)`` of keys or values ``b t (h d)`` and ``b h p d``, and the codes of both."""
    batch, count = new.shape[:2]
    heads, channels = past.shape[1], past.shape[3]
    turned = new.reshape(batch, count, heads, channels).transpose(0, 2, 1, 3)
    largest = np.abs(np.concatenate([past, turned], axis=2)).max(axis=(0, 2))
    if not by_channel:
        largest = np.repeat(largest.max(axis=1, keepdims=True), channels, axis=1)
    scale = (largest.astype(np.float64) / 127).astype(np.float32)
    both = [np.clip(np.rint(x / scale[None, :, None, :]), -128, 127).astype(np.int8) for x in (past, turned)]
    return scale, np.concatenate(both, axis=2)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([(4, 2), (3, 3), (6, 1)]),
    st.sampled_from(["channel", "head"]),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 6),
    st.integers(0, 9),
)
def test_codes_are_those_of_numpy(
    heads: tuple[int, int], scales: str, batch: int, new: int, past: int, seed: int
) -> None:
    model = decoder(heads=heads[0], fewer=heads[1], new="S")
    inputs = prompts(model, seed, batch, new, past)
    after, result = quantized(model, [inputs], scales=scales)
    assert result.changes == ["cache in 8-bit codes, which are inputs and outputs now (×2)"]
    known, plain, fed = cache_codes.scales(after), dict(inputs), fitting(after, inputs)
    for role, present in (("k", "k1"), ("v", "v1")):
        scale, codes = rounded(inputs[role], inputs[f"past_{role}"], scales == "channel")
        np.testing.assert_array_equal(np.broadcast_to(known[present], (1, heads[1], 1, 8))[0, :, 0], scale)
        np.testing.assert_array_equal(fed[f"past_{role}"], codes[:, :, :past])
        floats = codes * scale[None, :, None, :]
        plain[f"past_{role}"] = floats[:, :, :past]
        plain[role] = floats[:, :, past:].transpose(0, 2, 1, 3).reshape(inputs[role].shape)
        np.testing.assert_array_equal(run(after, fed)[present], codes)
    np.testing.assert_allclose(run(after, fed)["y"], run(model, plain)["y"], rtol=0, atol=1e-5)
    floats_again = run(as_came(model, after), inputs)
    assert all(array.dtype == np.float32 for array in floats_again.values())
    np.testing.assert_array_equal(floats_again["y"], run(after, fed)["y"])


@pytest.mark.parametrize("scales", ["channel", "head"])
def test_what_is_joined_by_a_concat(scales: str) -> None:
    """As exporters write it: the present is repeated for the query heads and multiplied in the graph."""
    w = test_recognise_cache.Decoder(2, 3, 4, 6)
    joined = {role: w("Concat", w.past(role), w.new(role), axis=2) for role in "kv"}
    y = w.attend(joined["k"], joined["v"], None)
    model = w.finish(y, {f"present_{role}": joined[role] for role in "kv"})
    inputs = feeds(model, 0, B=2, S=3, P=5)
    after, result = quantized(model, [inputs], scales=scales)
    assert result.changes == ["cache in 8-bit codes, which are inputs and outputs now (×2)"]
    fed, known = fitting(after, inputs), cache_codes.scales(after)
    plain = dict(inputs)
    for role, width in (("k", 4), ("v", 6)):
        scale, codes = rounded(inputs[role], inputs[f"past_{role}"], scales == "channel")
        floats = codes * scale[None, :, None, :]
        plain[f"past_{role}"] = floats[:, :, :5]
        plain[role] = floats[:, :, 5:].transpose(0, 2, 1, 3).reshape(2, 3, 2 * width)
        np.testing.assert_array_equal(run(after, fed)[f"present_{role}"], codes)
        assert known[f"past_{role}"].shape == (1, 2, 1, width if scales == "channel" else 1)
    np.testing.assert_allclose(run(after, fed)["y"], run(model, plain)["y"], rtol=0, atol=1e-5)
    assert reasons(quantized(after, [fed])[1]) == ["the cache is in 8-bit codes already"]


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from([(4, 2), (3, 3), (6, 1)]),
    st.sampled_from(["channel", "head"]),
    st.booleans(),
    st.integers(0, 9),
    st.integers(1, 3),
    st.integers(0, 9),
)
def test_lower_reads_the_codes_and_appends_in_place(
    heads: tuple[int, int], scales: str, boolean: bool, past: int, batch: int, seed: int
) -> None:
    model = decoder(heads=heads[0], fewer=heads[1], boolean=boolean)
    inputs = example(model, seed, past, batch)
    coded, _ = quantized(model, [inputs], scales=scales)
    after = coded.clone()
    result = Lower(**ONLY, in_place=True).run(after, always(0.5))
    assert result.changes == ["GroupQueryAttention written"] and not result.refusals
    assert not {"QuantizeLinear", "DequantizeLinear", "Concat"} & set(operators(after)) and caches.in_place(after)
    assert [v.dtype for v in after.graph.outputs] == [v.dtype for v in coded.graph.outputs]
    for name, scale in cache_codes.scales(coded).items():
        np.testing.assert_array_equal(*np.broadcast_arrays(cache_codes.scales(after)[name], scale))
    fed = fitting(after, inputs)
    wanted = run(coded, fed)
    shared = {"k1": "past_k", "v1": "past_v"}
    bound = runtime.session(after, optimise=True, threads=1).in_place(fed, shared)
    bound.run({})
    for found in (run(after, fed), bound.results()):
        for name, array in found.items():
            array = array[:, :, : past + 1] if name in shared else array
            np.testing.assert_allclose(array, wanted[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("fewer", [1, 2])
def test_lower_knows_it_after_simplify(fewer: int) -> None:
    """What has no effect for one head or one token is gone then."""
    model = decoder(heads=4, fewer=fewer)
    inputs = example(model, 0, 5)
    coded, _ = quantized(model, [inputs])
    Simplify().run(coded, CONTEXT)
    after = coded.clone()
    assert Lower(**ONLY).run(after, always(0.5)).changes == ["GroupQueryAttention written"]
    fed = fitting(coded, inputs)
    wanted = run(coded, fed)
    for name, array in run(after, fed).items():
        np.testing.assert_allclose(array, wanted[name], rtol=0, atol=1e-5)


def test_keys_alone_in_codes_are_not_lowered() -> None:
    model = decoder()
    coded, _ = quantized(model, [example(model, 0, 5)], include=("past_k",))
    result = Lower(**ONLY).run(coded, always(0.5))
    assert reasons(result) == ["GroupQueryAttention has keys and values both in codes"]


def test_a_cache_that_is_rounded_otherwise_is_not_lowered() -> None:
    model = decoder()
    coded, _ = quantized(model, [example(model, 0, 5)])
    node = next(n for n in coded.graph if n.op_type == "QuantizeLinear")
    other = ir.Value(name="other", const_value=ir.tensor(np.ones(16, np.float32)))
    other.shape, other.type = ir.Shape([16]), ir.TensorType(ir.DataType.FLOAT)
    coded.graph.register_initializer(other)
    node.replace_input_with(1, other)
    before = operators(coded)
    result = Lower(**ONLY).run(coded, always(0.5))
    assert reasons(result)[0].startswith("the cache is in codes, and what is new is not rounded or joined")
    assert operators(coded) == before


def test_caches_that_stay_and_why() -> None:
    model = decoder()
    inputs = example(model, 0, 5)
    lowered = model.clone()
    Lower(**ONLY).run(lowered, always(0.5))
    assert reasons(quantized(lowered, [inputs])[1]) == [
        "an operator of ONNX Runtime's own joins to the cache already: quantize-cache comes before lower"
    ]
    half = build(
        "p = Concat<axis=2>(past, x) y = Relu(p)",
        x="float16[B,2,S,4] x, float16[B,2,P,4] past",
        outputs="p y",
    )
    assert reasons(quantized(half, [feeds(half)])[1]) == ["caches of float32 become codes, and this one is float16"]
    plain = build("y = Relu(x)", x="float[N] x")
    assert reasons(quantized(plain, [feeds(plain)])[1]) == ["no input of the model is a cache that an output continues"]
    loose = build("p = Concat<axis=2>(past, x)", x="float[B,H,S,4] x, float[B,H,P,4] past", outputs="p")
    assert reasons(quantized(loose, [feeds(loose)])[1]) == ["the number of heads, or their size, is not known"]
    twice = build(
        "p = Concat<axis=2>(past, x) r = Concat<axis=2>(past, z)",
        x="float[B,2,S,4] x, float[B,2,S,4] z, float[B,2,P,4] past",
        outputs="p r",
    )
    assert reasons(quantized(twice, [feeds(twice)])[1]) == ["several operators join something to the cache"]
    assert operators(quantized(model, [inputs], keep=1)[0]) == operators(model)
    with pytest.raises(BadInput, match="no cache is called 'past_q'"):
        quantized(model, [inputs], include=("past_q",))


def test_channels_and_heads_without_anything() -> None:
    """A channel that was always 0 gets the scale of its head, and a head that was, 1: later values are not lost."""
    model = decoder(new="S")
    inputs = prompts(model, 0, 2, 3, 4)
    for role in "kv":
        inputs[role] = inputs[role].reshape(2, 3, 2, 8)
        inputs[role][..., 0, 3] = inputs[role][:, :, 1] = 0
        inputs[role] = inputs[role].reshape(2, 3, 16)
        inputs[f"past_{role}"][:, 0, :, 3] = inputs[f"past_{role}"][:, 1] = 0
    known = cache_codes.scales(quantized(model, [inputs])[0])
    assert (known["k1"][0, 1] == 1).all() and known["k1"][0, 0, 0, 3] == known["k1"][0, 0].max()
    inputs["k"][:] = np.nan
    with pytest.raises(BadInput, match="has NaN or infinity"):
        quantized(model, [inputs])


def test_a_past_that_was_made_up_says_nothing() -> None:
    model = decoder(new="S")
    inputs = prompts(model, 0, 2, 3, 4)
    inputs["past_k"] *= 100
    made = dataclasses.replace(calibrated([inputs]), data=())
    for ctx, largest in ((made, np.abs(inputs["k"]).max()), (calibrated([inputs]), np.abs(inputs["past_k"]).max())):
        after = model.clone()
        QuantizeCache().run(after, ctx)
        np.testing.assert_allclose(cache_codes.scales(after)["k1"].max() * 127, largest, rtol=1e-6)


@pytest.mark.parametrize("name", ["optimum-gpt2-past", "optimum-llama-past"])
def test_decoders_of_another_exporter(name: str) -> None:
    """A prompt, and the tokens after it with the past that the model itself gave."""
    model = frontends.load(FOLDER / f"{name}.onnx").model
    for each in Recipe.parse("simplify,fuse,recognise,simplify").passes:
        each.run(model, CONTEXT)
    shapes = {v.name: [d if isinstance(d, int) else 0 for d in v.shape] for v in model.graph.inputs}
    past = {n: np.zeros((2, *s[1:]), np.float32) for n, s in shapes.items() if n.startswith("past")}
    ids = np.random.default_rng(0).integers(0, 20, (2, 24))
    prompt = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(24)[None].repeat(2, 0)}
    prompt |= past
    found = run(model, prompt)
    after = {"input_ids": ids[:, :2], "attention_mask": np.ones((2, 26), np.int64)}
    after |= {"position_ids": np.array([[24, 25]] * 2)} | {k: found[v] for k, v in caches.pairs(model).items()}
    coded, result = quantized(model, [prompt, after])
    assert result.changes == ["cache in 8-bit codes, which are inputs and outputs now (×2)"] and not result.refusals
    floats = as_came(model, coded)
    for inputs in (prompt, after):
        wanted = run(model, inputs)
        for output, array in run(floats, inputs).items():
            assert np.abs(array - wanted[output]).max() < 0.02 * np.abs(wanted[output]).max(), output


def test_scales_of_another_graph_of_the_model(tmp_path: Path) -> None:
    """A graph for single tokens takes those that whole texts gave."""
    whole = decoder(new="S")
    texts = [prompts(whole, seed, 2, 9, 0) for seed in range(2)]
    coded, _ = quantized(whole, texts)
    save(coded, tmp_path / "whole.onnx")
    one = decoder()
    after, result = quantized(one, [], like=tmp_path / "whole.onnx")
    assert result.changes == ["cache in 8-bit codes, which are inputs and outputs now (×2)"] and not result.refusals
    for name, scale in cache_codes.scales(coded).items():
        np.testing.assert_array_equal(cache_codes.scales(after)[name], scale)
    lonely = example(one, 0, 0)
    _, result = quantized(one, [lonely])
    assert "scales come from single tokens without a past" in " ".join(result.notes)
    assert "single tokens" not in " ".join(quantized(one, [example(one, 0, 5)])[1].notes)
    save(one, tmp_path / "one.onnx")
    with pytest.raises(BadInput, match="no cache of the model is in codes"):
        quantized(one, [], like=tmp_path / "one.onnx")
    with pytest.raises(BadInput, match="are those of another model"):
        quantized(decoder(heads=3, fewer=3), [], like=tmp_path / "whole.onnx")
    with pytest.raises(BadInput, match="layers are kept by calibration"):
        QuantizeCache(keep=1, like=tmp_path / "whole.onnx")


def two_layers() -> tuple[ir.Model, list[Arrays]]:
    """Two caches of one head; of the second, the first channel is so large that nothing is left for the others."""
    body = (
        "k = Concat<axis=2>(past_a, a) t = Transpose<perm=[0,1,3,2]>(k) s = MatMul(a, t) m = Softmax(s) "
        "u = MatMul(m, k) b0 = Mul(a, large) j = Concat<axis=2>(past_b, b0) t2 = Transpose<perm=[0,1,3,2]>(j) "
        "r = Mul(a, small) s2 = MatMul(r, t2) m2 = Softmax(s2) v0 = MatMul(m2, j) v = Mul(v0, small) y = Add(u, v)"
    )
    large = np.array([3e4, *[1.0] * 7], np.float32)
    x = "float[B,1,S,8] a, float[B,1,P,8] past_a, float[B,1,P,8] past_b"
    model = build(body, x=x, outputs="y k j", large=large, small=1 / large)
    samples = [feeds(model, seed, B=1, S=6, P=0) for seed in range(3)]
    for output in model.graph.outputs:
        output.shape = ir.Shape(["B", 1, "S" if output.name == "y" else "P + S", 8])
    return model, samples


def test_the_gate_keeps_the_layer_that_rounding_ruins(tmp_path: Path) -> None:
    model, samples = two_layers()
    path = tmp_path / "model.onnx"
    save(model, path)

    def optimized(**more: Any) -> Any:
        options = {"data": samples, "measure": False, "cache": False, **more}
        return pipeline.optimize(path, recipe="quantize-cache{scales=head}", **options)

    report = optimized()
    assert report.approximation["error"] > 0.05
    assert "the cache takes 16 bytes a token instead of 64" in " ".join(report.warnings)
    report = optimized(max_drop={"error": 0.02})
    assert report.passes[-1].options == "quantize-cache{scales=head keep=1}"
    assert "'quantize-cache{scales=head}' was backed off" in " ".join(report.warnings)
    (refusal,) = report.passes[-1].refusals
    assert refusal.node == "past_b" and refusal.reason.startswith("one of the 1 layers whose cache rounding changes")
    assert {v.name: v.dtype.name for v in report.model.graph.inputs} == {
        "a": "FLOAT",
        "past_a": "INT8",
        "past_b": "FLOAT",
    }


def test_statistics_and_checks_go_on_with_codes(tmp_path: Path) -> None:
    """Passes that come later collect on data of the model as it came; what is emitted is checked and timed on it."""
    path = tmp_path / "model.onnx"
    save(test_run_script.decoder("S"), path)
    made = [
        {
            "input_ids": np.arange(4)[None] + i,
            "attention_mask": np.ones((1, 6), np.int64),
            **{f"past_{r}": np.random.default_rng(i).normal(size=(1, 1, 2, 8)).astype(np.float32) for r in "kv"},
        }
        for i in range(3)
    ]
    report = pipeline.optimize(
        path,
        tmp_path / "out",
        recipe="quantize-cache,quantize{least=0 bits=4 block=16 rounding=gptq},simplify",
        data=made,
        cache=False,
    )
    assert report.ok and report.rewrite["checked"] and "latency" in report.measurements
    interface = json.loads((tmp_path / "out" / "graphc.json").read_text())
    assert "int8" in json.dumps(interface["inputs"]).lower()


def test_verify_says_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = decoder()
    inputs = example(model, 0, 5)
    coded, _ = quantized(model, [inputs])
    verdict = checking.compare(model, coded, data=[inputs])
    assert verdict.checked and not verdict.ok and "times what rounding explains" in verdict.why
    assert {error.name for error in verdict.outputs} == {"y", "k1", "v1"}
    assert all(error.max_rel < 0.05 for error in verdict.outputs)
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    save(model, before), save(coded, after)
    assert cli.main(["verify", str(before), str(after)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "differs by up to" in shown and "its caches are in 8-bit codes" in shown
    assert cli.main(["bench", str(before), str(after), "--seconds", "0.1"]) == 0
    same = coded.clone()
    Lower(**ONLY).run(same, always(0.5))
    assert checking.compare(coded, same).ok


def test_a_wrong_scale_is_seen() -> None:
    """Codes may be a step away by luck, and no more than that."""
    model = decoder()
    coded, _ = quantized(model, [example(model, 0, 5)])
    wrong = coded.clone()
    for node in [n for n in wrong.graph if n.op_type in ("QuantizeLinear", "DequantizeLinear")]:
        value = node.inputs[1]
        if value.const_value.size > 1:
            value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.01), name=value.name)
    verdict = checking.compare(coded, wrong)
    assert verdict.checked and not verdict.ok


def test_graphs_that_hand_each_other_caches_share_scales(tmp_path: Path) -> None:
    """Apart, each would have its own: they are given those of the whole decoder, and go on from codes to codes."""
    models = {"prefill": ("S", False), "decode": ("1", True), "whole": ("S", True)}
    made = {name: test_run_script.decoder(*how) for name, how in models.items()}
    for name, model in made.items():
        save(model, tmp_path / f"{name}.onnx")
    ids = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]])
    empty = {name: np.zeros((1, 1, 0, 8), np.float32) for name in ("past_k", "past_v")}
    every = np.arange(20)[None]
    coded, _ = quantized(made["whole"], [{"input_ids": every, "attention_mask": np.ones_like(every), **empty}])
    save(coded, tmp_path / "coded.onnx")

    def optimize(options: str) -> Any:
        names = ("prefill", "decode")
        first, second = (dataclasses.replace(frontends.load(tmp_path / f"{n}.onnx"), name=n) for n in names)
        recipe = f"quantize-cache{options}"
        return pipeline.optimize(first.with_others([second]), tmp_path / "out", recipe=recipe, measure=False)

    with pytest.raises(BadInput, match="'quantize-cache' is for one graph") as error:
        optimize("")
    assert "--kv-cache merged" in error.value.hint
    report = optimize(f'{{like="{tmp_path / "coded.onnx"}"}}')
    assert report.ok and report.parts["prefill"].approximation["error"] < 0.2
    np.savez(tmp_path / "in.npz", input_ids=ids)
    command = [sys.executable, "-I", tmp_path / "out" / "run.py", tmp_path / "in.npz", "6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    wanted = test_run_script.plain(ids, np.ones_like(ids), 6)
    assert np.mean(np.array(done.stdout.split(), int) == wanted[0]) > 0.5
    prefill = frontends.load(tmp_path / "out" / "prefill.onnx").model
    assert cache_codes.scales(prefill)["present_k"].shape == cache_codes.scales(coded)["present_k"].shape
    verdict = checking.compare(made["prefill"], prefill)
    assert all(error.max_rel < 0.2 for error in verdict.outputs)


def test_what_is_known_beforehand_is_said() -> None:
    assert "slower" in " ".join(QuantizeCache().caveats(decoder(), CONTEXT))
    free = dataclasses.replace(CONTEXT, target=OnnxRuntime(portable=False).capabilities())
    assert not list(QuantizeCache().caveats(decoder(), free))


def test_run_script_continues_with_codes(tmp_path: Path) -> None:
    """Bound from step to step, and appended to in place: the same tokens."""
    ids, mask = np.array([[3, 1, 4, 1], [0, 0, 5, 9]]), np.array([[1, 1, 1, 1], [0, 0, 1, 1]])
    np.savez(tmp_path / "inputs.npz", input_ids=ids, attention_mask=mask)
    sample = {"input_ids": np.arange(20)[None], "attention_mask": np.ones((1, 20), np.int64)}
    sample |= {name: np.zeros((1, 1, 0, 8), np.float32) for name in ("past_k", "past_v")}
    one = [sample | {"input_ids": np.array([[i]]), "attention_mask": np.ones((1, 1), np.int64)} for i in range(20)]
    merged, _ = quantized(test_run_script.decoder("S"), [sample])
    decode, _ = quantized(test_run_script.decoder("1"), one)
    Lower(**ONLY, in_place=True).run(decode, always(0.5))
    assert caches.in_place(decode)
    target, found = OnnxRuntime(portable=False, threads=1), []
    for name, model in (("merged", merged), ("one", decode)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "graphc.json").write_text(json.dumps({"runtime": target.emit(model, folder)}))
        command = [sys.executable, "-I", folder / "run.py", tmp_path / "inputs.npz", "6"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        found.append([line.split() for line in done.stdout.splitlines()])
    assert found[0] == found[1] and np.shape(found[0]) == (2, 6)
