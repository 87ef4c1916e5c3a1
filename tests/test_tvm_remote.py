"""Loops measured on other machines: TVM's tracker with two workers on this one, of which one dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphc.contract import no_progress
from graphc.errors import BadInput
from graphc.recipe import parse_backend

KEY = "bench"


def unused() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@dataclass
class Farm:
    """A tracker, and by their ports its workers, each in a group of processes of its own."""

    address: str
    workers: dict[int, subprocess.Popen[bytes]]


def kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def farm(tvm: Any, tmp_path: Path) -> Iterator[Farm]:
    for needed in ("tornado", "cloudpickle"):
        pytest.importorskip(needed, reason="TVM's RPC is not installed: pip install 'apache-tvm[rpc]'")
    from graphc.tvm import remote

    port, started = unused(), []

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", *arguments, "--host", "127.0.0.1"]
        with (tmp_path / f"log{len(started)}").open("wb") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
        return started[-1]

    try:
        address = f"127.0.0.1:{port}"
        start("tvm.exec.rpc_tracker", "--port", str(port), "--port-end", str(port + 1))
        server, ports = ("tvm.exec.rpc_server", "--tracker", address, "--key", KEY), (unused(), unused())
        workers = {at: start(*server, "--port", str(at), "--port-end", str(at + 1)) for at in ports}
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(BadInput):
                if remote.Tracker(address, KEY).workers() == 2:
                    break
            assert time.monotonic() < end, [path.read_text() for path in tmp_path.glob("log*")]
            time.sleep(0.3)
        yield Farm(address, workers)
    finally:
        for process in started:
            kill(process)


def product() -> ir.Model:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[32,64] x) => (float[32,48] y) {y = MatMul(x, w)}'
    )
    array = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
    own = ir.Value(name="w", shape=ir.Shape((64, 48)), type=ir.TensorType(ir.DataType.FLOAT))
    own.const_value = ir.tensor(array, name="w")
    model.graph.initializers["w"] = own
    model.graph.node(0).replace_input_with(1, own)
    return model


@pytest.mark.slow
def test_a_worker_that_dies_costs_nothing_but_its_trial(
    farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphc.tvm import emit, remote, targets, tune

    monkeypatch.setenv("GRAPHC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "_seconds", lambda *given: pytest.fail("nothing is measured here"))
    tried: list[int] = []
    timed, arguments = remote._timed, remote.arguments

    def counted(worker: Any, *rest: Any) -> float:
        tried.append(worker[1])
        return timed(worker, *rest)

    def killing(function: Any) -> Any:
        # The worker has been sent the code, and waits for what to run it with.
        if len(tried) == 1:
            kill(farm.workers.pop(tried[0]))
        return arguments(function)

    monkeypatch.setattr(remote, "_timed", counted)
    monkeypatch.setattr(remote, "arguments", killing)

    def run(name: str, trials: int) -> Any:
        (tmp_path / name).mkdir()
        budget = tune.Budget(trials=trials, tracker=farm.address, key=KEY)
        return emit.emit(product(), tmp_path / name, targets.resolve("x86-64-v3", 1), (), budget, no_progress)

    def stored() -> list[float]:
        return [json.loads(path.read_text()) for path in (tmp_path / "cache").glob("*/*/seconds.json")]

    assert run("one", 5)["buckets"][0]["loops"]
    assert len(stored()) == 5 and np.isfinite(stored()).all()
    (left,) = farm.workers
    assert tried[1:] == [left] * 5, "one trial was made again, on the other worker"
    assert remote.Tracker(farm.address, KEY).workers() == 1
    run("two", 2)
    assert len(tried) == 8 and len(stored()) == 7, "what is known is not measured again"

    kill(farm.workers[left])
    with pytest.raises(BadInput, match=r"(?s)no workers named 'bench'.*none are left.*rpc_server --tracker"):
        run("three", 2)
    with pytest.raises(BadInput, match="no workers named 'other'"):
        remote.Tracker(farm.address, "other").workers()

    # What other machines measured says nothing of this one.
    here: list[float] = []

    def counted_here(*given: Any) -> float:
        here.append(1.0)
        return 1.0

    monkeypatch.setattr(tune, "_seconds", counted_here)
    (tmp_path / "four").mkdir()
    emit.emit(product(), tmp_path / "four", targets.resolve("x86-64-v3", 1), (), tune.Budget(trials=1), no_progress)
    assert len(here) == 1


def test_a_tracker_that_is_not_there(tvm: Any, tmp_path: Path) -> None:
    target = parse_backend("tvm", {"tracker": f"127.0.0.1:{unused()}", "key": KEY, "trials": 1})
    with pytest.raises(BadInput, match=r"(?s)tracker does not answer.*rpc_tracker --host"):
        target.check(product())


def test_what_is_no_tracker(tvm: Any) -> None:
    from graphc.tvm import remote

    with socket.create_server(("127.0.0.1", 0)) as server:
        # It is connected to, and says nothing.
        port = server.getsockname()[1]
        with pytest.MonkeyPatch.context() as patch, pytest.raises(BadInput, match="tracker does not answer"):
            patch.setattr(remote, "ANSWER", 0.2)
            remote.Tracker(f"127.0.0.1:{port}", KEY).workers()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tracker": "host:9190", "trials": 1}, "go together"),
        ({"key": "bench", "trials": 1}, "go together"),
        ({"tracker": "host", "key": "bench", "trials": 1}, "HOST:PORT"),
        ({"tracker": "host:9190", "key": "bench"}, "without --tune"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        parse_backend("tvm", options)
