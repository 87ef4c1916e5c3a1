"""What ``graphc optimize`` and ``graphc bench`` time: models against each other, in one interleaved run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from graphc import caches, runtime
from graphc.checking import inputs
from graphc.contract import Arrays, Runnable, no_progress
from graphc.errors import BadInput
from graphc.memory import peak_memory
from graphc.model import save
from graphc.runtime import timing

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphc.data import Given
    from graphc.frontends import Source

QUICK = 1.0
"""Seconds that ``graphc optimize`` spends on timing, warm-up excluded."""

LARGEST = 512 << 20
"""Bytes of weights up to which ``graphc optimize`` times."""

SLOWEST = 3.0
"""Seconds of one run from which ``graphc optimize`` does not time."""


def sample(model: ir.Model, seed: int = 0) -> Arrays:
    """The most ordinary of :func:`samples`."""
    return samples(model, seed)[0]


def samples(model: ir.Model, seed: int = 0) -> list[Arrays]:
    """Inputs with which a model runs, made to fit its interface; caches hold what the model itself makes of inputs.

    Raises:
        BadInput: None could be made; the message says why.
    """
    session = runtime.session(model, optimise=False, frugal=True)
    complaint = ""

    def accepts(arrays: Arrays) -> bool:
        nonlocal complaint
        try:
            session.run(arrays)
        except runtime.CannotRun as error:
            complaint = complaint or error.why
            return False
        return True

    try:
        cases = inputs.generate(model, seed=seed, accepts=accepts)
        if not cases:
            raise BadInput(
                "no inputs were found with which the model runs", why=complaint, hint="give some with --data"
            )
        known = caches.pairs(model)
        return [caches.lived(known, case.arrays, session.run) for case in cases if not case.strange]
    finally:
        session.close()


def against(original: ir.Model, output: Runnable, arrays: Arrays) -> dict[str, Any] | None:
    """Time the input model, as the runtime runs it by default, against what was emitted.

    Returns:
        ``{input, output: {median, low, high}, ratio, ratio_low, ratio_high, rounds}`` in seconds, the ratio output over
        input; None where the input model does not run or a run takes too long to repeat.
    """
    start = perf_counter()
    output.run(arrays)
    if perf_counter() - start > SLOWEST:
        return None
    try:
        before = runtime.session(original, optimise=True)
        found = timing.measure({"input": before, "output": output}, arrays, seconds=QUICK)
    except BadInput:
        return None
    after = found["output"]
    return {
        **{label: {k: getattr(found[label], k) for k in ("median", "low", "high")} for label in found},
        **{k: getattr(after, k) for k in ("ratio", "ratio_low", "ratio_high", "rounds", "provider")},
    }


def bench(
    models: Sequence[Path | Source],
    *,
    data: Given | None = None,
    seconds: float = 5.0,
    threads: int = 0,
    provider: str = runtime.CPU,
    progress: Callable[[str, int, int], None] = no_progress,
) -> dict[str, Any]:
    """Time models against the first one, interleaved, and measure the peak memory of each in a process of its own.

    Args:
        models: ``.onnx`` files, artifact folders, or what ``graphc.load`` returned, that take the same inputs.
        data: Inputs to run, see ``graphc.data``; the first sample is used. Made to fit when not given.
        seconds: The time to spend on all of them together, after a warm-up.
        threads: Threads within an operator; 0 lets the runtime choose.
        provider: The execution provider.
        progress: ``progress(what, done, total)``.

    Raises:
        BadInput: A model does not load, or does not run with the inputs.
    """
    from graphc import compiled, frontends
    from graphc.checking.interface import fitting
    from graphc.data import load

    progress("loading", 0, len(models))
    targets = [None if isinstance(each, frontends.Source) else compiled.backend(Path(each)) for each in models]
    loaded: list[Source | Path] = [
        each if target or isinstance(each, frontends.Source) else frontends.load(each)
        for each, target in zip(models, targets, strict=True)
    ]
    if not isinstance(loaded[0], frontends.Source):
        raise BadInput(
            "the first model is compiled: no inputs can be made for it",
            where=str(models[0]),
            hint="name the model that it was made from first",
        )
    first = loaded[0].original
    paths = [each.path if isinstance(each, frontends.Source) else each for each in loaded]
    labels = [f"{i}:{path}" for i, path in enumerate(paths)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = [_file(each, Path(folder) / str(i)) for i, each in enumerate(loaded)]
        runnables: dict[str, Runnable] = {}
        for label, path, target in zip(labels, files, targets, strict=True):
            if target is not None:
                runnables[label] = target.load(path)
                # What is compiled takes no other sizes.
                first = compiled.reference(first, runnables[label])
            else:
                runnables[label] = runtime.session(path, optimise=True, provider=provider, threads=threads)
        arrays = load(data, first)[0] if data is not None else sample(first)
        progress("timing", 0, 0)
        fed = {
            label: fitting(each.original, arrays) if isinstance(each, frontends.Source) else arrays
            for label, each in zip(labels, loaded, strict=True)
        }
        times = timing.measure(runnables, fed, seconds=seconds)
        for i, (label, path) in enumerate(zip(labels, files, strict=True)):
            progress("measuring memory", i, len(models))
            used = peak_memory(path, fed[label], provider=provider, threads=threads)
            measured = {"memory": used.peak, "anonymous": used.anonymous}
            rows.append({"model": str(paths[i]), **asdict(times[label]), **measured})
    return {
        "schema": "graphc-bench/1",
        "models": rows,
        "rounds": rows[0]["rounds"],
        "input": ", ".join(f"{name} {list(a.shape)}" for name, a in arrays.items()),
        "threads": threads,
    }


def _file(source: Source | Path, folder: Path) -> Path:
    """The file to load: a compiled artifact's folder, a model's own, or a new one if it was only in memory."""
    if isinstance(source, Path):
        return source
    if source.files:
        return source.files[0]
    folder.mkdir()
    return save(source.original, folder / "model.onnx")[0]
