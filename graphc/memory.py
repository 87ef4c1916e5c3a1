"""The memory of a process that loads a model and runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphc.contract import Arrays
from graphc.errors import BadInput


@dataclass(frozen=True)
class Memory:
    """The memory of a process that loads a model and runs it once.

    Attributes:
        peak: Bytes of its largest resident set, mapped pages of files included.
        anonymous: Bytes of the largest anonymous part, which no file backs; 0 where the system does not tell.
        base: Bytes of ``peak`` that it had before it loaded the model: Python and ONNX Runtime.
    """

    peak: int
    anonymous: int
    base: int


def peak_memory(
    model: Path,
    inputs: Arrays,
    *,
    optimise: bool = True,
    frugal: bool = False,
    provider: str = "",
    options: Mapping[str, str] | None = None,
    threads: int = 0,
) -> Memory:
    """Load a model in a process of its own, run it once, and say what memory that took.

    Args:
        model: An ONNX file, or a compiled artifact.
        inputs: Arrays by input name; no strings.
        optimise, frugal, provider, options, threads: See ``graphc.runtime.session``.

    Raises:
        BadInput: The process failed; the message has its last line.
    """
    settings = {
        "optimise": optimise,
        "frugal": frugal,
        "options": dict(options or {}),
        "threads": threads,
        **({"provider": provider} if provider else {}),
    }
    with tempfile.TemporaryDirectory(prefix="graphc-") as folder:
        feeds = Path(folder, "inputs.npz")
        np.savez(feeds, **{f"a{i}": array for i, array in enumerate(inputs.values())})  # type: ignore[arg-type]
        job = json.dumps([str(model), str(feeds), list(inputs), settings])
        code = "import sys; from graphc.memory import child; child(sys.argv[1])"
        done = subprocess.run([sys.executable, "-c", code, job], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise BadInput(
            "the model could not be run to measure its memory",
            where=str(model),
            why=lines[-1] if lines else f"exit code {done.returncode}",
        )
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def child(job: str) -> None:
    """What the process that :func:`peak_memory` starts does; it prints a ``Memory`` as JSON."""
    from graphc import runtime

    path, feeds, names, settings = json.loads(job)
    with np.load(feeds, allow_pickle=False) as stored:
        inputs = {name: stored[f"a{i}"] for i, name in enumerate(names)}
    runtime.require()
    import onnxruntime  # noqa: F401  part of the base

    base, anonymous = _peak(), [_status("RssAnon")]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            anonymous[0] = max(anonymous[0], _status("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    from graphc import compiled

    target = compiled.backend(Path(path))
    session = target.load(Path(path)) if target else runtime.session(Path(path), **settings)
    session.run(inputs)
    anonymous[0] = max(anonymous[0], _status("RssAnon"))
    stop.set()
    watcher.join()
    print(json.dumps({"peak": _peak(), "anonymous": anonymous[0], "base": base}))


def _status(key: str) -> int:
    """A line of ``/proc/self/status`` in bytes; 0 on systems without it."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    match = re.search(rf"^{key}:\s+(\d+) kB", text, re.M)
    return int(match[1]) * 1024 if match else 0


def _peak() -> int:
    """Bytes of the largest resident set of this process so far."""
    if peak := _status("VmHWM"):
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
