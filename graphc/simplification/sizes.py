"""Shape arithmetic: what computes a run of some tensor's dims reads them off that tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from graphc import edit
from graphc.shapes import Shape
from graphc.shapes.symbolic import Dim
from graphc.simplification.rules import Become, Outcome, Rules

if TYPE_CHECKING:
    from graphc.simplification.sweep import Sweep

RULES = Rules()


class Sources:
    """Tensors whose shapes are at hand, by their dims: the graph's inputs, and whatever a Shape node reads."""

    def __init__(self) -> None:
        self._by_dim: dict[Dim, list[tuple[ir.Value, Shape, int]]] = {}
        self._seen: set[ir.Value] = set()

    def add(self, value: ir.Value, shape: Shape | None) -> None:
        """Offer a tensor."""
        if shape is None or value in self._seen:
            return
        self._seen.add(value)
        for axis, dim in enumerate(shape):
            if not isinstance(dim, int):
                self._by_dim.setdefault(dim, []).append((value, shape, axis))

    def find(self, dims: Shape) -> tuple[ir.Value, int] | None:
        """A tensor and the axis from which on its dims are these."""
        for value, shape, axis in self._by_dim.get(dims[0], ()):
            if shape[axis : axis + len(dims)] == dims:
                return value, axis
        return None


@RULES.add(
    "Cast",
    "Concat",
    "Gather",
    "Reshape",
    "Slice",
    "Squeeze",
    "Unsqueeze",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Where",
    "Shape",
)
def _read_off(node: ir.Node, sweep: Sweep) -> Outcome:
    fact = sweep.facts(node.outputs[0])
    if fact.dtype != ir.DataType.INT64 or fact.rank != 1 or not fact.items or sweep.facts.version < 15:
        return None
    dims = tuple(item for item in fact.items if item is not None)
    if len(dims) < len(fact.items) or isinstance(dims[0], int):
        return None
    found = sweep.sources.find(dims)
    if found is None:
        return None
    value, axis = found
    if value is node.inputs[0] and edit.is_op(node, "Shape"):
        return None
    rank = sweep.facts(value).rank
    attributes = {} if axis == 0 and rank == len(dims) else {"start": axis, "end": axis + len(dims)}
    return Become([value], attributes, "size read off a tensor", "Shape")
