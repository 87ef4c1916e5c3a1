"""Measures loops, and remembers which are the fastest.

What can be decided of a loop nest is listed by :func:`graphc.tvm.contraction.choices`. Every choice that was measured
is kept under the hash of the nest, the target and the number of threads: a run that was interrupted goes on where it
was, and another model with the same nest knows the answer. What :mod:`graphc.tvm.remote` measures on other machines is
kept under their name.

This is a search of our own and not TVM's meta-schedule, for three reasons, all of TVM 0.27. Its builder imports
``tensor_intrin`` in every process that it starts, 32 to 62 seconds of a core each, since each function there walks
Python's stack: on two cores it does not finish. Its learned cost model is xgboost, which brings 470 MB of NCCL along.
And it draws schedules at random from a space of thousands, of which minutes see a few: most of them are slower than
what :mod:`graphc.tvm.contraction` decides without measuring. What is left to decide there, the tile and whether to
pack, are some tens of choices, all of which can be measured and remembered.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from graphc import cache
from graphc.contract import Progress
from graphc.environment import installed
from graphc.errors import BadInput
from graphc.tvm.contraction import choices
from graphc.tvm.nest import RULED, Choice, Machine
from graphc.tvm.schedule import functions, scheduled

RUNS = 7
"""Runs of a loop nest of which the fastest counts: what disturbs a run makes it slower."""

HOPELESS = 1.5
"""Times the best so far at which the first runs of a choice end its measurement."""


RULES = ("blocked.py", "contraction.py", "folds.py", "functions.py", "nest.py", "schedule.py")
"""The files on which a choice's loops depend."""


@dataclass(frozen=True)
class Budget:
    """How much to measure.

    Attributes:
        seconds: Time to spend; 0 for no limit.
        trials: Choices to measure; 0 for no limit.
        journal: A file that names the entry that is being measured, for whoever comes after a crash.
        tracker: ``host:port`` of TVM's RPC tracker, to measure on its workers; empty to measure here.
        key: The name of the workers.
    """

    seconds: float = 0.0
    trials: int = 0
    journal: Path | None = None
    tracker: str = ""
    key: str = ""

    def part(self, parts: int) -> Budget:
        """The budget of one of several parts."""
        return replace(self, seconds=self.seconds / parts, trials=-(-self.trials // parts))

    def __bool__(self) -> bool:
        return self.seconds > 0 or self.trials > 0


@dataclass
class Task:
    """A loop nest to tune.

    Attributes:
        workload: What a measurement depends on, but for the choice.
        names: The functions that are this nest.
        function: One of them.
        calls: How often a run of the model calls it.
        choices: What can be measured.
        seconds: The measured time of a call by choice; infinite where it does not compile.
    """

    workload: dict[str, Any]
    names: list[str]
    function: Any
    calls: int
    choices: list[Choice]
    seconds: dict[Choice, float]

    @property
    def best(self) -> Choice:
        """The fastest choice measured, or what the rules decide."""
        return min(self.seconds, key=lambda choice: self.seconds[choice], default=RULED)

    @property
    def share(self) -> float:
        """Seconds that it takes in a run of the model with the best choice."""
        return self.calls * min(self.seconds.values(), default=0.0)


def tune(module: Any, target: Any, budget: Budget, progress: Progress) -> dict[str, Choice]:
    """Measure loops for the contractions of a module, those first that take the most time.

    Args:
        module: What ``graphc.tvm.build.prepare`` made; it is not changed.
        target: A CPU that this machine, or the workers, can stand for.
        budget: How much to measure; what is known from earlier costs nothing.
        progress: ``progress(what, done, total)``.

    Returns:
        The best choice by function name.

    Raises:
        BadInput: The target is no CPU, or there are no workers.
    """
    if target.kind.name != "llvm":
        raise BadInput("only code for processors can be tuned", where=f"target {target}", hint="leave --tune out")
    machine, store = Machine.of(target), cache.Store()
    tasks = _tasks(module, target, machine, {"worker": budget.key} if budget.tracker else _here())
    for task in tasks:
        for choice in task.choices:
            if (entry := store.get(_entry(task.workload, choice))) is not None:
                task.seconds[choice] = float(json.loads((entry / "seconds.json").read_text(encoding="utf-8")))
    start, done = time.monotonic(), 0

    def spent() -> bool:
        late = budget.seconds > 0 and time.monotonic() - start > budget.seconds
        return late or (budget.trials > 0 and done >= budget.trials)

    def measure(wanted: Iterable[tuple[Task, Choice]]) -> None:
        nonlocal done
        running: deque[tuple[Task, Choice, Future[float]]] = deque()

        def settle() -> None:
            task, choice, found = running.popleft()
            task.seconds[choice] = seconds = found.result()
            # Other machines also fail for reasons that pass.
            if np.isfinite(seconds) or not budget.tracker:
                store.put(_entry(task.workload, choice), lambda folder: _write(folder, seconds))

        for task, choice in wanted:
            if choice in task.seconds or spent():
                continue
            progress("measuring loops", done, budget.trials or sum(len(each.choices) for each in tasks))
            if budget.journal is not None:
                budget.journal.write_text(_entry(task.workload, choice), encoding="utf-8")
            function, best = scheduled(task.function, machine, choice), min(task.seconds.values(), default=np.inf)
            running.append((task, choice, bench.start(function, best)))
            if budget.journal is not None:
                budget.journal.unlink()
            done += 1
            while len(running) >= bench.places:
                settle()
        while running:
            settle()

    with _bench(target, budget) as bench:
        # What the rules decide says where the time goes.
        measure((task, task.choices[0]) for task in tasks)
        measure((task, choice) for task in sorted(tasks, key=lambda each: -each.share) for choice in task.choices)
    return {name: task.best for task in tasks for name in task.names}


@dataclass(frozen=True)
class _Here:
    """Measures in this process."""

    target: Any
    places: int = 1

    def start(self, function: Any, best: float) -> Future[float]:
        found: Future[float] = Future()
        found.set_result(_seconds(function, self.target, best))
        return found


def _bench(target: Any, budget: Budget) -> contextlib.AbstractContextManager[Any]:
    if not budget.tracker:
        return contextlib.nullcontext(_Here(target))
    from graphc.tvm import remote

    return remote.Fleet(remote.Tracker(budget.tracker, budget.key), target)


def _tasks(module: Any, target: Any, machine: Machine, place: Mapping[str, Any]) -> list[Task]:
    """The contractions of a module; equal ones once."""
    tvm_ffi: Any = importlib.import_module("tvm_ffi")

    calls = _calls(module)
    found: dict[int, Task] = {}
    for name, function in functions(module):
        known = found.get(hashed := tvm_ffi.structural_hash(function))
        if known is None:
            if wanted := choices(function, machine):
                workload, count = {**_workload(function, target), **place}, calls.get(name.name_hint, 0)
                found[hashed] = Task(workload, [name.name_hint], function, count, wanted, {})
        else:
            known.names.append(name.name_hint)
            known.calls += calls.get(name.name_hint, 0)
    return list(found.values())


def _calls(module: Any) -> dict[str, int]:
    from tvm import relax
    from tvm.ir import Call, Op

    counts: dict[str, int] = {}
    call_tir = Op.get("relax.call_tir")

    def visit(expression: Any) -> None:
        if isinstance(expression, Call) and expression.op.same_as(call_tir):
            name = expression.args[0].name_hint
            counts[name] = counts.get(name, 0) + 1

    relax.analysis.post_order_visit(module["main"].body, visit)
    return counts


def _workload(function: Any, target: Any) -> dict[str, Any]:
    tvm_ffi: Any = importlib.import_module("tvm_ffi")

    return {
        "nest": str(tvm_ffi.structural_hash(function)),
        "shapes": [[*map(int, p.ty.shape), str(p.ty.dtype)] for p in function.params],
        "target": str(target),
        "tvm": installed("apache-tvm"),
        "rules": [cache.file_hash(Path(__file__).with_name(name)) for name in RULES],
    }


def _here() -> dict[str, Any]:
    """What a measurement depends on of this machine."""
    return {"threads": os.environ.get("TVM_NUM_THREADS", ""), "cpus": os.cpu_count()}


def blame(journal: Path) -> bool:
    """Remember that what a journal names ends the process that measures it; whether there was such a thing."""
    if not journal.is_file():
        return False
    cache.Store().put(journal.read_text(encoding="utf-8"), lambda folder: _write(folder, float("inf")), replace=True)
    journal.unlink()
    return True


def _entry(workload: dict[str, Any], choice: Choice) -> str:
    return cache.key(kind="tvm loops", choice=asdict(choice), **workload)


def _write(folder: Path, seconds: float) -> None:
    (folder / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")


def _seconds(function: Any, target: Any, best: float) -> float:
    """The fastest of some runs; infinite if it does not compile. A hopeless choice is not run to the end."""
    import tvm

    try:
        kernel = tvm.compile(tvm.IRModule({"k": function.with_attr("global_symbol", "k")}), target=target)["k"]
    except Exception:  # TVM's refusals are of many kinds
        return float("inf")
    given = [tvm.runtime.tensor(array) for array in arguments(function)]
    fastest = float("inf")
    for number in range(RUNS + 1):
        start = time.perf_counter()
        kernel(*given)
        taken = time.perf_counter() - start
        # The first run touches memory and starts threads.
        fastest = min(fastest, taken) if number else fastest
        if number >= 2 and fastest > HOPELESS * best:
            break
    return fastest


def arguments(function: Any) -> list[np.ndarray[Any, Any]]:
    """Random arrays for the parameters of a function; its results are written into the last ones."""
    return [_random([int(n) for n in p.ty.shape], str(p.ty.dtype)) for p in function.params]


def _random(shape: Sequence[int], dtype: str) -> np.ndarray[Any, Any]:
    values = np.random.default_rng(0).random(shape)
    return np.asarray(values).astype(dtype)
