"""Sizes that nodes are told, when something else in the graph is cut."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from fragments import run
from onnx import numpy_helper

from graphc.axes import cut
from graphc.axes.groups import analyse

# The mask's second size is unknown to inference, as in BERT exports whose token types are gathered by position.
MODEL = """<ir_version: 10, opset_import: ["" : 21]>
embedding (int64[N,S] ids, int64[1,P] positions) => (float[N,S,3] y) {
    types = GatherElements<axis = 1> (table, positions)
    size = Shape(ids)
    every = Expand(types, size)
    x = Gather(weight, every)
    a = MatMul(x, w1)
    b = Relu(a)
    y = MatMul(b, w2)
}"""


def test_an_expand_to_a_size_nobody_knows_is_left_alone_when_its_axes_are_not_cut() -> None:
    random = np.random.default_rng(0)
    proto = onnx.parser.parse_model(MODEL)
    weights = {"weight": random.normal(size=(2, 4)), "w1": random.normal(size=(4, 6)), "w2": random.normal(size=(6, 3))}
    weights["w1"][:, 2] = 0
    held = {name: array.astype(np.float32) for name, array in weights.items()} | {"table": np.zeros((1, 8), np.int64)}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in held.items())

    model = ir.from_proto(proto)
    groups = analyse(model)
    (group,) = (g for g in groups.groups if g.size == 6)
    cut.cut(model, groups, {group.name: np.arange(6) != 2})
    small = ir.to_proto(model)

    assert next(tuple(t.dims) for t in small.graph.initializer if t.name == "w1") == (4, 5)
    assert [node.op_type for node in small.graph.node] == [node.op_type for node in proto.graph.node]
    feeds = {"ids": np.zeros((2, 5), np.int64), "positions": np.arange(5)[None]}
    np.testing.assert_allclose(run(small, feeds)["y"], run(proto, feeds)["y"], rtol=1e-6, atol=1e-6)
