"""Measures loops, and remembers which are the fastest.

What can be decided of a loop nest is listed by :func:`graphc.tvm.contraction.choices`. Every choice that was measured
is kept under the hash of the nest, the target and the number of threads: a run that was interrupted goes on where it
was, and another model with the same nest knows the answer.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
    """

    seconds: float = 0.0
    trials: int = 0
    journal: Path | None = None

    def part(self, parts: int) -> Budget:
        """The budget of one of several parts."""
        return Budget(self.seconds / parts, -(-self.trials // parts), self.journal)

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
        target: A CPU that this machine can stand for.
        budget: How much to measure; what is known from earlier costs nothing.
        progress: ``progress(what, done, total)``.

    Returns:
        The best choice by function name.

    Raises:
        BadInput: The target is no CPU.
    """
    if target.kind.name != "llvm":
        raise BadInput("only code for processors can be tuned", where=f"target {target}", hint="leave --tune out")
    machine, store = Machine.of(target), cache.Store()
    tasks = _tasks(module, target, machine)
    for task in tasks:
        for choice in task.choices:
            if (entry := store.get(_entry(task.workload, choice))) is not None:
                task.seconds[choice] = float(json.loads((entry / "seconds.json").read_text(encoding="utf-8")))
    start, done = time.monotonic(), 0

    def spent() -> bool:
        late = budget.seconds > 0 and time.monotonic() - start > budget.seconds
        return late or (budget.trials > 0 and done >= budget.trials)

    def measure(task: Task, choice: Choice) -> None:
        nonlocal done
        progress("measuring loops", done, budget.trials or sum(len(each.choices) for each in tasks))
        entry = _entry(task.workload, choice)
        if budget.journal is not None:
            budget.journal.write_text(entry, encoding="utf-8")
        found = _seconds(scheduled(task.function, machine, choice), target, min(task.seconds.values(), default=np.inf))
        task.seconds[choice] = found
        store.put(entry, lambda folder: _write(folder, found))
        if budget.journal is not None:
            budget.journal.unlink()
        done += 1

    # What the rules decide says where the time goes.
    for task in tasks:
        if not spent() and task.choices[0] not in task.seconds:
            measure(task, task.choices[0])
    for task in sorted(tasks, key=lambda each: -each.share):
        for choice in task.choices:
            if choice not in task.seconds and not spent():
                measure(task, choice)
    return {name: task.best for task in tasks for name in task.names}


def _tasks(module: Any, target: Any, machine: Machine) -> list[Task]:
    """The contractions of a module; equal ones once."""
    tvm_ffi: Any = importlib.import_module("tvm_ffi")

    calls = _calls(module)
    found: dict[int, Task] = {}
    for name, function in functions(module):
        known = found.get(hashed := tvm_ffi.structural_hash(function))
        if known is None:
            if wanted := choices(function, machine):
                workload, count = _workload(function, target), calls.get(name.name_hint, 0)
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
        "threads": os.environ.get("TVM_NUM_THREADS", ""),
        "cpus": os.cpu_count(),
        "tvm": installed("apache-tvm"),
        "rules": [cache.file_hash(Path(__file__).with_name(name)) for name in RULES],
    }


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
    arguments = [tvm.runtime.tensor(_random([int(n) for n in p.ty.shape], str(p.ty.dtype))) for p in function.params]
    fastest = float("inf")
    for number in range(RUNS + 1):
        start = time.perf_counter()
        kernel(*arguments)
        taken = time.perf_counter() - start
        # The first run touches memory and starts threads.
        fastest = min(fastest, taken) if number else fastest
        if number >= 2 and fastest > HOPELESS * best:
            break
    return fastest


def _random(shape: Sequence[int], dtype: str) -> np.ndarray[Any, Any]:
    values = np.random.default_rng(0).random(shape)
    return np.asarray(values).astype(dtype)
