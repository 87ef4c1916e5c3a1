"""Artifacts that are compiled for fixed sizes: found, loaded, compared with the model they were made from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from graphc.contract import Arrays, Backend, Progress, Runnable, no_progress
from graphc.shapes import fix
from graphc.storage import files

CLOSE = 1e-4
"""The error of compiled code, relative to the size of an output, that is never held against it."""

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphc.checking import Checker, Comparison


def backend(path: Path) -> Backend | None:
    """The backend that loads an artifact folder; None if it is none, or holds an ONNX model, which needs no backend."""
    from graphc.recipe import parse_backend

    if not (path.is_dir() and files.is_artifact(path)):
        return None
    try:
        target = json.loads((path / files.MANIFEST).read_text(encoding="utf-8"))["target"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    found = parse_backend(str(target))
    return None if found.main.endswith(".onnx") else found


def reference(model: ir.Model, runnable: Runnable, number: int = 0) -> ir.Model:
    """The model with the sizes of one of the shapes that something was compiled for; itself if it takes all sizes."""
    if not runnable.shapes or not fix.symbols(model):
        return model
    return fix.shaped(model, runnable.shapes[number])


def fitting(samples: Sequence[Arrays], runnable: Runnable) -> list[Arrays]:
    """The samples that have a shape that something was compiled for."""
    return [s for s in samples if not runnable.shapes or any(_has(s, shapes) for shapes in runnable.shapes)]


def compare(
    model: ir.Model,
    runnable: Runnable,
    *,
    checker: Checker | None = None,
    data: Sequence[Arrays] = (),
    seed: int = 0,
    progress: Progress = no_progress,
) -> Comparison:
    """Compare something with the model it was compiled from, at every shape that it was compiled for.

    Args:
        model: The reference.
        runnable: What to compare.
        checker: Of the reference, used where all sizes are taken.
        data: Inputs to use where they have the right shape; made to fit otherwise.
        seed: Of the inputs made.
        progress: ``progress(what, done, total)``.

    Returns:
        The first verdict that is not good, or that of the last shape with the cases of all.
    """
    from graphc.checking import Checker

    cases: tuple[str, ...] = ()
    verdict: Comparison | None = None
    for number in range(max(1, len(runnable.shapes))):
        static = reference(model, runnable, number)
        at = [s for s in data if not runnable.shapes or _has(s, runnable.shapes[number])]
        one = checker if checker is not None and static is model else None
        one = one or Checker(static, data=at, seed=seed, progress=progress)
        verdict = _close(one.compare(runnable, optimise=True))
        if verdict.ok and (note := _judged(verdict, static, one, runnable)):
            verdict = replace(verdict, notes=(*verdict.notes, note))
        cases += verdict.cases
        if not verdict.ok:
            return verdict
    assert verdict is not None
    return replace(verdict, cases=cases)


def _close(verdict: Comparison) -> Comparison:
    """The verdict, with outputs forgiven that differ by more than rounding explains, but by very little.

    Other kernels sum in another order and compute exponentials by other polynomials.
    """
    bad = [output for output in verdict.outputs if not output.ok]
    if not bad or not all(math.isfinite(output.ratio) and output.max_rel <= CLOSE for output in bad):
        return verdict
    forgiven = tuple(replace(output, why="") for output in verdict.outputs)
    notes = tuple(
        f"output '{output.name}' differs by {output.max_rel:.2g} of its size, {output.ratio:.2g} times what rounding "
        "explains: other kernels"
        for output in bad
    )
    return replace(verdict, ok=True, why="", outputs=forgiven, notes=(*verdict.notes, *notes))


def _judged(verdict: Comparison, model: ir.Model, checker: Checker, runnable: Runnable) -> str:
    """Which of the two is nearer to the model in double precision, where rounding alone moves it far; else ""."""
    from graphc import runtime
    from graphc.checking import doubles

    far = max(verdict.outputs, key=lambda output: output.max_rel, default=None)
    if far is None or not CLOSE < far.max_rel < math.inf:
        return ""
    said = f"output '{far.name}' differs by {far.max_rel:.2g} of its size ({far.case})"
    case = next((case for case in checker.cases() if case.description == far.case), None)
    theirs = runtime.session(model, optimise=False, frugal=True)
    try:
        assert case is not None
        found = {who.provider: who.run(case.arrays) for who in (theirs, runnable)}
        away = doubles.distances(model, case.arrays, found, far.name)
    except (runtime.CannotRun, KeyError):
        return f"{said}, which is {far.ratio:.2g} of what rounding explains"
    finally:
        theirs.close()
    ours, other = away[runnable.provider], away[theirs.provider]
    return (
        f"{said}: the model's own rounding. From the same in double precision ONNX Runtime is {other:.2g} away, "
        f"{runnable.provider} {ours:.2g}"
    )


def _has(sample: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return all(sample[name].shape == shape for name, shape in shapes.items() if name in sample)
