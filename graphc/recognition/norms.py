"""Layer and root-mean-square normalisation written out become LayerNormalization and RMSNormalization.

A region between one variable and one result is recognised by what it computes of rows of numbers: gain and bias are
solved for, epsilon is one of the region's own constants, and further rows must agree. How an exporter arranged mean,
square, root and reciprocal does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array
from graphc.rewrites.base import FLOATS, Refused, Rewriter, Rule, dims

_LONGEST = 18
"""Nodes of a region at most."""

_AHEAD = 6
"""How many readers ahead of the root a region may end."""

_BINARY = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Pow": np.power}
_UNARY = {"Sqrt": np.sqrt, "Reciprocal": np.reciprocal, "Neg": np.negative}
_REDUCTIONS = {
    "ReduceMean": lambda x, axes, keep: x.mean(axis=axes, keepdims=keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axis=axes, keepdims=keep),
    "ReduceSumSquare": lambda x, axes, keep: (x * x).sum(axis=axes, keepdims=keep),
    "ReduceL2": lambda x, axes, keep: np.sqrt((x * x).sum(axis=axes, keepdims=keep)),
}
_POOL = "GlobalAveragePool"
"""The mean over all axes from the third on, as which TensorFlow's exporters write that over the last of three."""
_MEANS = (*_REDUCTIONS, _POOL)
_KNOWN = (*_BINARY, *_UNARY, *_MEANS, "Cast")

_TOLERANCE = 1e-6
"""Relative; a variance divided by one element less differs by more up to a width of a million, float32 constants by
less."""


@dataclass(frozen=True)
class _Norm:
    """What a region computes: ``gain * (x - mean(x)) / sqrt(mean(...) + epsilon) + bias``.

    Attributes:
        centred: Whether the mean is subtracted.
        epsilon: What is added under the root.
        gain, bias: float64, in the shape of the normalised axes.
    """

    centred: bool
    epsilon: float
    gain: Array
    bias: Array

    @property
    def operator(self) -> str:
        return "LayerNormalization" if self.centred else "RMSNormalization"


def layer_norm(node: ir.Node, rewriter: Rewriter) -> str | None:
    """Replace the region around a root by LayerNormalization."""
    return _recognise(node, rewriter, centred=True)


def rms_norm(node: ir.Node, rewriter: Rewriter) -> str | None:
    """Replace the region around a root by RMSNormalization."""
    return _recognise(node, rewriter, centred=False)


def _recognise(root: ir.Node, rewriter: Rewriter, *, centred: bool) -> str | None:
    if root.op_type == "Pow" and edit.scalar(root.inputs[1]) not in (0.5, -0.5):
        return None
    if not _follows_reduction(root) or rewriter.version < (17 if centred else 23):
        return None
    refused: Refused | None = None
    for end in reversed(_ends(root)):
        try:
            found = _find(end, root, rewriter)
        except Refused as refusal:
            refused = refused or refusal
            continue
        if found is None:
            continue
        x, region, norm, axis = found
        if norm.centred is not centred or (not centred and norm.bias.any()):
            continue
        _replace(end, x, region, norm, axis, rewriter)
        return f"{norm.operator} recognised"
    if refused is not None and centred == _subtracts(root):
        raise refused
    return None


def _ancestors(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes that a region behind a root may have, nearest first."""
    seen, queue = {node}, [node]
    while queue and len(seen) <= _LONGEST:
        current = queue.pop(0)
        yield current
        for value in current.inputs:
            producer = None if value is None else value.producer()
            if producer is not None and producer not in seen and edit.is_op(producer, *_KNOWN):
                seen.add(producer)
                queue.append(producer)


def _follows_reduction(root: ir.Node) -> bool:
    """Whether a mean or a sum lies right before a root, with nothing but arithmetic by numbers between them."""
    node: ir.Node | None = root
    for _ in range(5):
        value = next((v for v in node.inputs if v is not None and edit.tensor(v) is None), None) if node else None
        node = value.producer() if value is not None else None
        if not edit.is_op(node, *_KNOWN):
            return False
        if edit.is_op(node, *_MEANS):
            return True
    return False


def _subtracts(root: ir.Node) -> bool:
    return any(n.op_type == "Sub" for n in _ancestors(root))


def _ends(root: ir.Node) -> list[ir.Node]:
    """The nodes at which a region around a root may end, nearest first."""
    ends: list[ir.Node] = []
    begun = 0
    depth = {root: 0}
    while begun < len(depth):
        node = list(depth)[begun]
        begun += 1
        value = node.outputs[0]
        if value.is_graph_output() or depth[node] == _AHEAD:
            continue
        for following in dict.fromkeys(value.consumers()):
            if following not in depth and edit.is_op(following, *_BINARY, *_UNARY, "Cast") and len(ends) < _LONGEST:
                depth[following] = depth[node] + 1
                ends.append(following)
    return ends


def _find(end: ir.Node, root: ir.Node, rewriter: Rewriter) -> tuple[ir.Value, list[ir.Node], _Norm, int] | None:
    """The variable, nodes from the last to the first, meaning and first axis of the longest known region to ``end``."""
    region = [end]
    best = None
    while len(region) <= _LONGEST:
        frontier = _variables(region)
        if len(frontier) == 1 and root in region:
            axis = _axis(region, frontier[0], rewriter)
            norm = None if axis is None else _meaning(region, frontier[0], axis, rewriter)
            if norm is not None and axis is not None:
                best = (frontier[0], list(region), norm, axis)
        inside = set(region)
        candidates = [
            producer
            for value in frontier
            if not value.is_graph_output()
            and all(use.node in inside for use in value.uses())
            and edit.is_op(producer := value.producer(), *_KNOWN)
            and producer is not None
        ]
        if not candidates:
            break
        # A root first: what is divided by it may turn out to be the variable.
        region.append(next((n for n in candidates if n.op_type not in ("Add", "Mul", "Sub")), candidates[0]))
    if best is None and root in region and len(frontier) > 1:
        wanted = set(_ancestors(root))
        if any(v.producer() in wanted for v in frontier):
            raise Refused("a part of the normalisation is read elsewhere")
    return best


def _variables(region: list[ir.Node]) -> list[ir.Value]:
    """What a region reads that is not constant."""
    made = {node.outputs[0] for node in region}
    return list(
        dict.fromkeys(
            v for node in region for v in node.inputs if v is not None and v not in made and edit.tensor(v) is None
        )
    )


def _axis(region: list[ir.Node], x: ir.Value, rewriter: Rewriter) -> int | None:
    """The first of the axes that a region reduces, which are all from there on; negative.

    Raises:
        Refused: It reduces other axes, or their sizes are not known.
    """
    shape = rewriter.shape(x)
    rank = 0 if shape is None else len(shape)
    found = {_reduced(node, rank) for node in region if node.op_type in _MEANS}
    if len(found) != 1:
        return None
    axes = found.pop()
    if axes is None or shape is None:
        raise Refused("the rank of what is normalised is not known")
    normalised = list(axes)
    if not normalised or normalised != list(range(rank - len(normalised), rank)):
        raise Refused("the normalised axis is not the last")
    if any(not isinstance(shape[a], int) for a in normalised):
        raise Refused("the size of the normalised axis is not known")
    return -len(normalised)


def _reduced(node: ir.Node, rank: int) -> tuple[int, ...] | None:
    """The axes of a reduction of a value of this rank, from 0 on and in order, if they are constant."""
    if node.op_type == _POOL:
        return tuple(range(2, rank)) or None
    axes = edit.attribute(node, "axes")  # up to opset 17
    if axes is None and len(node.inputs) > 1:
        held = edit.constant(node.inputs[1], limit=8)
        axes = None if held is None else tuple(int(a) for a in held.reshape(-1))
    return None if axes is None or not rank else tuple(sorted(a % rank for a in axes))


def _meaning(region: list[ir.Node], x: ir.Value, axis: int, rewriter: Rewriter) -> _Norm | None:
    """The normalisation that a region computes of its variable."""
    dtype = rewriter.dtype(x)
    shape = rewriter.shape(x)
    assert shape is not None
    if dtype not in FLOATS or rewriter.dtype(region[0].outputs[0]) != dtype:
        return None
    size = tuple(int(d) for d in shape[axis:])  # type: ignore[arg-type]
    rows, scales = _rows(size, region)
    lead = (1,) * (len(shape) + axis)
    each = [_evaluate(region, x, row.reshape(lead + size)) for row in rows]
    # A region that drops or adds an axis is no normalisation, though its result may have as many elements.
    if any(result is None or result.shape != lead + size for result in each):
        return None
    computed = np.stack([result.reshape(size) for result in each if result is not None])
    for centred in (True, False):
        for epsilon in scales:
            normal = _normal(rows, centred, epsilon)
            # The first two rows are each other's negative, hence their normal forms are.
            bias = (computed[0] + computed[1]) / 2
            gain = (computed[0] - computed[1]) / (2 * normal[0])
            wanted = gain * normal + bias
            if (
                np.isfinite(wanted).all()
                and (
                    np.abs(wanted - computed) <= _TOLERANCE * (np.abs(gain) * np.abs(normal) + np.abs(bias) + 1e-30)
                ).all()
            ):
                bias[np.abs(bias) <= 1e-9 * np.abs(gain)] = 0.0
                return _Norm(centred, epsilon, gain, bias)
    return None


def _rows(size: tuple[int, ...], region: list[ir.Node]) -> tuple[Array, list[float]]:
    """Rows to compute on, ``(rows, *size)``, and all numbers in a region that may be its epsilon."""
    numbers = {
        abs(float(edit.scalar(v) or 0))
        for node in region
        if node.op_type in ("Add", "Sub")
        for v in node.inputs
        if edit.scalar(v) is not None
    }
    scales = sorted(n for n in numbers if 0 < n < 1) or [0.0]
    rng = np.random.default_rng(0)
    count = math.prod(size)
    sign = np.where(np.arange(count) % 2, -1.0, 1.0)
    first = sign * rng.uniform(1, 2, count)
    others = [rng.standard_normal(count) * s + m for s, m in ((1, 0.5), (100, -30), (1, 3))]
    small = [rng.standard_normal(count) * math.sqrt(e) for e in scales if e]
    return np.stack([first, -first, *others, *small]).reshape(-1, *size), scales


def _normal(rows: Array, centred: bool, epsilon: float) -> Array:
    axes = tuple(range(1, rows.ndim))
    if centred:
        rows = rows - rows.mean(axis=axes, keepdims=True)
    result: Array = rows / np.sqrt((rows * rows).mean(axis=axes, keepdims=True) + epsilon)
    return result


def _evaluate(region: list[ir.Node], x: ir.Value, data: Array) -> Array | None:
    """What a region computes of its variable, in float64; None if a part of it cannot be computed so."""
    values: dict[ir.Value, Array] = {x: data}
    for node in edit.in_order(region, values) or ():
        try:
            result = _compute(node, values)
        except (ValueError, IndexError):
            return None
        if result is None:
            return None
        values[node.outputs[0]] = result
    return values.get(region[0].outputs[0])


def _compute(node: ir.Node, values: dict[ir.Value, Array]) -> Array | None:
    def operand(index: int) -> Array:
        value = node.inputs[index]
        assert value is not None
        if value in values:
            return values[value]
        held = edit.tensor(value)
        assert held is not None
        return held.numpy().astype(np.float64)

    with np.errstate(all="ignore"):
        if node.op_type in _BINARY:
            result: Array = _BINARY[node.op_type](operand(0), operand(1))
            return result
        if node.op_type in _UNARY:
            result = _UNARY[node.op_type](operand(0))
            return result
        if node.op_type == _POOL:
            result = operand(0).mean(axis=tuple(range(2, operand(0).ndim)), keepdims=True)
            return result
        if node.op_type in _REDUCTIONS:
            axes = _reduced(node, operand(0).ndim)
            if axes is None:
                return None
            result = _REDUCTIONS[node.op_type](operand(0), axes, bool(edit.attribute(node, "keepdims", 1)))
            return result
        to = edit.attribute(node, "to")
        return operand(0) if to in FLOATS else None


def _replace(end: ir.Node, x: ir.Value, region: list[ir.Node], norm: _Norm, axis: int, rewriter: Rewriter) -> None:
    dtype = rewriter.dtype(x)
    assert dtype is not None
    inputs: list[ir.Value | None] = [x, _parameter(norm.gain, "scale", region, dtype, rewriter)]
    if norm.bias.any():
        inputs.append(_parameter(norm.bias, "bias", region, dtype, rewriter))
    rewriter.supersede(end, norm.operator, inputs, {"axis": axis, "epsilon": norm.epsilon})
    for each in region[1:]:
        rewriter.drop(each)


def _parameter(numbers: Array, role: str, region: list[ir.Node], dtype: ir.DataType, rewriter: Rewriter) -> ir.Value:
    """The constant of a region that holds these numbers, under its own name, or a new one."""
    rounded = numbers.astype(dtype.numpy())
    for node in region:
        for value in node.inputs:
            held = edit.tensor(value)
            if held is None or value is None or held.size != numbers.size or held.dtype != dtype or held.size == 1:
                continue
            if np.array_equal(held.numpy().reshape(numbers.shape), rounded):
                if dims(held) == numbers.shape:
                    return value
                flat = ir.Tensor(held.numpy().reshape(numbers.shape), dtype=dtype)
                return rewriter.constant(region[0], flat, f"{value.name}.flat")
    made = ir.Tensor(rounded, dtype=dtype)
    return rewriter.constant(region[0], made, f"{region[0].outputs[0].name}.{role}")


LAYER_NORM = Rule(
    {"layer-norm": "Layer normalisation written out becomes LayerNormalization."}, ("Sqrt", "Pow"), layer_norm
)
RMS_NORM = Rule(
    {"rms-norm": "Root-mean-square normalisation written out becomes RMSNormalization."}, ("Sqrt", "Pow"), rms_norm
)
