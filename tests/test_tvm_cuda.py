"""CUDA artifacts, compiled and looked into without a GPU: packed weights, tensor cores, and no source code instead."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from graphc.contract import no_progress
from graphc.errors import BadInput
from tests.test_pack import model as tiled
from tests.test_pack import sparse
from tests.test_tvm_packed import SIGNED, quantized
from tests.test_tvm_recurrent import layer


@pytest.fixture
def kernels(tvm: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The CUDA code of all that is compiled."""
    from graphc.tvm import cuda

    try:
        cuda.nvcc()
    except BadInput:
        pytest.skip("no nvcc: the CUDA toolkit is not installed")
    found: list[str] = []
    really = subprocess.run

    def seen(command: list[str], **more: Any) -> Any:
        if str(command[-1]).endswith(".cu"):
            found.append(Path(command[-1]).read_text())
        return really(command, **more)

    monkeypatch.setattr(subprocess, "run", seen)
    yield found


def build(model: ir.Model, folder: Path, *arch: str) -> bytes:
    """The library that a model becomes."""
    from graphc.tvm import emit, targets, tune

    folder.mkdir(exist_ok=True)
    emit.emit(model, folder, targets.resolve("cuda", 1, arch), (), tune.Budget(), no_progress)
    return (folder / "model.so").read_bytes()


def decoders(source: str) -> list[str]:
    """The kernels that read codes."""
    bodies = [part for part in source.split("__global__") if ") {" in part]
    found = [part for part in bodies if "int*" in part.partition(") {")[0]]
    assert all("long" not in part.replace("int64_t", "") for part in found), "codes are not read as wider numbers"
    return found


def half(rows: int) -> ir.Model:
    head = f"(float[1,{rows},256] x) => (float y)"
    return quantized("y = MatMul(x, w)", head, (256, 128), dtype=SIGNED[4], axis=0, block=32, half=True)


@pytest.mark.slow
def test_codes_stay_packed(kernels: list[str], tmp_path: Path) -> None:
    """Of one row, codes become numbers where they are multiplied: no kernel writes them."""
    from graphc.tvm import cuda

    code = build(half(1), tmp_path / "out", "sm_80")
    assert sorted(cuda.contents(code)) == [("ptx", 80), ("sm", 80)]
    assert b"__global__" not in code, "no source"
    assert (tmp_path / "out" / "weights.bin").stat().st_size == 256 * 128 // 2 + 256 // 32 * 128 * 4
    (row,) = decoders(kernels[0])
    assert "packed_row" in row.partition(") {")[0], "the kernel that multiplies is the one that reads codes"


@pytest.mark.slow
def test_products_of_many_rows_use_tensor_cores(kernels: list[str], tmp_path: Path) -> None:
    build(half(128), tmp_path / "out", "sm_80")
    assert (tmp_path / "out" / "weights.bin").stat().st_size == 256 * 128 // 2 + 256 // 32 * 128 * 4
    assert len(decoders(kernels[0])) == 1
    assert "wmma::mma_sync" in kernels[0] or "mma.sync" in kernels[0]


@pytest.mark.slow
def test_what_has_no_kernel_is_refused(kernels: list[str], tmp_path: Path) -> None:
    from graphc.passes.pack import Pack
    from tests.test_pack import TVM, Context

    with pytest.raises(BadInput, match=r"(?s)no kernel for recurrent layers.*-t onnxruntime"):
        build(layer("LSTM"), tmp_path / "lstm", "sm_80")
    packed = tiled(sparse(96, 64, 16, 1, 0.3))
    assert Pack(tile="16x1", always=True).run(packed, Context(TVM)).changed
    with pytest.raises(BadInput, match=r"(?s)no kernel for block-sparse weights.*pack"):
        build(packed, tmp_path / "sparse", "sm_80")


@pytest.mark.slow
def test_a_compiler_that_fails_is_an_error(kernels: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TVM would put the source code into the artifact."""
    from graphc.tvm import cuda

    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\necho 'no such architecture' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(cuda, "nvcc", lambda: str(broken))
    cuda.prepare.cache_clear()
    try:
        model = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 21]> g (float[4] x) => (float y) {y = Relu(x)}')
        with pytest.raises(BadInput, match=r"(?s)could not compile.*no such architecture"):
            build(model, tmp_path / "out", "sm_80")
    finally:
        cuda.prepare.cache_clear()
    assert not (tmp_path / "out" / "model.so").exists()
