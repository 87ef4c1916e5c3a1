"""A weight as the tiles of it that are not zero: a function in the model, whose body puts the dense weight together.

``graphc.TiledWeight(values, places) -> weight``: ``values`` ``(tiles, high, deep)`` are the tiles, of ``high`` outputs
and ``deep`` inputs; ``places`` ``(tiles, 1)`` int64 are their numbers in the grid of all tiles, which is read output
by output. The body consists of standard operators, so that every ONNX runtime computes the same weight from it; a
target with kernels for tiles reads the call.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array

DOMAIN, OPERATOR = "graphc", "TiledWeight"

_FUNCTION = """
<domain: "graphc", opset_import: ["" : 21]>
TiledWeight <all, grid, perm, shape> (values, places) => (weight)
{
  every = Constant <value_ints: ints = @all> ()
  nothing = ConstantOfShape (every)
  typed = CastLike (nothing, values)
  filled = ScatterND (typed, places, values)
  by_place = Constant <value_ints: ints = @grid> ()
  tiled = Reshape (filled, by_place)
  turned = Transpose <perm: ints = @perm> (tiled)
  sizes = Constant <value_ints: ints = @shape> ()
  weight = Reshape (turned, sizes)
}
"""


@dataclass(frozen=True)
class Tiled:
    """A weight's tiles.

    Attributes:
        values: ``(tiles, high, deep)``, those of the first outputs first.
        places: The number of each tile in the grid, ``(tiles,)``, ascending.
        outputs: Of the weight.
        depth: Its inputs.
        turned: Whether the weight is ``(inputs, outputs)``.
    """

    values: Array
    places: Array
    outputs: int
    depth: int
    turned: bool

    @staticmethod
    def of(matrix: Array, high: int, deep: int, *, turned: bool) -> Tiled:
        """The tiles of a matrix ``(outputs, inputs)`` that are not zero; one at least.

        Args:
            matrix: Both its sizes are multiples of the tiles'.
            high: Outputs of a tile.
            deep: Inputs of a tile.
            turned: How the weight lies in its model.
        """
        outputs, depth = matrix.shape
        grid = matrix.reshape(outputs // high, high, depth // deep, deep).transpose(0, 2, 1, 3)
        places = np.flatnonzero(grid.any(axis=(2, 3)))
        # Operators that read nothing at all are a special case everywhere.
        places = places if len(places) else np.zeros(1, np.int64)
        values = np.ascontiguousarray(grid.reshape(-1, high, deep)[places])
        return Tiled(values, places, outputs, depth, turned)

    def dense(self) -> Array:
        """The weight as it lies in its model."""
        _, high, deep = self.values.shape
        grid = np.zeros((self.outputs // high * self.columns, high, deep), self.values.dtype)
        grid[self.places] = self.values
        matrix = grid.reshape(-1, self.columns, high, deep).transpose(0, 2, 1, 3).reshape(self.outputs, self.depth)
        return np.ascontiguousarray(matrix.T if self.turned else matrix)

    @property
    def columns(self) -> int:
        """How many tiles stand beside each other in the grid."""
        return int(self.depth // self.values.shape[2])


def write(weight: ir.Value, tiled: Tiled, names: edit.Names, model: ir.Model) -> ir.Value:
    """Let a call of the function take the place of a constant; returns its output."""
    graph = weight.graph
    assert graph is not None
    function = ir.serde.deserialize_function(onnx.parser.parse_function(_FUNCTION))
    model.functions.setdefault(function.identifier(), function)
    model.graph.opset_imports.setdefault(DOMAIN, 1)
    count, high, deep = tiled.values.shape
    rows, columns = tiled.outputs // high, tiled.columns
    settings = {
        "all": [rows * columns, high, deep],
        "grid": [rows, columns, high, deep],
        "perm": [1, 3, 0, 2] if tiled.turned else [0, 2, 1, 3],
        "shape": [tiled.depth, tiled.outputs] if tiled.turned else [tiled.outputs, tiled.depth],
    }
    values = edit.initializer(graph, tiled.values, names.fresh(f"{weight.name}.tiles"))
    places = edit.initializer(graph, tiled.places.reshape(count, 1), names.fresh(f"{weight.name}.places"))
    out = ir.Value(name=names.fresh(f"{weight.name}.dense"), type=weight.type, shape=weight.shape)
    call = ir.node(OPERATOR, [values, places], settings, domain=DOMAIN, outputs=[out], name=out.name)
    graph.insert_before(graph[0], call)
    weight.replace_all_uses_with(out)
    edit.drop_unused(weight)
    return out


def read(value: ir.Value | None) -> Tiled | None:
    """The tiles that a value is put together from, if it is."""
    node = value.producer() if value is not None else None
    if node is None or not edit.is_op(node, OPERATOR, domain=DOMAIN):
        return None
    values, places = (edit.tensor(each) for each in node.inputs)
    if values is None or places is None:
        return None
    rows, columns, high, deep = edit.attribute(node, "grid")
    turned = edit.attribute(node, "perm") == (1, 3, 0, 2)
    return Tiled(values.numpy(), places.numpy().reshape(-1), rows * high, columns * deep, turned)
