"""``quantize``: codes and scales against plain numpy, integer products against exact integer arithmetic, the gate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc import edit, pipeline, runtime
from graphc.backends.onnxruntime import OnnxRuntime
from graphc.cli import main
from graphc.contract import Capabilities, Context, PassResult, Probe
from graphc.errors import BadInput
from graphc.gate import Judge
from graphc.model import load, save
from graphc.passes.quantize import Quantize
from graphc.passes.shrink import Shrink
from graphc.quantization import activations, equalisation, rounding, scaling, sites, streams
from graphc.quantization.granularity import Granularity
from graphc.quantization.grid import Grid
from graphc.shapes import infer
from graphc.stats import Collector
from graphc.stats.base import Valid
from graphc.stats.range import RangeOf
from graphc.storage.portable import portable

CONTEXT = Context(Capabilities("portable", 13, {"": 26}))
DATA = Path(__file__).parent / "data"
RANDOM = np.random.default_rng(0)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def build(body: str, inputs: str, outputs: str, opset: int = 21, **constants: np.ndarray) -> ir.Model:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}')
    for name, array in constants.items():
        value = edit.initializer(model.graph, array, name)
        for node in edit.nodes(model):
            for i, old in enumerate(node.inputs):
                if old is not None and old.name == name and old is not value:
                    node.replace_input_with(i, value)
    for i, node in enumerate(model.graph):
        node.name = node.name or f"{node.op_type}_{i}"
    return model


def mlp(**options: Any) -> ir.Model:
    weights = {"w": normal(64, 48), "b": normal(48), "v": normal(32, 48, seed=1), "c": normal(32, seed=1)} | options
    return build(
        "h = MatMul(x, w) a = Add(h, b) r = Relu(a) y = Gemm<transB=1>(r, v, c)",
        "float[N,64] x",
        "float[N,32] y",
        **weights,
    )


def images(groups: int = 1) -> ir.Model:
    return build(
        f"a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) s = Conv<pads=[1,1,1,1],group={groups}>(r, v, c) "
        "t = Add(s, r) u = Relu(t) g = GlobalAveragePool(u) f = Flatten(g) y = Gemm<transB=1>(f, h, d)",
        "float[N,3,8,8] x",
        "float[N,10] y",
        w=normal(16, 3, 3, 3),
        b=normal(16),
        v=normal(16, 16 // groups, 3, 3, seed=2),
        c=normal(16, seed=2),
        h=normal(10, 16),
        d=normal(10),
    )


def run(model: ir.Model, optimise: bool = False, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    return runtime.session(portable(model, CONTEXT.target), optimise=optimise, threads=1).run(feeds)


def context(samples: list[dict[str, np.ndarray]]) -> Context:
    return Context(CONTEXT.target, collect=Collector(samples, []).collect, calibration=samples)


def rows(count: int = 4, size: int = 20, width: int = 64) -> list[dict[str, np.ndarray]]:
    mix = normal(width, width, seed=9)
    return [{"x": (normal(size, width, seed=i) @ mix).astype(np.float32)} for i in range(count)]


def pictures(count: int = 4) -> list[dict[str, np.ndarray]]:
    return [{"x": normal(4, 3, 8, 8, seed=i)} for i in range(count)]


def quantized(model: ir.Model, ctx: Context = CONTEXT, **options: Any) -> PassResult:
    return Quantize(**{"least": 0, **options}).run(model, ctx)


def held(model: ir.Model, name: str) -> np.ndarray:
    value = model.graph.initializers[name].const_value
    assert value is not None
    return value.numpy()


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in edit.nodes(model)]


def reasons(result: PassResult) -> set[str]:
    return {refusal.reason for refusal in result.refusals}


# Grids: against the definition, element by element.


def reference(w: np.ndarray, bits: int, symmetric: bool, axis: int | None, block: int) -> np.ndarray:
    """What a weight becomes, one group at a time."""
    out = np.empty_like(w)
    moved, target = (w, out) if axis is None else (np.moveaxis(w, axis, -1), np.moveaxis(out, axis, -1))
    if axis is None:
        groups = [(..., slice(None))]
    elif not block:
        groups = [(..., i) for i in range(moved.shape[-1])]
    else:
        groups = [
            (*index, slice(i, i + block))
            for index in np.ndindex(moved.shape[:-1])
            for i in range(0, moved.shape[-1], block)
        ]
    for group in groups:
        part = moved[group].astype(np.float64)
        low, high, half = min(part.min(), 0), max(part.max(), 0), 1 << (bits - 1)
        if symmetric:
            scale, zero, least, most = max(high / (half - 1), -low / half), 0, -half, half - 1
        else:
            scale, least, most = (high - low) / (2 * half - 1), 0, 2 * half - 1
        scale = np.float32(scale) if scale else np.float32(1)
        if not symmetric:
            zero = np.clip(np.rint(-low / np.float64(scale)), least, most)
        tried = [scale]
        if symmetric and bits <= 4 and scale != 1:  # or the largest value at the code that only one side has
            turned = np.float32(max(high, -low) / half)
            tried.append(-turned if high > -low else turned)
        losses = []
        for each in tried:
            codes = np.clip(np.rint(moved[group] / each) + zero, least, most)
            losses.append((np.square((codes - zero) * each - moved[group]).sum(), (codes - zero) * each))
        target[group] = min(losses, key=lambda loss: loss[0])[1]
    return out


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("block", [0, -1, 16, 48])
def test_weights_are_what_the_definition_says(bits: int, symmetric: bool, block: int) -> None:
    model = mlp()
    opset = 25 if bits == 2 else 21
    model.graph.opset_imports[""] = opset
    before = {name: held(model, name).copy() for name in ("w", "v")}
    x = rows(1)[0]["x"]
    result = quantized(model, bits=bits, symmetric=symmetric, block=block)
    dtype = {8: "int8", 4: "int4", 3: "int4", 2: "int2"}[bits]
    assert result.changes == [f"weight stored in {'' if symmetric else 'u'}{dtype} (×2)"]
    granularity = {0: (1, 0), -1: (None, 0)}.get(block, (0, block))
    w = reference(before["w"], bits, symmetric, *granularity)
    v = reference(before["v"].T, bits, symmetric, *(granularity if block < 48 else (1, 0)))
    want = np.maximum(x.astype(np.float64) @ w + held(model, "b"), 0) @ v + held(model, "c")
    got = run(model, x=x)["y"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    assert "Gemm" not in operators(model), "ONNX Runtime multiplies with codes in MatMul only"


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 6),
    st.sampled_from([2, 3, 4, 7, 8]),
    st.booleans(),
    st.sampled_from([None, 0, 1]),
    st.sampled_from([0, 16, 7]),
    st.integers(0, 2**31),
)
def test_codes_survive_the_file_and_are_the_nearest(
    depth: int, width: int, bits: int, symmetric: bool, axis: int | None, block: int, seed: int
) -> None:
    w = np.random.default_rng(seed).normal(size=(depth, width)).astype(np.float32)
    grid, granularity = Grid(bits, symmetric), Granularity(axis, block if axis is not None else 0)
    codes = rounding.nearest(ir.tensor(w), grid, granularity)
    packed = ir.from_proto(ir.to_proto(codes.codes))
    np.testing.assert_array_equal(packed.numpy().astype(int), codes.codes.numpy().astype(int))
    assert packed.nbytes == -(-w.size * grid.dtype.bitwidth // 8)
    low, high = grid.reach
    stored = packed.numpy().astype(int)
    assert low <= stored.min() and stored.max() <= high
    scale = np.broadcast_to(granularity.spread(codes.scale, w.shape), w.shape)
    exact = symmetric and bits > 4
    assert (np.abs(codes.values() - w) <= np.abs(scale) * ((0.5 if exact else 1.0) + 2e-6 * 2**bits)).all()
    np.testing.assert_allclose(
        codes.values(), reference(w, bits, symmetric, axis, block if axis is not None else 0), atol=1e-6
    )


def test_large_weights_are_done_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    w = normal(70, 33)
    whole = [
        rounding.nearest(ir.tensor(w), Grid(4), g) for g in (Granularity(0, 32), Granularity(1), Granularity(1, 16))
    ]
    monkeypatch.setattr(rounding, "PIECE", 100)
    for each in whole:
        again = rounding.nearest(ir.tensor(w), Grid(4), each.granularity)
        np.testing.assert_array_equal(again.values(), each.values())
        np.testing.assert_array_equal(again.scale, each.scale)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("grid", [Grid(8), Grid(4, False), Grid(8, form="float8e4m3fn"), Grid(8, form="float8e5m2")])
def test_zeros_constants_and_extremes(grid: Grid, dtype: Any) -> None:
    top = float(ml_dtypes.finfo(dtype).max)
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    w = np.zeros((8, 4), dtype)
    w[:, 1], w[:, 2], w[:, 3] = 3.25, tiny, np.linspace(-top, top, 8)
    codes = rounding.nearest(ir.Tensor(w), grid, Granularity(1))
    values = codes.values().astype(np.float64)
    assert np.isfinite(values).all()
    assert (values[:, 0] == 0).all()
    np.testing.assert_allclose(values[:, 1], 3.25, rtol=1e-2)
    np.testing.assert_allclose(values[:, 2], 0, atol=2 * tiny)
    np.testing.assert_allclose(values[:, 3], w[:, 3].astype(np.float64), atol=top * 0.14)


def test_clipping_never_has_more_error() -> None:
    w = normal(64, 32)
    w[3, :8] *= 8
    for bits in (4, 3):
        losses = [
            np.square(rounding.nearest(ir.tensor(w), Grid(bits), Granularity(1), clip=clip).values() - w).sum(0)
            for clip in (False, True)
        ]
        assert (losses[1] <= losses[0]).all()
        assert losses[1].sum() < 0.95 * losses[0].sum()


# Where weights are.


def test_nan_stays_and_is_said() -> None:
    w = normal(64, 48)
    w[2, 2] = np.nan
    model = mlp(w=w)
    result = quantized(model)
    assert "it holds NaN or infinity" in reasons(result)
    assert held(model, "w").dtype == np.float32 and held(model, "v").dtype == np.int8


def test_an_embedding_and_its_head_share_one_table_whose_rows_are_looked_up() -> None:
    text = "e = Gather(t, i) h = MatMul(e, w) k = Transpose<perm=[1,0]>(t) y = MatMul(h, k)"
    model = build(text, "int64[N] i", "float[N,100] y", t=normal(100, 32), w=normal(32, 32))
    table = held(model, "t").copy()
    ids = np.arange(7)
    quantized(model, bits=4, block=16)
    assert held(model, "t").dtype == np.int8 and held(model, "w").dtype == ml_dtypes.int4
    assert sum(value.const_value.size == 3200 for value in model.graph.initializers.values()) == 1
    found = reference(table, 8, True, 0, 0)
    w = model.graph.initializers["w"]
    values = held(model, "w").astype(np.float32) * np.repeat(held(model, "w.scale"), 16, 0)
    assert w.dtype == ir.DataType.INT4
    np.testing.assert_allclose(run(model, i=ids)["y"], found[ids] @ values @ found.T, rtol=1e-4, atol=1e-4)
    gathered = next(node for node in model.graph if node.op_type == "Gather")
    assert gathered.inputs[0].dtype == ir.DataType.INT8


def test_a_tied_head_of_a_gemm_reads_the_same_table() -> None:
    text = "e = Gather(t, i) y = Gemm<transB=1>(e, t, b)"
    model = build(text, "int64[N] i", "float[N,100] y", t=normal(100, 32), b=normal(100))
    found = reference(held(model, "t"), 8, True, 0, 0)
    quantized(model)
    assert sum(value.const_value.size == 3200 for value in model.graph.initializers.values()) == 1
    want = found[:5] @ found.T + held(model, "b")
    np.testing.assert_allclose(run(model, i=np.arange(5))["y"], want, rtol=1e-4, atol=1e-4)
    model = build(text, "int64[N] i", "float[N,100] y", t=normal(100, 32), b=normal(100))
    assert not quantized(model, embeddings=0).changed


@pytest.mark.parametrize("scheme", ["weights", "dynamic"])
def test_shared_weights_are_stored_once(scheme: str) -> None:
    text = "a = MatMul(x, w) b = MatMul(a, w) y = Add(a, b)"
    model = build(text, "float[N,32] x", "float[N,32] y", w=normal(32, 32))
    x = normal(5, 32)
    want = run(model, x=x)["y"]
    quantized(model, scheme=scheme)
    assert len([v for v in model.graph.initializers.values() if v.dtype == ir.DataType.INT8]) == 1
    got = run(model, x=x)["y"]
    assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_stacked_weights_of_experts() -> None:
    model = build("y = MatMul(x, w)", "float[4,N,32] x", "float[4,N,16] y", w=normal(4, 32, 16))
    want = reference(held(model, "w"), 4, True, 1, 32)
    x = normal(4, 3, 32)
    result = quantized(model, bits=4)
    assert result.changed
    np.testing.assert_allclose(run(model, x=x)["y"], x @ want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2, 16])
@pytest.mark.parametrize("scheme", ["weights", "static"])
def test_convolutions_with_groups(groups: int, scheme: str) -> None:
    model = images(groups)
    x = pictures(1)[0]["x"]
    want = run(model, x=x)["y"]
    quantized(model, context(pictures()), scheme=scheme)
    assert held(model, "v").dtype == np.int8
    got = run(model, x=x)["y"]
    assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_weights_in_bodies_of_if() -> None:
    text = (
        "y = If (c) <then_branch = t () => (float[N,32] p) { p = MatMul(x, w) }, "
        "else_branch = e () => (float[N,32] q) { q = Neg(x) }>"
    )
    model = build(text, "bool c, float[N,32] x", "float[N,32] y", w=normal(32, 32))
    x = normal(3, 32)
    want = run(model, c=np.array(True), x=x)["y"]
    result = quantized(model, bits=8)
    assert result.changed
    got = run(model, c=np.array(True), x=x)["y"]
    assert 0 < np.abs(got - want).max() < 0.03 * np.abs(want).max()
    np.testing.assert_array_equal(run(model, c=np.array(False), x=x)["y"], -x)


@pytest.mark.parametrize("scheme", ["weights", "dynamic", "static"])
def test_nothing_is_quantized_twice(scheme: str) -> None:
    model = mlp()
    quantized(model, context(rows()), scheme=scheme)
    before = [(n.op_type, [v.name for v in n.inputs if v is not None]) for n in model.graph]
    result = quantized(model, context(rows()), scheme="weights", bits=4)
    assert not result.changed
    assert "its weight is quantized already" in reasons(result)
    assert before == [(n.op_type, [v.name for v in n.inputs if v is not None]) for n in model.graph]


def test_cast_and_mul_of_integers_count_as_quantized() -> None:
    text = "f = Cast<to=1>(w) m = Mul(f, s) y = MatMul(x, m)"
    model = build(text, "float[N,8] x", "float[N,4] y", w=np.ones((8, 4), np.int8), s=np.ones(4, np.float32))
    assert "its weight is quantized already" in reasons(quantized(model))


def test_names_choose_layers() -> None:
    model = mlp()
    quantized(model, include=("v",))
    assert held(model, "w").dtype == np.float32 and held(model, "v").dtype == np.int8
    model = mlp()
    quantized(model, exclude=("Gemm*",))
    assert held(model, "w").dtype == np.int8 and held(model, "v").dtype == np.float32
    with pytest.raises(BadInput, match="no weight or node is called 'z'"):
        quantized(mlp(), include=("z",))


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 5},
        {"block": 8},
        {"form": "float8e5m2", "bits": 4},
        {"scheme": "dynamic", "bits": 4},
        {"kinds": ("LSTM",)},
        {"damp": 0.0},
        {"embeddings": 3},
    ],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        Quantize(**options)


def test_old_opsets_are_left_with_the_reason() -> None:
    model = mlp()
    model.graph.opset_imports[""] = 20
    assert "it needs opset 21, the model has 20" in reasons(quantized(model, bits=4))
    assert quantized(model, bits=8).changed


def test_float16_weights_keep_their_type() -> None:
    model = build("y = MatMul(x, w)", "float16[N,32] x", "float16[N,16] y", w=normal(32, 16).astype(np.float16))
    want = reference(held(model, "w").astype(np.float32), 8, True, 1, 0)
    quantized(model)
    x = normal(3, 32).astype(np.float16)
    np.testing.assert_allclose(run(model, x=x)["y"], x.astype(np.float32) @ want, rtol=2e-2, atol=2e-2)
    assert held(model, "w.scale").dtype == np.float16


# GPTQ.


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("block", [0, 16])
def test_gptq_changes_outputs_less_than_nearest(bits: int, block: int) -> None:
    samples = rows()
    x = np.concatenate([sample["x"] for sample in samples]).astype(np.float64)
    w = held(mlp(), "w").copy()
    losses = []
    for how in ("nearest", "gptq"):
        model = mlp()
        quantized(model, context(samples), bits=bits, block=block, rounding=how, include=("w",))
        scale = held(model, "w.scale")
        values = held(model, "w").astype(np.float32) * (np.repeat(scale, 16, 0) if block else scale)
        losses.append(np.square(x @ (values - w)).sum(axis=0))
    assert (losses[1] <= losses[0] * (1 + 1e-6)).all()
    assert losses[1].sum() < 0.8 * losses[0].sum()


def test_gptq_of_convolutions_and_layer_after_layer() -> None:
    samples = pictures()
    model = images(2)
    want = run(model, x=samples[0]["x"])["y"]
    errors = {}
    for how in ("nearest", "gptq"):
        model = images(2)
        quantized(model, context(samples), bits=4, rounding=how, sequential=how == "gptq", kinds=("Conv",))
        errors[how] = np.square(run(model, x=samples[0]["x"])["y"] - want).sum()
    assert errors["gptq"] < errors["nearest"]


@pytest.mark.parametrize("seen", [0, 40])
def test_gptq_keeps_weights_of_inputs_that_calibration_never_had(seen: int) -> None:
    """Other data may have them; and an expert may never have been picked."""
    model = build("y = MatMul(x, w)", "float[N,64] x", "float[N,48] y", w=normal(64, 48))
    data = [{"x": np.concatenate([normal(20, seen), np.zeros((20, 64 - seen), np.float32)], axis=1)}]
    for rounded in ("nearest", "gptq"):
        one = model.clone()
        quantized(one, context(data), bits=4, rounding=rounded)
        got = run(one, x=np.eye(64, dtype=np.float32))["y"]
        error = np.abs(got - held(model, "w"))[seen:]
        assert (error < np.abs(held(model, "w")).max(axis=0) / 7).all()


@pytest.mark.parametrize("rounded", ["gptq", "awp"])
def test_zeros_stay_zeros(rounded: str) -> None:
    """Half of the weights, and the inputs vary together, so that a sweep would fill them."""
    w = normal(64, 48)
    w[RANDOM.random(w.shape) < 0.5] = 0
    model = build("y = MatMul(x, w)", "float[N,64] x", "float[N,48] y", w=w)
    data, errors = rows(), []
    want = run(model, x=data[0]["x"])["y"]
    for rounding_ in ("nearest", rounded):
        one = model.clone()
        quantized(one, context(data), bits=3, rounding=rounding_)
        assert (run(one, x=np.eye(64, dtype=np.float32))["y"][w == 0] == 0).all()
        errors.append(float(np.square(run(one, x=data[0]["x"])["y"] - want).sum()))
    assert errors[1] < 0.8 * errors[0]


def test_gptq_of_depthwise_convolutions_changes_outputs_less_than_nearest() -> None:
    model = build(
        "y = Conv<pads=[1,1,1,1],group=16>(x, w)", "float[N,16,8,8] x", "float[N,16,8,8] y", w=normal(16, 1, 3, 3)
    )
    samples = [{"x": np.maximum(normal(4, 16, 8, 8, seed=i), 0)} for i in range(4)]
    want, errors = run(model, **samples[0])["y"], []
    for rounded in ("nearest", "gptq"):
        one = model.clone()
        quantized(one, context(samples), bits=4, rounding=rounded)
        errors.append(float(np.square(run(one, **samples[0])["y"] - want).sum()))
    assert errors[1] < 0.95 * errors[0]


def test_biases_make_up_for_the_means() -> None:
    samples = [{"x": sample["x"] + 3} for sample in pictures()]
    shifts = []
    for correct in (False, True):
        model = images(2)
        want = np.concatenate([run(model, **sample)["y"] for sample in samples])
        quantized(model, context(samples), correct=correct, bits=4)
        got = np.concatenate([run(model, **sample)["y"] for sample in samples])
        shifts.append(np.abs((got - want).mean(0)).max())
    assert shifts[1] < 0.5 * shifts[0]


def test_a_bias_is_corrected_exactly() -> None:
    samples = rows()
    model = build("y = MatMul(x, w)", "float[N,64] x", "float[N,48] y", w=normal(64, 48))
    want = np.concatenate([run(model, **sample)["y"] for sample in samples]).mean(0)
    quantized(model, context(samples), bits=3, scheme="weights", correct=True)
    got = np.concatenate([run(model, **sample)["y"] for sample in samples]).mean(0)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_biases_of_layers_with_tiny_weights_do_not_overflow() -> None:
    """Weights of a channel so small that its bias on their scale would leave 32 bits."""
    w, b = normal(4, 32, 1, 1), np.full(4, 5.0, np.float32)
    w[1] *= 1e-12
    w[2] = 0
    for how in ("nearest", "gptq"):
        model = build("y = Conv(x, w, b)", "float[N,32,1,1] x", "float[N,4,1,1] y", w=w, b=b)
        samples = [{"x": normal(20, 32, 1, 1)}]
        want = run(model, **samples[0])["y"]
        quantized(model, context(samples), scheme="static", rounding=how)
        got = run(model, True, **samples[0])["y"]
        assert np.abs(got - want).max() < 0.03 * np.abs(want).max()


def normed() -> ir.Model:
    """A normalisation, one of whose channels is a hundred times as large, that two products read."""
    g = np.ones(64, np.float32)
    g[5] = 100
    return build(
        "n = LayerNormalization(x, g, d) a = MatMul(n, w) b = MatMul(n, v) y = Add(a, b)",
        "float[N,M,64] x",
        "float[N,M,48] y",
        g=g,
        d=normal(64),
        w=normal(64, 48),
        v=normal(64, 48, seed=2),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"scaling": "smooth", "scheme": "dynamic"},
        {"scaling": "smooth", "scheme": "static"},
        {"scaling": "awq", "bits": 3, "block": 16},
    ],
)
def test_scales_that_move_are_exact_and_help(options: dict[str, Any]) -> None:
    samples = [{"x": normal(2, 30, 64, seed=i)} for i in range(3)]
    want = run(normed(), **samples[0])["y"]
    errors = []
    for each in ({**options, "scaling": "none"}, options):
        model = normed()
        result = quantized(model, context(samples), **each)
        errors.append(np.square(run(model, **samples[0])["y"] - want).sum())
    assert "activation's scales moved to its weights" in result.changes
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("method", ["smooth", "awq"])
def test_moving_scales_alone_changes_nothing(method: Any) -> None:
    samples = [{"x": normal(2, 30, 64, seed=i)} for i in range(3)]
    model = normed()
    want = run(model, **samples[0])["y"]
    chosen = [(s, (Grid(3), Granularity(0, 16))) for s in sites.find(model, ("MatMul",), (), (), 0, PassResult())]
    members = scaling.groups(chosen)[0]
    statistics = context(samples).collect(model, {members[0][0].uses[0].moments})
    assert scaling.move(members, statistics, method, 0.5, edit.Names(model))
    np.testing.assert_allclose(run(model, **samples[0])["y"], want, atol=1e-5 * np.abs(want).max())
    assert held(model, "g")[5] < 90


# Products in integers.


def convolutions(clip: str = "") -> ir.Model:
    """A residual block with a depthwise convolution, as mobile networks have it."""
    constants = {
        "w": normal(8, 3, 3, 3),
        "b": normal(8),
        "e": normal(16, 8, 1, 1, seed=1) * np.geomspace(0.05, 2, 16, dtype=np.float32).reshape(-1, 1, 1, 1),
        "f": normal(16, seed=1),
        "v": normal(16, 1, 3, 3, seed=2),
        "c": normal(16, seed=2),
        "p": normal(8, 16, 1, 1, seed=3),
        "h": normal(10, 8, 1, 1, seed=4),
        "m": normal(8, 1, 1, seed=5),
    }
    act = "Clip(%s, low, high)" if clip else "Relu(%s)"
    if clip:
        constants |= {"low": np.array(0, np.float32), "high": np.array(clip, np.float32)}
    return build(
        f"a = Conv<pads=[1,1,1,1]>(x, w, b) r = Conv(a, e, f) s = {act % 'r'} "
        f"t = Conv<pads=[1,1,1,1],group=16>(s, v, c) u = {act % 't'} q = Conv(u, p) o = Add(q, a) k = Add(o, m) "
        "l = MaxPool<kernel_shape=[2,2]>(k) y = Conv(l, h)",
        "float[N,3,8,8] x",
        "float[N,10,7,7] y",
        **constants,
    )


def scaled_channels(model: ir.Model) -> list[streams.Stream]:
    infer(model)
    found = streams.find(sites.find(model, ("Conv", "MatMul", "Gemm"), (), (), 0, PassResult()))
    for i, stream in enumerate(found):
        streams.scale(stream, np.exp(normal(stream.channels, seed=i)).astype(np.float64), edit.Names(model))
    return found


def test_factors_of_channels_go_through_all_that_lies_between_products() -> None:
    model = convolutions()
    before = run(model, x=pictures()[0]["x"])["y"]
    found = scaled_channels(model)
    assert sorted((len(s.makers), len(s.readers), s.channels) for s in found) == [(1, 1, 16), (1, 1, 16), (2, 2, 8)]
    np.testing.assert_allclose(run(model, x=pictures()[0]["x"])["y"], before, rtol=1e-3, atol=1e-3)
    assert not np.allclose(held(model, "e"), held(convolutions(), "e"))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3), st.sampled_from(["Relu", "LeakyRelu", "Sigmoid"]), st.booleans())
def test_factors_of_channels_of_products_are_exact(seed: int, act: str, output: bool) -> None:
    """A Sigmoid lets none through, nor does a value that is an output."""
    model = build(
        f"h = MatMul(x, w) b = Add(h, c) r = {act}(b) y = Gemm<transB=1>(r, v, d) z = Relu(y)",
        "float[N,16] x",
        "float[N,8] z, float[N,12] r" if output else "float[N,8] z",
        w=normal(16, 12, seed=seed),
        c=normal(12, seed=seed),
        v=normal(8, 12, seed=seed),
        d=normal(8, seed=seed),
    )
    x = normal(5, 16, seed=seed)
    before = run(model, x=x)["z"]
    assert len(scaled_channels(model)) == (act != "Sigmoid" and not output)
    np.testing.assert_allclose(run(model, x=x)["z"], before, rtol=1e-3, atol=1e-3)


def test_equal_channels_lower_the_error_of_static_quantization() -> None:
    """Channels of which some are a hundred times smaller than others, and count as much."""
    sizes = np.geomspace(0.01, 1, 16).astype(np.float32).reshape(-1, 1, 1, 1)
    model = build(
        "a = Conv<pads=[1,1,1,1]>(x, w) r = Relu(a) y = Conv(r, v)",
        "float[N,3,8,8] x",
        "float[N,4,8,8] y",
        w=normal(16, 3, 3, 3) * sizes,
        v=normal(4, 16, 1, 1) / sizes.reshape(1, -1, 1, 1),
    )
    samples = pictures(6)
    want, errors = run(model, **samples[0])["y"], []
    for method in ("none", "channels"):
        one = model.clone()
        result = quantized(one, context(samples), scheme="static", scaling=method, full_range=True)
        errors.append(float(np.square(run(one, **samples[0])["y"] - want).mean()))
    assert any(change.startswith("channels brought") for change in result.changes)
    assert errors[1] < 0.2 * errors[0]


def test_channels_below_a_clip_are_only_made_larger_and_stay_below_it() -> None:
    model = convolutions("6.0")
    infer(model)
    found = streams.find(sites.find(model, ("Conv",), (), (), 0, PassResult()))
    clipped = [stream for stream in found if stream.clipped]
    assert len(clipped) == 2
    statistics = context(pictures()).collect(model, {use.moments for s in clipped for use in s.readers})
    for stream in clipped:
        factors = equalisation.factors(stream, statistics, Grid(8))
        if factors is not None:
            largest = statistics[stream.readers[0].moments].largest.reshape(-1)
            assert (factors >= 1).all() and (factors * largest <= 6 + 1e-6)[factors > 1].all()


def test_dynamic_is_exact_integer_arithmetic_under_default_options() -> None:
    """Against integers: neither 16-bit sums nor anything else saturates, with weights and rows at their limits."""
    depth = 64
    w = np.where(normal(depth, 48) > 0, 1.0, -1.0).astype(np.float32)
    w[:, 0] = 1
    model = build("y = MatMul(x, w)", "float[N,64] x", "float[N,48] y", w=w)
    quantized(model, scheme="dynamic")
    x = np.where(normal(6, depth, seed=3) > -0.5, 1.0, 0.0).astype(np.float32)
    x[0] = 1
    codes, scale = held(model, "w").astype(np.int64), held(model, "w.scale")
    assert codes.min() >= -64 and codes.max() <= 63
    rows_ = np.clip(np.rint(x / np.float32(1 / 255)), 0, 255).astype(np.int64)
    want = (rows_ @ codes).astype(np.float64) * (np.float32(1 / 255) * scale.astype(np.float64))
    for optimise in (False, True):
        np.testing.assert_allclose(run(model, optimise, x=x)["y"], want, rtol=1e-5)
    assert operators(model) == ["DynamicQuantizeLinear", "MatMulInteger", "Cast", "Mul", "Mul"]


def test_dynamic_gemm_and_shared_activations() -> None:
    model = build(
        "a = MatMul(x, w) g = Gemm<transB=1>(x, v, b) y = Concat<axis=1>(a, g)",
        "float[N,32] x",
        "float[N,40] y",
        w=normal(32, 16),
        v=normal(24, 32),
        b=normal(24),
    )
    x = normal(5, 32)
    want = run(model, x=x)["y"]
    quantized(model, scheme="dynamic")
    assert operators(model).count("DynamicQuantizeLinear") == 1
    assert np.abs(run(model, x=x)["y"] - want).max() < 0.03 * np.abs(want).max()


def optimised(model: ir.Model, path: Path) -> list[str]:
    import onnx
    import onnxruntime as ort

    save(portable(model, CONTEXT.target), path / "in.onnx")
    options = runtime.settings(optimise=True)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(path / "out.onnx")
    ort.InferenceSession(path / "in.onnx", options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(path / "out.onnx").graph.node]


def test_onnx_runtime_computes_with_the_codes(tmp_path: Path) -> None:
    text = "h = MatMul(x, w) a = Add(h, b) r = Gelu(a) y = MatMul(r, v)"
    model = build(
        text, "float[N,M,64] x", "float[N,M,32] y", opset=21, w=normal(64, 48), b=normal(48), v=normal(48, 32)
    )
    quantized(model, bits=4, block=32)
    assert optimised(model, tmp_path).count("MatMulNBits") == 2
    model = mlp()
    quantized(model, scheme="dynamic")
    assert not {"MatMul", "Gemm"} & set(optimised(model, tmp_path))
    model = mlp()
    quantized(model, context(rows()), scheme="static")
    assert not {"MatMul", "Gemm"} & set(optimised(model, tmp_path))
    model = images()
    quantized(model, context(pictures()), scheme="static")
    found = optimised(model, tmp_path)
    assert found.count("QLinearConv") == 2 and found.count("QLinearAdd") == 1 and "QGemm" in found, found
    assert not {"Conv", "Gemm", "Relu"} & set(found)


@pytest.mark.parametrize("bits, block", [(8, 0), (8, 32), (4, 32)])
@pytest.mark.parametrize(
    "body",
    [
        "k = Transpose(w) y = MatMul(x, k)",
        "k = Transpose<perm=[1,0]>(w) a = MatMul(x, k) r = Relu(a) y = MatMul(r, v)",
        "a = MatMul(x, w) r = Relu(a) y = MatMul(r, v)",
        "a = MatMul(x, w) r = Relu(a) b = MatMul(r, v) y = Add(b, r)",
        "a = MatMul(x, w) s = Sigmoid(a) y = MatMul(s, v)",
    ],
)
def test_every_product_with_codes_is_one_kernel(tmp_path: Path, body: str, bits: int, block: int) -> None:
    used = {"v": normal(64, 64, seed=1) / 8} if "v)" in body else {}
    model = build(body, "float[1,N,64] x", "float[1,N,64] y", w=normal(64, 64) / 8, **used)
    x = normal(1, 5, 64)
    want = run(model, x=x)["y"]
    quantized(model, bits=bits, block=block)
    got = run(model, x=x)["y"]
    assert np.abs(got - want).max() < (0.03 if bits == 8 else 0.4) * np.abs(want).max()
    found = optimised(model, tmp_path)
    assert found.count("MatMulNBits") == 1 + len(used) and "DequantizeLinear" not in found, found


def test_a_tied_head_is_one_kernel(tmp_path: Path) -> None:
    for text in ("y = Gemm<transB=1>(h, t)", "k = Transpose(t) p = MatMul(h, k) y = Relu(p)"):
        model = build(f"e = Gather(t, i) h = Sigmoid(e) {text}", "int64[N] i", "float[N,96] y", t=normal(96, 32))
        quantized(model)
        found = optimised(model, tmp_path)
        # One DequantizeLinear is that of the rows that were looked up.
        assert found.count("MatMulNBits") == 1 and found.count("DequantizeLinear") == 1, found


def test_static_is_what_integers_give() -> None:
    """A convolution of one place and a sum of channels, by hand."""
    model = build(
        "a = Conv(x, w, b) y = Relu(a)", "float[N,8,1,1] x", "float[N,4,1,1] y", w=normal(4, 8, 1, 1), b=normal(4)
    )
    samples = [{"x": normal(50, 8, 1, 1, seed=i)} for i in range(3)]
    x = np.concatenate([sample["x"] for sample in samples])
    float_out = run(model, x=x)["y"]
    w, b = held(model, "w").astype(np.float64).reshape(4, 8), held(model, "b").astype(np.float64)
    quantized(model, context(samples), scheme="static")

    def grid(values: np.ndarray) -> tuple[float, int]:
        low, high = min(float(values.min()), 0), max(float(values.max()), 0)
        scale = float(np.float32((high - low) / 255))
        return scale, int(np.clip(np.rint(-low / scale), 0, 255))

    sx, zx = grid(x)
    sy, zy = grid(float_out)
    sw = np.array([np.float32(max(row.max() / 63, -row.min() / 64)) for row in w], np.float64)
    codes = np.clip(np.rint(w / sw[:, None]), -64, 63)
    bias = np.rint(b / (sx * sw))
    rows_ = np.clip(np.rint(x.reshape(-1, 8) / sx) + zx, 0, 255) - zx
    real = (rows_ @ codes.T + bias) * (sx * sw)
    want = (np.clip(np.rint(np.maximum(real, 0) / sy) + zy, 0, 255) - zy) * sy
    for optimise in (False, True):
        got = run(model, optimise, x=x)["y"].reshape(-1, 4)
        assert np.abs(got - want).max() <= sy * 1.01
        assert (np.abs(got - want) > sy / 2).mean() < 0.02, "rounding of ties only"


def test_full_range_needs_a_session_option_and_less_does_not(tmp_path: Path) -> None:
    for full, wanted in ((False, {}), (True, {"session.x64quantprecision": "1"})):
        model = mlp()
        result = quantized(model, scheme="dynamic", full_range=full)
        folder = tmp_path / str(full)
        folder.mkdir()
        assert OnnxRuntime().emit(model, folder)["session_options"] == wanted
        assert any("x64quantprecision" in note for note in result.notes) is full


def test_layers_that_are_left_out_stay_precise_in_onnx_runtime() -> None:
    """Its own optimiser would round their weights with one scale for all."""
    v = normal(16, 16, 3, 3, seed=2)
    v[0] *= 100
    model = build(
        "a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) s = Conv<pads=[1,1,1,1]>(r, v, c) u = Relu(s) y = Conv(u, z, d)",
        "float[N,3,8,8] x",
        "float[N,4,8,8] y",
        w=normal(16, 3, 3, 3),
        b=normal(16),
        v=v,
        c=normal(16, seed=2),
        z=normal(4, 16, 1, 1) * (np.arange(16) > 0).astype(np.float32).reshape(16, 1, 1),
        d=normal(4),
    )
    result = quantized(model, context(pictures()), scheme="static", exclude=("v",))
    assert any(change.startswith("weight kept in 16 bits") for change in result.changes)
    sample = pictures(1)[0]
    plain, fused = (run(model, optimise, **sample)["y"] for optimise in (False, True))
    assert np.abs(fused - plain).max() < 0.05 * np.abs(plain).max()


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_ranges_of_activations(method: Any) -> None:
    x = np.random.default_rng(3).normal(size=(200000, 4)).astype(np.float32)
    x[0, 0] = 30
    seen = RangeOf("x").of([x], Valid())
    scale, zero = activations.scale_of(seen, method, 99.9)
    top = (255 - int(zero)) * float(scale)
    inner = x[np.abs(x) < 3]
    codes = np.clip(np.rint(inner / scale) + int(zero), 0, 255)
    error = np.abs((codes - float(zero)) * scale - inner).max()
    if method == "minmax":
        assert top == pytest.approx(30, rel=0.01)
    else:
        assert top < 25
    assert error <= scale * 0.51 + 1e-6
    nothing = RangeOf("x").of([np.zeros((0, 4), np.float32)], Valid())
    assert activations.scale_of(nothing, method, 99.9)[0] > 0


# Layers that stay, and the gate.


def planted_rows() -> list[dict[str, np.ndarray]]:
    found = [{"x": normal(16, 64, seed=i)} for i in range(3)]
    for sample in found:
        sample["x"][:, 0] = 0
    return found


def planted_chain() -> ir.Model:
    """Three layers; what the first one makes of its input hangs on a small part of its largest weights."""
    bad = normal(64, 64) * 0.01
    bad[0] = 0.3  # its input is zero
    return build(
        "a = MatMul(x, bad) b = MatMul(a, w1) y = MatMul(b, w2)",
        "float[N,64] x",
        "float[N,64] y",
        bad=bad,
        w1=normal(64, 64, seed=5),
        w2=normal(64, 64, seed=6),
    )


@pytest.mark.parametrize("mode", ["outputs", "layers"])
def test_the_most_sensitive_layer_is_kept(mode: Any) -> None:
    model = planted_chain()
    result = quantized(model, context(planted_rows()), keep=1, fallback=0, sensitivity=mode)
    assert held(model, "bad").dtype == np.float32
    assert held(model, "w1").dtype == held(model, "w2").dtype == np.int8
    note = next(note for note in result.notes if "most sensitive" in note)
    assert "bad (" in note and "their own type" in note and f"{64 * 64 * 3 - 64 * 4:,} bytes more" in note


def test_the_gate_backs_off_until_it_holds(tmp_path: Path) -> None:
    save(planted_chain(), tmp_path / "m.onnx")
    report = pipeline.optimize(
        tmp_path / "m.onnx",
        tmp_path / "o.onnx",
        recipe="quantize{bits=4 least=0}",
        calibrate=planted_rows(),
        data=planted_rows(),
        max_drop={"error": 0.2},
        measure=False,
    )
    assert any("was backed off to 'quantize{bits=4 keep=1 least=0}'" in warning for warning in report.warnings), report
    dtypes = {name: value.dtype for name, value in load(tmp_path / "o.onnx").graph.initializers.items()}
    assert dtypes["w1"] == dtypes["w2"] == ir.DataType.INT4
    assert dtypes["bad"] == ir.DataType.INT8
    assert report.approximation["error"] <= 0.2


def test_levels_end_with_8_bits() -> None:
    levels = Quantize(bits=4, least=0).levels(planted_chain())
    assert [(level.bits, level.keep) for level in levels] == [(4, 0), (4, 1), (4, 2), (8, 0), (8, 1), (8, 2)]


def test_bits_are_shared_by_what_errors_cost() -> None:
    model = planted_chain()
    result = quantized(model, context(planted_rows()), budget=6.0, choices=(4, 8), sensitivity="outputs")
    dtypes = {name: model.graph.initializers[name].dtype for name in ("bad", "w1", "w2")}
    assert dtypes == {"bad": ir.DataType.INT8, "w1": ir.DataType.INT4, "w2": ir.DataType.INT4}
    spent = next(note for note in result.notes if "bits per weight:" in note)
    assert float(spent.split()[1]) <= 6.05


def test_a_budget_in_megabytes_counts_every_quantized_weight() -> None:
    model = planted_chain()
    quantized(model, context(planted_rows()), megabytes=0.0095, choices=(4, 8), sensitivity="outputs")
    dtypes = [model.graph.initializers[name].dtype for name in ("bad", "w1", "w2")]
    assert dtypes == [ir.DataType.INT8, ir.DataType.INT4, ir.DataType.INT4]
    held = [v for v in model.graph.initializers.values() if v.const_value is not None]
    assert sum(v.const_value.nbytes for v in held if v.const_value is not None) <= 9500
    result = quantized(planted_chain(), context(planted_rows()), megabytes=0.001, choices=(4, 8))
    assert "the budget cannot be met with these choices" in reasons(result)


def test_a_budget_in_measured_time() -> None:
    """8 bits are timed at 0.5, 4 bits at 0.25: with half of the time, all may have 8."""

    def time(probes: Sequence[Probe]) -> dict[str, float]:
        return {probe.signature: 0.25 if "bits=4" in probe.signature else 0.5 for probe in probes}

    def chosen(limit: float) -> list[ir.DataType | None]:
        model = planted_chain()
        ctx = dataclasses.replace(context(planted_rows()), time=time)
        quantized(model, ctx, time=limit, choices=(4, 8), sensitivity="outputs")
        return [model.graph.initializers[name].dtype for name in ("bad", "w1", "w2")]

    assert chosen(0.5) == [ir.DataType.INT8] * 3
    assert chosen(0.34) == [ir.DataType.INT8, ir.DataType.INT4, ir.DataType.INT4]
    assert chosen(1.0) == [ir.DataType.FLOAT] * 3
    with pytest.raises(BadInput, match="nothing can be timed here"):
        quantized(planted_chain(), context(planted_rows()), time=0.5)
    with pytest.raises(BadInput, match="three ways to limit the same"):
        Quantize(time=0.5, budget=4.0)


# With other passes.


def test_shrink_after_quantize() -> None:
    """Channels that are zero go, codes and scales with them."""
    w, v = normal(64, 48), normal(32, 48, seed=1)
    w[:, 10:20] = 0
    b = normal(48)
    b[10:20] = 0
    model = mlp(w=w, v=v, b=b)
    quantized(model)
    x = rows(1)[0]["x"]
    want = run(model, x=x)["y"]
    result = Shrink().run(model, CONTEXT)
    assert result.changed
    assert held(model, "w").shape == (64, 38) and held(model, "w").dtype == np.int8
    np.testing.assert_allclose(run(model, x=x)["y"], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", ["quantize", "quantize{bits=4 block=32 rounding=gptq}", "quantize{scheme=dynamic}"])
def test_a_real_transformer_after_fusion(tmp_path: Path, recipe: str) -> None:
    images_ = np.load(DATA / "fashion_mnist_2k.npz")["calib_x"][:64]
    samples = [
        {"image": ((images_[i : i + 16].astype(np.float32) / 255 - 0.286) / 0.353)[:, None]} for i in (0, 16, 32)
    ]
    path = tmp_path / "o.onnx"
    report = pipeline.optimize(
        DATA / "fmnist_vit_tiny.onnx",
        path,
        recipe=f"simplify,fuse,{recipe}",
        calibrate=samples,
        data=samples,
        measure=False,
    )
    assert path.stat().st_size < (DATA / "fmnist_vit_tiny.onnx").stat().st_size * 0.5
    assert report.approximation["error"] < (0.2 if "bits=4" in recipe else 0.05)


def test_a_real_network_in_integers(tmp_path: Path) -> None:
    images_ = np.load(DATA / "fashion_mnist_2k.npz")
    x = ((images_["calib_x"][:128].astype(np.float32) / 255 - 0.286) / 0.353)[:, None]
    samples = [{"image": x[i : i + 32]} for i in range(0, 128, 32)]
    path = tmp_path / "o.onnx"
    pipeline.optimize(
        DATA / "fmnist_resnet.onnx",
        path,
        recipe="simplify,fuse,quantize{scheme=static}",
        calibrate=samples,
        measure=False,
    )
    before = runtime.session(DATA / "fmnist_resnet.onnx", optimise=True, threads=1).run({"image": x})["logits"]
    after = runtime.session(path, optimise=True, threads=1).run({"image": x})["logits"]
    assert (before.argmax(1) == after.argmax(1)).mean() > 0.97
    assert path.stat().st_size < (DATA / "fmnist_resnet.onnx").stat().st_size * 0.35


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for i in range(2):
        model = mlp()
        quantized(model, context(rows()), bits=4, block=16, rounding="gptq", clip="mse")
        save(portable(model, CONTEXT.target), tmp_path / f"{i}.onnx")
        found.append((tmp_path / f"{i}.onnx").read_bytes())
    assert found[0] == found[1]


# What is said before any work.


def caveats(model: ir.Model, ratio: float, **options: Any) -> list[str]:
    def time(probes: Sequence[Probe]) -> dict[str, float]:
        for probe in probes:
            for each in (probe.before, probe.after):
                runtime.session(portable(each, CONTEXT.target), optimise=True, threads=1).run(probe.inputs)
        return {probe.signature: ratio for probe in probes}

    target = Capabilities("onnxruntime", 13, {"": 26}, providers=("CPUExecutionProvider",))
    return list(Quantize(**options).caveats(model, dataclasses.replace(CONTEXT, target=target, time=time)))


@pytest.mark.parametrize("scheme", ["weights", "dynamic", "static"])
def test_what_is_not_faster_is_said_before(scheme: str) -> None:
    model = build("y = MatMul(x, w)", "float[B,S,512] x", "float[B,S,512] y", w=normal(512, 512))
    slow = caveats(model, 1.5, scheme=scheme)
    assert "a product of 64 rows with 512 x 512 takes 1.50x of float32's time" in slow[-1]
    assert not any("takes" in text for text in caveats(model, 0.5, scheme=scheme))
    pictures = build("y = Conv(x, w)", "float[N,32,16,16] x", "float[N,32,14,14] y", w=normal(32, 32, 3, 3))
    found = [text for text in caveats(pictures, 2.0, scheme=scheme) if "takes" in text]
    assert len(found) == (scheme != "dynamic"), "a convolution that stays as it is is as fast as it was"
    assert not caveats(build("y = Relu(x)", "float[N] x", "float[N] y"), 2.0, scheme=scheme)


def test_a_user_reads_it_before_the_passes_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    save(mlp(), source)
    command = ["optimize", str(source), "-o", str(out), "-p", "cast", "--no-cache", "--no-measure"]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("graphc: note: cast to float16: ONNX Runtime's CPU provider has no products in it")
    assert "the model is not faster" in " ".join(shown.out.split())
    assert main([*command, "-q"]) == 0 and not capsys.readouterr().err


def test_what_kernels_round_is_part_of_the_measured_error() -> None:
    """With weights that lie on the grid, the error left is that of activations, which the kernel rounds."""
    grid = np.random.default_rng(0).integers(-7, 8, (64, 64)).astype(np.float32)
    grid[0] = 7
    model = build("y = MatMul(x, w)", "float[1,N,64] x", "float[1,N,64] y", w=grid)
    judge = Judge(model, [{"x": normal(1, 9, 64)}], 0, lambda what, done, total: None)
    quantized(model, bits=4, block=32)
    assert 1e-4 < judge.costs(model, ["error"])["error"] < 0.02


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    source, half, whole, rest = (tmp_path / f"{name}.onnx" for name in ("in", "half", "whole", "rest"))
    save(mlp(), source)
    how: dict[str, Any] = {"measure": False, "cache": False}
    recipe = "simplify,quantize{bits=4 block=32 least=0},lower,lower-int8"
    pipeline.optimize(source, whole, recipe=recipe, **how)
    pipeline.optimize(source, half, recipe=recipe, stop_after="quantize", **how)
    pipeline.optimize(half, rest, resume=True, **how)
    assert rest.read_bytes() == whole.read_bytes()
