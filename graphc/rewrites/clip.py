"""Relu and Clip in a row are one Clip, or one Relu: the bounds compose."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.rewrites.base import FLOATS, Refused, Rewriter, Rule, sole_reader

_Bounds = tuple[float, float]


def _bounds(node: ir.Node) -> _Bounds | None:
    """The least and the greatest result of a Relu or a Clip by constants."""
    if node.op_type == "Relu":
        return 0.0, math.inf
    bounds = [-math.inf, math.inf]
    for i, value in enumerate(node.inputs[1:3]):
        if value is not None:
            bound = edit.scalar(value)
            if bound is None:
                return None
            bounds[i] = bound
    return (bounds[0], bounds[1]) if not any(math.isnan(b) for b in bounds) else None


def merge(node: ir.Node, rewriter: Rewriter) -> str | None:
    """Merge a Relu or Clip into the Relu or Clip before it."""
    source = node.inputs[0]
    before = source.producer() if source is not None else None
    if not edit.is_op(before, "Relu", "Clip"):
        return None
    assert source is not None and before is not None
    first, second = _bounds(before), _bounds(node)
    if first is None or second is None:
        raise Refused("a bound of a Clip is not constant")
    dtype = rewriter.dtype(source)
    if dtype is None or dtype not in FLOATS:
        raise Refused("the dtype of the clipped tensor is not a known floating-point type")
    sole_reader(source)
    # Clip(x, a, b) = min(max(x, a), b), so that the second wins where the ranges do not meet.
    low, high = (min(max(bound, second[0]), second[1]) for bound in first)
    what = f"{before.op_type}, {node.op_type} merged"
    inputs: list[ir.Value | None] = [before.inputs[0]]
    operator = "Relu" if (low, high) == (0.0, math.inf) else "Clip"
    if operator == "Clip":
        for bound, name in ((low, "min"), (high, "max")):
            held = ir.Tensor(np.asarray(bound, dtype=dtype.numpy()), dtype=dtype)
            hint = f"{node.outputs[0].name}.{name}"
            inputs.append(None if math.isinf(bound) else rewriter.constant(node, held, hint))
        if inputs[-1] is None:
            inputs.pop()
    rewriter.supersede(node, operator, inputs)
    rewriter.drop(before)
    return what


RULES = (Rule({"clip": "Relu and Clip in a row become one of them."}, ("Relu", "Clip"), merge),)
