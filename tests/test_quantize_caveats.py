"""What is said before any work, and what kernels cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphc import runtime
from graphc.cli import main
from graphc.contract import Capabilities, Probe
from graphc.gate import Judge
from graphc.model import save
from graphc.opset.portable import portable
from graphc.passes.quantize import Quantize
from tests.quantized_models import CONTEXT, build, mlp, normal, quantized


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
