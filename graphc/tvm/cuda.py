"""Compiles for CUDA, with or without a GPU at hand."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import inspect
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from graphc.environment import to_install
from graphc.errors import BadInput
from graphc.tvm import install

RUNTIME = "libtvm_runtime_cuda.so"

_MAGIC, _ENTRY, _PTX = 0xBA55ED50, 28, 1
"""Of a fat binary: its first word, where an entry has its architecture, and the kind of an entry that is PTX."""


def architectures(names: Sequence[str]) -> tuple[str, ...]:
    """The numbers of architectures, ``"80"`` for ``"sm_80"``.

    Raises:
        BadInput: One is no architecture, or one of which TVM would not use the tensor cores.
    """
    if not names:
        raise BadInput("no architecture to compile for", hint="e.g. arch=[sm_80,sm_90]")
    for name in names:
        if re.fullmatch(r"sm_\d+[a-z]", name):
            raise BadInput(
                f"'{name}' turns tensor cores off",
                why="TVM knows the matrix instructions of the plain architectures only",
                hint=f"arch={name[:-1]}",
            )
        if not re.fullmatch(r"sm_\d+", name):
            raise BadInput(f"'{name}' is no CUDA architecture", hint="e.g. sm_80 or sm_90")
    return tuple(name.removeprefix("sm_") for name in names)


def nvcc() -> str:
    """CUDA's compiler.

    Raises:
        BadInput: It is not there.
    """
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    found = shutil.which("nvcc") or next((p for h in homes if (p := shutil.which("nvcc", path=f"{h}/bin"))), None)
    if found is None:
        raise BadInput(
            "CUDA's compiler nvcc is not there",
            why="without it, TVM would ship source code that is compiled where it runs",
            hint="install the CUDA toolkit, and put nvcc on PATH or set CUDA_HOME",
        )
    return found


@cache
def driver() -> bool:
    """Whether there is a CUDA driver on this machine; asked once, before anything stands in for it."""
    try:
        ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


@cache
def prepare(archs: tuple[str, ...]) -> None:
    """Make TVM compile CUDA code for some architectures, into one fat binary with PTX for later ones.

    Raises:
        BadInput: The compiler or TVM's CUDA library is missing.
    """
    tvm_ffi: Any = importlib.import_module("tvm_ffi")

    compiler = nvcc()
    library = install.library(RUNTIME)
    if library is None:
        raise BadInput("the installed TVM has no CUDA", why=f"{RUNTIME} is missing", hint=to_install("tvm"))
    if not driver():
        _stand_in(library)
    try:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise BadInput(
            "TVM's CUDA library cannot be loaded", why=str(error), hint="install the CUDA toolkit that it names"
        ) from None
    for_each = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    for_later = f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"

    def compiled(code: str) -> bytes:
        with tempfile.TemporaryDirectory(prefix="graphc-") as folder:
            source, binary = Path(folder, "kernels.cu"), Path(folder, "kernels.fatbin")
            source.write_text(code, encoding="utf-8")
            command = [compiler, "--fatbin", "-O3", *for_each, for_later, "-o", str(binary), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
            found = binary.read_bytes()
        wanted = {("sm", int(a)) for a in archs} | {("ptx", int(archs[-1]))}
        if wanted - set(contents(found)):
            raise RuntimeError(f"nvcc left out {sorted(wanted - set(contents(found)))}")
        return found

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", compiled, override=True)


def contents(binary: bytes) -> list[tuple[str, int]]:
    """What the fat binaries in some bytes hold: ``("sm", 80)`` for machine code, ``("ptx", 90)`` for PTX."""
    found = []
    start = binary.find(struct.pack("<I", _MAGIC))
    while start >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", binary, start)
        place, end = start + header, start + header + size
        while place + _ENTRY + 4 <= end:
            kind, _, own, length = struct.unpack_from("<HHIQ", binary, place)
            (arch,) = struct.unpack_from("<I", binary, place + _ENTRY)
            found.append(("ptx" if kind == _PTX else "sm", arch))
            place += own + length
        start = binary.find(struct.pack("<I", _MAGIC), end)
    return found


def schedule(module: Any, target: Any) -> Any:
    """Bind the loops of every function to blocks and threads, with tensor cores where its dtypes allow."""
    from tvm.s_tir import dlight

    with _quick_stacks():
        importlib.import_module("tvm.s_tir.tensor_intrin")
    gpu = dlight.gpu
    with target:
        rules = (gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback())
        return dlight.ApplyDefaultSchedule(*rules)(module)


@contextlib.contextmanager
def _quick_stacks() -> Iterator[None]:
    """Let the stack be listed without its source lines: TVM lists it for each of its functions, for a minute in all."""

    def listed(frame: Any, context: int = 1) -> list[inspect.FrameInfo]:
        found = []
        while frame is not None:
            code = frame.f_code
            found.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None))
            frame = frame.f_back
        return found

    theirs = inspect.stack, inspect.getouterframes
    inspect.stack = lambda context=1: listed(inspect.currentframe().f_back)  # type: ignore[union-attr]
    inspect.getouterframes = listed
    try:
        yield
    finally:
        inspect.stack, inspect.getouterframes = theirs


def _stand_in(library: Path) -> None:
    """Load an empty ``libcuda.so.1``, so that TVM's CUDA library loads where there is no driver."""
    symbols = _driver_symbols(library)
    with tempfile.TemporaryDirectory(prefix="graphc-") as folder:
        source, made = Path(folder, "stub.c"), Path(folder, "libcuda.so.1")
        # 100 is CUDA_ERROR_NO_DEVICE.
        source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in symbols), encoding="utf-8")
        command = [install.compiler(), "-x", "c", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*command, "-o", str(made), str(source)], check=True, capture_output=True)
        ctypes.CDLL(str(made), ctypes.RTLD_GLOBAL)


def _driver_symbols(library: Path) -> list[str]:
    """The functions of the CUDA driver that a library names."""
    names = re.findall(rb"\x00(cu[A-Z][A-Za-z]+(?:_v\d)?)(?=\x00)", library.read_bytes())
    return sorted({name.decode() for name in names})
