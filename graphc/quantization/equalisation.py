"""Channels brought to like ranges, so that one grid for all of them has fewer codes that some never use.

The grid of an activation reaches as far as its largest channel does; a small one is left with few codes. A factor for
each channel, put on the rows of the weights before and taken from the columns of those behind (Nagel and others, 2019),
changes nothing by itself. Rows are free where each has a scale of its own; columns are not, but for depthwise
convolutions, so that how far to go is chosen by what both errors come to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.contract import Context, PassResult
from graphc.contraction import Contraction
from graphc.edit import Array
from graphc.quantization import streams
from graphc.quantization.grid import Grid
from graphc.quantization.sites import Site
from graphc.quantization.streams import Stream

POWERS = np.linspace(0, 1, 9)
"""How far ranges are made equal: not at all, to entirely."""

MOST = 8.0
"""The largest factor: a channel that calibration hardly saw may be large on other data."""

HEADROOM = 2.0
"""How far beyond what calibration saw of it a channel that was made larger can go before it leaves the grid."""

CODES = 255
"""Steps of the grid of an activation."""


def apply(model: ir.Model, chosen: Sequence[Site], grid: Grid, ctx: Context, result: PassResult) -> None:
    """Bring the channels between products to like ranges; see :func:`factors`."""
    found = streams.find(chosen)
    if not found:
        result.refuse("", "no channels are between products that let a factor through")
        return
    names = edit.Names(model)
    statistics = ctx.collect(model, {use.moments for stream in found for use in stream.readers})
    for i, stream in enumerate(found):
        ctx.progress("scaling", i, len(found))
        by_channel = factors(stream, statistics, grid)
        if by_channel is not None:
            streams.scale(stream, by_channel, names)
            result.change("channels brought to like ranges", stream.channels)


def factors(stream: Stream, statistics: Mapping[Any, Any], grid: Grid) -> Array | None:
    """Factors for the channels of a stream, ``(channels,)``; None if it is best as it is.

    Errors of activations and weights are taken as independent and evenly spread: each is a step squared, times what it
    is multiplied with squared.

    Args:
        stream: The stream.
        statistics: Moments of what its readers read.
        grid: That of the weights.
    """
    ranges = np.max([statistics[use.moments].largest.reshape(-1) for use in stream.readers], axis=0)
    if not (ranges > 0).any():
        return None
    most = ranges.max()
    relative = np.clip(most / (HEADROOM * np.maximum(ranges, most / (HEADROOM * MOST))), 1.0, MOST)
    best, chosen = np.inf, 0.0
    for power in POWERS:
        loss = sum(_loss(use, relative**power, ranges, statistics, grid) for use in stream.readers)
        if loss < best * (1 - 1e-3):
            best, chosen = loss, float(power)
    if not chosen or np.allclose(relative, 1.0):
        return None
    return np.asarray(relative**chosen)


def _loss(use: Contraction, factor: Array, ranges: Array, statistics: Mapping[Any, Any], grid: Grid) -> float:
    """The squared error of a reader's outputs in relation to their squares."""
    held = edit.tensor(use.weight)
    assert held is not None
    matrices = np.abs(use.matrices(np.asarray(held.numpy(), dtype=np.float32)))
    edit.release(held)
    weights = matrices.reshape(*matrices.shape[:2], -1, use.window)
    energy = np.square(weights).sum(axis=(1, 3))
    squares = np.square(statistics[use.moments].rms).reshape(energy.shape)
    spread = factor.reshape(energy.shape)
    step = float((factor * ranges).max()) / CODES
    activation = (energy * np.square(step / spread)).sum()
    steps = (weights.max(axis=3) / spread[:, None]).max(axis=2) / grid.most
    weight = (np.square(steps).sum(axis=1) * use.window * (squares * np.square(spread)).sum(axis=1)).sum()
    return float(activation + weight) / max(float((energy * squares).sum()), 1e-300)
