"""Latency and memory of things that run."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphc.contract import Arrays, Runnable
from graphc.errors import BadInput


@dataclass(frozen=True)
class Timing:
    """How long one run takes, measured in rounds that alternate with those of other runnables.

    Attributes:
        median: Seconds of a run.
        low, high: The quartiles of the rounds, in seconds.
        rounds: How often it ran, warm-up excluded.
        ratio: The median over the rounds of its time divided by that of the first runnable in the same round; below
            1 it is faster. Pairs of one round share the state of the machine, so that the ratio is steadier than
            the times.
        ratio_low, ratio_high: The quartiles of that ratio.
        provider: What ran it.
    """

    median: float
    low: float
    high: float
    rounds: int
    ratio: float
    ratio_low: float
    ratio_high: float
    provider: str = ""

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """What the median of the ratio is between, nine times in ten.

        They lie ``1.57 (ratio_high - ratio_low) / sqrt(rounds)`` around it (McGill, Tukey and Larsen, Variations of box
        plots, 1978), whatever the spread of single rounds.
        """
        half = 1.57 * (self.ratio_high - self.ratio_low) / math.sqrt(self.rounds)
        return self.ratio - half, self.ratio + half


def measure(
    runnables: Mapping[str, Runnable],
    inputs: Arrays | Mapping[str, Arrays],
    *,
    seconds: float = 3.0,
    rounds: int = 0,
    warmup: int = 2,
) -> dict[str, Timing]:
    """Time runnables against each other: one run of each a round, in alternating order.

    Args:
        runnables: What to time, by label; ratios are to the first.
        inputs: Arrays by input name for all of them, or a mapping from label to that.
        seconds: The time to spend after the warm-up, all runnables together; at least 5 rounds are run.
        rounds: The number of rounds, instead of ``seconds``.
        warmup: Runs of each before the first round.

    Raises:
        CannotRun: One of them does not run with the inputs.
    """
    feeds: dict[str, Any] = {
        label: own if isinstance(own := inputs.get(label), Mapping) else inputs for label in runnables
    }
    for _ in range(warmup):
        for label, runnable in runnables.items():
            runnable.run(feeds[label])
    times: dict[str, list[float]] = {label: [] for label in runnables}
    labels = list(runnables)
    start = time.perf_counter()
    done = 0
    while done < rounds if rounds else done < 5 or time.perf_counter() - start < seconds:
        # Forwards, then backwards: nobody always runs after the same neighbour.
        for label in labels if done % 2 == 0 else reversed(labels):
            begin = time.perf_counter()
            runnables[label].run(feeds[label])
            times[label].append(time.perf_counter() - begin)
        done += 1
    samples = {label: np.array(t) for label, t in times.items()}
    return {label: summary(array, samples[labels[0]], runnables[label].provider) for label, array in samples.items()}


def summary(times: np.ndarray[Any, Any], base: np.ndarray[Any, Any], provider: str = "") -> Timing:
    """The timing of a runnable that took ``times`` in the rounds in which the first took ``base``, in seconds."""
    low, median, high = (float(q) for q in np.percentile(times, (25, 50, 75)))
    ratio_low, ratio, ratio_high = (float(q) for q in np.percentile(times / base, (25, 50, 75)))
    return Timing(median, low, high, len(times), ratio, ratio_low, ratio_high, provider)


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
        code = "import sys; from graphc.runtime.timing import child; child(sys.argv[1])"
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
