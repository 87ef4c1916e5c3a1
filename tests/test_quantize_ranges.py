"""``quantize{scheme=static activations=auto}``: ranges are chosen by what they do to the model's outputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from graphc.cache import Store
from graphc.quantization.ranges import FAR, METHODS
from tests.quantized_models import build, context, normal, pictures, quantized, run

Samples = list[dict[str, np.ndarray]]


def even(count: int = 8) -> Samples:
    """Rows that take all values between two limits alike: nothing can be cut off."""
    return [{"x": np.random.default_rng(i).uniform(-1, 1, (512, 64)).astype(np.float32)} for i in range(count)]


def outlying(count: int = 8) -> Samples:
    """Rows with a channel that is huge now and then, and that nothing depends on."""
    found = [{"x": normal(512, 64, seed=i)} for i in range(count)]
    for sample in found:
        sample["x"][:2, 0] = 1000
    return found


def product(silent: bool) -> tuple[np.ndarray, ...]:
    w = normal(64, 32)
    w[0] *= not silent
    return (w,)


def losses(samples: Samples, silent: bool) -> dict[str, float]:
    """The relative error of the outputs for each way to choose ranges."""
    found = {}
    for method in ("auto", *METHODS):
        (w,) = product(silent)
        model = build("y = MatMul(x, w)", "float[N,64] x", "float[N,32] y", w=w)
        before = run(model, **samples[0])["y"]
        quantized(model, context(samples), scheme="static", activations=method)
        after = run(model, **samples[0])["y"]
        found[method] = float(np.square(after - before).sum() / np.square(before).sum())
    return found


@pytest.mark.parametrize("samples, silent", [(even(), False), (outlying(), True), (outlying(), False)])
def test_auto_is_minmax_or_better_by_far(samples: Samples, silent: bool) -> None:
    found = losses(samples, silent)
    auto = found.pop("auto")
    best = min(found.values())
    assert auto == (best if best < FAR * found["minmax"] else found["minmax"])


def test_outliers_that_nothing_depends_on_are_cut_off() -> None:
    found = losses(outlying(), True)
    assert found["auto"] < found["minmax"] / 4


def test_the_choice_is_told_and_kept(tmp_path: Path) -> None:
    model = build("y = Conv(x, w)", "float[N,3,8,8] x", "float[N,4,6,6] y", w=normal(4, 3, 3, 3))
    ctx = dataclasses.replace(context(pictures()), store=Store(tmp_path))
    (note,) = [n for n in quantized(model.clone(), ctx, scheme="static").notes if "activations=" in n]
    assert all(method in note for method in METHODS)
    again = quantized(model.clone(), dataclasses.replace(ctx, progress=_never), scheme="static")
    assert note in again.notes


def _never(what: str, done: int, total: int) -> None:
    assert what != "choosing ranges", "it was measured again"


def test_what_is_asked_for_is_not_measured() -> None:
    model = build("y = Conv(x, w)", "float[N,3,8,8] x", "float[N,4,6,6] y", w=normal(4, 3, 3, 3))
    ctx = dataclasses.replace(context(pictures()), progress=_never)
    result = quantized(model, ctx, scheme="static", activations="mse")
    assert not [n for n in result.notes if "activations=" in n]
