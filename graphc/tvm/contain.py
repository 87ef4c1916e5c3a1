"""Compiles in a process of its own: where TVM crashes, the user is told so, and nothing else ends with it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphc import edit
from graphc.contract import Progress
from graphc.errors import BadInput
from graphc.storage.tensors import write_tensor
from graphc.tvm.importer import WEIGHT
from graphc.tvm.tune import Budget, blame

WORKER = "graphc.tvm.worker"
"""The module that the process runs."""

JOURNAL = "measuring"
"""The file of a job that names the loops that are being measured."""

_CRASHES = 5
"""How often loops may end the process that measures them."""

_ALIGNMENT = 64
"""Bytes to which weights that are handed over are aligned."""


def emit(
    model: ir.Model,
    folder: Path,
    target: str,
    threads: int,
    arch: Sequence[str],
    shapes: Sequence[str],
    budget: Budget,
    progress: Progress,
) -> Mapping[str, Any]:
    """:func:`graphc.tvm.emit.emit` in a child process; for the first five, see ``graphc.tvm.targets.resolve``.

    Temporary files are made beside ``folder``, and removed whatever happens; the child ends with this process.

    Raises:
        BadInput: As there, or the child crashed.
    """
    with tempfile.TemporaryDirectory(prefix="graphc-", dir=folder.absolute().parent) as made:
        job = Path(made)
        hand_over(model, job / "model.onnx")
        settings = {
            "folder": str(folder.absolute()),
            "target": target,
            "threads": threads,
            "arch": list(arch),
            "shapes": list(shapes),
            "seconds": budget.seconds,
            "trials": budget.trials,
            "tracker": budget.tracker,
            "key": budget.key,
        }
        (job / "job.json").write_text(json.dumps(settings), encoding="utf-8")
        code, doing = run(job, progress, WORKER)
        for _ in range(_CRASHES):
            # Loops that crash are not measured again, and what is known of others is not lost.
            if code >= 0 or -code == signal.SIGKILL or not blame(job / JOURNAL):
                break
            code, doing = run(job, progress, WORKER)
        if (job / "error.json").is_file():
            raise BadInput(**json.loads((job / "error.json").read_text(encoding="utf-8")))
        if code:
            raise _failure(job, code, doing)
        needs: Mapping[str, Any] = json.loads((job / "result.json").read_text(encoding="utf-8"))
        return needs


def hand_over(model: ir.Model, path: Path) -> None:
    """Write a model for a process on this machine: weights that are in files stay there, and are mapped again.

    Args:
        model: It is not changed.
        path: The ONNX file; other large weights go to a file beside it. Locations are absolute.
    """
    copy, data = model.clone(), path.with_suffix(".data")
    with data.open("wb") as file:
        for graph in edit.graphs(copy):
            for value in graph.initializers.values():
                held = value.const_value
                if held is None or held.size < WEIGHT or held.dtype == ir.DataType.STRING:
                    continue
                if isinstance(held, ir.ExternalTensor):
                    place, offset, length = Path(held.path).absolute(), held.offset, held.length
                else:
                    place, offset = data, -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
                    file.seek(offset)
                    write_tensor(held, file)
                    length = file.tell() - offset
                value.const_value = ir.ExternalTensor(
                    str(place), offset, length, held.dtype, shape=ir.Shape(held.shape.numpy()), name=value.name or ""
                )
    path.write_bytes(ir.to_proto(copy).SerializeToString(deterministic=True))


def run(job: Path, progress: Progress, worker: str) -> tuple[int, str]:
    """Run a worker to its end: its exit code, or minus the signal, and what it was doing last."""
    path = os.pathsep.join(place or str(Path.cwd()) for place in sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(job)}
    doing = "compiling"
    with (job / "log").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", worker, str(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            # A group of its own, so that compilers that it has started end with it.
            start_new_session=True,
        )
        try:
            assert child.stdout is not None
            for line in child.stdout:
                with contextlib.suppress(ValueError):
                    doing, done, total = json.loads(line)
                    progress(doing, done, total)
            return child.wait(), doing
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            # Closes its pipes, too.
            child.communicate()


def _failure(job: Path, code: int, doing: str) -> BadInput:
    report = "please report this as a defect of graphc, with the model if you may"
    lines = (job / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if code > 0:
        why = lines[-1][:300] if lines else f"exit code {code}"
        return BadInput("the process that compiles with TVM failed", where=doing, why=why, hint=report)
    running = (job / "pass").read_text(encoding="utf-8").strip() if (job / "pass").is_file() else ""
    where = f"while {doing}" + (f"; the last of its passes was {running}" if running else "")
    name = next((known.name for known in signal.Signals if known == -code), str(-code))
    if -code == signal.SIGKILL:
        return BadInput(
            "the process that compiles with TVM was killed",
            where=where,
            why="memory has probably run out",
            hint="compile where there is more memory, or use -t onnxruntime",
        )
    tuning = "leave --tune and --trials out, or use " if doing.startswith("measuring") else ""
    return BadInput(
        f"TVM itself crashed (signal {name}) while {doing}",
        where=f"TVM's pass {running}" if running else "",
        hint=f"{tuning}-t onnxruntime; {report}",
    )
