"""Functions of one number that are written out, such as Gelu by Erf, become the operator that computes them.

A region of elementwise operators between one variable and one result is recognised by what it computes, on points that
cover its bends and its tails, not by how it is arranged: exporters write the same function in many ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array
from graphc.rewrites.base import FLOATS, Rewriter, Rule, chain

_LONGEST = 12
"""Nodes of a region at most."""

_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
"""Dtypes in which runtimes have these operators."""

_AHEAD = 5
"""How many readers ahead of a marker a region may end."""


def _erf(x: Array) -> Array:
    return np.array([math.erf(number) for number in x.reshape(-1)]).reshape(x.shape)


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))


_KERNELS: dict[str, Callable[..., Array]] = {
    "Add": np.add,
    "Sum": lambda *operands: sum(operands),
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Neg": np.negative,
    "Erf": _erf,
    "Tanh": np.tanh,
    "Sigmoid": _sigmoid,
    "Relu": lambda x: np.maximum(x, 0),
    "Clip": lambda x, low=-math.inf, high=math.inf: np.minimum(np.maximum(x, low), high),
    "Softplus": lambda x: np.logaddexp(x, 0),
}


@dataclass(frozen=True)
class _Function:
    """An operator of one input, as a function of float64 arrays."""

    operator: str
    attributes: dict[str, float | str]
    compute: Callable[[Array], Array]
    markers: tuple[str, ...]
    since: int


def _hard_sigmoid(alpha: float) -> _Function:
    return _Function(
        "HardSigmoid",
        {"alpha": alpha, "beta": 0.5},
        lambda x: np.clip(alpha * x + 0.5, 0, 1),
        ("Clip", "Relu"),
        6,
    )


_FUNCTIONS = (
    _Function("Gelu", {}, lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2))), ("Erf",), 20),
    _Function(
        "Gelu",
        {"approximate": "tanh"},
        lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        ("Tanh",),
        20,
    ),
    _Function("Mish", {}, lambda x: x * np.tanh(np.logaddexp(x, 0)), ("Softplus",), 18),
    _Function("HardSwish", {}, lambda x: x * np.clip(x / 6 + 0.5, 0, 1), ("Clip", "Relu", "HardSigmoid"), 14),
    _hard_sigmoid(1 / 6),
    _hard_sigmoid(0.2),
)

_MARKERS = tuple(dict.fromkeys(marker for function in _FUNCTIONS for marker in function.markers))

_POINTS = np.concatenate([np.linspace(-8, 8, 129), [-3.001, -2.999, 2.999, 3.001], np.geomspace(9, 1e4, 12)])
_POINTS = np.concatenate([_POINTS, -_POINTS[_POINTS > 8]])


def recognise(node: ir.Node, rewriter: Rewriter) -> str | None:
    """Replace the region around a node by one operator that computes the same."""
    for end in reversed(chain(node, _is_elementwise, _AHEAD)):
        found = _find(end, node, rewriter)
        if found is None:
            continue
        source, region, function = found
        if function.since > rewriter.version:
            continue
        rewriter.supersede(end, function.operator, [source], dict(function.attributes))
        for each in region[1:]:
            rewriter.drop(each)
        return f"{function.operator} recognised"
    return None


def _is_elementwise(node: ir.Node | None) -> bool:
    return edit.is_op(node, *_KERNELS, "HardSigmoid")


def _find(end: ir.Node, marker: ir.Node, rewriter: Rewriter) -> tuple[ir.Value, list[ir.Node], _Function] | None:
    """The variable, nodes from the last to the first, and function of a known region that ends at a node."""
    region = [end]
    while len(region) <= _LONGEST:
        frontier = _variables(region)
        if frontier is None or not frontier:
            return None
        if len(frontier) == 1 and len(region) > 1 and marker in region:
            function = _known(region, frontier[0], marker, rewriter.dtype(frontier[0]))
            if function is not None:
                return frontier[0], region, function
        inside = set(region)
        for value in frontier:
            producer = value.producer()
            is_inner = not value.is_graph_output() and all(use.node in inside for use in value.uses())
            if is_inner and _is_elementwise(producer):
                assert producer is not None
                region.append(producer)
                break
        else:
            return None
    return None


def _variables(region: list[ir.Node]) -> list[ir.Value] | None:
    """What a region reads that is not constant; None if it reads a constant that is no number."""
    made = {node.outputs[0] for node in region}
    found: dict[ir.Value, None] = {}
    for node in region:
        for value in node.inputs:
            if value is None or value in made:
                continue
            held = edit.tensor(value)
            if held is None:
                found[value] = None
            elif held.size != 1 or held.dtype not in FLOATS or len(held.shape) > 1:
                return None
    return list(found)


def _known(region: list[ir.Node], source: ir.Value, marker: ir.Node, dtype: ir.DataType | None) -> _Function | None:
    """The function that a region computes of its variable."""
    candidates = [f for f in _FUNCTIONS if marker.op_type in f.markers]
    if dtype is None or dtype not in _DTYPES:
        return None
    computed = _evaluate(region, source)
    if computed is None:
        return None
    eps = float(ml_dtypes.finfo(dtype.numpy()).eps)  # type: ignore[no-untyped-call]
    for function in candidates:
        if (np.abs(computed - function.compute(_POINTS)) <= 4 * eps * (1 + np.abs(_POINTS))).all():
            return function
    return None


def _evaluate(region: list[ir.Node], source: ir.Value) -> Array | None:
    """What a region computes on the points."""
    values: dict[ir.Value, Array] = {source: _POINTS}
    for node in edit.in_order(region, values) or ():
        operands = []
        for value in node.inputs:
            if value in values:
                operands.append(values[value])
            elif value is None:
                return None
            else:
                operands.append(np.asarray(edit.scalar(value), dtype=np.float64))
        with np.errstate(all="ignore"):
            if node.op_type == "HardSigmoid":
                alpha, beta = edit.attribute(node, "alpha", 0.2), edit.attribute(node, "beta", 0.5)
                values[node.outputs[0]] = np.clip(alpha * operands[0] + beta, 0, 1)
            else:
                values[node.outputs[0]] = _KERNELS[node.op_type](*operands)
    return values.get(region[0].outputs[0])


RULES = (
    Rule(
        {"elementwise": "Gelu, HardSwish, HardSigmoid and Mish written out become one operator."},
        _MARKERS,
        recognise,
    ),
)
