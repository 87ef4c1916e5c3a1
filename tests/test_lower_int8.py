"""``lower-int8``: packed codes against the dequantized weights that they stand for, and what is left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc import pipeline, runtime
from graphc.contract import Context, PassResult, Probe
from graphc.lowering.packed import pack
from graphc.model import load
from graphc.opset.portable import portable
from graphc.passes.lower_int8 import LowerInt8
from graphc.passes.quantize import Quantize
from tests.quantized_models import CONTEXT, DATA, build, normal, reasons
from tests.small_models import operators

TARGET = dataclasses.replace(runtime.capabilities(), portable=False)
FREE = dataclasses.replace(CONTEXT, target=TARGET)


def run(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    return runtime.session(portable(model, TARGET), optimise=False, threads=1).run(feeds)["y"]


def lowered(model: ir.Model, ctx: Context = FREE, **options: Any) -> PassResult:
    return LowerInt8(**{"always": True, "activations": "float", **options}).run(model, ctx)


def quantized(body: str, inputs: str, outputs: str, options: dict[str, Any], **weights: np.ndarray) -> ir.Model:
    model = build(body, inputs, outputs, 25 if options.get("bits") == 2 else 21, **weights)
    assert Quantize(**{"least": 0, **options}).run(model, CONTEXT).changed
    return model


X, Y = "float[1,N,72] x", "float[1,N,48] y"
SQUARE = ("float[1,N,64] x", "float[1,N,64] y")
WAYS = [
    {"bits": bits, "block": block, "symmetric": symmetric}
    for bits, block in ((4, 16), (4, 32), (4, 0), (8, 64), (8, 0), (8, -1), (2, 32))
    for symmetric in (True, False)
]


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("body", ["y = MatMul(x, w)", "k = Transpose(v) y = MatMul(x, k)"])
def test_products(body: str, options: dict[str, Any]) -> None:
    """72 inputs do not divide into blocks: the last one is filled up."""
    weight = {"w": normal(72, 48)} if "w)" in body else {"v": normal(48, 72)}
    model = quantized(body, X, Y, options, **weight)
    x = normal(1, 3, 72)
    want = run(model, x=x)
    result = lowered(model)
    assert result.changes == ["MatMulNBits written"] and operators(model) == ["MatMulNBits"]
    np.testing.assert_allclose(run(model, x=x), want, rtol=0, atol=2e-5 * np.abs(want).max())
    again = quantized(body, X, Y, options, **weight)
    lowered(again, activations="int8")
    assert 1e-5 < np.abs(run(again, x=x) - want).max() / np.abs(want).max() < 0.05, "activations were rounded"


@pytest.mark.parametrize("bits", [2, 4])
def test_an_embedding_and_its_head_share_packed_codes(bits: int) -> None:
    codes = np.random.default_rng(0).integers(-(1 << (bits - 1)), 1 << (bits - 1), (50, 64))
    dtype = {2: ml_dtypes.int2, 4: ml_dtypes.int4}[bits]
    source = build(
        "d = DequantizeLinear<axis=1, block_size=32>(c, s) e = Gather(d, i) h = Sigmoid(e) "
        "k = Transpose(d) y = MatMul(h, k)",
        "int64[1,N] i",
        "float[1,N,50] y",
        25,
        c=codes.astype(dtype),
        s=np.abs(normal(50, 2)),
    )
    ids = np.array([[0, 49, 7, -1]])
    want = run(source, i=ids)
    result = lowered(source)
    assert result.changes == ["MatMulNBits written", "GatherBlockQuantized written"]
    packed = [v for v in source.graph.initializers.values() if v.dtype == ir.DataType.UINT8]
    assert len(packed) == 1, "stored once"
    np.testing.assert_allclose(run(source, i=ids[:, :3]), want[:, :3], rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(
    "body",
    [
        "a = MatMul(x, w) s = Sigmoid(a) y = MatMul(s, w)",
        "k = Transpose(w) a = MatMul(x, k) s = Sigmoid(a) y = MatMul(s, k)",
        "y = If (c) <then_branch = t () => (float[1,N,64] p) { p = MatMul(x, w) }, "
        "else_branch = e () => (float[1,N,64] q) { q = Neg(x) }>",
    ],
)
def test_what_the_session_does_not_do_by_itself(body: str) -> None:
    inputs = f"bool c, {SQUARE[0]}" if "If" in body else SQUARE[0]
    model = quantized(body, inputs, SQUARE[1], {"bits": 4, "block": 32}, w=normal(64, 64) / 8)
    feeds = {"x": normal(1, 3, 64)} | ({"c": np.array(True)} if "If" in body else {})
    want = run(model, **feeds)
    assert lowered(model).changed
    assert "DequantizeLinear" not in operators(model) and "MatMulNBits" in operators(model)
    assert len([v for v in model.graph.initializers.values() if v.dtype == ir.DataType.UINT8]) == 1
    np.testing.assert_allclose(run(model, **feeds), want, rtol=0, atol=1e-4 * np.abs(want).max())
    session = runtime.session(portable(model, TARGET), optimise=True, threads=1)
    np.testing.assert_allclose(session.run(feeds)["y"], want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_gemms_of_other_tools() -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (48, 64)).astype(ml_dtypes.int4)
    text = "d = DequantizeLinear<axis=1, block_size=32>(c, s) y = Gemm<transB=1>(x, d, b)"
    model = build(text, "float[N,64] x", "float[N,48] y", c=codes, s=np.abs(normal(48, 2)), b=normal(48))
    x = normal(5, 64)
    want = run(model, x=x)
    assert lowered(model).changed and operators(model) == ["MatMulNBits", "Add"]
    np.testing.assert_allclose(run(model, x=x), want, rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(
    "body, reason",
    [
        ("d = DequantizeLinear<axis=0>(c, s) y = MatMul(x, d)", "its scales differ along the inputs"),
        ("d = DequantizeLinear<axis=1>(c, s) a = MatMul(x, d) k = Transpose(d) y = MatMul(a, k)", "its rows and its"),
        ("d = DequantizeLinear<axis=1>(c, s) a = Mul(x, d) y = MatMul(a, d)", "Mul reads what it stands for"),
        ("d = DequantizeLinear<axis=1>(c, s) f = Cast<to=1>(c) a = Mul(x, f) y = MatMul(a, d)", "something else reads"),
        ("d = DequantizeLinear<axis=0, block_size=24>(c, b) y = MatMul(x, d)", "its blocks are no power of two"),
        ("d = DequantizeLinear<axis=1, block_size=16>(c, b) y = MatMul(x, d)", "its blocks lie along the outputs"),
    ],
)
def test_what_does_not_fit(body: str, reason: str) -> None:
    scales = {"s": np.abs(normal(48))} if "s)" in body else {}
    if "b)" in body:
        scales["b"] = np.abs(normal(2, 48) if "24" in body else normal(48, 3))
    model = build(body, "float[48,48] x", "float[48,48] y", c=np.ones((48, 48), np.int8), **scales)
    before = operators(model)
    result = lowered(model)
    assert not result.changed and operators(model) == before
    assert any(each.startswith(reason) for each in reasons(result)), reasons(result)


def test_times_decide() -> None:
    def timed(ratio: float) -> tuple[ir.Model, PassResult, list[Probe]]:
        probes: list[Probe] = []

        def time(asked: Sequence[Probe]) -> Mapping[str, float]:
            probes.extend(asked)
            return {probe.signature: ratio for probe in asked}

        model = quantized(
            "a = MatMul(x, w) s = Sigmoid(a) y = MatMul(s, v)",
            *SQUARE,
            {"bits": 4, "block": 32},
            w=normal(64, 64),
            v=normal(64, 64, seed=1),
        )
        ctx = dataclasses.replace(FREE, time=time)
        return model, LowerInt8(activations="float").run(model, ctx), probes

    model, result, probes = timed(1.0)
    assert not result.changed and len(probes) == 1, "equal sizes are timed once"
    assert reasons(result) == {"packed codes are not faster than what the session makes by itself"}
    for probe in probes:
        before, after = (
            runtime.session(each, optimise=False, threads=1).run(probe.inputs) for each in (probe.before, probe.after)
        )
        for name, array in before.items():
            np.testing.assert_allclose(after[name], array, rtol=0, atol=1e-4 * np.abs(array).max())
    model, result, _ = timed(0.5)
    assert result.changes == ["MatMulNBits written (×2)"] and operators(model).count("MatMulNBits") == 2
    assert reasons(LowerInt8().run(model, FREE)) == {"nothing can be timed here"}
    portable_only = dataclasses.replace(FREE, target=dataclasses.replace(TARGET, portable=True))
    assert "only standard operators" in reasons(LowerInt8().run(model, portable_only)).pop()


@settings(deadline=None, max_examples=50)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_packing_keeps_every_code(bits: int, length: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (3, length)).astype(np.uint8)
    packed = pack(codes, bits)
    each = 8 // bits
    assert packed.shape == (3, -(-length // each))
    found = [(packed[:, i // each] >> (bits * (i % each))) & ((1 << bits) - 1) for i in range(length)]
    np.testing.assert_array_equal(np.stack(found, 1), codes)


def test_a_real_model_through_the_command(tmp_path: Path) -> None:
    source, out = DATA / "tiny_mixtral_bytes.onnx", tmp_path / "out.onnx"
    recipe = "simplify,quantize{bits=4 block=32 embeddings=4},lower-int8{always=true}"
    report = pipeline.optimize(
        source, out, recipe=recipe, target="onnxruntime{portable=false}", measure=False, cache=False
    )
    assert any(change.startswith("MatMulNBits") for change in report.passes[-1].changes)
    assert report.approximation["error"] < 0.3
    assert load(out).graph.opset_imports["com.microsoft"] == 1


@pytest.mark.parametrize("width, blocks", [(80, 5), (64, 1), (72, 0)])
def test_tables_of_few_bits_have_blocks_that_rows_divide_into(width: int, blocks: int) -> None:
    model = build("e = Gather(t, i) y = Sigmoid(e)", "int64[N] i", f"float[N,{width}] y", t=normal(50, width))
    assert Quantize(least=0, bits=4, block=128, embeddings=4).run(model, CONTEXT).changed
    scale = model.graph.initializers["t.scale"]
    assert list(scale.shape or ()) == ([50, blocks] if blocks else [50])
    want = run(model, i=np.arange(9))
    assert lowered(model).changed is bool(blocks)
    np.testing.assert_allclose(run(model, i=np.arange(9)), want, rtol=0, atol=1e-6)
