"""Beyond which values an activation makes no difference, since what reads it does not grow there."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import attribute
from graphc.stats.range import BINS, Range

NONE = (-math.inf, math.inf)
"""Of what makes a difference everywhere."""


def limits(value: ir.Value) -> tuple[float, float]:
    """Where all readers of a value stop to tell values apart, below and above."""
    ends = [_of(node, index) for node, index in value.uses()]
    if value.is_graph_output() or not ends:
        return NONE
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    return (low, high) if low < high else NONE


def _of(node: ir.Node, index: int) -> tuple[float, float]:
    if index or node.domain not in ("", "ai.onnx"):
        return NONE
    match node.op_type:
        case "Relu":
            return 0.0, math.inf
        case "HardSwish":  # x * min(max(x / 6 + 1 / 2, 0), 1)
            return -3.0, math.inf
        case "HardSigmoid":
            alpha, beta = float(attribute(node, "alpha", 0.2)), float(attribute(node, "beta", 0.5))
            return (-beta / alpha, (1 - beta) / alpha) if alpha > 0 else NONE
        case "Clip":
            ends = [edit.scalar(value) if value is not None else None for value in (*node.inputs[1:3], None, None)][:2]
            given = [value is not None for value in (*node.inputs[1:3], None, None)][:2]
            if any(known and end is None for known, end in zip(given, ends, strict=True)):
                return NONE
            low, high = (none if end is None else float(end) for end, none in zip(ends, NONE, strict=True))
            return low, high
    return NONE


def within(seen: Range, low: float, high: float) -> Range:
    """What was seen, with all that lies beyond limits at them; a limit counts only where something lies beyond it."""
    least, most = float(seen.low), float(seen.high)
    if not least <= most or (low <= least and high >= most):
        return seen
    limit = float(seen.limit)
    centres = (np.arange(BINS) + 0.5) * (2 * limit / BINS) - limit
    ends = np.clip([low, high], -limit, limit)
    at = np.minimum(((np.clip(centres, *ends) + limit) * (BINS / (2 * limit))).astype(np.int64), BINS - 1)
    bins = np.bincount(at, weights=seen.bins, minlength=BINS)
    return Range(np.clip(seen.low, low, high), np.clip(seen.high, low, high), seen.limit, bins)
