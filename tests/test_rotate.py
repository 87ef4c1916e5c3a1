"""``rotate``: what is turned computes the same, whatever the graph; what cannot be turned stays, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from fragments import ALL, feeds
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc import pipeline, runtime
from graphc.contract import PassResult
from graphc.passes.quantize import Quantize
from graphc.passes.rotate import Rotate
from graphc.rotation.orthogonal import Orthogonal
from tests.quantized_models import CONTEXT, DATA, build, held, normal, reasons, run
from tests.small_models import operators

KINDS = ("channel", "expert", "head", "head_dim", "neuron", "rank", "width")


def rotated(model: ir.Model, **options: Any) -> PassResult:
    return Rotate(**{"least": 2, **options}).run(model, CONTEXT)


def decoder(**weights: np.ndarray) -> ir.Model:
    """An embedding, a gated block behind a norm written out, another norm, and a head tied to the embedding."""
    return build(
        "e = Gather(t, i) p = Add(e, q) s = Pow(p, two) m = ReduceMean<keepdims=1>(s, last) v = Add(m, eps) "
        "r = Sqrt(v) n = Div(p, r) g = Mul(n, gain) u = MatMul(g, up) a = Sigmoid(u) d = MatMul(a, down) "
        "h = Add(d, p) f = RMSNormalization(h, end) k = Transpose<perm=[1,0]>(t) y = MatMul(f, k)",
        "int64[B,4] i",
        "float[B,4,50] y",
        opset=23,
        **{
            "t": normal(50, 24),
            "q": normal(4, 24),
            "two": np.array(2, np.float32),
            "last": np.array([-1]),
            "eps": np.array(1e-5, np.float32),
            "gain": np.exp(normal(24)),
            "up": normal(24, 40),
            "down": normal(40, 24),
            "end": np.exp(normal(24, seed=3)),
        }
        | weights,
    )


IDS = np.random.default_rng(0).integers(0, 50, (3, 4))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 96), st.integers(0, 1000))
def test_the_matrices_are_orthogonal_and_have_no_large_element(n: int, seed: int) -> None:
    q = Orthogonal(n, seed)
    np.testing.assert_allclose(q.matrix @ q.matrix.T, np.eye(n), atol=1e-12)
    rows = np.random.default_rng(seed).normal(size=(3, 2, n))
    np.testing.assert_allclose(q.apply(rows), rows @ q.matrix, atol=1e-12)
    if not n & (n - 1):
        np.testing.assert_allclose(np.abs(q.matrix), n**-0.5)


def test_a_decoder_computes_the_same_in_another_basis() -> None:
    model, before = decoder(), decoder()
    want = run(before, i=IDS)["y"]
    result = rotated(model)
    assert result.changes == [
        "gain folded into weights",
        "gain before a shared weight became a matrix",
        "width of 24 turned",
    ]
    np.testing.assert_allclose(run(model, i=IDS)["y"], want, rtol=1e-4, atol=1e-4)
    q = Orthogonal(24, 0).matrix
    np.testing.assert_allclose(held(model, "t"), held(before, "t") @ q, atol=1e-5)
    np.testing.assert_allclose(held(model, "q"), held(before, "q") @ q, atol=1e-5)
    np.testing.assert_allclose(held(model, "up"), q.T @ (held(before, "gain")[:, None] * held(before, "up")), atol=1e-5)
    assert (held(model, "gain") == 1).all() and (held(model, "end") == 1).all()
    assert operators(model).count("MatMul") == 4 and len(model.graph.initializers) == len(before.graph.initializers) + 1


def test_the_same_seed_gives_the_same_and_a_second_time_is_right() -> None:
    model, again = decoder(), decoder()
    rotated(model)
    rotated(again)
    assert np.array_equal(held(model, "up"), held(again, "up"))
    want = run(decoder(), i=IDS)["y"]
    assert "width of 24 turned" in rotated(model).changes
    np.testing.assert_allclose(run(model, i=IDS)["y"], want, rtol=1e-3, atol=1e-3)


TURNED = {"attention_operator", "dimension_from_shape", "fpn", "lora_branches", "mamba", "masked_mean_pooling"}
"""Some of the fragments in which an axis can be turned."""


@pytest.mark.parametrize("name", ALL)
def test_fragments_compute_the_same(name: str) -> None:
    """Every kind of axis of parts of many networks; half of them can be turned somewhere."""
    proto = ALL[name].build()
    model = ir.from_proto(proto)
    if not rotated(model, kinds=KINDS).changed:
        assert name not in TURNED
        return
    given = feeds(proto)
    want = runtime.session(ir.from_proto(proto), optimise=False, threads=1).run(given)
    got = runtime.session(model, optimise=False, threads=1).run(given)
    for key, array in want.items():
        np.testing.assert_allclose(got[key], array, rtol=1e-3, atol=1e-4 * max(1, np.abs(array).max()))


BETWEEN = {
    "n = LayerNormalization(p, g) y = MatMul(n, w)": "its mean is taken, which a rotation changes",
    "n = Sigmoid(p) y = MatMul(n, w)": "Sigmoid may see the basis that it is in",
    "n = Mul(p, p) y = MatMul(n, w)": "two values are combined by Mul channel by channel",
    "n = RMSNormalization(p, g) a = Add(n, p) y = MatMul(a, w)": "a gain is on the way to Add",
    "n = Add(p, one) y = MatMul(n, w)": "the same value is added to all of its channels",
    "n = ReduceMean<keepdims=1>(p, last) a = MatMul(p, w) y = Add(a, n)": "its mean is taken, which a rotation changes",
    "n = Max(p, one) y = MatMul(n, w)": "Max may see the basis that it is in",
    "n = Where(mask, p, zero) y = MatMul(n, w)": "some of its channels are masked",
}


@pytest.mark.parametrize("body", BETWEEN)
def test_what_sees_its_basis_is_not_turned(body: str) -> None:
    constants = {
        "g": np.exp(normal(16)),
        "one": np.ones((), np.float32),
        "zero": np.zeros((), np.float32),
        "last": np.array([-1]),
        "mask": normal(16) > 0,
    }
    used = {name: array for name, array in constants.items() if name in body.replace("(", " ").replace(")", ",")}
    used = {name: array for name, array in used.items() if f" {name}," in body.replace(")", ",").replace("(", " ")}
    model = build(
        f"p = MatMul(x, v) {body}",
        "float[N,8] x",
        "float[N,6] y",
        opset=23,
        v=normal(8, 16),
        w=normal(16, 6),
        **used,
    )
    before = held(model, "w").copy()
    result = rotated(model, kinds=KINDS)
    assert BETWEEN[body] in reasons(result)
    assert np.array_equal(held(model, "w"), before)


def test_weights_that_are_quantized_already_stay() -> None:
    model = decoder()
    Quantize(least=0, include=("up",)).run(model, CONTEXT)
    assert "a weight along it is quantized already" in reasons(rotated(model))


def test_axes_of_the_interface_stay() -> None:
    model = build("y = MatMul(x, w)", "float[N,8] x", "float[N,16] y", w=normal(8, 16))
    result = rotated(model)
    assert not result.changed and reasons(result) == {"there is no residual stream with RMS normalisation"}


def test_few_bits_lose_less_where_single_channels_are_large() -> None:
    """A channel of the stream is small, and its rows in what reads it are large: they take the whole range."""
    t, q, up = normal(50, 24), normal(4, 24), normal(24, 40)
    t[:, 3], q[:, 3], up[3] = t[:, 3] / 30, q[:, 3] / 30, up[3] * 30
    errors = []
    for turned in (False, True):
        model = decoder(t=t, q=q, up=up)
        want = run(model, i=IDS)["y"]
        if turned:
            rotated(model)
        Quantize(bits=4, include=("up",), least=0).run(model, CONTEXT)
        errors.append(float(np.square(run(model, i=IDS)["y"] - want).sum()))
    assert errors[1] < 0.3 * errors[0]


def test_a_real_mixture_of_experts(tmp_path: Path) -> None:
    report = pipeline.optimize(
        DATA / "tiny_mixtral_bytes.onnx", tmp_path / "o.onnx", recipe="simplify,rotate", measure=False, cache=False
    )
    (done,) = [each for each in report.passes if each.name == "rotate"]
    assert "width of 128 turned" in done.changes and not done.rolled_back
    assert done.changes[0].startswith("gain folded into weights")


def test_a_gain_that_became_a_matrix_is_not_quantized() -> None:
    """It is known by what it is, a symmetric matrix behind a normalisation, whatever it is called."""
    reason = "it is the gain of a normalisation, turned by rotate: few weights, through which all that follows goes"
    model = decoder()
    rotated(model)
    (gain,) = [value for name, value in model.graph.initializers.items() if name.endswith(".turned")]
    gain.name = "anything"
    result = Quantize(least=0).run(model, CONTEXT)
    assert reason in {refusal.reason for refusal in result.refusals} and gain.dtype == ir.DataType.FLOAT
    assert result.changes == ["weight stored in int8 (×3)"]
    plain = decoder()
    plain.graph.initializers["up"].const_value = ir.tensor(normal(24, 40))
    assert reason not in {refusal.reason for refusal in Quantize(least=0).run(plain, CONTEXT).refusals}
    square = build(
        "f = RMSNormalization(x, g) y = MatMul(f, w)", "float[N,8] x", "float[N,8] y", 23, g=normal(8), w=normal(8, 8)
    )
    assert reason not in {refusal.reason for refusal in Quantize(least=0).run(square, CONTEXT).refusals}
