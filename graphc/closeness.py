"""Whether an output is another one up to rounding, given how far rounding moves it.

With ``d`` the difference and ``n`` the noise of an output in one case, these ratios must stay below 1:

- ``rms(d) / (RMS rms(n))``: a small error everywhere. Two correct evaluations differ by ``sqrt(2)`` of the noise; ONNX
  Runtime's optimiser changes real models by 0.2 to 0.9 of it.
- the same for every index of every axis, with ``SLICE``, in each case and over all cases together (each relative to
  its noise): an error in one channel, one class, one row.
- ``max|d| / (MAX max|n|)``: an error in one place, such as a border.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc.noise import EPS, GAIN

Array = np.ndarray[Any, np.dtype[Any]]

RMS = 6.0
"""How many times the noise the difference of a whole output may be."""
SLICE = 12.0
"""The same for one index of one axis; more, because its noise is estimated from fewer numbers."""
MAX = 6.0
"""How many times the largest noise the largest difference may be."""

SLICE_VALUES = 24
"""Samples of the noise from which it can be estimated."""

_GUESS = 20.0
"""What rounding is guessed to change, in units of eps, where it cannot be measured; real models have 2 to 20."""

_FLIP = 1e3
"""How many times the typical answer to the noise, and..."""
_FLIP_SIZE = 1e-2
"""...what share of the output's size an element must move to count as the result of a flipped decision."""


@dataclass(frozen=True)
class OutputError:
    """How far one output is from the reference's, in the worst case.

    Attributes:
        name: The output.
        max_abs: The largest absolute difference.
        max_rel: The largest absolute difference over the root mean square of the reference.
        tolerance: The largest absolute difference allowed.
        ratio: The worst of the ratios of the module's documentation; above 1 the outputs differ. Infinite where
            something must be equal and is not.
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


def is_float(array: Array) -> bool:
    """Whether an array holds floats, those of ml_dtypes included, whose NumPy kind is not ``f``."""
    return array.dtype.kind == "f" or array.dtype.name.startswith(("float", "bfloat"))


def noise_of(array: Array, runs: Sequence[Array]) -> Array:
    """How far rounding moves every element of an output.

    Args:
        array: The output.
        runs: The same output of runs with inserted errors, ``GAIN`` times as large as those of rounding.

    Returns:
        For floats the root mean square of the error, float32, infinite where rounding flips a decision; for anything
        else a boolean array, true where it does.
    """
    # Where rounding decides on the shape, as on that of NonZero's result, nothing can be compared.
    unstable = any(run.shape != array.shape for run in runs)
    if not is_float(array):
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
        with np.errstate(invalid="ignore", over="ignore"):
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


def guessed_noise(array: Array) -> Array:
    """Like :func:`noise_of`, for a model of which no runs with inserted errors are to be had."""
    if not is_float(array):
        return np.zeros(array.shape, dtype=bool)
    magnitude = np.where(np.isfinite(_wide(array)), np.abs(_wide(array)), 0.0)
    return (_GUESS * _eps(array.dtype) * np.maximum(magnitude, _rms(magnitude))).astype(np.float32)


def distance(a: Array, b: Array) -> Array:
    """The absolute difference of two float arrays, 0 where both are the same infinity or NaN; float32."""
    with np.errstate(invalid="ignore"):
        found = np.abs(_wide(a) - _wide(b))
    return np.where(np.isnan(found), 0, found).astype(np.float32)


def relative(array: Array, noise: Array) -> float | None:
    """The noise of a float output relative to its size; None if it has none."""
    usable = np.isfinite(noise) & np.isfinite(_wide(array))
    scale = _rms(array[usable])
    return _rms(noise[usable]) / scale if scale else None


class Closeness:
    """Compares one output, case by case.

    Args:
        name: The output.
        noise_runs: How many samples of the noise each element has.
    """

    def __init__(self, name: str, noise_runs: int) -> None:
        self._runs = noise_runs
        self._worst = OutputError(name)
        self._pools: dict[int, _Pool] = {}
        self._cases = 0

    def add(self, case: str, want: Array, got: Array, noise: Array) -> None:
        """Compare one case.

        Args:
            case: Its description.
            want: The reference's output.
            got: The candidate's.
            noise: What :func:`noise_of` gives for the reference's.
        """
        error = dataclasses.replace(self._compare(want, got, noise), case=case)
        if self._cases == 0 or (bool(error.why), error.ratio) > (bool(self._worst.why), self._worst.ratio):
            self._worst = error
        self._cases += 1

    def fail(self, case: str, why: str) -> None:
        """Note that there is nothing to compare."""
        self._worst = dataclasses.replace(self._worst, ratio=math.inf, case=case, why=why)
        self._cases += 1

    def verdict(self) -> OutputError:
        """The worst case, or what shows over all cases together only."""
        worst = self._worst
        for axis, pool in self._pools.items():
            if pool.cases != self._cases or self._runs * pool.count < SLICE_VALUES:
                continue
            ratio, index = _slice_ratio(pool.errors, pool.noise)
            if ratio > worst.ratio:
                worst = dataclasses.replace(worst, ratio=ratio)
                if ratio > 1:
                    why = f"differs by {ratio:.3g} times what rounding explains at index {index} of axis {axis}"
                    worst = dataclasses.replace(worst, why=why, case="all cases together")
        return worst

    def _compare(self, want: Array, got: Array, noise: Array) -> OutputError:
        name = self._worst.name
        if got.dtype != want.dtype and not (_is_text(want) and _is_text(got)):
            return _wrong(name, f"has the dtype {got.dtype} instead of {want.dtype}")
        usable = ~noise if noise.dtype == bool else np.isfinite(noise)
        skipped = 1.0 - float(usable.mean()) if usable.size else 0.0
        if want.size and not usable.any():
            return OutputError(name, skipped=skipped)
        if got.shape != want.shape:
            return _wrong(name, f"has the shape {list(got.shape)} instead of {list(want.shape)}")
        if not is_float(want):
            count = int(np.count_nonzero((got != want) & usable))
            if count:
                return _wrong(name, f"differs in {count} of {want.size} elements, which must be equal")
            return OutputError(name, skipped=skipped)
        exact, found = _wide(want), _wide(got)
        for what, test in (("NaN", np.isnan), ("infinity", np.isinf)):
            there, here = test(exact), test(found)
            if bool(((there != here) & usable).any()):
                return _wrong(name, f"has {what} in other places ({int(here.sum())} instead of {int(there.sum())})")
        infinite = np.isinf(exact) & usable
        if bool((exact[infinite] != found[infinite]).any()):
            return _wrong(name, "has infinities of another sign")
        usable &= np.isfinite(exact)
        with np.errstate(invalid="ignore"):
            difference = np.where(usable, np.abs(found - exact), 0.0)
        error = self._judge(exact, difference, np.where(usable, noise, 0.0).astype(np.float64))
        return dataclasses.replace(error, skipped=skipped)

    def _judge(self, exact: Array, difference: Array, noise: Array) -> OutputError:
        """The ratios of one case; its slices also go to the pools."""
        typical = _rms(noise)
        largest, allowed = float(difference.max(initial=0.0)), MAX * float(noise.max(initial=0.0))
        ratio = max(_ratio(largest, allowed), _ratio(_rms(difference), RMS * typical))
        place = ""
        for axis, errors, allowances, count in _slices(difference, noise):
            if typical:
                self._pool(axis, errors / typical**2, allowances / typical**2, count)
            if self._runs * count >= SLICE_VALUES:
                found, index = _slice_ratio(errors, allowances)
                if found > max(ratio, 1.0):
                    place = f", most of all at index {index} of axis {axis}"
                ratio = max(ratio, found)
        scale = _rms(exact[np.isfinite(exact)])
        relative = largest / scale if scale else (math.inf if largest else 0.0)
        error = OutputError(self._worst.name, largest, relative, allowed, ratio)
        if ratio <= 1:
            return error
        size = f"{relative:.2g} of its size" if scale else "it should be zero"
        why = f"differs by up to {largest:.3g} ({size}), {ratio:.3g} times what rounding explains{place}"
        return dataclasses.replace(error, why=why)

    def _pool(self, axis: int, errors: Array, noise: Array, count: int) -> None:
        pool = self._pools.setdefault(axis, _Pool(np.zeros_like(errors), np.zeros_like(noise)))
        if pool.errors.shape == errors.shape:
            pool.errors += errors
            pool.noise += noise
            pool.count += count
            pool.cases += 1


@dataclass
class _Pool:
    """Sums over cases of the squares along an axis."""

    errors: Array
    noise: Array
    count: int = 0
    cases: int = 0


def _slices(difference: Array, noise: Array) -> Iterator[tuple[int, Array, Array, int]]:
    """For every axis: its number, sums of the squares for each index of it, and how many squares these sum."""
    errors, noises = np.square(difference), np.square(noise)
    for axis, size in enumerate(difference.shape):
        if size > 1:
            others = tuple(i for i in range(difference.ndim) if i != axis)
            yield axis, errors.sum(axis=others), noises.sum(axis=others), difference.size // size


def _slice_ratio(errors: Array, noise: Array) -> tuple[float, int]:
    """The worst ratio of the slices of an axis, and its index."""
    ratios = np.divide(errors, noise, out=np.where(errors > 0, np.inf, 0.0), where=noise > 0)
    index = int(ratios.argmax())
    return math.sqrt(float(ratios[index])) / SLICE, index


def _wrong(name: str, why: str) -> OutputError:
    return OutputError(name, ratio=math.inf, why=why)


def _is_text(array: Array) -> bool:
    return array.dtype.kind in "OUS"


def _wide(array: Array) -> Array:
    return array.astype(np.float64)


def _rms(array: Array) -> float:
    return math.sqrt(float(np.mean(np.square(_wide(array))))) if array.size else 0.0


def _ratio(value: float, allowed: float) -> float:
    if not value:
        return 0.0
    return value / allowed if allowed else math.inf


def _eps(dtype: np.dtype[Any]) -> float:
    return EPS.get(ir.DataType.from_numpy(dtype), 2.0**-3)  # the 8-bit floats
