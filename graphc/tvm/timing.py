"""Times operators as TVM compiles them: in a process of its own, ``python -m graphc.tvm.timing FOLDER``."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphc.contract import Arrays, Probe, Progress, Runnable, no_progress
from graphc.errors import BadInput, GraphcError


def timer(
    probes: Sequence[Probe], progress: Progress, *, target: str, threads: int
) -> Mapping[str, tuple[float, float]]:
    """Bounds of the ratio after / before for each probe; what does not compile is left out.

    Args:
        probes: Models with static shapes.
        progress: ``progress(what, done, total)``.
        target: See ``graphc.tvm.targets.resolve``; a processor that this machine can stand for.
        threads: See there.
    """
    from graphc.tvm import contain

    with tempfile.TemporaryDirectory(prefix="graphc-") as made:
        job = Path(made)
        for number, probe in enumerate(probes):
            for part, model in (("before", probe.before), ("after", probe.after)):
                contain.hand_over(model, job / f"{number}.{part}.onnx")
            np.savez(job / f"{number}.npz", allow_pickle=False, **probe.inputs)
        (job / "job.json").write_text(json.dumps({"target": target, "threads": threads, "count": len(probes)}))
        contain.run(job, progress, __name__)
        lines = (job / "ratios").read_text().splitlines() if (job / "ratios").is_file() else []
        found = {int(number): (low, high) for number, low, high in map(json.loads, lines)}
        return {probes[number].signature: ratios for number, ratios in found.items()}


class _Compiled(Runnable):
    provider = "TVM (cpu)"

    def __init__(self, model: Any) -> None:
        self._model = model

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        found: dict[str, np.ndarray[Any, Any]] = self._model.run(inputs)
        return found


def _compiled(path: Path, target: Any) -> _Compiled:
    from graphc.tvm import emit, serve, tune

    folder = path.with_suffix("")
    folder.mkdir()
    model = ir.from_proto(onnx.load(path, load_external_data=False))
    needs = emit.emit(model, folder, target, (), tune.Budget(), no_progress)
    (folder / "graphc.json").write_text(json.dumps({"runtime": dict(needs)}))
    return _Compiled(serve.Model(folder))


def main(job: Path) -> int:
    """Time what ``job.json`` describes; each result is a line of ``ratios`` at once: a crash costs those behind it."""
    from graphc.timings import ratio
    from graphc.tvm import targets, worker

    progress = worker.connected()
    settings = json.loads((job / "job.json").read_text(encoding="utf-8"))
    try:
        target = targets.resolve(settings["target"], settings["threads"])
    except BadInput:
        return 1
    for number in range(settings["count"]):
        progress("timing operators", number, settings["count"])
        try:
            before, after = (_compiled(job / f"{number}.{part}.onnx", target) for part in ("before", "after"))
            found = ratio(before, after, dict(np.load(job / f"{number}.npz")))
        except GraphcError:
            continue
        with (job / "ratios").open("a", encoding="utf-8") as file:
            file.write(json.dumps([number, found.low, found.high]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
