"""What a model does with the values of its inputs: which tables they index, what they mask, choose or size.

Found by walking from an input to its readers, through what only rearranges values, into branches, loop bodies and
local functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from graphc import edit
from graphc.moves import MOVES


@dataclass
class Role:
    """What the readers of an input do with its values.

    Attributes:
        bounds: Sizes of the axes that the values index, as numbers or as names of dynamic dimensions; the values
            must lie in ``[0, bound)``. An axis of unknown size counts as 1.
        mask: Whether the values select positions: they become booleans, or are compared with 0 or 1.
        choices: Other constants that the values are compared with.
        sizes: Where the values are a shape, an axis or a count: a value that each such reader can live with, see
            ``SIZES``.
    """

    bounds: list[int | str] = field(default_factory=list)
    mask: bool = False
    choices: list[float] = field(default_factory=list)
    sizes: list[Any] = field(default_factory=list)


# Operators that hand on the values of these inputs, rearranged at most; None stands for all inputs.
_CARRIES: dict[str, tuple[int, ...] | None] = {
    **dict.fromkeys((*MOVES, "Abs", "Cast", "CastLike", "Clip", "Dropout", "Pad"), (0,)),
    **dict.fromkeys(("ReduceMax", "ReduceMin", "Trilu"), (0,)),
    **dict.fromkeys(("Concat", "Max", "Min"), None),
    "Where": (1, 2),
}

SIZES: dict[tuple[str, int], Any] = {
    ("ConstantOfShape", 0): 2,
    ("CumSum", 1): 0,
    ("Expand", 1): 1,
    ("Loop", 0): 3,
    ("NonMaxSuppression", 2): 8,
    ("NonMaxSuppression", 3): 0.5,
    ("NonMaxSuppression", 4): 0.1,
    ("OneHot", 1): 4,
    ("Pad", 1): 1,
    ("Range", 0): 0,
    ("Range", 1): 4,
    ("Range", 2): 1,
    ("Reshape", 1): "reshape",
    ("Resize", 2): "scales",
    ("Slice", 1): 0,
    ("Slice", 2): 2,
    ("Slice", 3): "count",
    ("Slice", 4): 1,
    ("Squeeze", 1): 0,
    ("Tile", 1): 2,
    ("TopK", 1): 1,
    ("Unsqueeze", 1): 0,
    ("Upsample", 1): "scales",
}
"""Readers that take sizes, counts or axes, by operator and input, with a value that fits most models.

``"count"`` stands for 0, 1, 2, ...; ``"reshape"`` for -1, 1, 1, ...; ``"scales"`` for ..., 1, 2, 2.
"""

_COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")

# Operators of which one input indexes the first axis of another: (domain, operator, index input) -> table input.
_TABLES: dict[tuple[str, str, int], int] = {
    ("", "RotaryEmbedding", 3): 1,
    ("com.microsoft", "EmbedLayerNormalization", 0): 2,
    ("com.microsoft", "EmbedLayerNormalization", 1): 4,
    ("com.microsoft", "GatherBlockQuantized", 1): 0,
    ("com.microsoft", "RotaryEmbedding", 1): 2,
}

_LARGE = 1e3
"""Factor from which a product is the negative infinity of an attention mask."""


def role(model: ir.Model, value: ir.Value) -> Role:
    """What the model does with the values of ``value``, one of its inputs."""
    found = Role()
    # A value that carries the input on, and what was added on the way.
    work: list[tuple[ir.Value, int]] = [(value, 0)]
    seen: set[int] = set()
    while work:
        carrier, offset = work.pop()
        if id(carrier) not in seen:
            seen.add(id(carrier))
            for use in carrier.uses():
                work += _read(model, found, use.node, use.idx, offset)
    return found


def _read(model: ir.Model, role: Role, node: ir.Node, position: int, offset: int) -> Iterator[tuple[ir.Value, int]]:
    """Note what one reader does, and yield the values that carry its input on."""
    function = model.functions.get(node.op_identifier())
    domain = "" if node.domain == "ai.onnx" else node.domain
    kind = node.op_type
    if function is not None:
        yield from ((v, offset) for v in function.inputs[position : position + 1])
    elif (table := _TABLES.get((domain, kind, position))) is not None and table < len(node.inputs):
        _bound(role, node.inputs[table], 0, offset)
    elif domain:
        return
    elif kind in ("Gather", "GatherElements", "ScatterElements") and position == 1:
        _bound(role, node.inputs[0], edit.attribute(node, "axis", 0), offset)
    elif kind in ("GatherND", "ScatterND") and position == 1:
        data = node.inputs[0]
        for axis in range(len(data.shape) if data is not None and data.shape is not None else 1):
            _bound(role, data, axis, offset)
    elif kind == "OneHot" and position == 0:
        depth = edit.scalar(node.inputs[1])
        role.bounds += [int(depth) - offset] if depth is not None else []
    elif (
        (kind == "Cast" and edit.attribute(node, "to") == int(ir.DataType.BOOL))
        or kind in ("Not", "And", "Or", "Xor")
        or (kind == "Where" and position == 0)
    ):
        role.mask = True
    elif kind in _COMPARISONS:
        constant = edit.scalar(node.inputs[1 - position])
        if constant is not None and 0 <= constant <= 1:
            role.mask = True
        elif constant is not None:
            role.choices.append(constant)
    elif kind in ("Add", "Sub", "Mul"):
        yield from _arithmetic(role, node, position, offset)
    elif (kind, position) in SIZES:
        role.sizes.append(SIZES[kind, position])
    elif kind.startswith("Reduce") and position == 1:
        role.sizes.append(0)
    elif kind in ("Loop", "Scan"):
        # Loop takes (trip count, condition, carried...) and hands its body (iteration, condition, carried...);
        # Scan's body takes what Scan is given.
        yield from ((v, offset) for v in node.attributes["body"].as_graph().inputs[position : position + 1])
    elif kind in _CARRIES and ((carried := _CARRIES[kind]) is None or position in carried):
        yield from ((v, offset) for v in node.outputs)


def _arithmetic(role: Role, node: ir.Node, position: int, offset: int) -> Iterator[tuple[ir.Value, int]]:
    number = edit.scalar(node.inputs[1 - position])
    if not isinstance(number, int | float):
        return
    match node.op_type:
        case "Mul":
            role.mask = role.mask or abs(number) >= _LARGE
        case "Sub" if position == 1:
            role.mask = role.mask or number == 1  # 1 - mask
        case "Add" | "Sub" if float(number).is_integer():
            yield node.outputs[0], offset + int(number if node.op_type == "Add" else -number)


def _bound(role: Role, data: ir.Value | None, axis: int, offset: int) -> None:
    shape = data.shape if data is not None else None
    if shape is None or not -len(shape) <= axis < len(shape):
        role.bounds.append(1)
        return
    size = shape[axis]
    role.bounds.append(max(size - offset, 1) if isinstance(size, int) else size.value or 1)
