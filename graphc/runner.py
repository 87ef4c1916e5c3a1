"""Runs passes on a model: exact ones are checked and undone when wrong, lossy ones measured and backed off.

A row of exact passes is compared, as a whole, with the model it was given. Only when that fails are the models
after each pass compared one by one, to find the pass to undo; the passes after it then run again without it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from graphc.contract import Context, Effect, Pass, PassResult, Probe, Refusal
from graphc.errors import CheckFailed, GraphcError
from graphc.gate import Gate, Judge
from graphc.report import PassReport

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphc.calibration import Calibration
    from graphc.checking import Checker, Comparison


@dataclass
class Done:
    """What has been done to a model so far; all that is needed to go on later.

    Attributes:
        model: The model as it is now.
        passes: What each pass did.
        rewrite: The worst check of exact passes so far, see ``Report.rewrite``.
        approximation: What the lossy passes cost so far, by metric.
        warnings: What the user should know.
        timings: The ratios of times that decided, by signature.
    """

    model: ir.Model
    passes: list[PassReport] = field(default_factory=list)
    rewrite: dict[str, Any] = field(default_factory=dict)
    approximation: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything but the model, as plain data."""
        rest = {k: v for k, v in vars(self).items() if k not in ("model", "passes")}
        return {**rest, "passes": [p.to_json() for p in self.passes]}

    @staticmethod
    def from_json(model: ir.Model, document: Mapping[str, Any]) -> Done:
        passes = [PassReport.from_json(p) for p in document["passes"]]
        return Done(model, **{**document, "passes": passes})


@dataclass
class Step:
    """Something that was done to a model: what it reports, the model it left, and what the user should know of it."""

    report: PassReport
    model: ir.Model
    notes: Sequence[str] = ()


Do = Callable[["ir.Model"], Step]
"""Does something to a model, which stays as it is."""


@dataclass
class Runner:
    """Runs passes on ``done.model``.

    Attributes:
        done: What has been done; updated as passes run.
        checker: Makes a checker whose reference is the given model; None when nothing is to be checked.
        judge: Measures what lossy passes cost against the model as it came; made when first needed.
        gates: The limits that lossy passes must hold.
        context: What passes are given.
        unchecked: Whether all passes may run although nothing can be checked.
        calibration: Makes what collects the statistics that passes ask for; called when the first one asks.
        last: The checker that found ``done.model`` right, if one did.
        timings: Times probes for passes that ask; None where nothing may be timed.
    """

    done: Done
    checker: Callable[[ir.Model], Checker] | None
    judge: Callable[[], Judge]
    gates: Sequence[Gate]
    context: Context
    unchecked: bool = False
    calibration: Callable[[], Calibration] | None = None
    last: Checker | None = None
    timings: Callable[[Sequence[Probe]], Mapping[str, float]] | None = None

    def run(self, passes: Sequence[Pass], load: Do | None = None) -> None:
        """Run passes in order; ``load`` is what the frontend does to the model as it came, checked like a pass."""
        at = _row(passes, 0)
        first = [partial(self._loaded, load)] if load else []
        self._exact(first + [partial(self._one, each) for each in passes[:at]])
        while at < len(passes):
            self._lossy(passes[at])
            end = _row(passes, at + 1)
            self._exact([partial(self._one, each) for each in passes[at + 1 : end]])
            at = end

    def _exact(self, todo: Sequence[Do]) -> None:
        """Run a row of exact passes, check it, and undo what is wrong."""
        if not todo:
            return
        self.last = checker = self._checker(self.done.model)
        changed = False
        while True:
            steps: list[Step] = []
            for do in todo:
                steps.append(do(steps[-1].model if steps else self.done.model))
            good, verdict = len(steps), None
            if checker is not None and (changed or any(step.report.changes for step in steps)):
                self.context.progress("checking", 0, 0)
                verdict = checker.compare(steps[-1].model if steps else self.done.model)
                if not verdict.ok:
                    good, verdict = self._culprit(checker, steps, verdict)
            for step in steps[:good]:
                changed = changed or bool(step.report.changes)
                self.done.passes.append(step.report)
                self.done.model = step.model
                self._warn(step.notes)
            if verdict is not None and good == len(steps):
                self._note(verdict)
            if good == len(steps):
                return
            assert verdict is not None
            wrong = steps[good].report
            wrong.error, wrong.rolled_back = f"the result was wrong: {verdict.why}", True
            self.done.passes.append(wrong)
            todo = todo[good + 1 :]

    def _culprit(self, checker: Checker, steps: Sequence[Step], last: Comparison) -> tuple[int, Comparison]:
        """The first step whose model is wrong, and how."""
        for i, step in enumerate(steps[:-1]):
            if step.report.changes:
                self.context.progress(f"looking for the wrong pass: {step.report.name}", i, len(steps))
                comparison = checker.compare(step.model)
                if not comparison.ok:
                    return i, comparison
        return len(steps) - 1, last

    def _one(self, each: Pass, model: ir.Model) -> Step:
        report = PassReport(each.name, each.spec(), each.effect.value)
        if not self.context.checkable and not self.unchecked and not each.unchecked_ok:
            result = PassResult()
            result.refuse("", "nothing can be checked here; --unchecked runs the pass all the same")
            report.refusals = result.refusals
            return Step(report, model)
        self.context.progress(each.name, 0, 0)
        start = time.perf_counter()
        clone = model.clone()
        try:
            result = each.run(clone, self._informed(each, clone))
        except GraphcError:
            raise
        except Exception as error:  # a defect of the pass must not cost the user the rest of the run
            report.error = f"the pass itself failed ({type(error).__name__}: {error})"
            report.rolled_back = True
            return Step(report, model)
        report.changes, report.refusals, report.losses = result.changes, result.refusals, result.losses
        report.seconds = time.perf_counter() - start
        return Step(report, clone if result.changed else model, result.notes)

    def _informed(self, each: Pass, model: ir.Model) -> Context:
        """The context of a pass, with the statistics that it needs."""
        wanted = each.needs(model)
        context = self.context
        if wanted.timings and self.timings is not None and context.target.name in each.timed_on:
            context = dataclasses.replace(context, time=self._timed)
        if not (wanted.statistics or wanted.calibration) or self.calibration is None:
            return context
        from graphc.checking.interface import fitting

        calibration = self.calibration()
        self._warn(calibration.notes)
        samples = calibration.samples
        if samples and fitting(model, samples[0]) is not samples[0]:
            samples = [fitting(model, sample) for sample in samples]
        return dataclasses.replace(
            context,
            statistics=calibration.collect(model, wanted.statistics),
            collect=calibration.collect,
            calibration=samples,
            labels=calibration.labels,
        )

    def _timed(self, probes: Sequence[Probe]) -> Mapping[str, float]:
        """Ratios of the times of probes; what was used is kept for the manifest."""
        assert self.timings is not None
        found = self.timings(probes)
        self.done.timings.update(found)
        return found

    def _loaded(self, load: Do, original: ir.Model) -> Step:
        """What the frontend made of the model, or the model as it came where that could not be checked."""
        step = load(original)
        if not step.report.changes or self.context.checkable or self.unchecked:
            return step
        refused = Refusal("", f"nothing can be checked here, so this was not done: {'; '.join(step.report.changes)}")
        return Step(dataclasses.replace(step.report, changes=[], refusals=[*step.report.refusals, refused]), original)

    def _lossy(self, strongest: Pass) -> None:
        """Run a lossy pass at the strongest level that holds every gate on the outputs, or not at all."""
        levels = list(strongest.levels(self.done.model))
        drops = [gate for gate in self.gates if gate.kind == "drop"]
        if drops and not self.context.checkable:
            raise CheckFailed(
                f"what '{strongest.name}' costs cannot be measured",
                why=self.done.rewrite.get("why", ""),
                hint="leave --max-drop out",
            )
        for i, level in enumerate(levels):
            step = self._one(level, self.done.model)
            if not step.report.changes or not self.context.checkable:
                break
            self.context.progress(f"measuring {level.spec()}", i, len(levels))
            costs = self.judge().costs(step.model, ["error", *(gate.metric for gate in drops)])
            broken = [
                f"{g.metric} {costs[g.metric]:.3g} > {g.limit:g}" for g in drops if not costs[g.metric] <= g.limit
            ]
            if not broken:
                self.done.approximation = dict(costs)
                if i:
                    self.done.warnings.append(f"'{strongest.spec()}' was backed off to '{level.spec()}'")
                break
            step.report.error, step.report.rolled_back = f"the gate did not hold: {', '.join(broken)}", True
        self.done.passes.append(step.report)
        if not step.report.rolled_back:
            self.done.model, self.last = step.model, None
            self._warn(step.notes)

    def _checker(self, reference: ir.Model) -> Checker | None:
        """The checker of a row, and through it whether anything can be checked at all."""
        if self.checker is None:
            if not self.done.rewrite:
                self.done.rewrite = {"checked": False, "ok": True, "why": "checks were switched off"}
            return None
        self.context.progress("running the reference", 0, 0)
        checker = self.checker(reference)
        if checker.why:
            self.context = dataclasses.replace(self.context, checkable=False)
            self.done.rewrite = {"checked": False, "ok": True, "why": checker.why}
            return None
        return checker

    def _note(self, comparison: Comparison) -> None:
        """Keep the worst check so far."""
        ratio = comparison.worst.ratio if comparison.worst else 0.0
        if ratio >= self.done.rewrite.get("worst", 0.0):
            self.done.rewrite = comparison.to_json() | {"worst": ratio}
        self._warn(comparison.notes)

    def _warn(self, notes: Sequence[str]) -> None:
        """Tell the user, each thing once."""
        for note in notes:
            if note not in self.done.warnings:
                self.done.warnings.append(note)


def _row(passes: Sequence[Pass], start: int) -> int:
    """The end of the row of exact passes that begins at ``start``."""
    end = start
    while end < len(passes) and passes[end].effect is Effect.EXACT:
        end += 1
    return end
