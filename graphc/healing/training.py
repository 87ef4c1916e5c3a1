"""The training loop of healing: batches, schedule, checkpoints, and the best state on held-out cases.

The same cases, seed and steps give the same weights, bit for bit on a CPU, interrupted or not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from graphc.cache import Store
from graphc.contract import Arrays, no_progress
from graphc.edit import Array
from graphc.errors import BadInput
from graphc.healing.objective import Objective
from graphc.healing.weights import Weights

SAVE_EVERY = 60.0
"""Seconds of work that an interruption may cost."""

REMEMBERED = 1 << 28
"""Bytes of the original's outputs that are kept, so that it runs each case once."""

ROWS, TOKENS = 32, 2048
"""The rows of a step, and the most tokens that they may have together."""

MOST_HELD_OUT = 64
"""Cases that are held out at most: each is run at every evaluation."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train.

    Attributes:
        steps: Optimizer steps.
        minutes: Wall time after which it ends early; 0 for no limit. With a limit, results depend on the machine.
        rate: The learning rate after the warm-up, from which it falls to 0 along a cosine.
        warmup: The part of the steps in which it rises from 0.
        batch: Rows (entries of the inputs' first axis) a step; cases are run one by one until there are as many.
        decay: AdamW's weight decay of matrices.
        clip: The largest norm of the whole gradient; 0 for any.
        held_out: The part of the cases that is not trained on.
        evaluations: How often the held-out loss is read along the way.
        patience: Evaluations without a new best after which it ends early; 0 for never.
        bfloat16: Whether products are computed in bfloat16.
        seed: Of the order of the cases, and of the held-out ones.
    """

    steps: int
    minutes: float = 0.0
    rate: float = 5e-4
    warmup: float = 0.1
    batch: int = 32
    decay: float = 0.0
    clip: float = 1.0
    held_out: float = 0.1
    evaluations: int = 10
    patience: int = 4
    bfloat16: bool = False
    seed: int = 0


@dataclass
class State:
    """All that is needed to go on.

    Attributes:
        step: Steps done.
        seconds: Time they took.
        first: The held-out loss before the first one.
        best: The lowest held-out loss so far.
        best_step: After how many steps it was read.
        worse: Evaluations since then.
        values: The trained leaves after ``best_step``; empty for 0.
    """

    step: int = 0
    seconds: float = 0.0
    first: float = math.nan
    best: float = math.inf
    best_step: int = 0
    worse: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Trainer:
    """Trains ``weights`` of ``student`` to answer as ``teacher`` does.

    Attributes:
        student: The module that is healed; called with its inputs by name, returns outputs by name.
        teacher: The original, with the same outputs.
        weights: What of the student is trained.
        objective: What is made smaller.
        cases: What both are run on.
        labels: What the outputs should be, one array a case; empty if unknown.
        plan: How long and how fast.
        device: Where.
        store: Where unfinished work is kept; None for nowhere.
        name: The name of this work in the store: a hash of all it depends on.
        progress: ``progress(what, done, total)``.
        notes: What the user should know.
    """

    student: nn.Module
    teacher: nn.Module
    weights: Weights
    objective: Objective
    cases: Sequence[Arrays]
    labels: Sequence[Array]
    plan: Plan
    device: torch.device
    store: Store | None = None
    name: str = ""
    progress: Callable[[str, int, int], None] = no_progress
    notes: list[str] = field(default_factory=list)
    _answers: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    _room: int = REMEMBERED

    def run(self) -> State:
        """Train, and leave ``weights`` in the best state found, which is the first one if none is better.

        Raises:
            BadInput: The loss of the model as it is is no number.
        """
        torch.manual_seed(self.plan.seed)
        for module in (self.student, self.teacher):
            module.to(self.device).eval().requires_grad_(False)
        self.weights.to(self.device)
        leaves = self.weights.trained()
        held, trained = self._split()
        optimizer = self._optimizer(leaves)
        state = self._resumed(leaves, optimizer) or State()
        if not state.step:
            state.first = state.best = self._loss_of(held)
            if not math.isfinite(state.first):
                raise BadInput("the model cannot be healed", why=f"its loss on held-out data is {state.first}")
            start = {name: leaf.detach().clone() for name, leaf in leaves.items()}
            state.values = start
        self._train(leaves, optimizer, state, held, trained)
        self.weights.load({name: value.to(self.device) for name, value in state.values.items()})
        if self.store is not None:
            self.store.drop(self.name)
        return state

    def _train(
        self,
        leaves: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        state: State,
        held: list[int],
        trained: list[int],
    ) -> None:
        plan = self.plan
        order = _Order(trained, plan.seed)
        order.skip(self._rows, plan.batch, state.step)
        start, saved = time.monotonic() - state.seconds, time.monotonic()
        read = self._spent(state)
        shown = state.first
        while state.step < plan.steps:
            self.progress(f"healing: loss {shown:.4g}, held-out {state.best:.4g}", state.step, plan.steps)
            state.seconds = time.monotonic() - start
            spent = self._spent(state)
            if spent >= 1:
                break
            loss = self._step(leaves, optimizer, order.take(self._rows, plan.batch), self._rate(spent, state.step))
            shown = loss
            state.step += 1
            state.seconds = time.monotonic() - start
            last = state.step == plan.steps
            if self._due(state, read) or last or not math.isfinite(loss):
                read = self._spent(state)
                self._evaluate(leaves, state, held)
                if not math.isfinite(loss) or (plan.patience and state.worse >= plan.patience):
                    break
            if self.store is not None and time.monotonic() - saved >= SAVE_EVERY and not last:
                self.store.put(self.name, lambda folder: _save(folder, leaves, optimizer, state), replace=True)
                saved = time.monotonic()
        else:
            return
        if state.best_step != state.step and math.isfinite(shown):
            self._evaluate(leaves, state, held)

    def _evaluate(self, leaves: Mapping[str, Tensor], state: State, held: list[int]) -> None:
        loss = self._loss_of(held)
        if loss < state.best:
            state.best, state.best_step, state.worse = loss, state.step, 0
            state.values = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        else:
            state.worse += 1

    def _spent(self, state: State) -> float:
        """The part of the time limit that is over; 0 without a limit."""
        return state.seconds / 60 / self.plan.minutes if self.plan.minutes else 0.0

    def _due(self, state: State, read: float) -> bool:
        """Whether to read the held-out loss: at even distances in steps, and in time where that is limited.

        Args:
            state: The present one.
            read: The part of the time limit that was over when the loss was last read.
        """
        count = max(self.plan.evaluations, 1)
        every = max(1, self.plan.steps // count)
        return state.step % every == 0 or int(self._spent(state) * count) > int(read * count)

    def _rate(self, spent: float, step: int) -> float:
        """The learning rate of a step: a linear warm-up, then half a cosine, over the steps or the time that ends."""
        plan = self.plan
        risen = (step + 1) / max(1, round(plan.warmup * plan.steps))
        if plan.minutes:
            risen = max(risen, spent / plan.warmup if plan.warmup else 1.0)
        done = max(step / plan.steps, spent)
        return plan.rate * min(1.0, risen) * (1 + math.cos(math.pi * min(done, 1.0))) / 2

    def _optimizer(self, leaves: Mapping[str, Tensor]) -> torch.optim.AdamW:
        decayed = set(self.weights.decayed())
        groups = [
            {"params": [v for n, v in leaves.items() if n in decayed], "weight_decay": self.plan.decay},
            {"params": [v for n, v in leaves.items() if n not in decayed], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=self.plan.rate, foreach=False)

    def _step(
        self, leaves: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, batch: list[int], rate: float
    ) -> float:
        optimizer.zero_grad(set_to_none=True)
        rows = sum(self._rows(i) for i in batch)
        total = 0.0
        for i in batch:
            loss = self._loss(i) * (self._rows(i) / rows)
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            return total
        self.weights.hold_zeros()
        if self.plan.clip:
            torch.nn.utils.clip_grad_norm_(leaves.values(), self.plan.clip, foreach=False)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        return total

    def _loss_of(self, cases: list[int]) -> float:
        """The mean loss a row over cases."""
        with torch.no_grad():
            rows = [self._rows(i) for i in cases]
            return float(sum(self._loss(i).item() * n for i, n in zip(cases, rows, strict=True)) / sum(rows))

    def _loss(self, i: int) -> Tensor:
        sample = self.cases[i]
        products = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.plan.bfloat16)
        with torch.device(self.device), products:
            wanted = self._wanted(i, sample)
            got = functional_call(self.student, self.weights.effective(), kwargs=self._given(self.student, sample))
        return self.objective(got, wanted, sample, self.labels[i] if len(self.labels) else None)

    def _wanted(self, i: int, sample: Arrays) -> Mapping[str, Tensor]:
        """The original's answer to a case, kept while there is room."""
        if (known := self._answers.get(i)) is not None:
            return known
        with torch.no_grad():
            answer: dict[str, Tensor] = self.teacher(**self._given(self.teacher, sample))
        size = sum(t.numel() * t.element_size() for t in answer.values())
        if size <= self._room:
            self._room -= size
            self._answers[i] = answer
        return answer

    def _given(self, module: Any, sample: Arrays) -> dict[str, Tensor]:
        names: dict[str, str] = module.meta["inputs"]
        return {key: torch.from_numpy(np.array(sample[name])).to(self.device) for key, name in names.items()}

    def _rows(self, i: int) -> int:
        return max((a.shape[0] for a in self.cases[i].values() if a.ndim), default=1)

    def _split(self) -> tuple[list[int], list[int]]:
        """The held-out cases and those that are trained on."""
        count = len(self.cases)
        order = np.random.default_rng((self.plan.seed, 1)).permutation(count).tolist()
        held = min(max(1, round(count * self.plan.held_out)), MOST_HELD_OUT)
        if count < 2:
            self.notes.append("there is one case only: what is held out was trained on")
            return order, order
        return sorted(order[:held]), sorted(order[held:])

    def _resumed(self, leaves: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> State | None:
        entry = self.store.get(self.name) if self.store is not None else None
        return None if entry is None else _load(entry, leaves, optimizer)


def batch_of(sample: Arrays) -> int:
    """The rows of a step where none are given: fewer where each is a long text."""
    length = max((a.shape[1] for a in sample.values() if a.ndim == 2 and a.dtype.kind in "iu"), default=1)
    return max(1, min(ROWS, TOKENS // max(length, 1)))


class _Order:
    """An endless order of cases, each once an epoch."""

    def __init__(self, cases: Sequence[int], seed: int) -> None:
        self._cases, self._seed = list(cases), seed
        self._epoch = 0
        self._left: list[int] = []

    def take(self, rows: Callable[[int], int], wanted: int) -> list[int]:
        """The next cases, with together at least ``wanted`` rows."""
        batch: list[int] = []
        have = 0
        while have < max(wanted, 1):
            if not self._left:
                rng = np.random.default_rng((self._seed, 2, self._epoch))
                self._left = [self._cases[i] for i in rng.permutation(len(self._cases))]
                self._epoch += 1
            batch.append(self._left.pop())
            have += rows(batch[-1])
        return batch

    def skip(self, rows: Callable[[int], int], wanted: int, steps: int) -> None:
        """Go on to where it is after some steps."""
        for _ in range(steps):
            self.take(rows, wanted)


def _save(folder: Path, leaves: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, state: State) -> None:
    arrays: dict[str, Array] = {}
    for i, (name, leaf) in enumerate(leaves.items()):
        arrays[f"{i}.now"] = leaf.detach().cpu().numpy()
        arrays[f"{i}.best"] = state.values[name].cpu().numpy()
        for key, value in optimizer.state.get(leaf, {}).items():
            arrays[f"{i}.{key}"] = value.cpu().numpy()
    np.savez(folder / "values.npz", **arrays)  # type: ignore[arg-type]
    plain = {name: value for name, value in vars(state).items() if name != "values"}
    (folder / "state.json").write_text(json.dumps(plain), encoding="utf-8")


def _load(folder: Path, leaves: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> State:
    state = State(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
    with np.load(folder / "values.npz", allow_pickle=False) as arrays, torch.no_grad():
        for i, (name, leaf) in enumerate(leaves.items()):
            leaf.copy_(torch.from_numpy(arrays[f"{i}.now"]))
            state.values[name] = torch.from_numpy(arrays[f"{i}.best"])
            moments = {k.partition(".")[2]: arrays[k] for k in arrays.files if k.startswith(f"{i}.")}
            for key in ("now", "best"):
                moments.pop(key)
            if moments:
                held = {key: torch.from_numpy(np.array(value)) for key, value in moments.items()}
                optimizer.state[leaf] = {k: v if k == "step" else v.to(leaf.device) for k, v in held.items()}
    return state
