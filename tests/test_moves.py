"""Operators that only move elements."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphc import moves, runtime

INPUTS: dict[str, tuple[tuple[int, ...], list[Any], dict[str, Any]]] = {
    "Compress": ((2, 3), [np.array([True, False])], {"axis": 0}),
    "DepthToSpace": ((1, 4, 2, 2), [], {"blocksize": 2}),
    "Expand": ((2, 1), [np.array([2, 3])], {}),
    "Flatten": ((2, 3, 2), [], {}),
    "Gather": ((4, 3), [np.array([3, 0, 3])], {}),
    "GatherElements": ((2, 3), [np.array([[1, 0, 1]])], {}),
    "GatherND": ((2, 3), [np.array([[1, 2], [0, 0]])], {}),
    "Identity": ((2, 3), [], {}),
    "Reshape": ((2, 3), [np.array([3, -1])], {}),
    "ReverseSequence": ((3, 2), [np.array([3, 2])], {}),
    "Slice": ((4, 3), [np.array([1]), np.array([3])], {}),
    "SpaceToDepth": ((1, 1, 4, 4), [], {"blocksize": 2}),
    "Split": ((4, 3), [], {"num_outputs": 2}),
    "Squeeze": ((1, 3), [np.array([0])], {}),
    "Tile": ((2, 3), [np.array([2, 1])], {}),
    "Transpose": ((2, 3), [], {}),
    "Unsqueeze": ((2, 3), [np.array([1])], {}),
}


@pytest.mark.parametrize("operator", moves.MOVES)
def test_elements_of_the_first_input_come_out(operator: str) -> None:
    shape, others, attributes = INPUTS[operator]
    given = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    held = [
        ir.Value(name=f"c{i}", const_value=ir.tensor(array, name=f"c{i}"), shape=ir.Shape(array.shape))
        for i, array in enumerate(others)
    ]
    for value, array in zip(held, others, strict=True):
        value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    node = ir.node(operator, [x, *held], attributes, num_outputs=attributes.get("num_outputs", 1))
    for i, output in enumerate(node.outputs):
        output.name, output.type = f"y{i}", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=held, opset_imports={"": 21}, name="g")
    got = list(runtime.session(ir.Model(graph, ir_version=10), optimise=False).run({"x": given}).values())

    flat = np.concatenate([array.reshape(-1) for array in got])
    assert set(flat) <= set(given.reshape(-1))
    if operator not in moves.PICKS:
        assert set(flat) == set(given.reshape(-1))
    if operator not in (*moves.PICKS, *moves.REPEATS):
        assert flat.size == given.size
    if operator in moves.VIEWS:
        np.testing.assert_array_equal(flat, given.reshape(-1))


def test_each_is_named_once() -> None:
    assert len(set(moves.MOVES)) == len(moves.MOVES)
