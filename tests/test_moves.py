"""Operators that only move elements."""

from __future__ import annotations

import numpy as np
import pytest

from graphc import moves
from tests.small_models import build, run

CALLS: dict[str, tuple[tuple[int, ...], str, dict[str, np.ndarray]]] = {
    "Compress": ((2, 3), "Compress<axis=0>(x, c)", {"c": np.array([True, False])}),
    "DepthToSpace": ((1, 4, 2, 2), "DepthToSpace<blocksize=2>(x)", {}),
    "Expand": ((2, 1), "Expand(x, c)", {"c": np.array([2, 3])}),
    "Flatten": ((2, 3, 2), "Flatten(x)", {}),
    "Gather": ((4, 3), "Gather(x, c)", {"c": np.array([3, 0, 3])}),
    "GatherElements": ((2, 3), "GatherElements(x, c)", {"c": np.array([[1, 0, 1]])}),
    "GatherND": ((2, 3), "GatherND(x, c)", {"c": np.array([[1, 2], [0, 0]])}),
    "Identity": ((2, 3), "Identity(x)", {}),
    "Reshape": ((2, 3), "Reshape(x, c)", {"c": np.array([3, -1])}),
    "ReverseSequence": ((3, 2), "ReverseSequence(x, c)", {"c": np.array([3, 2])}),
    "Slice": ((4, 3), "Slice(x, c, d)", {"c": np.array([1]), "d": np.array([3])}),
    "SpaceToDepth": ((1, 1, 4, 4), "SpaceToDepth<blocksize=2>(x)", {}),
    "Split": ((4, 3), "Split<num_outputs=2>(x)", {}),
    "Squeeze": ((1, 3), "Squeeze(x, c)", {"c": np.array([0])}),
    "Tile": ((2, 3), "Tile(x, c)", {"c": np.array([2, 1])}),
    "Transpose": ((2, 3), "Transpose(x)", {}),
    "Unsqueeze": ((2, 3), "Unsqueeze(x, c)", {"c": np.array([1])}),
}


@pytest.mark.parametrize("operator", moves.MOVES)
def test_elements_of_the_first_input_come_out(operator: str) -> None:
    shape, call, constants = CALLS[operator]
    given = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    outputs = "y z" if operator == "Split" else "y"
    body = f"{outputs.replace(' ', ', ')} = {call}"
    model = build(body, x=f"float[{','.join(map(str, shape))}] x", outputs=outputs, **constants)
    flat = np.concatenate([array.reshape(-1) for array in run(model, {"x": given}).values()])
    assert set(flat) <= set(given.reshape(-1))
    if operator not in moves.PICKS:
        assert set(flat) == set(given.reshape(-1))
    if operator not in (*moves.PICKS, *moves.REPEATS):
        assert flat.size == given.size
    if operator in moves.VIEWS:
        np.testing.assert_array_equal(flat, given.reshape(-1))


def test_each_is_named_once() -> None:
    assert len(set(moves.MOVES)) == len(moves.MOVES)
