"""GPTQ by what the loss makes of rows: the weighted Gram matrix against plain numpy, and what it is good for."""

from __future__ import annotations

import numpy as np
import pytest

from graphc import contraction
from graphc.collection import Collector
from graphc.errors import BadInput
from graphc.stats import GuidedGramOf
from tests.quantized_models import build, context, held, normal, quantized, run

pytest.importorskip("torch")


def mixed(rows: int, seed: int) -> np.ndarray:
    """Rows of two kinds that lie in two spaces; those of the second kind, one in eight, have a one in front."""
    kind = np.arange(rows) % 8 == 0
    spaces = [normal(8, 64, seed=100 + i) for i in range(2)]
    parts = normal(rows, 8, seed=seed)
    x = np.where(kind[:, None], parts @ spaces[1], 5 * parts @ spaces[0])
    x[:, 0] = kind
    return x.astype(np.float32)


def test_rows_weigh_as_much_as_the_loss_is_steep_in_them() -> None:
    """The loss without labels is half the mean square of all outputs, whose gradient is known."""
    model = build("h = MatMul(x, w) y = Relu(h)", "float[N,M,16] x", "float[N,M,8] y", w=normal(16, 8))
    use = contraction.of(model.graph[0])
    assert isinstance(use, contraction.Contraction) and use.guided_gram is not None
    samples = [{"x": normal(2, 5, 16, seed=i)} for i in range(3)]
    got = Collector(samples).collect(model, [use.guided_gram, use.gram])
    want = np.zeros((16, 16))
    for sample in samples:
        x = sample["x"].reshape(-1, 16).astype(np.float64)
        slope = np.maximum(x @ held(model, "w"), 0) / 80
        want += np.einsum("r,ri,rj->ij", np.square(slope * 10).mean(axis=1), x, x)
    np.testing.assert_allclose(got[use.guided_gram].products, want, rtol=1e-4, atol=1e-6 * want.max())
    assert not np.allclose(got[use.gram].products, want)


def test_padding_does_not_count_and_convolutions_are_not_guided() -> None:
    request = GuidedGramOf("x", "h")
    from graphc.stats import Valid

    x, slope = normal(1, 4, 6), normal(1, 4, 3, seed=1)
    valid = np.array([[True, True, False, False]])
    some = request.of([x, slope], Valid(valid)).products
    assert np.linalg.matrix_rank(some, tol=1e-5 * some.max()) == 2
    model = build("y = Conv(x, w)", "float[N,4,8,8] x", "float[N,4,8,8] y", w=normal(4, 4, 1, 1))
    use = contraction.of(model.graph[0])
    assert isinstance(use, contraction.Contraction) and use.guided_gram is None


@pytest.mark.parametrize("rounding", ["gptq", "awp"])
def test_the_loss_rises_less(rounding: str) -> None:
    """Most rows come to nothing."""
    gate = np.eye(64, 1, dtype=np.float32)
    text = "h = MatMul(x, w) g = MatMul(x, gate) y = Mul(h, g)"
    model = build(text, "float[N,64] x", "float[N,16] y", w=normal(64, 16), gate=gate)
    samples = [{"x": mixed(512, seed)} for seed in range(3)]
    losses = {}
    for guide in ("inputs", "loss"):
        one = model.clone()
        quantized(one, context(samples), bits=3, rounding=rounding, guide=guide, include=("w",))
        test = mixed(512, 9)
        losses[guide] = float(np.square(run(one, x=test)["y"] - run(model, x=test)["y"]).sum())
    assert losses["loss"] < 0.7 * losses["inputs"]


def test_errors_of_outputs_make_up_for_each_other() -> None:
    """What the outputs become lies in a space of six dimensions."""
    text = "h = MatMul(x, w) y = MatMul(h, v)"
    weights = {"w": normal(48, 24), "v": normal(24, 6, seed=1)}
    model = build(text, "float[N,48] x", "float[N,6] y", **weights)
    samples = [{"x": normal(512, 48, seed=seed)} for seed in range(3)]
    losses = {}
    for guide in ("loss", "curvature"):
        one = model.clone()
        options = {"bits": 4, "block": 16, "symmetric": False, "rounding": "gptq", "refine": 1, "include": ("w",)}
        quantized(one, context(samples), guide=guide, **options)
        x = normal(512, 48, seed=9)
        losses[guide] = float(np.square(run(one, x=x)["y"] - run(model, x=x)["y"]).sum())
    assert losses["curvature"] < 0.6 * losses["loss"]


def test_bits_go_where_the_loss_is_steep() -> None:
    """Two layers alike, of which one hardly counts; both do by their own outputs."""
    one, two, small = normal(64, 64), normal(64, 64, seed=1), np.array(0.01, np.float32)
    text = "a = MatMul(x, one) b = MatMul(x, two) c = Mul(b, small) y = Add(a, c)"
    for order in ("one", "two"):
        held_ = {"one": one, "two": two} if order == "one" else {"one": two, "two": one}
        model = build(text, "float[N,64] x", "float[N,64] y", small=small, **held_)
        samples = [{"x": normal(32, 64, seed=i)} for i in range(2)]
        quantized(model, context(samples), budget=6.6, choices=(4, 8), sensitivity="loss")
        kinds = [model.graph.initializers[name].dtype.name for name in ("one", "two")]
        assert kinds == ["INT8", "INT4"]


def test_convolutions_cannot_be_compared_by_the_loss() -> None:
    model = build("y = Conv(x, w)", "float[N,64,8,8] x", "float[N,64,8,8] y", w=normal(64, 64, 1, 1))
    with pytest.raises(BadInput, match="products of matrices"):
        quantized(model, context([{"x": normal(2, 64, 8, 8)}]), budget=5, choices=(4, 8), sensitivity="loss")
