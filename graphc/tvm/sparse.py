"""Products with tiles of a weight, in an operator of graphc's own.

``SparseProduct(x, starts, places, values)`` stands in a lowered model where MatMul or Gemm read a weight that
:mod:`graphc.tiles` puts together; for its operands see :mod:`graphc.tvm.kernels.sparse`, with values as ``(tiles,
outputs, inputs)``.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphc import edit, tiles
from graphc.edit import attribute
from graphc.recognition.graph import Graph
from graphc.tiles import Tiled
from graphc.tvm.kernels.sparse import Tiles
from graphc.tvm.placing import graph_of, put

PRODUCT = "SparseProduct"


def write(model: ir.Model) -> int:
    """Let products read tiles, in place; returns how many do. What reads a weight otherwise gets it dense."""
    calls = [node for node in model.graph if edit.is_op(node, tiles.OPERATOR, domain=tiles.DOMAIN)]
    if not calls:
        return 0
    graph, done = graph_of(model), 0
    for call in calls:
        out = call.outputs[0]
        tiled = tiles.read(out)
        if tiled is None:
            continue
        readers = [use.node for use in out.uses() if use.idx == 1 and multiplies(use.node, tiled.turned, graph)]
        if readers and fits(tiled):
            _write(out, tiled, readers, graph)
            done += len(readers)
        if out.uses() or out.is_graph_output():
            dense = edit.initializer(model.graph, tiled.dense(), graph.fresh(f"{out.name}.dense"))
            edit.replace(out, dense)
        held = list(call.inputs)
        edit.remove(call)
        for value in held:
            edit.drop_unused(value)
    for key in [key for key in model.functions if key[0] == tiles.DOMAIN]:
        del model.functions[key]
    return done


def multiplies(node: ir.Node, turned: bool, graph: Graph) -> bool:
    """Whether a node is the product of rows with its second input, plus a bias at most."""
    if edit.is_op(node, "MatMul"):
        return turned and graph.rank(node.inputs[0]) != 1
    plain = attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1 and not attribute(node, "transA", 0)
    return edit.is_op(node, "Gemm") and plain and bool(attribute(node, "transB", 0)) != turned


def fits(tiled: Tiled) -> bool:
    """Whether a side of the tiles fills a vector, and the weight is float32."""
    count, high, deep = tiled.values.shape
    return bool(Tiles(tiled.outputs, tiled.depth, high, deep, count).lanes) and tiled.values.dtype == np.float32


def _write(out: ir.Value, tiled: Tiled, readers: list[ir.Node], graph: Graph) -> None:
    count, high, deep = tiled.values.shape
    bands, columns = np.divmod(tiled.places, tiled.columns)
    starts = np.searchsorted(bands, np.arange(tiled.outputs // high + 1)).astype(np.int32)
    parts = {"starts": starts, "places": (columns * deep).astype(np.int32), "values": tiled.values}
    home, name = graph.model.graph, out.name
    operands = [edit.initializer(home, array, graph.fresh(f"{name}.{part}")) for part, array in parts.items()]
    settings = {"outputs": tiled.outputs, "depth": tiled.depth, "high": high, "deep": deep, "count": count}
    for node in readers:
        put(node, PRODUCT, [node.inputs[0], *operands], settings, graph)
