"""Constants along an axis, scaled and turned when they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes import cut
from graphc.axes.group import Place
from graphc.edit import Array
from graphc.rewrites.weights import reading
from graphc.rotation.orthogonal import Orthogonal
from graphc.rotation.streams import Gain

PIECE = 1 << 22
"""Elements that are turned at once, in float64."""

Step = Callable[[Array], Array]
"""What is done to rows ``(..., n)`` along an axis of ``n`` units."""


@dataclass
class Turned:
    """What becomes of one constant: steps along axes, in order.

    Attributes:
        place: Where it is; any of its places.
        steps: The axis, the positions of each unit along it ``(n, copies)``, and what is done along the units.
    """

    place: Place
    steps: list[tuple[int, Array, Step]] = field(default_factory=list)


class Constants:
    """The constants that change, each written once at the end."""

    def __init__(self) -> None:
        self._held: dict[tuple[ir.Value, ir.Node | None], Turned] = {}

    def scale(self, place: Place, factors: Array) -> None:
        """Multiply each unit by a factor, ``(n,)``."""
        self._add(place, lambda rows: rows * factors)

    def ones(self, place: Place) -> None:
        """Make all factors 1."""
        self._add(place, np.ones_like)

    def turn(self, place: Place, q: Orthogonal) -> None:
        """Turn the axis."""
        self._add(place, q.apply)

    def _add(self, place: Place, step: Step) -> None:
        turned = self._held.setdefault((place.value, place.reader), Turned(place))
        units = place.units
        order = np.argsort(units, kind="stable")[np.count_nonzero(units < 0) :]
        turned.steps.append((place.axis, order.reshape(int(units.max()) + 1, -1), step))

    def write(self, names: edit.Names) -> int:
        """Let the constants hold what they became, computed when it is read; returns how many."""
        for (value, reader), turned in self._held.items():
            held = edit.tensor(value)
            assert held is not None
            cut.write(value, _lazy(held, turned), reader=reader, names=names)
        return len(self._held)


def _lazy(held: ir.TensorProtocol, turned: Turned) -> ir.TensorProtocol:
    def compute() -> ir.TensorProtocol:
        with reading(held) as array:
            found = np.array(array)
            del array
        for axis, order, step in turned.steps:
            _along(found, axis, order, step)
        return ir.Tensor(found, dtype=held.dtype, name=held.name)

    return ir.LazyTensor(compute, dtype=held.dtype, shape=ir.Shape(held.shape.numpy()), cache=False, name=held.name)


def _along(array: Array, axis: int, order: Array, step: Step) -> None:
    """Do a step along the units of an axis, in place, in pieces."""
    n, copies = order.shape
    moved = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
    back = None if np.shares_memory(moved, array) else moved
    rows = max(1, PIECE // moved.shape[1])
    for start in range(0, len(moved), rows):
        piece = moved[start : start + rows]
        units = np.moveaxis(piece[:, order.reshape(-1)].reshape(len(piece), n, copies), 1, 2)
        done = np.moveaxis(step(units), 2, 1).reshape(len(piece), -1)
        piece[:, order.reshape(-1)] = done.astype(array.dtype)
    if back is not None:
        shape = np.moveaxis(array, axis, -1).shape
        np.moveaxis(array, axis, -1)[...] = back.reshape(shape)


def as_matrix(gain: Gain, q: Orthogonal, names: edit.Names) -> bool:
    """Put a product with ``QT G Q`` behind a turned value whose gain ``G`` no weight can take up."""
    node, out = gain.node, gain.node.outputs[0]
    graph, dtype = node.graph, out.dtype
    held = edit.tensor(gain.place.value)
    assert graph is not None and held is not None
    matrix = q.apply(q.matrix.T * gain.factors)
    like = (dtype or held.dtype).numpy()
    weight = edit.initializer(graph, matrix.astype(like), names.fresh(f"{gain.place.value.name}.turned"))
    made = ir.Value(name=names.fresh(f"{out.name}.gained"), shape=out.shape, type=out.type)
    uses = list(out.uses())
    product = ir.node("MatMul", [out, weight], outputs=[made], name=names.fresh(f"{node.name}.gain"))
    for use in uses:
        use.node.replace_input_with(use.idx, made)
    node.append(product)
    return True
