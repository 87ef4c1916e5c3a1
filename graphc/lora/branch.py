"""Linear branches of a graph: what is computed from some ``x`` by products with constants and by constant scales alone.

A branch is read from its result upwards. It is a sum of paths; a path is a chain of products, the last of which gives
the result, perhaps placed among zero channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array, attribute, is_op
from graphc.lora.products import Kind, Product, product
from graphc.rewrites.base import FLOATS, Rewriter, dims

DYNAMIC = "the scale is not constant: the adapter is meant to be switched"

_ACTIVATIONS = frozenset(
    ("Celu", "Clip", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Relu", "Selu")
) | frozenset(("Sigmoid", "Softmax", "Softplus", "Swish", "Tanh"))
"""What stands between A and B in adapters that cannot be folded."""

_LONGEST = 4
"""Products in a row that are read as one chain; an adapter has two."""


@dataclass(frozen=True)
class Path:
    """One chain of products.

    Attributes:
        products: From the one that gives the result to the one that reads ``source``.
        diagonals: For each product, factors of its output channels; None for none.
        scale: What everything is multiplied by.
        source: What the first product reads, behind scales and casts.
        values: The results on the way, from the first product's on: nobody else may read them.
        casts: Nodes that change the dtype.
        ranks: Values with the number of axes that a constant scale would give them if they had fewer.
        offset: The channel of the result at which the path's channels begin.
        width: How many channels the result has; None if just those of the path.
        problem: Why it cannot be folded, though it looks like an adapter; empty if it can.
    """

    products: tuple[Product, ...]
    diagonals: tuple[Array | None, ...]
    scale: float
    source: ir.Value
    values: tuple[ir.Value, ...]
    casts: tuple[ir.Node, ...]
    ranks: tuple[tuple[ir.Value, int], ...] = ()
    offset: int = 0
    width: int | None = None
    problem: str = ""

    @property
    def kind(self) -> Kind:
        """How the source is read."""
        return self.products[-1].kind

    @property
    def channels(self) -> int:
        """How many channels the result has."""
        return self.products[0].channels[1] if self.width is None else self.width

    @property
    def rank(self) -> int:
        """How many channels the narrowest place in it has."""
        return min(p.channels[1] for p in self.products[1:])


@dataclass(frozen=True)
class Step:
    """A node that passes its input on, scaled.

    Attributes:
        node: The node.
        value: Its input.
        scale: The factor, one for all elements; or one for each element of the last axis.
        rank: How many axes the factor has.
    """

    node: ir.Node
    value: ir.Value
    scale: float | Array
    rank: int = 0

    @property
    def ranks(self) -> tuple[tuple[ir.Value, int], ...]:
        """What ``Path.ranks`` has to know of it."""
        return ((self.value, self.rank),) if self.rank > 1 else ()

    @property
    def casts(self) -> tuple[ir.Node, ...]:
        """The node, if it changes the dtype."""
        return (self.node,) if self.node.op_type == "Cast" else ()


def step(value: ir.Value) -> Step | None:
    """The scale, Cast, Identity or idle Dropout that makes a value; None if something else does."""
    node = value.producer()
    if node is None or node.domain or not node.inputs or node.inputs[0] is None or value is not node.outputs[0]:
        return None
    first = node.inputs[0]
    match node.op_type:
        case "Identity":
            return Step(node, first, 1.0)
        case "Cast":
            return Step(node, first, 1.0)
        case "Neg":
            return Step(node, first, -1.0)
        case "Dropout":
            training = node.inputs[2] if len(node.inputs) > 2 else None
            idle = training is None or edit.scalar(training) is False
            return Step(node, first, 1.0) if idle and not any(v.uses() for v in node.outputs[1:]) else None
        case "Mul":
            second = node.inputs[1]
            for data, factor in ((first, second), (second, first)):
                if data is not None and (scale := _factor(factor)) is not None:
                    return Step(node, data, *scale)
        case "Div":
            scale = _factor(node.inputs[1])
            if scale is not None and np.all(scale[0] != 0):
                return Step(node, first, 1 / scale[0], scale[1])
    return None


def _factor(factor: ir.Value | None) -> tuple[float | Array, int] | None:
    """The values of a constant scale, and how many axes it has."""
    held = edit.tensor(factor)
    if held is None or held.dtype not in FLOATS or held.size > edit.SMALL:
        return None
    shape = dims(held)
    if held.size != 1 and shape[-1] != held.size:
        return None
    array = held.numpy().astype(np.float64)
    return (float(array.reshape(())) if array.size == 1 else array.reshape(-1)), len(shape)


def _from(last: Product) -> Path:
    """The path of one product; what it reads is followed up behind scales and casts."""
    value, scale, output = last.data, last.scale, last.node.outputs[0]
    steps = list[Step]()
    while (found := step(value)) is not None and isinstance(found.scale, float):
        scale *= found.scale
        steps.append(found)
        value = found.value
    casts = tuple(node for each in steps for node in each.casts) if last.kind != "table" else ()
    ranks = tuple(rank for each in steps for rank in each.ranks)
    return Path((last,), (None,), scale, value, (output,), casts, ranks, problem=last.weight.problem)


def parts(value: ir.Value, rewriter: Rewriter) -> list[list[Path]]:
    """Read a value as a branch: a sum, in which each part is a path.

    Returns:
        For each part, the ways of telling its products from its source, the shortest first; empty if the value is no
        sum of products seen through scales and zeros beside them.
    """
    node = value.producer()
    if node is None or node.domain:
        return _one(chains(value))
    match node.op_type:
        case "Add" | "Sum":
            return _summed(value, rewriter)
        case "Concat":
            return _joined(value, rewriter)
        case "Pad":
            return _padded(value, rewriter)
    if product(node) is None:
        found = step(value)
        if found is not None:
            return _behind(parts(found.value, rewriter), value, found)
    return _one(chains(value))


def _one(found: list[Path]) -> list[list[Path]]:
    return [found] if found else []


def _behind(inner: list[list[Path]], value: ir.Value, found: Step) -> list[list[Path]]:
    after = [[made for path in part if (made := _after(path, value, found)) is not None] for part in inner]
    return after if all(after) else []


def _after(path: Path, value: ir.Value, found: Step) -> Path | None:
    """The path with one more node behind it."""
    casts, ranks = (*path.casts, *found.casts), (*path.ranks, *found.ranks)
    path = replace(path, values=(*path.values, value), casts=casts, ranks=ranks)
    if isinstance(found.scale, float):
        return replace(path, scale=path.scale * found.scale)
    last = path.products[0]
    if path.width is not None or last.kind not in ("rows", "table") or last.channels[1] not in (0, found.scale.size):
        return None
    old = path.diagonals[0]
    return replace(path, diagonals=(found.scale if old is None else found.scale * old, *path.diagonals[1:]))


def chains(value: ir.Value) -> list[Path]:
    """Read a value as one chain of products, behind scales; the shortest reading first."""
    node = value.producer()
    if node is None:
        return []
    made = product(node)
    if made is not None:
        return list(_through(made))
    found = step(value)
    if found is not None:
        return [after for path in chains(found.value) if (after := _after(path, value, found)) is not None]
    problem, data = _obstacle(node)
    return [
        replace(path, values=(*path.values, value), problem=path.problem or problem)
        for path in (chains(data) if data is not None else ())
        if not path.problem
    ]


def _obstacle(node: ir.Node) -> tuple[str, ir.Value | None]:
    """Why a node hinders folding what is before it, and what that is, if it is the kind that adapters have."""
    if node.domain:
        return "", None
    if node.op_type in _ACTIVATIONS:
        return f"{node.op_type} in the branch is not linear", node.inputs[0]
    if node.op_type == "Dropout":
        return "Dropout in the branch is not idle", node.inputs[0]
    if node.op_type == "Mul":
        for data, factor in (node.inputs, reversed(node.inputs)):
            if data is None or factor is None:
                continue
            if factor.is_graph_input() or (factor.shape is not None and all(dim == 1 for dim in factor.shape)):
                return DYNAMIC, data
            if (gate := factor.producer()) is not None and gate.op_type in _ACTIVATIONS and gate.inputs[0] is data:
                return f"{gate.op_type} in the branch is not linear", data
    return "", None


def ways(last: Product) -> list[Path]:
    """All chains of products that end in this one, the shortest first."""
    return list(_through(last))


def _through(last: Product) -> Iterator[Path]:
    """All chains that end in a product."""
    yield _from(last)
    if last.kind in ("table", "columns"):
        return
    for path in chains(last.data):
        if len(path.products) < _LONGEST and (path.kind == "image") == (last.kind == "image"):
            yield replace(
                path,
                products=(last, *path.products),
                diagonals=(None, *path.diagonals),
                scale=path.scale * last.scale,
                values=(*path.values, last.node.outputs[0]),
                problem=path.problem or last.weight.problem,
            )


def _summed(value: ir.Value, rewriter: Rewriter) -> list[list[Path]]:
    """The branches of an Add or a Sum of nothing else."""
    node = value.producer()
    assert node is not None
    found: list[list[Path]] = []
    for data in node.inputs:
        inner = parts(data, rewriter) if data is not None and len(data.uses()) == 1 else []
        if not inner:
            return []
        found += inner
    return [[replace(path, values=(*path.values, value)) for path in part] for part in found]


def _joined(value: ir.Value, rewriter: Rewriter) -> list[list[Path]]:
    """The branches in a Concat along the last axis of branches and zeros."""
    node = value.producer()
    assert node is not None
    items = [data for data in node.inputs if data is not None]
    read = [parts(data, rewriter) for data in items]
    if not any(read) or any(ways[0].kind == "image" for part in read for ways in part):
        return []
    if not _is_last(attribute(node, "axis"), value, rewriter):
        return []
    widths = [part[0][0].channels if part else _zeros(data, rewriter) for part, data in zip(read, items, strict=True)]
    if not all(widths):
        return []
    found: list[list[Path]] = []
    for i, part in enumerate(read):
        found += _placed(part, value, sum(widths[:i]), sum(widths[i + 1 :]))
    return found


def _is_last(axis: int, value: ir.Value, rewriter: Rewriter) -> bool:
    return axis == -1 or axis + 1 == rewriter.rank(value)


def _zeros(value: ir.Value, rewriter: Rewriter) -> int:
    """How many channels a value has that is zero throughout; 0 if it is not, or unknown."""
    node = value.producer()
    if is_op(node, "ConstantOfShape"):
        assert node is not None
        fill = attribute(node, "value")
        zero = fill is None or not fill.numpy().any()
    else:
        constant = edit.constant(node.inputs[0] if node is not None and is_op(node, "Expand") else value)
        zero = constant is not None and not constant.any()
    shape = rewriter.shape(value) if zero else None
    return shape[-1] if shape is not None and len(shape) and isinstance(shape[-1], int) else 0


def _padded(value: ir.Value, rewriter: Rewriter) -> list[list[Path]]:
    """The branch in a Pad of the last axis with zeros."""
    node = value.producer()
    assert node is not None
    data, pads = node.inputs[0], edit.constant(node.inputs[1], limit=32)
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    axes = edit.constant(node.inputs[3], limit=32) if len(node.inputs) > 3 else None
    inner = parts(data, rewriter) if data is not None else []
    if not inner or pads is None or attribute(node, "mode", "constant") != "constant":
        return []
    if zero is not None and edit.scalar(zero) != 0:
        return []
    before, after = np.split(pads, 2)
    if before[:-1].any() or after[:-1].any() or before[-1] < 0 or after[-1] < 0:
        return []
    if (
        len(node.inputs) > 3
        and node.inputs[3] is not None
        and (axes is None or not _is_last(int(axes[-1]), value, rewriter))
    ):
        return []
    return _placed(inner, value, int(before[-1]), int(after[-1]))


def _placed(inner: list[list[Path]], value: ir.Value, before: int, after: int) -> list[list[Path]]:
    """The parts with zero channels before and after them, as ``value``."""
    found = [
        [
            replace(
                path, values=(*path.values, value), offset=path.offset + before, width=before + path.channels + after
            )
            for path in part
            if path.kind != "image" and path.channels
        ]
        for part in inner
    ]
    return found if all(found) else []
