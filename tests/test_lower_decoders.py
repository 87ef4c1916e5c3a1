"""Forms of ``lower`` for decoders: products joined or unpacked, and attention that appends to its cache in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc import caches, edit, runtime
from graphc.contract import Probe
from graphc.lowering import weights
from graphc.passes.lower import Lower
from graphc.runtime.timing import Timing
from graphc.timings import Table
from tests.recognised_models import CONTEXT, TARGET, always
from tests.small_models import build, feeds, numbers, operators, reasons, run
from tests.test_lower import lowered

ROWS = "float[B,S,8] x"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.booleans(), st.integers(0, 9))
def test_products_of_one_input_become_one(widths: list[int], shown: bool, seed: int) -> None:
    body = " ".join(f"p{i} = MatMul(x, w{i})" for i in range(len(widths)))
    body += " " + " ".join(f"y{i} = {'Relu' if not shown else 'Identity'}(p{i})" for i in range(len(widths)))
    names = " ".join(f"y{i}" for i in range(len(widths)))
    model = build(body, x=ROWS, outputs=names, **{f"w{i}": numbers(8, n, seed=seed + i) for i, n in enumerate(widths)})
    after, result = lowered(model, only=("joint-product",))
    assert operators(after)[:2] == ["MatMul", "Split"] and "MatMul" not in operators(after)[1:]
    assert result.changes == [f"{len(widths)} MatMul of one input joined"]
    assert len(after.graph.initializers) == 2


@pytest.mark.parametrize(
    "body, reason",
    [
        ("a = MatMul(x, w) b = MatMul(x, w) y = Add(a, b)", "products of one input have weights of several dtypes"),
        (
            "a = MatMul(x, w) b = MatMul(x, v) c = Transpose(v) d = MatMul(b, c) e = Add(a, b) y = Add(e, d)",
            "another form of a weight that others read would store it twice",
        ),
        (
            "a = MatMul(x, w) b = MatMul(x, v) c = MatMul(x, u) d = MatMul(x, t) e = MatMul(x, s) "
            "f = Sum(a, b, c, d, e) y = Relu(f)",
            "more than 4 products share their input",
        ),
    ],
)
def test_products_that_are_not_joined(body: str, reason: str) -> None:
    held = {name: numbers(8, 8, seed=i) for i, name in enumerate("wvuts") if f" {name})" in body}
    model = build(body, x=ROWS, **held)
    after, result = lowered(model, only=("joint-product",))
    assert operators(after) == operators(model) and reasons(result)[0].startswith(reason)


def test_products_with_computed_weights_stay() -> None:
    model = build("a = MatMul(x, w) b = MatMul(x, v) y = Add(a, b)", x=f"{ROWS}, float[8,8] w, float[8,8] v")
    after, result = lowered(model, only=("joint-product",))
    assert operators(after) == operators(model) and not result.refusals


@pytest.mark.parametrize("turned", [False, True])
def test_one_row_reads_a_large_weight_unpacked(turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_LARGE", 1000)
    body = "t = Transpose<perm=[1,0]>(w) y = MatMul(x, t)" if turned else "y = MatMul(x, w)"
    model = build(body, x="float[B,1,8] x", w=numbers(*((40, 8) if turned else (8, 40))))
    after, result = lowered(model, only=("unpacked-product",))
    assert result.changes == ["MatMul reads its weight unpacked"]
    assert operators(after)[-2:] == ["Reshape", "MatMul"]
    several = build(body, x=ROWS, w=numbers(*((40, 8) if turned else (8, 40))))
    assert operators(lowered(several, only=("unpacked-product",))[0]) == operators(several)
    attention = "z, k1, v1 = Attention<q_num_heads=2,kv_num_heads=2>(x, x, x, g, past_k, past_v) "
    cached = f"{ROWS}, float[B,1,S,T] g, float[B,2,P,4] past_k, float[B,2,P,4] past_v"
    held = numbers(*((40, 8) if turned else (8, 40)))
    model = build(attention + body, x=cached, outputs="y z k1 v1", opset=23, w=held)
    after = model.clone()
    assert Lower(only=("unpacked-product",)).run(after, always(0.5)).changes == ["MatMul reads its weight unpacked"]
    inputs = feeds(model, 0, S=3, P=5, T=8)
    np.testing.assert_allclose(run(after, inputs)["y"], run(model, inputs)["y"], rtol=0, atol=1e-5)


def test_a_weight_behind_fixed_sizes_cannot_be_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_LARGE", 1000)
    model = build("y = MatMul(x, w)", x="float[1,1,8] x", w=numbers(8, 40))
    after, result = lowered(model, only=("unpacked-product",))
    assert operators(after) == ["MatMul"]
    assert reasons(result) == ["all sizes are fixed, and the session would see through a view of the weight"]


def decoder(
    *, heads: int = 4, fewer: int = 2, batch: str = "B", new: str = "1", boolean: bool = False, **more: object
) -> ir.Model:
    """Attention of new tokens with a cache, and a mask that is made of positions and of padding."""
    attributes = {"q_num_heads": heads, "kv_num_heads": fewer, "scale": 0.3, **more}
    given = ", ".join(f"{name}={value}" for name, value in attributes.items())
    body = (
        "p = Shape<start=2,end=3>(past_k) p0 = Squeeze(p) s = Shape<start=1,end=2>(q) s0 = Squeeze(s) t = Add(p0, s0) "
        "keys = Range(zero, t, one) r = Range(zero, s0, one) rows = Add(r, p0) a = Unsqueeze(keys, at0) "
        "b = Unsqueeze(rows, at1) c = LessOrEqual(a, b) d = Cast<to=9>(m) e = Unsqueeze(d, at12) f = And(c, e) "
        f"{'g = Identity(f)' if boolean else 'g = Where(f, nothing, low)'} "
        f"y, k1, v1 = Attention<{given}>(q, k, v, g, past_k, past_v)"
    )
    x = (
        f"float[{batch},{new},{heads * 8}] q, float[{batch},{new},{fewer * 8}] k, float[{batch},{new},{fewer * 8}] v, "
        f"int64[{batch},total] m, float[{batch},{fewer},P,8] past_k, float[{batch},{fewer},P,8] past_v"
    )
    known = {"zero": np.int64(0), "one": np.int64(1), "at0": np.array([0]), "at1": np.array([1])}
    known |= {"at12": np.array([1, 2])}
    known |= {} if boolean else {"nothing": np.float32(0), "low": np.float32(-3.4e38)}
    arrays = {name: np.asarray(value) for name, value in known.items()}
    model = build(body, x=x, outputs="y k1 v1", opset=23, **arrays)
    mask = next(value for value in model.graph.inputs if value.name == "m")
    mask.shape = ir.Shape([mask.shape[0], f"P + {new}"])
    return model


def example(model: ir.Model, seed: int, past: int, batch: int = 2) -> dict[str, np.ndarray]:
    """Random inputs; the first sequence is padded on the left."""
    found = feeds(model, seed, B=batch, P=past, **{"P + 1": past + 1})
    found["m"] = np.ones_like(found["m"])
    found["m"][0, : past // 2] = 0
    return found


ONLY = {"only": ("group-query-attention",)}


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([(4, 2), (3, 3), (6, 1)]),
    st.sampled_from([{}, {"softcap": 5.0}]),
    st.integers(0, 9),
    st.integers(1, 3),
    st.integers(0, 9),
)
def test_attention_of_one_token_appends_in_place(
    heads: tuple[int, int], more: dict[str, object], past: int, batch: int, seed: int
) -> None:
    model = decoder(heads=heads[0], fewer=heads[1], **more)
    for value in model.graph.outputs[1:]:
        value.shape = ir.Shape(["B", heads[1], "P + 1", 8])
    after = model.clone()
    result = Lower(**ONLY, in_place=True).run(after, always(0.5))
    assert result.changes == ["GroupQueryAttention written"] and not result.refusals
    assert [str(v.shape) for v in after.graph.outputs[1:]] == [str(v.shape) for v in model.graph.outputs[1:]]
    inputs = example(model, seed, past, batch)
    wanted = run(model, inputs)
    for name, array in run(after, inputs).items():
        np.testing.assert_allclose(array, wanted[name], rtol=0, atol=1e-5)
    shared = {"k1": "past_k", "v1": "past_v"}
    bound = runtime.session(after, optimise=True, threads=1).in_place(inputs, shared)
    bound.run({})
    for name, array in bound.results().items():
        array = array[:, :, : past + 1] if name in shared else array
        np.testing.assert_allclose(array, wanted[name], rtol=0, atol=1e-5)


def two_layers() -> ir.Model:
    """Two attentions with the same mask."""
    model = decoder()
    (node,) = [n for n in edit.nodes(model) if n.op_type == "Attention"]
    copy = ir.node("Attention", list(node.inputs), dict(node.attributes), num_outputs=3, name="second")
    for new, old in zip(copy.outputs, node.outputs, strict=True):
        new.name, new.type, new.shape = f"{old.name}.second", old.type, old.shape
    node.append(copy)
    model.graph.outputs.extend(copy.outputs)
    return model


def test_lengths_are_computed_once_for_all_layers() -> None:
    model = two_layers()
    Lower(**ONLY).run(model, always(0.5))
    assert operators(model).count("GroupQueryAttention") == 2
    assert operators(model).count("Cast") == 2 and operators(model).count("Expand") == 1


@pytest.mark.parametrize("in_place", [False, True])
def test_what_layers_share_is_timed_once(in_place: bool) -> None:
    timed: list[Probe] = []

    def time(probes: Sequence[Probe]) -> dict[str, float]:
        timed.extend(probes)
        return {}

    Lower(**ONLY, in_place=in_place, length=9).run(two_layers(), dataclasses.replace(always(0.5), time=time))
    (probe,) = timed
    found = operators(probe.after)
    assert operators(probe.before) == ["Attention"] * 8
    assert found.count("GroupQueryAttention") == 8 and found.count("Expand") == found.count("Squeeze") == 1
    inputs = dict(probe.inputs)
    assert len(inputs) == 1 + 8 * 5 and {v.name for v in probe.after.graph.inputs} == set(inputs)
    wanted = run(probe.before, inputs)
    session = runtime.session(probe.after, optimise=True, threads=1)
    found_without = session.run(inputs)
    for name, array in wanted.items():
        np.testing.assert_allclose(found_without[name], array, rtol=0, atol=1e-5)
    assert len(probe.shared) == (16 if in_place else 0)
    if in_place:
        bound = session.in_place(inputs, probe.shared)
        bound.run({})
        for name, array in bound.results().items():
            array = array[:, :, :10] if name in probe.shared else array
            np.testing.assert_allclose(array, wanted[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "model, reason",
    [
        (decoder(new="S"), "with a past, GroupQueryAttention takes several tokens of one sequence only"),
        (decoder(is_causal=1), "GroupQueryAttention has another causal mask, or another precision of the softmax"),
    ],
)
def test_attention_that_is_not_lowered(model: ir.Model, reason: str) -> None:
    after = model.clone()
    result = Lower(**ONLY).run(after, always(0.5))
    assert operators(after) == operators(model) and reasons(result) == [reason]


@pytest.mark.parametrize("past", [0, 1, 6])
def test_a_boolean_mask_that_may_hide_everything(past: int) -> None:
    """A query without any key gets 0, as of Attention."""
    model = decoder(boolean=True)
    after = model.clone()
    result = Lower(**ONLY, in_place=True).run(after, always(0.5))
    assert result.changes == ["GroupQueryAttention written"] and not result.refusals
    inputs = example(model, 0, past, batch=3)
    inputs["m"][1] = 0
    wanted = run(model, inputs)
    assert not wanted["y"][1].any() and wanted["y"][0].any()
    for name, array in run(after, inputs).items():
        np.testing.assert_allclose(array, wanted[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "mask, given, reason",
    [
        ("bool[B,4,1,T] g", "g", "GroupQueryAttention adds its mask, and this one is boolean and not the same"),
        ("bool[B,1,1,T] g", "", "without a mask nothing says how long the past is"),
    ],
)
def test_masks_that_stay(mask: str, given: str, reason: str) -> None:
    x = f"float[B,1,32] q, float[B,1,16] k, float[B,1,16] v, {mask}, float[B,2,P,8] past_k, float[B,2,P,8] past_v"
    body = f"y, k1, v1 = Attention<q_num_heads=4,kv_num_heads=2>(q, k, v, {given}, past_k, past_v)"
    model = build(body, x=x, outputs="y k1 v1", opset=23)
    for output in model.graph.outputs:
        output.dtype = ir.DataType.FLOAT
    result = Lower(**ONLY).run(model, always(0.5))
    assert reasons(result)[0].startswith(reason)


def test_heads_of_a_size_without_a_kernel_stay() -> None:
    x = "float[B,1,16] q, float[B,1,8] k, float[B,1,8] v, float[B,1,1,T] g, "
    x += "float[B,2,P,4] past_k, float[B,2,P,4] past_v"
    body = "y, k1, v1 = Attention<q_num_heads=4,kv_num_heads=2>(q, k, v, g, past_k, past_v)"
    result = Lower(**ONLY).run(build(body, x=x, outputs="y k1 v1", opset=23), always(0.5))
    assert reasons(result) == ["GroupQueryAttention has heads whose size is a multiple of 8"]


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_of_a_cache_are_read_elsewhere(tied: bool) -> None:
    """What else is read of it ties the buffer to the length of what it holds."""
    model = decoder()
    next(value for value in model.graph.inputs if value.name == "m").shape = ir.Shape(["B", "P + 1"])
    node = next(n for n in edit.nodes(model) if n.op_type == "Shape")
    node.attributes["start"], node.attributes["end"] = ir.AttrInt64("start", 0), ir.AttrInt64("end", 4)
    squeeze = next(iter(node.outputs[0].consumers()))
    size = ir.node("Slice", [node.outputs[0], *(edit.initializer(model.graph, np.array([i]), f"i{i}") for i in (2, 3))])
    size.outputs[0].name = "sliced"
    squeeze.prepend(size)
    squeeze.replace_input_with(0, size.outputs[0])
    if tied:
        last = next(v for v in model.graph.inputs if v.name == "past_k")
        read = ir.node("Relu", [last])
        read.outputs[0].name, read.outputs[0].type, read.outputs[0].shape = "read", last.type, last.shape
        model.graph.append(read)
        model.graph.outputs.append(read.outputs[0])
    after = model.clone()
    result = Lower(**ONLY, in_place=True).run(after, always(0.5))
    why = ["the model reads the length of the past off this cache, whose buffer must have it"]
    assert reasons(result) == (why if tied else []) and caches.in_place(after) != tied
    inputs = example(model, 0, 5)
    wanted = run(model, inputs)
    for name, array in run(after, inputs).items():
        np.testing.assert_allclose(array, wanted[name], rtol=0, atol=1e-5)


def test_a_prompt_and_as_many_tokens_decide_together() -> None:
    """Both are timed for one decision, a prompt once for all of its tokens."""
    text = "z, k1, v1 = Attention<q_num_heads=2,kv_num_heads=2>(x, x, x, g, past_k, past_v) "
    text += "a = MatMul(z, w) b = MatMul(z, v)"
    x = "float[B,S,8] x, float[B,1,S,T] g, float[B,2,P,4] past_k, float[B,2,P,4] past_v"
    model = build(f"{text} y = Add(a, b)", x=x, outputs="y k1 v1", opset=23, w=numbers(8, 8), v=numbers(8, 8, seed=1))
    seen: list[Probe] = []

    def time(probes: list[Probe]) -> dict[str, float]:
        seen.extend(probes)
        return {p.signature: 0.5 for p in probes}

    Lower(only=("joint-product",), length=16).run(model, dataclasses.replace(CONTEXT, target=TARGET, time=time))
    (probe,) = seen
    assert probe.beside is not None and probe.times == 16
    assert [next(iter(each.values())).shape for each in (probe.inputs, probe.beside)] == [(1, 1, 8), (1, 16, 8)]
    assert "16 x float[1, 1, 8]" in probe.signature and "float[1, 16, 8]" in probe.signature
    for each in (probe.before, probe.after):
        for inputs in (probe.inputs, probe.beside):
            runtime.session(each, optimise=True).run(inputs)


def test_a_table_adds_the_times_of_a_prompt_and_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the time for each of 10 tokens of 1 s, twice for a prompt of 5 s: 15 s in the place of 15 s."""
    model = build("y = Relu(x)", x="float[N] x")

    def measure(pair: dict, inputs: dict, **_: object) -> dict[str, Timing]:
        seconds, ratio = (1.0, 0.5) if len(inputs["x"]) == 1 else (5.0, 2.0)
        return {n: Timing(seconds * r, 0, 0, 5, r, r, r) for n, r in zip(pair, (1.0, ratio), strict=True)}

    monkeypatch.setattr(runtime, "measure", measure)
    arrays = [{"x": np.zeros(n, np.float32)} for n in (1, 10)]
    probe = Probe("relu", model, model.clone(), arrays[0], beside=arrays[1], times=10)
    assert Table()([probe]) == {"relu": 1.0}
    assert Table()([dataclasses.replace(probe, beside=None)]) == {"relu": 0.5}
