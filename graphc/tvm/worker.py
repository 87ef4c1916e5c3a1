"""What runs in the process that :mod:`graphc.tvm.contain` starts: ``python -m graphc.tvm.worker FOLDER``."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from graphc.contract import Progress
from graphc.errors import GraphcError
from graphc.tvm import contain, emit, targets, tune


def main(job: Path) -> int:
    """Compile what ``job.json`` describes; write ``result.json``, or ``error.json`` if the user can act on it."""
    progress = connected()
    settings = json.loads((job / "job.json").read_text(encoding="utf-8"))
    try:
        target = targets.resolve(settings["target"], settings["threads"], settings["arch"])
        model = ir.from_proto(onnx.load(job / "model.onnx", load_external_data=False))
        with _watched(job / "pass"):
            amount, where = (settings["seconds"], settings["trials"]), (settings["tracker"], settings["key"])
            budget = tune.Budget(*amount, job / contain.JOURNAL, *where)
            needs = emit.emit(model, Path(settings["folder"]), target, settings["shapes"], budget, progress)
    except GraphcError as error:
        said = {"what": error.what, "where": error.where, "why": error.why, "hint": error.hint}
        (job / "error.json").write_text(json.dumps(said), encoding="utf-8")
        return int(error.exit_code)
    (job / "result.json").write_text(json.dumps(needs), encoding="utf-8")
    return 0


def connected() -> Progress:
    """Make this process end with its parent; what is returned tells the parent what it is doing."""
    # What the compiler prints goes to the log, as all that it writes to standard error.
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def progress(what: str, done: int, total: int) -> None:
        print(json.dumps([what, done, total]), file=pipe, flush=True)

    return progress


def _end_with_parent() -> None:
    """Wait for the end of the process that holds the other end of standard input, and end with all children then."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def _watched(path: Path) -> Any:
    """A pass context that keeps the name of the pass that is running in a file, in case it is the last."""
    import tvm

    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)

    class Watch:
        def run_before_pass(self, module: Any, info: Any) -> None:
            os.pwrite(file, f"{info.name!s:80.80}".encode(), 0)

    return tvm.transform.PassContext(instruments=[tvm.ir.instrument.pass_instrument(Watch)()])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
