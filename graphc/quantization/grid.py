"""The grids that numbers are rounded to, and the scales that fit them: integers of 2 to 8 bits, 8-bit floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphc.edit import Array
from graphc.quantization.granularity import Granularity

CLIPS = np.linspace(1.0, 0.5, 26)
"""Parts of the range that are tried where clipping is chosen by error."""

TURNED = 4
"""Bits up to which a symmetric grid may be turned around for the code that only one side has."""

EXPONENT = 120
"""Of two, up to which numbers are brought to 1 in float32."""

_SIGNED = {2: ir.DataType.INT2, 4: ir.DataType.INT4, 8: ir.DataType.INT8, 16: ir.DataType.INT16}
_UNSIGNED = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8, 16: ir.DataType.UINT16}
_FLOATS = {"float8e4m3fn": ir.DataType.FLOAT8E4M3FN, "float8e5m2": ir.DataType.FLOAT8E5M2}
OPSETS = {ir.DataType.INT2: 25, ir.DataType.UINT2: 25}
"""The opset in which DequantizeLinear came to take a dtype, where that is after 21."""


@dataclass(frozen=True)
class Grid:
    """What codes there are, and what they stand for: ``(code - zero) * scale``.

    Attributes:
        bits: 2 to 8, or 16. Codes of 3 bits are stored in 4, of 5 to 7 in 8.
        symmetric: Whether the zero point is 0 and codes have a sign; else codes are from 0 on.
        form: ``int``, or an 8-bit float, which is symmetric.
    """

    bits: int = 8
    symmetric: bool = True
    form: str = "int"

    @property
    def dtype(self) -> ir.DataType:
        """What codes are stored in."""
        if self.form != "int":
            return _FLOATS[self.form]
        held = next(width for width in _SIGNED if self.bits <= width)
        return (_SIGNED if self.symmetric else _UNSIGNED)[held]

    @property
    def reach(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        half = 1 << (self.bits - 1)
        return (-half, half - 1) if self.symmetric else (0, 2 * half - 1)

    @property
    def most(self) -> float:
        """The largest code."""
        return float(self.reach[1]) if self.form == "int" else _most(self.dtype.numpy())

    @property
    def opset(self) -> int:
        return OPSETS.get(self.dtype, 21)

    def scales(self, low: Array, high: Array, dtype: np.dtype[np.generic]) -> tuple[Array, Array]:
        """Scales and zero points with which the codes reach from ``low`` to ``high``, float64; zero is always exact.

        Args:
            low: The smallest value of each group.
            high: The largest.
            dtype: What scales are stored in; they are rounded to it. Groups of zeros get a scale of 1.
        """
        low, high = np.minimum(low.astype(np.float64), 0), np.maximum(high.astype(np.float64), 0)
        zero = np.zeros_like(low)
        if self.form != "int":
            scale = np.maximum(-low, high) / self.most
        elif self.symmetric:
            scale = np.maximum(high / self.reach[1], low / self.reach[0])
        else:
            scale = (high - low) / self.reach[1]
        scale = _stored(scale, dtype)
        if self.form == "int" and not self.symmetric:
            zero = np.clip(np.rint(-low / scale), *self.reach)
        # What the outermost codes stand for must not be infinite.
        far = self.most if self.form != "int" else np.maximum(self.reach[1] - zero, zero - self.reach[0])
        limit = _most(dtype) * (1 - float(_info(dtype).eps)) / far
        return np.where(scale > limit, np.asarray(limit).astype(dtype).astype(np.float64), scale), zero

    def codes(self, values: Array, scale: Array, zero: Array) -> Array:
        """The nearest codes, in float32 (as wide as the values); scales and zero points broadcast."""
        scaled = values / scale.astype(values.dtype)
        if self.form != "int":
            return np.asarray(np.clip(scaled, -self.most, self.most).astype(self.dtype.numpy()).astype(values.dtype))
        return np.asarray(np.clip(np.rint(scaled) + zero.astype(values.dtype), *self.reach))

    def rounded(self, values: Array, scale: Array, zero: Array) -> Array:
        """What the nearest codes stand for."""
        codes = self.codes(values, scale, zero)
        return np.asarray((codes - zero.astype(values.dtype)) * scale.astype(values.dtype))


def _stored(scale: Array, dtype: np.dtype[np.generic]) -> Array:
    """Scales as a dtype holds them; where it holds few digits, rounded up, so that nothing is clipped; 1 for zero."""
    with np.errstate(over="ignore"):
        held = scale.astype(dtype).astype(np.float64)
    info = _info(dtype)
    short = (held < scale) & (scale < float(info.smallest_normal))
    held = np.where(short, held + float(info.smallest_subnormal), held)
    held = np.where(np.isfinite(held), held, _most(dtype))
    return np.where(held > 0, held, 1.0)


def _info(dtype: np.dtype[np.generic]) -> Any:
    return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]


def _most(dtype: np.dtype[np.generic]) -> float:
    return float(_info(dtype).max)


def fit(
    values: Array,
    grid: Grid,
    granularity: Granularity,
    dtype: np.dtype[np.generic],
    *,
    clip: bool = False,
    importance: Array | None = None,
) -> tuple[Array, Array]:
    """Scales and zero points of each group of values, float64, in the shape that DequantizeLinear wants.

    Args:
        values: The values, finite.
        grid: Their grid.
        granularity: Which values share a scale.
        dtype: What scales are stored in.
        clip: Whether ranges are narrowed to the part with the least squared error.
        importance: The weight of each value's squared error; it broadcasts.
    """
    low, high = granularity.reduced(values, np.min), granularity.reduced(values, np.max)
    scale, zero = grid.scales(low, high, dtype)
    few = grid.form == "int" and grid.symmetric and grid.bits <= TURNED
    if not (clip or few):
        return scale, zero
    candidates = [grid.scales(low * part, high * part, dtype) for part in (CLIPS if clip else CLIPS[:1])]
    if few:
        candidates += [(_turned(grid, low * part, high * part, dtype), zero) for part in (CLIPS if clip else CLIPS[:1])]
    best: Array | None = None
    unit = values.dtype.type(unit_of(values))
    for tried, offset in candidates:
        spread = (granularity.spread(tried, values.shape), granularity.spread(offset, values.shape))
        error = np.square((grid.rounded(values, *spread) - values) * unit)
        loss = granularity.reduced(error if importance is None else error * importance, np.sum)
        if best is None:
            best = loss
            continue
        better = loss < best
        scale, zero = np.where(better, tried, scale), np.where(better, offset, zero)
        best = np.minimum(best, loss)
    return scale, zero


def unit_of(values: Array) -> float:
    """A power of two that brings values to 1 at most: squares of huge and of tiny ones leave float32."""
    far = max(float(values.max(initial=0)), -float(values.min(initial=0)))
    return float(2.0 ** -np.clip(np.frexp(far)[1], -EXPONENT, EXPONENT))


def _turned(grid: Grid, low: Array, high: Array, dtype: np.dtype[np.generic]) -> Array:
    """Scales that bring the largest value to the code furthest out, which is negative: so they may be, too."""
    low, high = np.minimum(low.astype(np.float64), 0), np.maximum(high.astype(np.float64), 0)
    scale = _stored(np.maximum(high, -low) / -grid.reach[0], dtype)
    return np.where(high > -low, -scale, scale)
