"""What ``quantize`` leaves alone, and that it says why; what it must not trip over."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from graphc.passes.simplify import Simplify
from graphc.quantization.dynamic import NO_KERNEL
from graphc.quantization.sites import QUANTIZED
from tests.quantized_models import CONTEXT, build, context, held, normal, quantized, reasons, rows, run
from tests.small_models import operators

IDS = [{"i": np.arange(12).reshape(2, 6)}]
FOLD = "its weight is computed from constants: put simplify before it"


@pytest.mark.parametrize(
    ("body", "reason", "constants"),
    [
        ("y = ConvTranspose(x, w)", "weights of ConvTranspose are not looked at", {"w": normal(64, 8, 2, 2)}),
        ('y = Einsum<equation="nioo,if->nf">(x, w)', "weights of Einsum are not looked at", {"w": normal(64, 32)}),
        ("t = Mul(w, s) y = MatMul(x, t)", FOLD, {"w": normal(64, 64), "s": np.full((), 2, np.float32)}),
        ("t = Cast<to=1>(w) y = MatMul(x, t)", FOLD, {"w": normal(64, 64).astype(np.float16)}),
        ("i = ArgMax(x) y = Gather<axis=1>(w, i)", "what is looked up are not rows of a matrix", {"w": normal(64, 64)}),
        ("i = ArgMax(x) y = Gather(w, i)", "what is looked up are not rows of a matrix", {"w": normal(64, 4, 16)}),
    ],
)
def test_why_a_weight_stays(body: str, reason: str, constants: dict[str, Any]) -> None:
    model = build(body, "float[N,64,64,64] x", "float y", **constants)
    before = operators(model)
    assert reasons(quantized(model, least=1024)) == {reason, "no weight can be quantized"}
    assert operators(model) == before


CODES = {"q": np.arange(1024).reshape(32, 32).astype(np.int8), "s": np.full(32, 0.01, np.float32)}


@pytest.mark.parametrize(
    "body",
    [
        "c = Cast<to=1>(q) m = Mul(c, s) y = MatMul(x, m)",
        "c = Cast<to=1>(q) m = Div(c, s) y = MatMul(x, m)",
        "c = Cast<to=1>(q) z = Sub(c, s) m = Mul(z, s) t = Transpose(m) y = MatMul(x, t)",
        "c = Cast<to=1>(q) m = Mul(c, s) y = Gemm(x, m, s)",
        "c = Cast<to=1>(q) h = MatMul(x, c) y = Mul(h, s)",
    ],
)
def test_codes_that_are_cast_stay_and_are_known(body: str) -> None:
    """Simplify makes no floats of them, which quantize would round once more."""
    model = build(body, "float[N,32] x", "float[N,32] y", **CODES)
    Simplify().run(model, CONTEXT)
    assert "Cast" in operators(model) and held(model, "q").dtype == np.int8
    assert reasons(quantized(model)) == {QUANTIZED, "no weight can be quantized"}


@pytest.mark.parametrize(
    "body",
    [
        "i = ArgMax(x) g = Gather(q, i) c = Cast<to=1>(g) y = Mul(c, s)",
        "m = DequantizeLinear<axis=1>(q, s) y = MatMul(x, m)",
        "m = DequantizeLinear<axis=1>(h, s) y = MatMul(x, m)",
        "m = com.microsoft.DequantizeLinear<axis=1>(h, s) y = MatMul(x, m)",
        "y = com.microsoft.MatMulBnb4<K=32, N=32, block_size=32, quant_type=1>(x, q, s)",
    ],
)
def test_codes_of_other_tools_are_known(body: str) -> None:
    constants = CODES | {"h": CODES["q"].astype(np.int16)}
    model = build(body, "float[N,32] x", "float y", **{k: v for k, v in constants.items() if f"{k}," in body + ","})
    assert reasons(quantized(model)) == {QUANTIZED, "no weight can be quantized"}


def test_convolutions_have_no_dynamic_kernel() -> None:
    model = build("y = Conv(x, w)", "float[N,32,4,4] x", "float[N,48,4,4] y", w=normal(48, 32, 1, 1))
    assert NO_KERNEL in reasons(quantized(model, scheme="dynamic"))


def test_a_weight_that_is_read_transposed_is_no_embedding() -> None:
    body = "h = MatMul(x, w) r = Relu(h) t = Transpose(w) y = MatMul(r, t)"
    for scheme in ("dynamic", "static"):
        model = build(body, "float[N,64] x", "float[N,64] y", w=normal(64, 48))
        assert "a transposition reads the weight, too" in reasons(quantized(model, scheme=scheme))


@pytest.mark.parametrize("scheme", ["weights", "dynamic"])
def test_codes_that_take_as_much_are_not_written(scheme: str) -> None:
    model = build("y = MatMul(x, w)", "float[N,1] x", "float[N,96] y", w=normal(1, 96))
    assert "codes and scales would take as much as it does" in reasons(quantized(model, scheme=scheme))
    assert operators(model) == ["MatMul"]


def test_static_changes_nothing_where_nothing_is_quantized() -> None:
    constants = {"w": normal(64, 48).astype(np.float16), "b": normal(48).astype(np.float16)}
    model = build("h = MatMul(x, w) y = Add(h, b)", "float16[N,64] x", "float16[N,48] y", **constants)
    result = quantized(model, scheme="static")
    assert not result.changed and operators(model) == ["MatMul", "Add"]


@pytest.mark.parametrize("head", ["", "k = Transpose(t) y = MatMul(h, k)"])
def test_static_products_that_read_rows_of_an_embedding(head: str) -> None:
    """What the lookup gives is replaced, and its codes were to be put behind what is gone."""
    last = head or "y = MatMul(h, v)"
    weights = {"t": normal(96, 64), "w": normal(64, 64)} | ({} if head else {"v": normal(64, 96)})
    model = build(f"e = Gather(t, i) h = MatMul(e, w) {last}", "int64[N,S] i", "float[N,S,96] y", **weights)
    want = run(model, **IDS[0])["y"]
    result = quantized(model, context(IDS), scheme="static", activations="minmax")
    assert "activation quantized" in " ".join(result.changes)
    for optimise in (False, True):
        got = run(model, optimise, **IDS[0])["y"]
        assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)


@pytest.mark.parametrize("size", [1e25, 1e-25, 1e-41])
@pytest.mark.parametrize("options", [{}, {"rounding": "gptq", "refine": 1}, {"clip": "mse"}], ids=str)
def test_squares_of_huge_and_tiny_numbers_fit(size: float, options: dict[str, Any]) -> None:
    weights = {"w": normal(64, 48) * np.float32(size), "v": normal(48, 32)}
    model = build("h = MatMul(x, w) y = MatMul(h, v)", "float[N,64] x", "float[N,32] y", **weights)
    samples = rows()
    want = run(model, **samples[0])["y"].astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        quantized(model, context(samples), bits=4, block=16, **options)
    got = run(model, **samples[0])["y"]
    assert np.linalg.norm(got - want) < 0.12 * np.linalg.norm(want)


@pytest.mark.parametrize("scheme", ["weights", "dynamic", "static"])
@pytest.mark.parametrize("product", ["MatMul(x, w)", "Gemm(x, w)", "Gemm(x, w, b)"])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_an_activation_that_is_an_output_too(scheme: str, product: str, rounding: str) -> None:
    """Its name goes to what is written instead, while its statistics are known by that name."""
    weights = {"w": normal(64, 64), "v": normal(64, 64)} | ({"b": normal(64)} if "b" in product else {})
    model = build(f"h = {product} y = Gemm(h, v)", "float[N,64] x", "float[N,64] h, float[N,64] y", **weights)
    want = run(model, **rows()[0])
    quantized(model, context(rows()), scheme=scheme, correct=True, rounding=rounding)
    got = run(model, **rows()[0])
    assert list(got) == ["h", "y"]
    for name, array in want.items():
        assert np.linalg.norm(got[name] - array) < 0.02 * np.linalg.norm(array)


def test_sums_with_new_biases_are_what_the_next_product_reads_as_codes() -> None:
    weights = {"w": normal(64, 64), "v": normal(64, 64)}
    model = build("h = MatMul(x, w) y = MatMul(h, v)", "float[N,4,64] x", "float[N,4,64] y", **weights)
    samples = [{"x": normal(8, 4, 64, seed=i)} for i in range(3)]
    quantized(model, context(samples), scheme="static", correct=True)
    read = [node.inputs[0].producer() for node in model.graph if node.op_type == "QuantizeLinear"]
    assert [None if node is None else node.op_type for node in read] == [None, "Add"]
