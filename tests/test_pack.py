"""Weights as the tiles of them that are not zero."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphc import compiled, edit, pipeline, runtime
from graphc.contract import Capabilities, Context, Probe
from graphc.errors import BadInput
from graphc.passes.pack import Pack
from graphc.passes.simplify import Simplify
from graphc.recipe import parse_backend
from graphc.tiles import Tiled
from graphc.tvm import emit
from tests.tvm_models import build, text

Array = np.ndarray[Any, np.dtype[Any]]
TVM = Capabilities("tvm", max_ir=10, max_opset={"": 21})


def sparse(outputs: int, depth: int, high: int, deep: int, kept: float, seed: int = 0) -> Array:
    """A matrix ``(outputs, depth)`` of which some tiles are not zero."""
    rng = np.random.default_rng(seed)
    keep = rng.random((outputs // high, depth // deep)) < kept
    mask = np.repeat(np.repeat(keep, high, axis=0), deep, axis=1)
    return (rng.standard_normal((outputs, depth)) * mask / np.sqrt(depth)).astype(np.float32)


def model(matrix: Array, *, gemm: bool = False, rows: str = "6") -> ir.Model:
    """Rows times the matrix, which lies as a MatMul or, with a bias, as a Gemm with transB reads it."""
    body = "h = Gemm<transB: int = 1>(x, w, b)" if gemm else "h = MatMul(x, w)"
    made = text(f"{body}\n y = Relu(h)", f"(float[{rows},{matrix.shape[1]}] x) => (float y)")
    node = made.graph.node(0)
    weight = np.ascontiguousarray(matrix if gemm else matrix.T)
    node.replace_input_with(1, edit.initializer(made.graph, weight, "w"))
    if gemm:
        node.replace_input_with(2, edit.initializer(made.graph, np.arange(len(matrix), dtype=np.float32), "b"))
    return made


def timer(ratio: float) -> Any:
    def time(probes: Sequence[Probe]) -> Mapping[str, float]:
        return {probe.signature: ratio for probe in probes}

    return time


@given(
    st.sampled_from([(1, 4), (4, 4), (8, 1), (2, 3)]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.floats(0, 1),
    st.booleans(),
    st.integers(0, 99),
)
def test_tiles_are_the_weight(
    tile: tuple[int, int], rows: int, columns: int, kept: float, turned: bool, seed: int
) -> None:
    matrix = sparse(tile[0] * rows, tile[1] * columns, *tile, kept, seed)
    tiled = Tiled.of(matrix, *tile, turned=turned)
    np.testing.assert_array_equal(tiled.dense(), matrix.T if turned else matrix)
    assert tiled.values.any(axis=(1, 2)).all() or not matrix.any()


@pytest.mark.parametrize("gemm", [False, True])
def test_the_function_is_the_weight_in_any_runtime(gemm: bool) -> None:
    before = model(sparse(48, 32, 16, 1, 0.3), gemm=gemm)
    after = before.clone()
    result = Pack(always=True).run(after, Context(TVM))
    assert result.changes == ["weight stored as tiles of 16x1"]
    feeds = {"x": np.random.default_rng(1).standard_normal((6, 32)).astype(np.float32)}
    wanted = runtime.session(before, optimise=False).run(feeds)["y"]
    np.testing.assert_array_equal(runtime.session(after, optimise=False).run(feeds)["y"], wanted)
    # It survives what inlines functions, and what is behind it keeps its shape.
    Simplify().run(after, Context(TVM))
    assert [node.op_type for node in after.graph] == ["TiledWeight", "Gemm" if gemm else "MatMul", "Relu"]
    assert after.graph.node(1).outputs[0].shape == (6, 48)
    np.testing.assert_array_equal(runtime.session(after, optimise=False).run(feeds)["y"], wanted)


@pytest.mark.parametrize("tile", [(16, 1), (8, 8), (4, 4), (1, 16)])
def test_auto_finds_the_tiles(tile: tuple[int, int]) -> None:
    packed = model(sparse(64, 64, *tile, 0.3))
    assert Pack(always=True).run(packed, Context(TVM)).changes == [f"weight stored as tiles of {tile[0]}x{tile[1]}"]


@pytest.mark.parametrize(
    ("matrix", "options", "reason"),
    [
        (np.ones((48, 32), np.float32), {}, "few of its weights are zero"),
        (np.eye(48, dtype=np.float32), {"tile": "48x48"}, "its zeros fill no tiles"),
        (sparse(48, 32, 16, 1, 0.3), {"tile": "7x7"}, "its zeros fill no tiles"),
        (sparse(48, 32, 16, 1, 0.3).astype(np.float16), {}, "it is not float32"),
    ],
)
def test_what_does_not_pay_is_refused(matrix: Array, options: dict[str, Any], reason: str) -> None:
    plain = model(matrix)
    result = Pack(always=True, **options).run(plain, Context(TVM))
    assert not result.changed and [refusal.reason for refusal in result.refusals] == [reason]


@pytest.mark.parametrize(("ratio", "packed"), [(0.5, True), (1.2, False)])
def test_a_measured_time_decides(ratio: float, packed: bool) -> None:
    each = model(sparse(48, 32, 16, 1, 0.3))
    result = Pack().run(each, Context(TVM, time=timer(ratio)))
    assert result.changed == packed
    if not packed:
        assert [refusal.reason for refusal in result.refusals] == ["tiles take 1.20 of the time of the dense product"]


def test_without_a_timer_nothing_is_packed() -> None:
    result = Pack().run(model(sparse(48, 32, 16, 1, 0.3)), Context(TVM))
    assert [refusal.reason for refusal in result.refusals] == ["nothing can be timed here"]


def test_onnx_runtime_is_refused_before_any_work(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    ir.save(model(sparse(48, 32, 16, 1, 0.3)), path)
    report = pipeline.optimize(path, tmp_path / "out.onnx", recipe="pack", measure=False)
    assert any("pack does nothing here: ONNX Runtime has no kernel" in warning for warning in report.warnings)
    assert "no kernel for block-sparse" in report.passes[-1].refusals[0].reason


def test_a_tile_that_is_none_is_refused() -> None:
    for tile in ("16", "free", "2:4"):
        with pytest.raises((ValueError, BadInput)):
            Pack(tile=tile)


# --- what needs TVM --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("tile", [(16, 1), (32, 2), (4, 4), (4, 16), (1, 16), (2, 8)])
def test_a_product_reads_tiles(tile: tuple[int, int], rows: int, tvm: None, tmp_path: Path) -> None:
    each = model(sparse(96, 64, *tile, 0.3), gemm=tile == (16, 1), rows=str(rows))
    Pack(tile=f"{tile[0]}x{tile[1]}", always=True).run(each, Context(TVM))
    ((_, _, simple),) = emit.lowered(each.clone(), ())
    assert next(node.op_type for node in simple.graph) == "SparseProduct"
    verdict = compiled.compare(each, build(each.clone(), tmp_path / "out"))
    assert verdict.checked and verdict.ok, verdict.why
    assert (tmp_path / "out" / "weights.bin").stat().st_size < 0.5 * 4 * 96 * 64


def test_what_no_kernel_takes_is_dense(tvm: None, tmp_path: Path) -> None:
    each = model(sparse(90, 60, 6, 3, 0.3))
    assert Pack(tile="6x3", always=True).run(each, Context(TVM)).changed
    ((_, _, simple),) = emit.lowered(each.clone(), ())
    assert [node.op_type for node in simple.graph] == ["MatMul", "Relu"]
    verdict = compiled.compare(each, build(each.clone(), tmp_path / "out"))
    assert verdict.checked and verdict.ok, verdict.why


@pytest.mark.slow
def test_from_sparsify_to_an_artifact(tvm: None, tmp_path: Path) -> None:
    """The real timer: 1024 x 1024 at 10 % is far faster as tiles, on any machine."""
    path, out = tmp_path / "m.onnx", tmp_path / "out"
    rng = np.random.default_rng(0)
    ir.save(model(rng.standard_normal((1024, 1024)).astype(np.float32) / 32, rows="16"), path)
    target = parse_backend("tvm", {"threads": 1, "runtime": False})
    recipe = "sparsify{ratio=0.9 pattern=16x1},pack"
    table = tmp_path / "timings.json"
    report = pipeline.optimize(path, out, recipe=recipe, target=target, measure=False, timings=table)
    assert report.passes[-1].changes == ["weight stored as tiles of 16x1"], report.passes[-1].refusals
    assert (out / "weights.bin").stat().st_size < 0.2 * 4 * 1024 * 1024
    (signature,) = json.loads(table.read_text())["ratios"]
    assert signature == "pack: 16 rows, 1024 x 1024, 10% of the tiles of 16x1"
