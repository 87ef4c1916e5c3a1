"""A table that is looked up and multiplied with is stored once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphc import compiled
from tests.small_models import hold
from tests.tvm_models import build, weight

pytestmark = pytest.mark.usefixtures("tvm")

ROWS, DEPTH = 93, 64


def model(body: str, index: str) -> ir.Model:
    """``t`` is a table of random numbers, ``u`` another."""
    head = f"({index} i, float[4,{DEPTH}] x) => (float e, float y)"
    made = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]> g {head} {{ {body} }}')
    if index.endswith("[]"):
        made.graph.inputs[0].shape = ir.Shape(())
    read = {value.name for node in made.graph for value in node.inputs if value is not None}
    tables = {name: weight(name, ROWS, DEPTH, seed=seed).const_value for seed, name in enumerate("tu")}
    return hold(made, **{name: held for name, held in tables.items() if name in read and held is not None})


CASES = {
    "a head of the transposed table": ("e = Gather(t, i)\n f = Transpose(t)\n y = MatMul(x, f)", "int64[2,3]", 1),
    "a Gemm that reads it transposed": ("e = Gather(t, i)\n y = Gemm<transB: int = 1>(x, t)", "int32[5]", 1),
    "one row": ("e = Gather(t, i)\n f = Transpose(t)\n y = MatMul(x, f)", "int64[]", 1),
    "another table": ("e = Gather(u, i)\n f = Transpose(t)\n y = MatMul(x, f)", "int64[5]", 2),
    "columns": ("e = Gather<axis: int = 1>(t, i)\n f = Transpose(t)\n y = MatMul(x, f)", "int64[5]", 2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_tied_table_is_stored_once(case: str, tmp_path: Path) -> None:
    body, index, copies = CASES[case]
    source = model(body, index)
    made = build(source.clone(), tmp_path / "out")
    shape = [int(n) for n in index.partition("[")[2].rstrip("]").split(",") if n]
    given = np.resize(np.array([0, ROWS - 1, -1, -ROWS, 7, 8], index.partition("[")[0]), shape)
    if case == "columns":
        given %= DEPTH
    x = np.random.default_rng(2).standard_normal((4, DEPTH)).astype(np.float32)
    verdict = compiled.compare(source, made, data=[{"i": given, "x": x}])
    assert verdict.checked and verdict.ok, verdict.why
    table = -(-ROWS // 8) * 8 * DEPTH * 4
    assert (copies - 1) * table < (tmp_path / "out" / "weights.bin").stat().st_size <= copies * table
