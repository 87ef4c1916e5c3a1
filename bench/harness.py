"""What the comparisons share: commands of tools, and the judgement of what they wrote."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import process

Command = Callable[[str, Path, Path, bool], list[str | Path]]
"""The command line from interpreter, input, output, and whether the output needs external data."""

LARGE = 1 << 30
"""From this many bytes on, tools are told to write external data, and each runs once."""


def graphc(*flags: str) -> Command:
    """``graphc optimize`` without cache and timing; a pass that is rolled back must not pass for a result."""
    fixed = ("--no-cache", "--no-measure", "--strict", "-q", *flags)
    return lambda python, model, out, large: [python, "-m", "graphc", "optimize", model, "-o", out, *fixed]


def entry_point(code: str) -> Command:
    """A peer's own command line, started by ``code``."""
    return lambda python, model, out, large: [
        *(python, "-c", code, model, out),
        *(["--save-as-external-data"] if large else []),
    ]


def script(code: str, *arguments: str) -> Command:
    """A peer's Python interface; ``sys.argv`` is input, output, ``arguments``, then the data file's name if large."""
    return lambda python, model, out, large: [
        *(python, "-c", code, model, out),
        *arguments,
        *([out.name + ".data"] if large else []),
    ]


def size(path: Path) -> int:
    """Bytes of a model with its data."""
    return sum(file.stat().st_size for file in path.parent.glob(path.name + "*"))


def summary(runs: Sequence[process.Usage]) -> dict[str, Any]:
    """Median times and peak memory of several runs of one tool, and the first failure."""
    failure = next((run.failure for run in runs if run.failure), "")
    return {
        "wall_s": round(statistics.median(run.wall_s for run in runs), 3),
        "cpu_s": round(statistics.median(run.cpu_s for run in runs), 3),
        "rss_mb": max(run.rss_mb for run in runs),
        "anon_mb": max(run.anon_mb for run in runs),
        "failure": public(failure),
    }


def public(text: str) -> str:
    """A message without the folders of this machine, and no longer than a line."""
    words = (Path(word.strip("'\"")).name if "/" in word else word for word in text.split())
    return " ".join(words)[:160]


def check(name: str, original: Path, candidate: Path, seconds: float) -> dict[str, Any]:
    """What ``bench/check.py`` says of a candidate."""
    code = Path(__file__).with_name("check.py")
    command: list[str | Path] = [sys.executable, code, name, original, candidate, str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"same": False, "error": None, "why": f"checking it ended with status {done.returncode}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result | {"why": public(result["why"])}


def version(python: str, package: str) -> str | None:
    """The version of a package that an interpreter sees; None if it is not installed."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
