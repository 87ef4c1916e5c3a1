"""The work on one graph: its passes and checks, what they are made from, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphc import kept, timings
from graphc.contract import Arrays, Context, Pass, Progress
from graphc.errors import CheckFailed
from graphc.gate import Judge
from graphc.report import PassReport, Report
from graphc.runner import Done, Runner, Step

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphc.calibration import Calibration
    from graphc.checking import Checker
    from graphc.data import Origin, Samples
    from graphc.frontends import Source
    from graphc.presets import Choice
    from graphc.settings import Settings


@dataclass
class Work:
    """One run on one graph: what its checks and passes are made from.

    Attributes:
        loaded: The model as the frontend gave it.
        settings: The flags.
        progress: ``progress(what, done, total)``.
        described: What the report says of the model as it came.
        choice: What was chosen for a goal.
        last: The checker that found the resulting model right, if one did.
    """

    loaded: Source
    settings: Settings
    progress: Progress
    described: dict[str, Any]
    choice: Choice | None = None
    last: Checker | None = None

    @cached_property
    def calibrating(self) -> Samples | None:
        """The user's data to collect statistics on."""
        given = self.settings.calibrate if self.settings.calibrate is not None else self.settings.data
        return self._load_data(given)

    @cached_property
    def checking(self) -> Samples | None:
        """The user's data to check and measure on; where only one of both was given, it serves for both."""
        if self.settings.data is None or self.settings.calibrate is None:
            return self.calibrating
        return self._load_data(self.settings.data)

    @property
    def samples(self) -> Sequence[Arrays]:
        return self.checking or ()

    def _load_data(self, given: Origin | None) -> Samples | None:
        from graphc import data

        return None if given is None else data.load(given, self.loaded.model)

    @cached_property
    def judge(self) -> Judge:
        """Measures lossy passes against the model as it came."""
        return Judge(self.loaded.original, self.samples, self.settings.seed, self.progress)

    @cached_property
    def table(self) -> timings.Table:
        """How fast operators are on this machine."""
        from graphc.cache import Store

        target, store = self.settings.target, Store() if self.settings.cache else None
        of = "" if target.name == "onnxruntime" else target.spec()
        return timings.Table(self.settings.timings, store, self.progress, target.timer(), of)

    @cached_property
    def caveats(self) -> list[str]:
        """What should be known of the passes before they run."""
        settings, model = self.settings, self.loaded.model
        target = settings.target.capabilities()
        timed = settings.measure and target.name == "onnxruntime"
        context = Context(target, seed=settings.seed, time=self.table if timed else None)
        return list(dict.fromkeys(text for each in settings.recipe.passes for text in each.caveats(model, context)))

    @cached_property
    def calibration(self) -> Calibration:
        """What collects the statistics that passes ask for."""
        from graphc.calibration import Calibration

        # Whatever the model is for: an accelerator that starts here collects faster.
        providers = sorted(self.settings.target.capabilities().providers, key="CPUExecutionProvider".__eq__)
        return Calibration.of(self.loaded.model, self.calibrating, self.settings, providers, self.progress)

    def report(self) -> Report:
        """Run the recipe, or what is left of it; what was done, without an output.

        Raises:
            CheckFailed: A pass was rolled back and ``strict`` was given, or a gate did not hold.
        """
        loaded, settings = self.loaded, self.settings
        recipe, done = kept.resumed(loaded, settings)
        now, later = kept.until(recipe, settings.stop_after)
        done = self.run(now, done)
        done.passes[:0] = [loaded.adapted] if loaded.adapted else []
        done.warnings[:0] = [*loaded.warnings, *(text for text in self.caveats if text not in done.warnings)]
        if self.choice is not None and self.choice.warning:
            done.warnings.insert(0, self.choice.warning)
        report = Report(
            input=self.described,
            target=settings.target.spec(),
            recipe=recipe.text(),
            passes=done.passes,
            rewrite=done.rewrite,
            approximation=done.approximation,
            measurements=dict(loaded.measurements),
            warnings=done.warnings,
            notes=[*loaded.notes, *([self.judge.note] if "judge" in vars(self) and self.judge.note else [])],
            preset=self.choice.to_json() if self.choice is not None else {},
            timings=timings.digest(done.timings),
            model=done.model,
        )
        if settings.strict and not report.ok:
            failed = next(p for p in done.passes if p.error)
            raise CheckFailed(
                "a pass had to be rolled back (--strict)",
                where=failed.options,
                why=failed.error,
                hint="run without --strict to get the output without it",
            )
        if later:
            kept.stop(done.model, later, done)
        return report

    def try_out(self, report: Report, emitted: Path) -> None:
        """Try out what was emitted; see ``graphc.trial``."""
        if not (self.settings.verify or self.settings.measure or self.settings.gates):
            return
        from graphc import trial

        model = report.model
        assert model is not None
        trial.try_out(
            report,
            emitted,
            self.loaded,
            self.settings,
            self.samples,
            lambda: self.last or self.checker(model),
            self.progress,
        )

    def checker(self, reference: ir.Model) -> Checker:
        """A checker whose reference is the given model."""
        from graphc.checking import Checker
        from graphc.checking.interface import fitting

        data = [fitting(reference, each) for each in self.samples]
        return Checker(reference, data=data, seed=self.settings.seed, progress=self.progress)

    def run(self, passes: Sequence[Pass], done: Done | None) -> Done:
        """Run passes on the loaded model, or on what was resumed; what is in the cache is not done again."""
        from graphc.cache import Store
        from graphc.model import nbytes

        settings = self.settings
        context = Context(
            settings.target.capabilities(),
            seed=settings.seed,
            original=None if done else self.loaded.model,
            store=Store() if settings.cache else None,
            data=self.samples,
            progress=self.progress,
        )
        store = Store()
        name = None
        if settings.cache and nbytes(self.loaded.model) <= store.limit // 8:
            name = kept.key(self.loaded, settings, passes, done, context, (self.checking, self.calibrating))
        if name is not None and (entry := store.get(name)) is not None:
            known = kept.recall(entry)
            note = "the passes ran and were checked earlier: taken from the cache (--no-cache runs them again)"
            known.warnings.append(note)
            self.table.used.update(known.timings)
            self.table.write()
            return known
        runner = Runner(
            done or Done(self.loaded.original),
            checker=self.checker if settings.verify else None,
            judge=lambda: self.judge,
            gates=settings.gates,
            context=context,
            calibration=lambda: self.calibration,
            unchecked=settings.unchecked or not settings.verify,
            timings=self.table if settings.target.timer() is not None else None,
        )
        runner.run(passes, load=None if done else self._load)
        self.table.write()
        self.last = runner.last
        if name is not None:
            store.put(name, lambda folder: kept.remember(folder, runner.done))
        return runner.done

    def _load(self, original: ir.Model) -> Step:
        """What the frontend changed, as the first step of the run."""
        result = self.loaded.result
        report = PassReport("load", "load", "exact", result.changes, result.refusals)
        return Step(report, self.loaded.model)
