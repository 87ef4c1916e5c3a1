"""The 8-bit grid of an activation, from the values that it took on calibration data."""

from __future__ import annotations

from typing import Literal

import numpy as np

from graphc.edit import Array
from graphc.quantization.grid import Grid
from graphc.stats.range import Range

Method = Literal["minmax", "percentile", "mse", "entropy"]

PARTS = np.geomspace(1.0, 0.02, 80)
"""Parts of the range that are tried; an outlier may be far out."""

GRID = Grid(8, symmetric=False)
"""Codes of activations: uint8."""


def scale_of(seen: Range, method: Method, percentile: float) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of a value.

    Args:
        seen: Its histogram.
        method: ``minmax``: all that was seen; ``percentile``: a part of what was seen, equally much cut off on either
            side; ``mse``: the range with the least mean squared error; ``entropy``: that with the least divergence of
            what is quantized from what was seen (as TensorRT chooses it, Migacz 2017).
        percentile: That part, in percent.
    """
    low, high = float(np.minimum(seen.low, 0)), float(np.maximum(seen.high, 0))
    if not np.isfinite([low, high]).all():  # nothing was seen
        low, high = 0.0, 0.0
    if method == "percentile":
        low, high = _percentile(seen, low, high, percentile)
    elif method in ("mse", "entropy") and high > low:
        loss = _squares if method == "mse" else _divergence
        parts = [(low * p, high * p) for p in PARTS]
        low, high = min(parts, key=lambda ends: loss(seen, *ends))
    scale, zero = GRID.scales(np.asarray(low), np.asarray(high), np.dtype(np.float32))
    return np.float32(scale), np.uint8(zero)


def _centres(seen: Range) -> Array:
    limit, count = float(seen.limit), len(seen.bins)
    return np.asarray((np.arange(count) + 0.5) * (2 * limit / count) - limit)


def _percentile(seen: Range, low: float, high: float, percentile: float) -> tuple[float, float]:
    total = np.cumsum(seen.bins)
    if not total[-1]:
        return low, high
    width = 2 * float(seen.limit) / len(seen.bins)
    cut = total[-1] * (1 - percentile / 100) / 2
    first = int(np.searchsorted(total, cut, side="right"))
    last = int(np.searchsorted(total, total[-1] - cut, side="left"))
    edges = first * width - float(seen.limit), (last + 1) * width - float(seen.limit)
    return min(max(low, edges[0]), 0.0), max(min(high, edges[1]), 0.0)


def _squares(seen: Range, low: float, high: float) -> float:
    """The sum of the squared errors of the histogram's values on the grid of a range."""
    centres = _centres(seen)
    scale, zero = GRID.scales(np.asarray(low), np.asarray(high), np.dtype(np.float32))
    return float((seen.bins * np.square(GRID.rounded(centres, scale, zero) - centres)).sum())


def _divergence(seen: Range, low: float, high: float) -> float:
    """KL divergence of the histogram, what is outside counted at its ends, and the same with 256 even levels."""
    centres = _centres(seen)
    scale, zero = GRID.scales(np.asarray(low), np.asarray(high), np.dtype(np.float32))
    codes = GRID.codes(centres, scale, zero).astype(np.int64)
    inside = (centres >= low) & (centres <= high)
    if not inside.any():
        return np.inf
    wanted = np.where(inside, seen.bins, 0.0)
    first, last = np.flatnonzero(inside)[[0, -1]]
    wanted[first] += seen.bins[:first].sum()
    wanted[last] += seen.bins[last + 1 :].sum()
    # A level's count is spread over its bins that are not empty; what is outside is not part of it.
    held = inside & (seen.bins > 0)
    counts = np.bincount(codes[held], weights=seen.bins[held], minlength=256)
    shares = np.bincount(codes[held], minlength=256)
    found = np.where(held, counts[codes] / np.maximum(shares[codes], 1), 0.0)
    p, q = wanted / wanted.sum(), (found + 1e-9) / (found + 1e-9).sum()
    some = p > 0
    return float((p[some] * np.log(p[some] / q[some])).sum())
