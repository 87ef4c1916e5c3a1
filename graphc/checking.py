"""Whether two models compute the same, up to the rounding of their dtypes.

Both run on the same inputs, the reference with the runtime's own optimisation off. Integers, booleans, strings,
shapes, dtypes and the places of NaN and infinity must be equal. Floats may differ by a small multiple of the
reference's own rounding noise, which :mod:`graphc.noise` measures: errors of the size that one rounding (or one
accumulation of K products) makes are inserted behind every operator, and the spread of the outputs is the noise.
It knows dtype, accumulation length, depth and conditioning, so that the tolerance is tight for every model.

With ``d`` the difference and ``n`` the noise of an output in one case, three ratios must stay below 1:

- ``rms(d) / (RMS rms(n))``: a small error everywhere. Two correct evaluations differ by ``sqrt(2)`` of the noise; ONNX
  Runtime's optimiser changes real models by 0.2 to 0.9 of it.
- the same for every index of every axis, with ``SLICE``: an error in one channel, one class, one row.
- ``max|d| / (MAX max|n|)``: an error in one place, such as a border.

Where the inserted errors (``GAIN`` times the rounding) already flip a discrete decision of the reference, an arg max, a
routing, an element cannot be compared and is left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import inputs, runtime
from graphc import model as models
from graphc.contract import Arrays, Runnable, no_progress
from graphc.errors import BadInput
from graphc.inputs import Case
from graphc.noise import EPS, GAIN, noisy

Array = np.ndarray[Any, np.dtype[Any]]

RMS = 6.0
"""How many times the noise the difference of a whole output may be."""
SLICE = 12.0
"""The same for one index of one axis; more, because its noise is estimated from fewer numbers."""
MAX = 6.0
"""How many times the largest noise the largest difference may be."""

NOISE_RUNS = 3
MAX_SAMPLES = 8
"""Samples of the user's data that are compared; more would only take longer."""
BIG_MODEL_CASES = 2

_FLIP = 1e3
"""How many times the typical answer to the noise, and..."""
_FLIP_SIZE = 1e-2
"""...what share of the output's size an element must move to count as the result of a flipped decision."""
_WEAK = 0.05
"""Noise relative to the output from which equality says little."""
_SLICE_VALUES = 24
"""Elements that a slice must have, noise runs included, for its noise to be an estimate."""


@dataclass(frozen=True)
class OutputError:
    """How far one output is from the reference's, in the worst case.

    Attributes:
        name: The output.
        max_abs: The largest absolute difference.
        max_rel: The largest absolute difference over the root mean square of the reference.
        tolerance: The largest absolute difference allowed.
        ratio: The worst of the three ratios of the module's documentation; above 1 the outputs differ. Infinite for
            what must be equal and is not.
        case: The description of the worst case.
        why: What is wrong; empty if nothing is.
        skipped: The share of elements that rounding alone flips, which could not be compared.
    """

    name: str
    max_abs: float = 0.0
    max_rel: float = 0.0
    tolerance: float = 0.0
    ratio: float = 0.0
    case: str = ""
    why: str = ""
    skipped: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.why


@dataclass(frozen=True)
class Comparison:
    """The verdict on two models.

    Attributes:
        ok: Nothing that was compared differs. Also true if nothing could be compared: see ``checked``.
        checked: Whether the models were run and compared.
        why: What differs first, or why nothing could be checked.
        cases: Descriptions of the inputs that were compared.
        outputs: The worst error of every output.
        notes: What limits the verdict: outputs that are random, or so ill-conditioned that rounding hides errors.
        provider: What ran the candidate.
    """

    ok: bool
    checked: bool
    why: str = ""
    cases: tuple[str, ...] = ()
    outputs: tuple[OutputError, ...] = ()
    notes: tuple[str, ...] = ()
    provider: str = ""

    @property
    def worst(self) -> OutputError | None:
        """The output that is furthest from the reference, relative to its tolerance."""
        return max(self.outputs, key=lambda o: (bool(o.why), o.ratio), default=None)

    def to_json(self) -> dict[str, Any]:
        """The verdict as JSON types; an infinite ratio is null."""
        return dataclasses.asdict(self) | {
            "cases": list(self.cases),
            "notes": list(self.notes),
            "outputs": [
                {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in vars(o).items()}
                for o in self.outputs
            ],
        }


@dataclass
class _Expected:
    """What the reference gives in one case, and how far rounding moves it.

    Attributes:
        case: The inputs.
        outputs: The reference's outputs.
        noise: For float outputs the root mean square of the rounding error of every element, infinite where rounding
            flips a decision; for others, true where it does.
        optimised: For float outputs, how far the runtime's optimiser moves the reference; filled when asked for.
    """

    case: Case
    outputs: dict[str, Array]
    noise: dict[str, Array] = field(default_factory=dict)
    optimised: dict[str, Array] = field(default_factory=dict)


class Checker:
    """Compares candidates with one reference, whose outputs are computed once, on first use.

    Args:
        reference: The model that is right.
        data: Inputs to use instead of made ones; the first ``MAX_SAMPLES`` are.
        seed: Of the made inputs and of the noise.
        provider: The execution provider that runs both.
        progress: ``progress(what, done, total)``.
    """

    def __init__(
        self,
        reference: ir.Model | Path,
        *,
        data: Sequence[Arrays] = (),
        seed: int = 0,
        provider: str = runtime.CPU,
        progress: Callable[[str, int, int], None] = no_progress,
    ) -> None:
        self._reference, self._data, self._seed = reference, data, seed
        self._provider, self._progress = provider, progress
        self._model: ir.Model | None = None
        self._expected: list[_Expected] | None = None
        self._why = ""
        self._random: dict[str, str] = {}

    def cases(self) -> list[Case]:
        """The inputs on which candidates are compared; empty if nothing can be checked."""
        return [e.case for e in self._prepare()]

    @property
    def why(self) -> str:
        """Why nothing can be checked; empty if something can."""
        self._prepare()
        return self._why

    def reference_outputs(self) -> list[Mapping[str, Array]]:
        """What the reference gives, case by case."""
        return [e.outputs for e in self._prepare()]

    def compare(self, candidate: ir.Model | Path | Runnable, *, optimise: bool = False) -> Comparison:
        """Run a candidate and compare its interface and its outputs with the reference's.

        Args:
            candidate: A model, a file, or an artifact that a backend has loaded.
            optimise: Whether the runtime may optimise the candidate, as it does when users run it.

        Returns:
            The verdict. A candidate that does not load or run differs; a reference that does not run gives
            ``checked=False``.
        """
        expected = self._prepare()
        try:
            if not isinstance(candidate, Runnable) and self._model is not None:
                model = models.load(candidate) if isinstance(candidate, Path) else candidate
                if difference := interface_difference(self._model, model):
                    return Comparison(False, bool(expected), difference)
            if not expected:
                return Comparison(True, False, self._why)
            runnable = candidate if isinstance(candidate, Runnable) else self._session(candidate, optimise)
        except BadInput as error:
            return Comparison(False, bool(expected), f"it does not load: {error.why or error.what}")
        if optimise:
            self._measure_optimiser(expected)
        worst: dict[str, OutputError] = {}
        try:
            for number, each in enumerate(expected):
                self._progress("comparing", number, len(expected))
                try:
                    found = runnable.run(each.case.arrays)
                except BadInput as error:
                    why = f"it does not run ({each.case.description}): {error.why or error.what}"
                    return Comparison(False, True, why, provider=runnable.provider)
                for output in self._errors(each, found, optimise):
                    known = worst.get(output.name)
                    if known is None or (bool(output.why), output.ratio) > (bool(known.why), known.ratio):
                        worst[output.name] = output
        finally:
            if isinstance(runnable, runtime.Session) and runnable is not candidate:
                runnable.close()
        outputs = tuple(worst.values())
        bad = max((o for o in outputs if o.why), key=lambda o: o.ratio, default=None)
        return Comparison(
            ok=bad is None,
            checked=True,
            why=f"output '{bad.name}' {bad.why} ({bad.case})" if bad else "",
            cases=tuple(e.case.description for e in expected),
            outputs=outputs,
            notes=self._notes(expected),
            provider=runnable.provider,
        )

    def _session(self, model: ir.Model | Path, optimise: bool) -> runtime.Session:
        return runtime.session(model, optimise=optimise, provider=self._provider, frugal=self._big)

    @property
    def _big(self) -> bool:
        assert self._model is not None
        return runtime.constants_nbytes(self._model) > runtime.BIG

    def _prepare(self) -> list[_Expected]:
        """The reference's outputs and their noise; computed once."""
        if self._expected is None:
            self._expected = []
            reference = self._reference
            try:
                self._model = models.load(reference) if isinstance(reference, Path) else reference.clone()
                self._expected = self._run_reference(self._model)
            except BadInput as error:
                self._why = f"the original cannot be run here: {error.why or error.what}"
            if not self._expected and not self._why:
                self._why = "no inputs were found with which the original runs; give some with --data"
        return self._expected

    def _run_reference(self, model: ir.Model) -> list[_Expected]:
        limit = BIG_MODEL_CASES if self._big else None
        session = self._session(self._reference, False)
        cases = self._cases(model, session)[:limit]
        expected = []
        for number, case in enumerate(cases):
            self._progress("running the original", number, len(cases))
            expected.append(_Expected(case, session.run(case.arrays)))
        if expected:
            again = session.run(expected[0].case.arrays)
            for name, array in expected[0].outputs.items():
                if name not in again or not _identical(array, again[name]):
                    self._random[name] = f"output '{name}' is random, so it was not compared"
        session.close()
        if expected and len(self._random) == len(expected[0].outputs):
            self._why = "all outputs of the original are random"
            return []
        noise_session = self._session(noisy(model, seed=self._seed), False)
        smallest = min(a.size for each in expected for a in each.outputs.values())
        count = NOISE_RUNS if smallest >= _SLICE_VALUES else 2 * NOISE_RUNS
        for number, each in enumerate(expected):
            self._progress("measuring the rounding noise", number, len(expected))
            runs = [noise_session.run(each.case.arrays) for _ in range(count)]
            for name, array in each.outputs.items():
                each.noise[name] = _noise(array, [r[name] for r in runs if name in r])
        noise_session.close()
        return expected

    def _measure_optimiser(self, expected: Sequence[_Expected]) -> None:
        """How far the runtime's optimiser moves the reference's own outputs: not a candidate's fault."""
        if expected[0].optimised:
            return
        session = self._session(self._reference, True)
        for each in expected:
            found = session.run(each.case.arrays)
            for name, array in each.outputs.items():
                if _is_float(array) and name in found and found[name].shape == array.shape:
                    with np.errstate(invalid="ignore"):
                        difference = np.abs(_wide(found[name]) - _wide(array))
                    each.optimised[name] = np.where(np.isnan(difference), 0, difference).astype(np.float32)
        session.close()

    def _cases(self, model: ir.Model, session: runtime.Session) -> list[Case]:
        if self._data:
            return [Case(arrays, f"data[{i}]") for i, arrays in enumerate(self._data[:MAX_SAMPLES])]
        complaint = ""

        def accepts(arrays: Arrays) -> bool:
            nonlocal complaint
            try:
                session.run(arrays)
            except runtime.CannotRun as error:
                complaint = complaint or error.why
                return False
            return True

        cases = inputs.generate(model, seed=self._seed, accepts=accepts)
        if not cases and complaint:
            self._why = f"the original runs with no inputs that were tried: {complaint}"
        return cases

    def _errors(self, expected: _Expected, found: Mapping[str, Array], optimise: bool) -> Iterator[OutputError]:
        case = expected.case.description
        for name, want in expected.outputs.items():
            if name in self._random:
                continue
            if name not in found:
                yield OutputError(name, ratio=math.inf, case=case, why="is missing")
                continue
            noise = expected.noise[name]
            if optimise and name in expected.optimised:
                noise = np.maximum(noise, expected.optimised[name])
            yield _compare(name, want, found[name], noise, case)
        for name in found.keys() - expected.outputs.keys():
            yield OutputError(name, ratio=math.inf, case=case, why="is not an output of the original")

    def _notes(self, expected: Sequence[_Expected]) -> tuple[str, ...]:
        notes = list(self._random.values())
        for name in expected[0].outputs:
            if name in self._random:
                continue
            noise = min((_relative_noise(each, name) for each in expected), default=0.0)
            if noise > _WEAK:
                notes.append(
                    f"output '{name}' is ill-conditioned: rounding alone changes it by {noise:.0%} or more, "
                    "so that small errors cannot be seen"
                )
        return tuple(notes)


def compare(
    reference: ir.Model | Path,
    candidate: ir.Model | Path | Runnable,
    *,
    data: Sequence[Arrays] = (),
    seed: int = 0,
    optimise: bool = False,
    provider: str = runtime.CPU,
) -> Comparison:
    """Compare two models once; see :class:`Checker`."""
    return Checker(reference, data=data, seed=seed, provider=provider).compare(candidate, optimise=optimise)


def interface_difference(reference: ir.Model, candidate: ir.Model) -> str:
    """What differs between the inputs and outputs that two models declare; empty if nothing does.

    Names, order, dtypes and shapes must be the same, but an output may declare what was unknown: dimensions without a
    name, or with one that no input has.
    """
    symbols = {d.value for v in reference.graph.inputs for d in v.shape or () if not isinstance(d, int)}
    for kind in ("input", "output"):
        ours, theirs = (list(getattr(m.graph, f"{kind}s")) for m in (reference, candidate))
        if kind == "input":  # a default is an initializer, listed or not
            ours, theirs = ([v for v in vs if not v.is_initializer()] for vs in (ours, theirs))
        names, other = [v.name for v in ours], [v.name for v in theirs]
        if names != other:
            return f"its {kind}s are {', '.join(map(str, other))} instead of {', '.join(map(str, names))}"
        for a, b in zip(ours, theirs, strict=True):
            if a.type is not None and a.type != b.type:
                return f"{kind} '{a.name}' is {b.type} instead of {a.type}"
            if not _shape_kept(a.shape, b.shape, symbols if kind == "output" else None):
                return f"{kind} '{a.name}' has the shape {_shape_text(b.shape)} instead of {_shape_text(a.shape)}"
    return ""


def _shape_kept(ours: ir.Shape | None, theirs: ir.Shape | None, symbols: set[str | None] | None) -> bool:
    """Whether a declared shape is still what it was.

    With the ``symbols`` of the inputs, any other dimension without a number may have become known.
    """
    if ours is None or theirs is None:
        return ours is theirs or (ours is None and symbols is not None)
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        free = not isinstance(a, int) and (a.value is None or (symbols is not None and a.value not in symbols))
        if not free and a != b:
            return False
        if free and symbols is None and isinstance(b, int):
            return False
    return True


def _shape_text(shape: ir.Shape | None) -> str:
    if shape is None:
        return "unknown"
    return "[" + ", ".join(str(d) if isinstance(d, int) else str(d.value or "?") for d in shape) + "]"


def _is_float(array: Array) -> bool:
    """Whether an array holds floats, those of ml_dtypes included (NumPy gives them the kind 'V')."""
    return array.dtype.kind == "f" or array.dtype.name in ("bfloat16",) or array.dtype.name.startswith("float")


def _identical(a: Array, b: Array) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if _is_float(a):
        return bool(np.array_equal(a.astype(np.float64), b.astype(np.float64), equal_nan=True))
    return bool(np.array_equal(a, b))


def _rms(array: Array) -> float:
    return math.sqrt(float(np.mean(np.square(_wide(array))))) if array.size else 0.0


def _wide(array: Array) -> Array:
    return array.astype(np.float64)


def _noise(array: Array, runs: Sequence[Array]) -> Array:
    """How far rounding moves every element: see :class:`_Expected`."""
    # Rounding decides on the shape, as that of NonZero's result: nothing can be compared.
    unstable = any(run.shape != array.shape for run in runs)
    if not _is_float(array):
        flips = np.full(array.shape, unstable)
        for run in () if unstable else runs:
            flips |= np.asarray(run != array)
        return flips
    if unstable or not array.size:
        return np.full(array.shape, np.inf, dtype=np.float32)
    exact = _wide(array)
    finite = np.isfinite(exact)
    magnitude = np.where(finite, np.abs(exact), 0.0)
    squares = np.zeros(array.shape)
    for run in runs:
        values = _wide(run)
        finite_too = np.isfinite(values)
        with np.errstate(invalid="ignore"):
            moved = np.where(finite & finite_too, np.square(values - exact), 0.0)
        # What becomes finite or infinite by rounding alone cannot be compared either.
        squares += np.where(finite == finite_too, moved, np.inf)
    squares /= len(runs)
    stable = finite & np.isfinite(squares)
    typical = float(np.median(squares[stable])) if stable.any() else 0.0
    scale = _rms(magnitude)
    # A decision flipped: the answer to a tiny error is neither tiny nor like that of the other elements.
    squares[(squares > _FLIP**2 * typical) & (squares > (_FLIP_SIZE * scale) ** 2)] = np.inf
    eps = _eps(array.dtype)
    floor = np.square(0.5 * eps * magnitude) + (1e-3 * eps * scale) ** 2
    return np.sqrt(squares / GAIN**2 + floor).astype(np.float32)


def _relative_noise(expected: _Expected, name: str) -> float:
    noise, output = expected.noise[name], expected.outputs[name]
    if noise.dtype == bool:
        return 0.0
    usable = np.isfinite(noise) & np.isfinite(_wide(output))
    scale = _rms(output[usable])
    return _rms(noise[usable]) / scale if scale and usable.any() else 0.0


def _eps(dtype: np.dtype[Any]) -> float:
    try:
        return EPS[ir.DataType.from_numpy(dtype)]
    except (KeyError, TypeError):
        return 2.0**-3  # the 8-bit floats


def _compare(name: str, want: Array, got: Array, noise: Array, case: str) -> OutputError:
    """Compare one output in one case."""

    def wrong(why: str) -> OutputError:
        return OutputError(name, ratio=math.inf, case=case, why=why)

    text = want.dtype.kind in "OUS" and got.dtype.kind in "OUS"
    if got.dtype != want.dtype and not text:
        return wrong(f"has the dtype {got.dtype} instead of {want.dtype}")
    usable = ~noise if noise.dtype == bool else np.isfinite(noise)
    skipped = 1.0 - float(usable.mean()) if usable.size else 0.0
    if want.size and not usable.any():
        return OutputError(name, case=case, skipped=skipped)
    if got.shape != want.shape:
        return wrong(f"has the shape {list(got.shape)} instead of {list(want.shape)}")
    if not _is_float(want):
        count = int(np.count_nonzero((got != want) & usable))
        if count:
            return wrong(f"differs in {count} of {want.size} elements, which must be equal")
        return OutputError(name, case=case, skipped=skipped)
    exact, found = _wide(want), _wide(got)
    for what, test in (("NaN", np.isnan), ("infinity", np.isinf)):
        there, here = test(exact), test(found)
        if bool(((there != here) & usable).any()):
            return wrong(f"has {what} in other places ({int(here.sum())} instead of {int(there.sum())})")
    infinite = np.isinf(exact) & usable
    if bool((exact[infinite] != found[infinite]).any()):
        return wrong("has infinities of another sign")
    usable &= np.isfinite(exact)
    with np.errstate(invalid="ignore"):
        difference = np.where(usable, np.abs(found - exact), 0.0)
    error = _judge(name, exact, difference, np.where(usable, noise, 0.0))
    return dataclasses.replace(error, case=case, skipped=skipped)


def _judge(name: str, exact: Array, difference: Array, noise: Array) -> OutputError:
    """The three ratios of the module's documentation, and what they say."""
    if not difference.any():
        return OutputError(name, tolerance=MAX * float(noise.max(initial=0.0)))
    largest, allowed = float(difference.max()), MAX * float(noise.max())
    ratio = max(_ratio(largest, allowed), _ratio(_rms(difference), RMS * _rms(noise)))
    place = ""
    for axis in range(exact.ndim):
        others = tuple(i for i in range(exact.ndim) if i != axis)
        if exact.shape[axis] < 2 or NOISE_RUNS * exact.size // exact.shape[axis] < _SLICE_VALUES:
            continue
        errors = np.sqrt(np.mean(np.square(difference), axis=others))
        allowances = SLICE * np.sqrt(np.mean(np.square(noise, dtype=np.float64), axis=others))
        ratios = np.divide(errors, allowances, out=np.where(errors > 0, np.inf, 0.0), where=allowances > 0)
        if ratios.max() > max(ratio, 1.0):
            place = f", most of all at index {int(ratios.argmax())} of axis {axis}"
        ratio = max(ratio, float(ratios.max()))
    scale = _rms(exact[np.isfinite(exact)])
    relative = largest / scale if scale else math.inf
    error = OutputError(name, largest, relative, allowed, ratio)
    if ratio <= 1:
        return error
    size = f"{relative:.2g} of its size" if scale else "it should be zero"
    return dataclasses.replace(
        error, why=f"differs by up to {largest:.3g} ({size}), {ratio:.3g} times what rounding explains{place}"
    )


def _ratio(value: float, allowed: float) -> float:
    if not value:
        return 0.0
    return value / allowed if allowed else math.inf
