"""Tries out what was emitted as its users will run it: a fresh session with default options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graphc import compiled, measure
from graphc.checking.interface import Array, fitting
from graphc.contract import Arrays, Runnable, no_progress
from graphc.errors import BadInput, CheckFailed, NotHere
from graphc.gate import Gate
from graphc.model import nbytes
from graphc.views.units import seconds, size

if TYPE_CHECKING:
    from graphc.checking import Checker
    from graphc.frontends import Source
    from graphc.report import Report
    from graphc.settings import Settings

SLOWER = 1.05
"""Latency ratio from which the report says that the output is slower, if the whole spread is above it."""


def try_out(
    report: Report,
    emitted: Path,
    source: Source,
    settings: Settings,
    samples: Sequence[Arrays],
    checker: Callable[[], Checker],
    progress: Callable[[str, int, int], None] = no_progress,
) -> None:
    """Load what was emitted, compare it, time it against the input, hold the gates; adds to the report.

    Args:
        report: Of the run so far; its ``output`` describes what was emitted.
        emitted: The ``.onnx`` file or the artifact folder.
        source: The model as it came.
        settings: The flags of the run.
        samples: The user's data.
        checker: Gives the checker whose reference computes what the output must.
        progress: ``progress(what, done, total)``.

    Raises:
        CheckFailed: It does not load or run although the model did, or computes something else, or breaks a gate.
    """
    assert report.model is not None
    if source.name == "model":
        hold_sizes(report, settings)
    latency = [gate for gate in settings.gates if gate.kind == "latency"]
    if settings.verify and not report.rewrite.get("checked", True):
        return
    # Runtimes repack weights to run fast, which takes as much memory again.
    timed = bool(latency) or (settings.measure and nbytes(report.model) <= measure.LARGEST)
    if not (settings.verify or timed):
        return
    progress("loading what was emitted", 0, 0)
    try:
        loaded = settings.target.load(emitted, frugal=not timed)
        if settings.verify:
            _compare(loaded, checker, source, report, samples)
        if timed or loaded.shapes:
            progress("reading back", 0, 0)
            _read_back(emitted, settings, report)
        if timed:
            progress("measuring", 0, 0)
            _time(loaded, samples, source, settings, report, latency)
        elif settings.measure:
            report.warnings.append("not timed, to spare memory: 'graphc bench INPUT OUTPUT' times large models")
    except NotHere as error:
        report.warnings.append(f"what was emitted cannot run here, so it was neither compared nor timed: {error.what}")
    except BadInput as error:
        raise CheckFailed(
            "what was emitted does not run; nothing was written",
            where=error.where,
            why=error.why or error.what,
            hint="please report this as a defect of graphc, with the model if you may",
        ) from error


def _read_back(emitted: Path, settings: Settings, report: Report) -> None:
    """Warn of what the target does not run as the model has it."""
    report.warnings += settings.target.unrealised(emitted)


def hold_sizes(report: Report, settings: Settings) -> None:
    """Hold the limits on the size of the output.

    Raises:
        CheckFailed: It is larger.
    """
    for gate in settings.gates:
        if gate.kind == "size":
            _hold(gate, report.output["bytes"], report.input["bytes"], size)


def _compare(
    loaded: Runnable, checker: Callable[[], Checker], source: Source, report: Report, samples: Sequence[Arrays]
) -> None:
    assert report.model is not None
    if loaded.shapes:
        verdict = compiled.compare(report.model, loaded, data=compiled.fitting(samples, loaded))
        if not verdict.ok:
            raise CheckFailed(
                "what was compiled computes something else; nothing was written",
                why=verdict.why,
                hint="-t onnxruntime; and please report this as a defect of graphc, with the model if you may",
            )
        report.warnings += [note for note in verdict.notes if note not in report.warnings]
        worst = max((output.max_rel for output in verdict.outputs), default=0.0)
        report.measurements["compiled"] = {
            "cases": list(verdict.cases),
            "worst": worst,
            "provider": loaded.provider,
            "shapes": [{name: list(shape) for name, shape in each.items()} for each in loaded.shapes],
        }
        return
    judge = checker()
    verdict = judge.compare(loaded, optimise=True)
    if verdict.ok:
        return
    own = judge.compare(source.original, optimise=True)
    if own.ok:
        raise CheckFailed(
            "what was emitted computes something else when the runtime optimises it; nothing was written",
            why=verdict.why,
            hint="leave out passes (-p) until it holds, and please report this as a defect of graphc",
        )
    report.warnings.append(
        f"the runtime's own optimisation changes the result, of the input as well as of the output: {verdict.why}"
    )


def _time(
    loaded: Runnable,
    samples: Sequence[Arrays],
    source: Source,
    settings: Settings,
    report: Report,
    latency: Sequence[Gate],
) -> None:
    assert report.model is not None
    runs = compiled.fitting(samples, loaded)
    sample = runs[0] if runs else measure.sample(compiled.reference(source.original, loaded), settings.seed)
    fed = fitting(report.model, sample)
    if fed is not sample:
        loaded = _Fed(loaded, fed)
    found = measure.against(source.original, loaded, sample)
    if found is None:
        if latency:
            raise CheckFailed("the latency could not be measured", why="the input model does not run or is too slow")
        return
    report.measurements["latency"] = found
    for gate in latency:
        _hold(gate, found["output"]["median"], found["input"]["median"], seconds)
    if found["ratio_low"] > SLOWER:
        report.warnings.append(
            f"the output is slower than the input here: {found['ratio']:.2f}x "
            f"({found['ratio_low']:.2f} to {found['ratio_high']:.2f})"
            + (f": {settings.target.when_slower}" if settings.target.when_slower else "")
        )


class _Fed(Runnable):
    """Runs a model with fewer inputs, or others, on what becomes of those of the model as it came.

    Args:
        inner: The model, loaded.
        fed: What it runs on, whatever it is given.
    """

    def __init__(self, inner: Runnable, fed: Arrays) -> None:
        self._inner, self._fed = inner, fed
        self.provider = inner.provider

    def run(self, inputs: Arrays) -> dict[str, Array]:
        return self._inner.run(self._fed)


def _hold(gate: Gate, value: float, before: float, show: Callable[[float], str]) -> None:
    limit = gate.limit * before if gate.relative else gate.limit
    if value > limit:
        raise CheckFailed(
            f"the gate '{gate}' does not hold; nothing was written",
            why=f"{show(value)} is more than {show(limit)}",
            hint="choose a stronger recipe, or a milder limit",
        )
