"""Run one command as a whole process and measure what it took."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_POLL_S = 0.005


@dataclass(frozen=True)
class Usage:
    """What a process took.

    Attributes:
        wall_s: Seconds from start to exit.
        cpu_s: User and system seconds, those of children it waited for included.
        rss_mb: Peak resident set in MB (1e6 bytes); it counts mapped files.
        anon_mb: Peak anonymous memory in MB, sampled every 5 ms: what cannot be dropped under pressure.
        failure: Empty, or the last line that it printed, or ``"timeout"``.
    """

    wall_s: float
    cpu_s: float
    rss_mb: float
    anon_mb: float
    failure: str


def run(command: Sequence[str | Path], env: Mapping[str, str] | None = None, timeout_s: float = 900) -> Usage:
    """Run ``command`` to its end. Linux only: memory is read from ``/proc``."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
        )
        anon_kb, late = 0, False
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            anon_kb = max(anon_kb, _anonymous_kb(process.pid))
            if not late and time.perf_counter() - start > timeout_s:
                late = True
                process.kill()
            time.sleep(_POLL_S)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        failure = "timeout" if late else ""
        if process.returncode and not late:
            log.seek(0)
            lines = [line.strip() for line in log.read().splitlines() if line.strip()]
            failure = lines[-1] if lines else f"exit status {process.returncode}"
    return Usage(
        round(wall, 3),
        round(usage.ru_utime + usage.ru_stime, 3),
        round(usage.ru_maxrss * 1024 / 1e6, 1),
        round(anon_kb * 1024 / 1e6, 1),
        failure,
    )


def _anonymous_kb(pid: int) -> int:
    try:
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) if found else 0


def machine() -> str:
    """The machine in one line: processor, cores, memory."""
    processor = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = processor[1] if processor else platform.machine()
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}"
