"""Random graphs with random options of ``quantize``: what comes out runs and is near, or it is refused."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st

from graphc import edit, runtime, shapes
from graphc.errors import BadInput
from graphc.passes.quantize import Quantize
from tests.quantized_models import context, run
from tests.test_random_graphs import BATCHES, Builder, feeds

OPTIONS = {
    "bits": st.sampled_from([8, 4, 3]),
    "block": st.sampled_from([0, 16, -1]),
    "symmetric": st.booleans(),
    "rounding": st.sampled_from(["nearest", "gptq", "awp"]),
    "clip": st.sampled_from(["none", "mse"]),
    "scaling": st.sampled_from(["none", "smooth", "awq", "channels", "flatten"]),
    "correct": st.booleans(),
    "activations": st.sampled_from(["minmax", "auto", "entropy"]),
    "refine": st.sampled_from([0, 1]),
    "keep": st.sampled_from([0, 1]),
    "full_range": st.booleans(),
}
SCHEMES = st.fixed_dictionaries({"scheme": st.sampled_from(["weights", "dynamic", "static"])}, optional=OPTIONS)
NEAR = 0.6
"""The relative error of 8 bits that only a defect exceeds, in graphs of few channels whose values may cancel."""
FAR = 3.0
"""The same of fewer bits."""


def check(data: st.DataObject) -> None:
    model = Builder(data).model(steps=10)
    for i, node in enumerate(edit.nodes(model)):
        node.name = node.name or f"n{i}"
    shapes.infer(model)
    samples = [feeds(batch) for batch in BATCHES]
    try:
        wanted = [run(model, **each) for each in samples]
    except runtime.CannotRun:
        reject()  # without optimisation, too, ONNX Runtime drops Casts that only subgraphs read
    options: dict[str, Any] = data.draw(SCHEMES)
    try:
        each = Quantize(**{"least": 0, **options})
    except BadInput:
        reject()
    after: ir.Model = model.clone()
    if not each.run(after, context(samples)).changed:
        return
    allowed = FAR if options.get("bits", 8) < 8 else NEAR
    for optimise in (False, True):
        for inputs, want in zip(samples, wanted, strict=True):
            found = run(after, optimise, **inputs)
            assert list(found) == list(want)
            for name, array in want.items():
                assert found[name].shape == array.shape and found[name].dtype == array.dtype
                size = np.linalg.norm(array.astype(np.float64))
                if np.isfinite(size) and size > 0.01 * np.sqrt(array.size):
                    assert np.linalg.norm(found[name].astype(np.float64) - array) <= allowed * size, name


_QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example, HealthCheck.filter_too_much]


@settings(max_examples=15, derandomize=True, deadline=None, suppress_health_check=_QUIET)
@given(st.data())
def test_random_graphs_quantize(data: st.DataObject) -> None:
    check(data)


@pytest.mark.slow
@settings(
    max_examples=int(os.environ.get("GRAPHC_EXAMPLES", "150")),
    derandomize="GRAPHC_EXAMPLES" not in os.environ,  # whoever asks for a number searches; a plain run repeats
    deadline=None,
    suppress_health_check=_QUIET,
    phases=[Phase.generate],  # shrinking such graphs takes many minutes
)
@given(st.data())
def test_many_random_graphs_quantize(data: st.DataObject) -> None:
    check(data)
