"""ONNX's own tests of the operators, written out as the functions that define them, must be recognised again."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphc.passes.fuse import Fuse
from graphc.passes.recognise import Recognise
from graphc.passes.simplify import Simplify
from tests.recognised_models import CONTEXT
from tests.small_models import operators, run

OPERATORS = {
    "test_rms_normalization": "RMSNormalization",
    "test_layer_normalization": "LayerNormalization",
    "test_rotary_embedding": "RotaryEmbedding",
    "test_gelu": "Gelu",
    "test_attention": "Attention",
}
LEFT = {
    "qk_matmul": "the scores are an output",
    "bf16": "no kernel",
    "gqa_rank4_mask": "opset 26",
}


def cases() -> list[Any]:
    """Those of opsets up to 24, with the first output alone where the others are statistics."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        return [
            case
            for case in collect_testcases(None)
            if "_expanded" in case.name
            and any(case.name.startswith(name) for name in OPERATORS)
            and not any(word in case.name for word in LEFT)
            and case.model.opset_import[0].version <= 24
        ]


@pytest.mark.slow
@pytest.mark.parametrize("start", OPERATORS)
def test_the_function_of_an_operator_is_recognised(start: str) -> None:
    found = [case for case in cases() if case.name.startswith(start)]
    assert len(found) > 3
    for case in found:
        model = ir.from_proto(case.model)
        if start == "test_layer_normalization":
            while len(model.graph.outputs) > 1:
                model.graph.outputs.pop()
        for each in (Simplify(), Fuse(skip=("elementwise", "layer-norm")), Simplify()):
            each.run(model, CONTEXT)
        before = model.clone()
        Recognise().run(model, CONTEXT)
        assert OPERATORS[start] in operators(model), case.name
        assert "Softmax" not in operators(model), case.name
        inputs, _ = case.data_sets[0]
        named = {v.name: np.asarray(x) for v, x in zip(model.graph.inputs, inputs, strict=True)}
        wanted, after = run(before, named), run(model, named)
        for name, array in wanted.items():
            atol = 32 * float(np.finfo(array.dtype).eps) * (1 + float(np.abs(array).max()))
            np.testing.assert_allclose(after[name], array, rtol=0, atol=atol, err_msg=case.name)
