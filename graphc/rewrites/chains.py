"""Scales and shifts in a row, with nothing near that could take them, become as few operators as possible."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array
from graphc.rewrites import affine as affines
from graphc.rewrites.affine import Affine, affine
from graphc.rewrites.base import FLOATS, Refused, Rewriter, Rule, sole_reader
from graphc.rewrites.weights import check_rounded, rounded


def _read(node: ir.Node | None) -> Affine | None:
    """The affine map of an arithmetic node; None for anything else."""
    if not edit.is_op(node, *affines.OPERATORS):
        return None
    assert node is not None
    try:
        return affine(node)
    except Refused:
        return None


def _row(first: Affine) -> list[Affine]:
    """The affine maps from ``first`` on, each the only reader of the one before."""
    row = [first]
    while True:
        try:
            following = _read(sole_reader(row[-1].node.outputs[0]))
        except Refused:
            return row
        if following is None:
            return row
        row.append(following)


def merge(node: ir.Node, rewriter: Rewriter) -> str | None:
    """Merge scales and shifts in a row into one Mul, one Add, or both, or one BatchNormalization."""
    first = _read(node)
    if first is None or _starts_later(first):
        return None
    row = _row(first)
    if len(row) < 2:
        return None
    rank, axis = _common_axis(row, rewriter)
    dtype = _dtype(row)
    if dtype is None:
        return None
    scale, shift = np.asarray(1.0), np.asarray(0.0)
    for part in row:
        scale, shift = scale * part.scale, shift * part.scale + part.shift
    check_rounded(scale, dtype)
    check_rounded(shift, dtype)
    what = ", ".join(dict.fromkeys(part.node.op_type for part in row))
    is_scale, is_shift = bool((scale != 1).any()), bool(shift.any())
    last = row[-1].node
    as_batchnorm = (
        axis == 1
        and rank > 2
        and dtype != ir.DataType.BFLOAT16
        and (any(p.is_batchnorm for p in row) or (is_scale and is_shift))
    )
    if as_batchnorm and "batchnorm-arithmetic" in rewriter.enabled:
        parameters = _parameters(last, scale, shift, dtype, rewriter)
        rewriter.supersede(last, "BatchNormalization", [row[0].x, *parameters], {"epsilon": 0.0})
        what = f"{what} merged into BatchNormalization"
    elif "affine-chain" in rewriter.enabled and is_scale + is_shift < len(row) and (is_scale or is_shift):
        tail = (1,) * (rank - axis - 1) if axis is not None else ()
        steps = [step for step, wanted in ((("Mul", scale), is_scale), (("Add", shift), is_shift)) if wanted]
        value = row[0].x
        for op_type, numbers in steps:
            held = rounded(numbers.reshape(numbers.shape + (tail if numbers.ndim else ())), dtype, op_type)
            stem = f"{last.outputs[0].name}.{op_type.lower()}"
            inputs = [value, rewriter.constant(last, held, f"{stem}.constant")]
            if numbers is steps[-1][1]:
                rewriter.supersede(last, op_type, inputs)
            else:
                value = rewriter.insert(last, op_type, inputs, name=rewriter.fresh(stem), like=last.outputs[0])
        what = f"{what} merged"
    else:
        return None
    for part in reversed(row[:-1]):
        rewriter.drop(part.node)
    return what


def _starts_later(first: Affine) -> bool:
    """Whether the row of affine maps begins before ``first``."""
    before = _read(first.x.producer())
    return before is not None and len(_row(before)) > 1


def _common_axis(row: list[Affine], rewriter: Rewriter) -> tuple[int, int | None]:
    """The rank of the tensor, and the one axis along which the maps of the row vary.

    Raises:
        Refused: They vary along several, or it is not certain that they keep the tensor's shape.
    """
    if all(part.axis is None and part.rank == 0 for part in row):
        return 0, None
    shape = rewriter.shape(row[0].x)
    if shape is None:
        raise Refused("the rank of the scaled tensor is not known")
    places = {part.axis_in(len(shape)) for part in row} - {None}
    if len(places) > 1:
        raise Refused("the constants vary along several axes")
    axis = places.pop() if places else None
    if axis is not None and shape[axis] not in {part.size for part in row if part.axis is not None}:
        raise Refused("the scaled dimension is not known, so that the constant may broadcast")
    return len(shape), axis


def _dtype(row: list[Affine]) -> ir.DataType | None:
    """The dtype of the tensor that the row scales."""
    for part in row:
        if part.x.dtype in FLOATS:
            return part.x.dtype
        held = [edit.tensor(v) for v in part.node.inputs]
        known = [t.dtype for t in held if t is not None]
        if known and not part.is_batchnorm:
            return known[0]
    return None


def _parameters(node: ir.Node, scale: Array, shift: Array, dtype: ir.DataType, rewriter: Rewriter) -> list[ir.Value]:
    """Scale, bias, mean 0 and variance 1 of a BatchNormalization in place of a node."""
    numbers = {"scale": scale, "bias": shift, "mean": np.asarray(0.0), "var": np.asarray(1.0)}
    size = max(scale.size, shift.size)
    return [
        rewriter.constant(node, rounded(np.broadcast_to(exact, (size,)), dtype, name), f"{node.outputs[0].name}.{name}")
        for name, exact in numbers.items()
    ]


RULES = (
    Rule(
        {
            "affine-chain": "Add, Sub, Mul, Div by constants in a row become one Mul, one Add or both.",
            "batchnorm-arithmetic": "A scale and a shift per channel in a row become one BatchNormalization.",
        },
        affines.OPERATORS,
        merge,
    ),
)
