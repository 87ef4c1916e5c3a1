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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc.checking.noise import EPS, GAIN

Array = np.ndarray[Any, np.dtype[Any]]

RMS = 6.0
"""How many times the noise the difference of a whole output may be."""
SLICE = 12.0
"""The same for one index of one axis; more, because its noise is estimated from fewer numbers."""
MAX = 6.0
"""How many times the largest noise the largest difference may be."""

LUCK = 2
"""Codes of a grid that may be a step away although the noise moved none."""

SLICE_VALUES = 24
"""Samples of the noise from which it can be estimated."""

_BLOCK = 1 << 18
"""Elements that are widened to double precision at a time."""

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


class NoiseMeter:
    """Measures how far rounding moves every element of an output, from runs with inserted errors.

    Args:
        array: The output.
    """

    def __init__(self, array: Array) -> None:
        self._array = array
        self._runs = 0
        self._unstable = False
        if is_float(array):
            self._scale = math.sqrt(_mean_square(array)) or 1.0
            self._squares = np.zeros(array.shape, dtype=np.float32)  # in units of the scale
        else:
            self._flips = np.zeros(array.shape, dtype=bool)

    def add(self, run: Array | None) -> None:
        """Take the same output of another run; None if it did not have it."""
        self._runs += 1
        if run is None or run.shape != self._array.shape:
            # Rounding decides on the shape, as on that of NonZero's result.
            self._unstable = True
        elif not is_float(self._array):
            self._flips |= np.asarray(run != self._array)
        else:
            for block in _blocks(run.shape):
                exact, values = _wide(self._array[block]), _wide(run[block])
                finite, finite_too = np.isfinite(exact), np.isfinite(values)
                with np.errstate(invalid="ignore", over="ignore"):
                    moved = np.where(finite & finite_too, np.square((values - exact) / self._scale), 0.0)
                    # What becomes finite or infinite by rounding alone cannot be compared.
                    self._squares[block] += np.where(finite == finite_too, moved, np.inf)

    def noise(self, gain: float = GAIN) -> Array:
        """How far rounding moves every element.

        Args:
            gain: How much further the inserted errors move the output than rounding does.

        Returns:
            For floats the root mean square of the error, float32, infinite where rounding flips a decision; for
            anything else a boolean array, true where it does.
        """
        if not is_float(self._array):
            return np.asarray(self._flips | self._unstable)
        if self._unstable or not self._array.size or not self._runs:
            return np.full(self._array.shape, np.inf, dtype=np.float32)
        squares = self._squares.copy()
        squares /= self._runs
        stable = squares[np.isfinite(squares) & (squares > 0)]  # zeros, as behind a Relu, do not answer at all
        typical = float(np.median(stable)) if stable.size else 0.0
        # A decision flipped: the answer to a tiny error is neither tiny nor like that of the other elements.
        squares[(squares > _FLIP**2 * typical) & (squares > _FLIP_SIZE**2)] = np.inf
        eps = _eps(self._array.dtype)
        for block in _blocks(squares.shape):
            magnitude = np.abs(_wide(self._array[block])) / self._scale
            floor = np.square(0.5 * eps * np.where(np.isfinite(magnitude), magnitude, 0.0)) + (1e-3 * eps) ** 2
            squares[block] = self._scale * np.sqrt(squares[block] / gain**2 + floor)
        return squares


def guessed_noise(array: Array) -> Array:
    """What a :class:`NoiseMeter` may have found, for a model that does not run with inserted errors."""
    if not is_float(array):
        return np.zeros(array.shape, dtype=bool)
    magnitude = np.where(np.isfinite(array), np.abs(array), 0.0).astype(np.float32)
    return np.asarray(_GUESS * _eps(array.dtype) * np.maximum(magnitude, math.sqrt(_mean_square(array))))


def distance(a: Array, b: Array) -> Array:
    """The absolute difference of two float arrays, 0 where it is no number; float32."""
    found = np.empty(a.shape, dtype=np.float32)
    for block in _blocks(a.shape):
        with np.errstate(invalid="ignore"):
            found[block] = np.nan_to_num(np.abs(_wide(a[block]) - _wide(b[block])), nan=0.0)
    return found


def relative(array: Array, noise: Array) -> float | None:
    """The noise of a float output relative to its size; None if it has none."""
    size = _mean_square(array)
    return math.sqrt(_mean_square(noise) / size) if size else None


def depends(arrays: Sequence[Array], noises: Sequence[Array]) -> bool:
    """Whether a float output of several cases is another in some of them, or in some rows of one, than in the rest.

    An output that is not, because a network is dead or a decision was made early, hides what happened before.
    True as well if there is nothing to tell from.
    """
    if not arrays or any(not array.ndim for array in arrays):
        return len(arrays) < 2 or len({float(array) for array in arrays}) > 1
    first, seen = arrays[0][:1], 0
    for array, noise in zip(arrays, noises, strict=True):
        if array.shape[1:] != first.shape[1:] or not first.size:
            return True
        seen += len(array)
        moved = distance(array, np.broadcast_to(first, array.shape))
        if bool((moved > MAX * np.where(np.isfinite(noise), noise, np.inf)).any()):
            return True
    return seen < 2


class Closeness:
    """Compares one output, case by case.

    Args:
        name: The output.
        noise_runs: How many samples of the noise each element has.
        codes: Whether integers are codes of a grid, which rounding may move by a step.
    """

    def __init__(self, name: str, noise_runs: int, codes: bool = False) -> None:
        self._runs, self._codes = noise_runs, codes
        self._worst = OutputError(name)
        self._pools: dict[int, _Pool] = {}
        self._cases = 0

    def add(self, case: str, want: Array, got: Array, noise: Array) -> None:
        """Compare one case.

        Args:
            case: Its description.
            want: The reference's output.
            got: The candidate's.
            noise: What a :class:`NoiseMeter` found for the reference's.
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
            differ = (got != want) & usable
            count = int(np.count_nonzero(differ))
            # Errors as large as those of the noise move at least as many codes, though others.
            luck = LUCK + int(np.count_nonzero(~usable)) if self._codes else 0
            if count > luck or (count and int(np.abs(got[differ].astype(np.int64) - want[differ]).max()) > 1):
                return _wrong(name, f"differs in {count} of {want.size} elements, which must be equal")
            return OutputError(name, skipped=skipped)
        for what, test in (("NaN", np.isnan), ("infinity", np.isposinf), ("negative infinity", np.isneginf)):
            there, here = _test(test, want), _test(test, got)
            if bool(((there != here) & usable).any()):
                return _wrong(name, f"has {what} in other places ({int(here.sum())} instead of {int(there.sum())})")
        return dataclasses.replace(self._judge(want, got, noise), skipped=skipped)

    def _judge(self, want: Array, got: Array, noise: Array) -> OutputError:
        """The ratios of one case; its slices also go to the pools."""
        sums = _Sums(want.shape)
        for block in _blocks(want.shape):
            exact, moved = _wide(want[block]), _wide(noise[block])
            usable = np.isfinite(exact) & np.isfinite(moved)
            with np.errstate(invalid="ignore"):
                difference = np.where(usable, np.abs(_wide(got[block]) - exact), 0.0)
            sums.add(block, difference, np.where(usable, moved, 0.0))
        largest, allowed = sums.largest_error, MAX * sums.largest_noise
        total, noises = math.sqrt(sums.errors_total), math.sqrt(sums.noise_total)
        ratio = max(_ratio(largest, allowed), _ratio(total, RMS * noises))
        place = ""
        for axis, (errors, allowances) in sums.axes.items():
            count = want.size // want.shape[axis]
            if noises:
                scale = sums.noise_total / want.size
                self._pool(axis, errors / scale, allowances / scale, count)
            if self._runs * count >= SLICE_VALUES:
                found, index = _slice_ratio(errors, allowances)
                if found > max(ratio, 1.0):
                    place = f", most of all at index {index} of axis {axis}"
                ratio = max(ratio, found)
        size = math.sqrt(_mean_square(want))
        relative = largest / size if size else (math.inf if largest else 0.0)
        error = OutputError(self._worst.name, largest, relative, allowed, ratio)
        if ratio <= 1:
            return error
        share = f"{relative:.2g} of its size" if size else "it should be zero"
        why = f"differs by up to {largest:.3g} ({share}), {ratio:.3g} times what rounding explains{place}"
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


class _Sums:
    """Sums of the squares of errors and noise, over all elements and for every index of every axis."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.largest_error = self.largest_noise = self.errors_total = self.noise_total = 0.0
        self.axes = {axis: (np.zeros(n), np.zeros(n)) for axis, n in enumerate(shape) if n > 1}

    def add(self, block: tuple[slice, ...], errors: Array, noise: Array) -> None:
        """Add the errors and the noise of a part."""
        self.largest_error = max(self.largest_error, float(errors.max(initial=0.0)))
        self.largest_noise = max(self.largest_noise, float(noise.max(initial=0.0)))
        for number, squares in enumerate((np.square(errors), np.square(noise))):
            if number == 0:
                self.errors_total += float(squares.sum())
            else:
                self.noise_total += float(squares.sum())
            for axis, sums in self.axes.items():
                others = tuple(i for i in range(squares.ndim) if i != axis)
                sums[number][block[axis]] += squares.sum(axis=others)


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Parts of an array that are small enough to be widened; they follow each other along its longest axis."""
    if not shape:
        yield ()
        return
    longest = max(range(len(shape)), key=lambda axis: shape[axis])
    step = max(_BLOCK * shape[longest] // max(math.prod(shape), 1), 1)
    for start in range(0, shape[longest], step):
        part = slice(start, start + step)
        yield tuple(part if axis == longest else slice(None) for axis in range(len(shape)))


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


def _mean_square(array: Array) -> float:
    """The mean of the squares of the finite elements."""
    total, count = 0.0, 0
    for block in _blocks(array.shape):
        values = _wide(array[block])
        finite = np.isfinite(values)
        total += float(np.square(values, where=finite, out=np.zeros_like(values)).sum())
        count += int(finite.sum())
    return total / count if count else 0.0


def _test(test: Callable[[Array], Array], array: Array) -> Array:
    found = np.empty(array.shape, dtype=bool)
    for block in _blocks(array.shape):
        found[block] = test(_wide(array[block]))
    return found


def _ratio(value: float, allowed: float) -> float:
    if not value:
        return 0.0
    return value / allowed if allowed else math.inf


def _eps(dtype: np.dtype[Any]) -> float:
    return EPS.get(ir.DataType.from_numpy(dtype), 2.0**-3)  # the 8-bit floats
