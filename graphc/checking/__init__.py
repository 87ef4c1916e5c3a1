"""Whether two models compute the same, up to the rounding of their dtypes.

Both run on the same inputs, the reference with the runtime's own optimisation off. Integers, booleans, strings,
shapes, dtypes and the places of NaN and infinity must be equal. Floats may differ by a small multiple of the
reference's own rounding noise, which :mod:`graphc.checking.noise` measures: errors of the size that one rounding
(or one accumulation of K products) makes are inserted behind every operator, and the spread of the outputs is the
noise. It knows dtype, accumulation length, depth and conditioning, so that the tolerance is tight for every model.
:mod:`graphc.checking.closeness` compares with it, and :mod:`graphc.checking.taps` looks behind outputs that saturate.
Where the inserted errors flip a discrete decision of the reference (an arg max, a routing), an element cannot be
compared and is left out.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import model as models
from graphc import runtime
from graphc.checking import inputs
from graphc.checking.closeness import (
    SLICE_VALUES,
    Closeness,
    NoiseMeter,
    OutputError,
    depends,
    distance,
    guessed_noise,
    is_float,
    relative,
)
from graphc.checking.grids import codes, steps
from graphc.checking.inputs import Case
from graphc.checking.interface import as_came, difference
from graphc.checking.noise import GAIN, noisy
from graphc.checking.taps import Tapped, tapped
from graphc.contract import Arrays, Runnable, no_progress
from graphc.errors import BadInput

Array = np.ndarray[Any, np.dtype[Any]]

NOISE_RUNS = 3
"""Samples of the noise; outputs with few elements get twice as many."""

MAX_SAMPLES = 8
"""Samples of the user's data that are compared; more would only take longer."""

FEW_CASES = 2
"""Cases on which models are compared that are larger than ``runtime.BIG``, or slow."""

SLOW = 1.0
"""Seconds of a run from which a model is slow."""

CODED = "its caches are in 8-bit codes: what differs is what rounding them costs, on values like those of the data"
"""What is said of a candidate whose caches are codes where those of the reference are not."""

_WEAK = 0.05
"""Noise relative to the output from which equality says little."""


@dataclass(frozen=True)
class Comparison:
    """The verdict on two models.

    Attributes:
        ok: Nothing that was compared differs. Also true if nothing could be compared: see ``checked``.
        checked: Whether the models were run and compared.
        why: What differs most, or why nothing could be checked.
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
        """The verdict as JSON types; what is infinite is null."""
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
    """What the reference gives in one case.

    Attributes:
        case: The inputs.
        outputs: The reference's outputs.
        noise: How far rounding moves them, see ``graphc.checking.closeness.NoiseMeter``.
        optimised: For float outputs, how far the runtime's optimiser moves them; filled when asked for.
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
        self._runs = NOISE_RUNS
        self._why = ""
        self._random: dict[str, str] = {}
        self._limits: list[str] = []
        self._taps: frozenset[str] = frozenset()
        self._codes: frozenset[str] = frozenset()

    def cases(self) -> list[Case]:
        """The inputs on which candidates are compared; empty if nothing can be checked."""
        return [each.case for each in self._prepare()]

    @property
    def why(self) -> str:
        """Why nothing can be checked; empty if something can."""
        self._prepare()
        return self._why

    def compare(self, candidate: ir.Model | Path | Runnable, *, optimise: bool = False) -> Comparison:
        """Compare the interface and the outputs of a candidate with those of the reference.

        Args:
            candidate: A model, a file, or an artifact that a backend has loaded.
            optimise: Whether the runtime may optimise the candidate, as it does for users. Then what its optimiser
                does to the reference is allowed, too.

        Returns:
            The verdict. A candidate that does not load or run differs; a reference that does not run gives
            ``checked=False``.
        """
        expected = self._prepare()
        runnable: Runnable
        coded: tuple[str, ...] = ()
        try:
            if isinstance(candidate, Runnable):
                runnable = candidate
            else:
                model = models.load(candidate) if isinstance(candidate, Path) else candidate
                came = model if self._model is None else as_came(self._model, model)
                coded, model = (CODED,) if came is not model else (), came
                if self._model is not None and (changed := difference(self._model, model)):
                    return Comparison(False, bool(expected), changed)
                if expected:
                    runnable = self._session(model, optimise)
        except BadInput as error:
            return Comparison(False, bool(expected), f"it does not load: {error.why or error.what}")
        if not expected:
            return Comparison(True, False, self._why)
        if optimise:
            self._measure_optimiser(expected)
        try:
            found = self._compare(expected, runnable, optimise)
            return dataclasses.replace(found, notes=(*found.notes, *coded))
        finally:
            if isinstance(runnable, Tapped):
                runnable.close()

    def _compare(self, expected: Sequence[_Expected], runnable: Runnable, optimise: bool) -> Comparison:
        found: dict[str, Closeness] = {}
        for number, each in enumerate(expected):
            self._progress("comparing", number, len(expected))
            case = each.case.description
            try:
                outputs = runnable.run(each.case.arrays)
            except BadInput as error:
                why = f"it does not run ({case}): {error.why or error.what}"
                return Comparison(False, True, why, provider=runnable.provider)
            # A tap is compared where both have it; a candidate may end in another operator.
            taps = self._taps | (runnable.names if isinstance(runnable, Tapped) else frozenset())
            for name in (each.outputs | outputs).keys() - self._random.keys():
                if name in taps and not (name in each.outputs and name in outputs):
                    continue
                closeness = found.setdefault(name, Closeness(name, self._runs, name in self._codes))
                if name not in outputs:
                    closeness.fail(case, "is missing")
                elif name not in each.outputs:
                    closeness.fail(case, "is not an output of the original")
                else:
                    noise = each.noise[name]
                    if optimise and name in each.optimised:
                        noise = np.maximum(noise, each.optimised[name])
                    closeness.add(case, each.outputs[name], outputs[name], noise)
        errors = tuple(found[name].verdict() for name in sorted(found, key=list(expected[0].outputs | found).index))
        bad = max((e for e in errors if e.why), key=lambda e: e.ratio, default=None)
        return Comparison(
            ok=bad is None,
            checked=True,
            why=f"output '{bad.name}' {bad.why} ({bad.case})" if bad else "",
            cases=tuple(each.case.description for each in expected),
            outputs=errors,
            notes=self._notes(expected),
            provider=runnable.provider,
        )

    def _session(self, model: ir.Model, optimise: bool, *, noise: bool = False) -> Tapped:
        model, taps = tapped(model)
        if noise:
            model = noisy(model, seed=self._seed)
        session = runtime.session(model, optimise=optimise, provider=self._provider, frugal=self._big)
        return Tapped(session, taps)

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
            except runtime.CannotRun as error:
                self._why = f"the original cannot be run here: {error.why or error.what}"
            except BadInput as error:
                self._why = f"{error.what}: {error.hint or error.why}"
            if not self._expected and not self._why:
                self._why = "no inputs were found with which the original runs; give some with --data"
        return self._expected

    def _run_reference(self, model: ir.Model) -> list[_Expected]:
        # One session after the other: each has its own copy of the weights where the runtime repacks them.
        session = self._session(model, False)
        self._taps, self._codes = session.names, codes(model)
        expected = self._given(session) if self._data else self._made(model, session)
        if not expected:
            return []
        again = session.run(expected[0].case.arrays)
        session.close()
        for name, array in expected[0].outputs.items():
            if name not in again or not _identical(array, again[name]):
                self._random[name] = f"output '{name}' is random, so it was not compared"
        if len(self._random) == len(expected[0].outputs):
            self._why = "all outputs of the original are random"
            return []
        if min(a.size for each in expected for a in each.outputs.values()) < SLICE_VALUES:
            self._runs = 2 * NOISE_RUNS
        try:
            self._measure_noise(model, expected)
        except runtime.CannotRun as error:
            self._limits.append(f"the rounding noise could not be measured and was guessed: {error.why}")
            for each in expected:
                each.noise = {name: guessed_noise(array) for name, array in each.outputs.items()}
        return expected

    def _given(self, session: Runnable) -> list[_Expected]:
        """The reference's outputs for the user's data."""
        expected = []
        samples = self._data[:MAX_SAMPLES]
        for number, arrays in enumerate(samples):
            self._progress("running the original", number, len(samples))
            expected.append(_Expected(Case(arrays, f"data[{number}]"), session.run(arrays)))
        return expected

    def _made(self, model: ir.Model, session: Runnable) -> list[_Expected]:
        """The reference's outputs for made inputs, as many as its size and speed allow."""
        found: dict[str, Array] = {}
        complaints: list[str] = []
        seconds = 0.0

        def accepts(arrays: Arrays) -> bool:
            nonlocal found, seconds
            start = time.perf_counter()
            try:
                found = session.run(arrays)
            except runtime.CannotRun as error:
                complaints.append(error.why)
                return False
            seconds = time.perf_counter() - start
            return True

        expected: list[_Expected] = []
        for case in inputs.cases(model, seed=self._seed, accepts=accepts):
            expected.append(_Expected(case, found))
            self._progress("running the original", len(expected), 0)
            if len(expected) >= FEW_CASES and (self._big or seconds > SLOW):
                break
        if not expected and complaints:
            self._why = f"the original runs with no inputs that were tried: {complaints[0]}"
        return expected

    def _measure_noise(self, model: ir.Model, expected: Sequence[_Expected]) -> None:
        session = self._session(model, False, noise=True)
        gain = math.sqrt(GAIN) if steps(model) else GAIN
        for number, each in enumerate(expected):
            self._progress("measuring the rounding noise", number, len(expected))
            meters = {name: NoiseMeter(array) for name, array in each.outputs.items()}
            for _ in range(self._runs):
                found = session.run(each.case.arrays)
                for name, meter in meters.items():
                    meter.add(found.get(name))
            each.noise = {name: meter.noise(gain) for name, meter in meters.items()}
        session.close()

    def _measure_optimiser(self, expected: Sequence[_Expected]) -> None:
        """Note how far the runtime's optimiser moves the reference's outputs, which is not a candidate's fault."""
        if expected[0].optimised:
            return
        assert self._model is not None
        try:
            session = self._session(self._model, True)
        except runtime.CannotRun:  # its optimiser breaks the model: then there is nothing to allow for
            return
        for each in expected:
            found = session.run(each.case.arrays)
            for name, array in each.outputs.items():
                if is_float(array) and name in found and found[name].shape == array.shape:
                    each.optimised[name] = distance(found[name], array)
        session.close()

    def _notes(self, expected: Sequence[_Expected]) -> tuple[str, ...]:
        notes = [*self._random.values(), *self._limits]
        for name, array in expected[0].outputs.items():
            if name in self._random or name in self._taps:
                continue
            # What is behind a saturated output tells more than the output.
            seen = next((tap for tap in sorted(self._taps) if tap.startswith(f"{name} before ")), name)
            found = [(each.outputs[seen], each.noise[seen]) for each in expected if seen in each.outputs]
            if not any(_comparable(noise) for _, noise in found):
                notes.append(f"output '{name}' was not compared: rounding alone decides on all of it")
            if not is_float(array):
                continue
            if not depends([values for values, _ in found], [noise for _, noise in found]):
                notes.append(f"output '{name}' is the same for all inputs tried, so that it may hide errors")
            sizes = [size for values, noise in found if (size := relative(values, noise)) is not None]
            if min(sizes, default=0.0) > _WEAK:
                notes.append(
                    f"output '{name}' is ill-conditioned: rounding alone changes it by {min(sizes):.0%} or more, "
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


def _comparable(noise: Array) -> bool:
    """Whether anything of an output is stable enough to be compared; an empty one is."""
    return not noise.size or not bool(noise.all() if noise.dtype == bool else np.isinf(noise).all())


def _identical(a: Array, b: Array) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if is_float(a):
        return bool(np.array_equal(a.astype(np.float64), b.astype(np.float64), equal_nan=True))
    return bool(np.array_equal(a, b))
