"""Measures loops on other machines, which TVM's RPC tracker hands out.

Code is compiled and linked here, sent to a worker that is free, and timed there, in a session of its own. A worker
that dies costs what it was measuring, which is tried once more on another.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from graphc.errors import BadInput
from graphc.tvm import build
from graphc.tvm.tune import HOPELESS, RUNS, arguments

T = TypeVar("T")

SESSION = 120
"""Seconds that a worker may take for a measurement; TVM's server ends it then."""

WAIT = 600
"""Seconds to wait for a worker that others use."""

ANSWER = 5
"""Seconds that the tracker may take to answer; a request for a worker is asked anew after them."""

TRIES = 2
"""Workers on which loops must fail to count as failed."""

START = "python -m tvm.exec.rpc_server --tracker {} --key {}"
"""How a worker is started."""


@dataclass(frozen=True)
class Tracker:
    """TVM's RPC tracker, and which of its workers are meant.

    Attributes:
        address: ``host:port``.
        key: The name under which the workers are registered.
    """

    address: str
    key: str

    def workers(self) -> int:
        """How many workers there are, busy ones too.

        Raises:
            BadInput: The tracker does not answer, or there are none.
        """
        from tvm.rpc.base import TrackerCode

        registered = self._ask(TrackerCode.SUMMARY)["server_info"]
        count = [server.get("key") for server in registered].count(f"server:{self.key}")
        if count:
            return int(count)
        others = sorted({str(server.get("key")).removeprefix("server:") for server in registered})
        raise BadInput(
            f"the tracker has no workers named '{self.key}'",
            where=self.address,
            why=f"it has workers named {', '.join(others)}" if others else "none are left, or none were started",
            hint=f"start some: {START.format(self.address, self.key)}; they end when loops crash them, "
            "as code for another processor does; what was measured is remembered",
        )

    def free(self) -> tuple[str, int, str]:
        """Wait for a worker: its host, its port, and the word that it expects.

        Raises:
            BadInput: As for :meth:`workers`, or all are busy for too long.
        """
        from tvm.rpc.base import TrackerCode

        end = time.monotonic() + WAIT
        while self.workers() and time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                host, port, word = self._ask(TrackerCode.REQUEST, self.key, "", 1)
                return host, port, word
        raise BadInput(f"no worker named '{self.key}' became free in {WAIT} s", where=self.address)

    def _ask(self, *question: Any) -> Any:
        """The answer to a question, in the protocol of ``tvm/rpc/tracker.py``."""
        from tvm.rpc import base

        host, _, port = self.address.rpartition(":")
        answered = False
        try:
            with socket.create_connection((host, int(port)), timeout=ANSWER) as connection:
                connection.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
                answered = base.recvall(connection, 4) == struct.pack("<i", base.RPC_TRACKER_MAGIC)
                if not answered:
                    raise ValueError("what listens there is no tracker of TVM's")
                base.sendjson(connection, question)
                code, answer = base.recvjson(connection)
        except (OSError, ValueError, TypeError) as error:
            if answered and isinstance(error, TimeoutError) and question[0] == base.TrackerCode.REQUEST:
                raise
            raise BadInput(
                "TVM's RPC tracker does not answer",
                where=self.address,
                why=str(error),
                hint=f"start it there: python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port {port}",
            ) from None
        if code != base.TrackerCode.SUCCESS:
            raise BadInput("TVM's RPC tracker refuses", where=self.address, why=str(answer))
        return answer


class Fleet:
    """The workers of a tracker, to measure loops on; a context manager.

    Args:
        tracker: The tracker.
        target: A CPU that the workers have.

    Attributes:
        places: How many loops to measure at a time: one for each worker, and one that waits compiled.

    Raises:
        BadInput: See :meth:`Tracker.workers`.
    """

    def __init__(self, tracker: Tracker, target: Any) -> None:
        self.places = tracker.workers() + 1
        self._tracker, self._target = tracker, target
        self._count, self._measured, self._why = 0, 0, ""
        self._folder = tempfile.TemporaryDirectory(prefix="graphc-")

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self._folder.cleanup()
        if kind is None and self._why and not self._measured:
            raise BadInput(
                "no loops could be measured on the workers",
                where=f"'{self._tracker.key}' of {self._tracker.address}",
                why=self._why,
                hint="target= must be a processor that they have",
            )

    def start(self, function: Any, best: float) -> Future[float]:
        """Compile a function, and measure it as soon as a worker is free; see ``graphc.tvm.tune.seconds``.

        The result is infinite where it does not compile or fails on several workers. It raises BadInput if there are
        no workers any more.
        """
        import tvm

        self._count += 1
        library = Path(self._folder.name) / f"loops{self._count}.so"
        try:
            build.link(tvm.IRModule({"k": function.with_attr("global_symbol", "k")}), self._target, library)
        except BadInput:
            found: Future[float] = Future()
            found.set_result(math.inf)
            return found
        return _apart(lambda: self._somewhere(library, function, best))

    def _somewhere(self, library: Path, function: Any, best: float) -> float:
        for _ in range(TRIES):
            worker = self._tracker.free()
            try:
                # A worker that is not reached any more says nothing.
                found = _apart(partial(_timed, worker, library, function, best)).result(SESSION + ANSWER)
            except Exception as error:  # TVM's are of many kinds
                self._why = (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
            else:
                self._measured += 1
                return found
        return math.inf


def _timed(worker: tuple[str, int, str], library: Path, function: Any, best: float) -> float:
    import tvm
    from tvm import rpc

    session = rpc.connect(*worker, session_timeout=SESSION)
    device = session.cpu()
    session.upload(str(library))
    given = [tvm.runtime.tensor(array, device) for array in arguments(function)]
    kernel = session.load_module(library.name)

    def fastest(runs: int) -> float:
        # One run goes before those that are timed.
        return min(map(float, kernel.time_evaluator("k", device, number=1, repeat=runs)(*given).results))

    first = fastest(2)
    return first if first > HOPELESS * best else min(first, fastest(RUNS - 2))


def _apart(call: Callable[[], T]) -> Future[T]:
    """Call something in a thread that does not keep this process from its end."""
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(call())
        except Exception as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return found
