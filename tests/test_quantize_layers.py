"""Layers that stay, bits that layers share, and the gate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphc import pipeline
from graphc.contract import Probe
from graphc.errors import BadInput
from graphc.model import load, save
from graphc.passes.quantize import Quantize
from tests.quantized_models import build, context, held, normal, quantized, reasons


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


def test_what_embeds_patches_has_the_bits_of_embeddings() -> None:
    text = "s = Sub(x, m) p = Conv<strides=[4,4]>(s, w) r = Relu(p) y = Conv(r, v)"
    for embeddings, dtypes in ((8, ("INT8", "INT4")), (4, ("INT4", "INT4")), (0, ("INT4", "INT4"))):
        model = build(
            text,
            "float[N,3,16,16] x",
            "float[N,32,4,4] y",
            m=normal(1, 3, 1, 1),
            w=normal(32, 3, 4, 4),
            v=normal(32, 32, 1, 1),
        )
        quantized(model, bits=4, embeddings=embeddings)
        assert tuple(model.graph.initializers[name].dtype.name for name in "wv") == dtypes
