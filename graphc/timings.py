"""How fast forms of operators are on this machine: measured once, kept, and pinned by a file if one is given."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from graphc.cache import Store, key
from graphc.contract import Arrays, Probe, Progress, Runnable, Timer, no_progress
from graphc.errors import BadInput

SCHEMA = "graphc-timings/1"

FASTER = 0.95
"""The ratio of times from which on a form counts as faster."""

_SECONDS = (0.05, 0.4)
"""Time spent on each pair of forms: at first, and where that does not tell them apart."""

_CLEAR = (0.8, 1.1)
"""Ratios below and above which a first look is enough."""

_STEADY = 1.1
"""The ratio of the bounds up to which a measurement is kept for other runs: others were disturbed."""

_DIGITS = 3


class Table:
    """Ratios of the time of one form to that of another, by signature.

    Args:
        pinned: A file. If it exists, its numbers are the only ones there are; if not, ``write`` makes it.
        store: Where measurements are kept for the next run.
        progress: ``progress(what, done, total)``.
        timer: What measures.
        target: The target that it measures on, with its options; "" for ONNX Runtime.

    Attributes:
        used: Every ratio that was asked for and found.

    Raises:
        BadInput: The file is no timing table.
    """

    def __init__(
        self,
        pinned: Path | None = None,
        store: Store | None = None,
        progress: Progress = no_progress,
        timer: Timer | None = None,
        target: str = "",
    ) -> None:
        self.used: dict[str, float] = {}
        self._path, self._store, self._progress = pinned, store, progress
        self._timer, self._target = timer or in_sessions, target
        self._pinned = _read(pinned) if pinned is not None and pinned.exists() else None

    def __call__(self, probes: Sequence[Probe]) -> Mapping[str, float]:
        """The ratio after / before of each probe; one that is unknown and may not be measured is left out."""
        known: dict[str, float | None] = {}
        for probe in probes:
            pinned = self._pinned
            known[probe.signature] = self._kept(probe.signature) if pinned is None else pinned.get(probe.signature)
        waiting = [probe for probe in probes if known[probe.signature] is None]
        if self._pinned is None and waiting:
            for signature, (low, high) in self._timer(waiting, self._progress).items():
                # The upper bound: what counts as faster is so with some certainty, on a busy machine, too.
                known[signature] = ratio = round(high, _DIGITS)
                if self._store is not None and high <= _STEADY * low:
                    self._store.put(self._key(signature), partial(_keep, ratio=ratio))
        found = {signature: ratio for signature, ratio in known.items() if ratio is not None}
        self.used.update(found)
        return found

    def write(self) -> None:
        """Write the file, if one was named that did not exist."""
        if self._path is not None and self._pinned is None and self.used:
            from graphc.storage.files import write

            document = {"schema": SCHEMA, "machine": machine(), "ratios": dict(sorted(self.used.items()))}
            write(self._path, json.dumps(document, indent=2) + "\n")

    def _kept(self, signature: str) -> float | None:
        entry = self._store.get(self._key(signature)) if self._store is not None else None
        if entry is None:
            return None
        return float(json.loads((entry / "ratio.json").read_text(encoding="utf-8")))

    def _key(self, signature: str) -> str:
        from graphc import environment

        on = {"target": self._target} if self._target else {}
        return key(
            kind="timing by bounds", signature=signature, machine=machine(), versions=environment.versions(), **on
        )


def in_sessions(probes: Sequence[Probe], progress: Progress) -> dict[str, tuple[float, float]]:
    """Bounds of the ratio after / before in sessions of ONNX Runtime; what does not run is left out."""
    from graphc import runtime

    found = {}
    for number, probe in enumerate(probes):
        progress("timing operators", number, len(probes))
        try:
            before, after = (runtime.session(model, optimise=True) for model in (probe.before, probe.after))
            took = ratio(before, after.in_place(probe.inputs, probe.shared) if probe.shared else after, probe.inputs)
            if probe.beside is not None:
                shared = after.in_place(probe.beside, probe.shared) if probe.shared else after
                took = took.scaled(probe.times).added(ratio(before, shared, probe.beside))
            found[probe.signature] = took.low, took.high
        except BadInput:
            continue
    return found


@dataclass(frozen=True)
class Ratio:
    """The time of one form divided by that of another: bounds of the median, and the seconds of the other."""

    low: float
    high: float
    seconds: float

    def scaled(self, times: int) -> Ratio:
        """That of so many runs."""
        return replace(self, seconds=times * self.seconds)

    def added(self, other: Ratio) -> Ratio:
        """That of both, one after the other."""
        total = self.seconds + other.seconds
        low, high = (
            (a * self.seconds + b * other.seconds) / total for a, b in ((self.low, other.low), (self.high, other.high))
        )
        return Ratio(low, high, total)


def ratio(before: Runnable, after: Runnable, inputs: Arrays) -> Ratio:
    """The ratio of the times of two runnables, measured in turns, for longer where it is near 1."""
    from graphc import runtime

    for seconds in _SECONDS:
        timings = runtime.measure({"before": before, "after": after}, inputs, seconds=seconds, warmup=3)
        found = timings["after"]
        low, high = found.ratio_bounds
        if high < _CLEAR[0] or low > _CLEAR[1]:
            break
    return Ratio(low, high, timings["before"].median)


def digest(used: Mapping[str, float]) -> str:
    """The hash of what was timed and which was faster, for the manifest; "" if nothing was.

    Equal decisions make equal models, hence what was decided counts and not by how many microseconds.
    """
    decided = sorted((signature, ratio <= FASTER) for signature, ratio in used.items())
    return hashlib.sha256(json.dumps(decided).encode()).hexdigest() if used else ""


def machine() -> str:
    """The processor and how many of it, in words."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return f"{found[1] if found else platform.processor() or platform.machine()}, {os.cpu_count()} processors"


def _keep(folder: Path, ratio: float) -> None:
    (folder / "ratio.json").write_text(json.dumps(ratio), encoding="utf-8")


def _read(path: Path) -> dict[str, float]:
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError(f"its schema is '{document['schema']}', not '{SCHEMA}'")
        return {str(name): float(ratio) for name, ratio in document["ratios"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(
            "the file is no timing table",
            where=str(path),
            why=str(error),
            hint="name a file that does not exist: what is measured is then written there",
        ) from None
