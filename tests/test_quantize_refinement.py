"""Codes and scales that are refined in turn: never worse, best where that is known, and still on their grids."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc.quantization.grid import Grid
from graphc.quantization.refinement import labels, refined
from tests.quantized_models import context, held, images, mlp, normal, pictures, quantized, rows, run

Array = np.ndarray[Any, Any]


def loss(weights: Array, products: Array, codes: Array, scales: Array, zeros: Array) -> Array:
    error = (weights - (codes - zeros) * scales).astype(np.float64)
    return np.asarray(((error @ products) * error).sum(axis=1))


def start(outputs: int, columns: int, size: int, grid: Grid, seed: int) -> tuple[Array, ...]:
    """A weight with correlated inputs, its nearest codes, their scales and zero points, and the groups."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((outputs, columns)).astype(np.float32)
    inputs = rng.standard_normal((4 * columns, columns)) @ rng.standard_normal((columns, columns))
    groups = np.arange(columns) // size + np.arange(outputs)[:, None] * (-(-columns // size))
    scales, zeros = np.empty_like(weights), np.empty_like(weights)
    for group in range(groups.max() + 1):
        part = weights[groups == group]
        scale, zero = grid.scales(part.min(), part.max(), np.dtype(np.float32))
        scales[groups == group], zeros[groups == group] = scale, zero
    return weights, inputs.T @ inputs, grid.codes(weights, scales, zeros), scales, zeros, groups


@given(st.integers(1, 5), st.integers(2, 40), st.integers(2, 16), st.sampled_from([2, 3, 4, 8]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_no_row_loses_and_codes_stay_in_reach(outputs: int, columns: int, size: int, bits: int, signed: bool) -> None:
    grid = Grid(bits, signed)
    weights, products, codes, scales, zeros, groups = start(outputs, columns, size, grid, columns)
    new, fitted = refined(weights, products, grid, codes, scales, zeros, labels(groups), 2)
    before, after = loss(weights, products, codes, scales, zeros), loss(weights, products, new, fitted, zeros)
    assert (after <= before * (1 + 1e-4) + 1e-6).all()
    assert (np.rint(new) == new).all() and grid.reach[0] <= new.min() and new.max() <= grid.reach[1]
    assert all(len(np.unique(fitted[groups == group])) == 1 for group in range(groups.max() + 1))


def test_scales_of_codes_are_those_of_least_squares() -> None:
    grid = Grid(3)
    weights, products, codes, scales, zeros, groups = start(1, 12, 4, grid, 3)
    lower = np.linalg.cholesky(products)
    spread = codes.reshape(-1, 1) * (groups.reshape(-1, 1) == np.arange(3))
    wanted = np.linalg.lstsq(lower.T @ spread, lower.T @ weights[0], rcond=None)[0]
    fitted = refined(weights, products, grid, codes, scales, zeros, labels(groups), 1)[1]
    np.testing.assert_allclose(fitted[0, ::4], wanted, rtol=1e-3)
    assert loss(weights, products, codes, fitted, zeros) < loss(weights, products, codes, scales, zeros)


def test_a_sweep_ends_where_no_single_code_can_be_better() -> None:
    grid = Grid(2)
    weights, products, codes, scales, zeros, _ = start(1, 6, 6, grid, 4)
    new, fitted = refined(weights, products, grid, codes, scales, zeros, None, 20)
    np.testing.assert_array_equal(fitted, scales)
    least = loss(weights, products, new, scales, zeros)[0]
    for column, code in itertools.product(range(6), range(grid.reach[0], grid.reach[1] + 1)):
        other = new.copy()
        other[0, column] = code
        assert loss(weights, products, other, scales, zeros)[0] >= least * (1 - 1e-5)


def test_zeros_stay_and_groups_without_codes_keep_their_scale() -> None:
    grid = Grid(4)
    weights, products, codes, scales, zeros, groups = start(3, 16, 4, grid, 5)
    weights[:, ::3], codes[:, ::3] = 0, 0
    weights[1, 4:8], codes[1, 4:8] = 0, 0
    new, fitted = refined(weights, products, grid, codes, scales, zeros, labels(groups), 3)
    assert not new[weights == 0].any()
    np.testing.assert_allclose(fitted[1, 4:8], scales[1, 4:8], rtol=1e-5)


def test_rows_that_share_a_scale_keep_it() -> None:
    weights, products, codes, _, zeros, _ = start(4, 8, 8, Grid(4), 6)
    scales = np.full_like(weights, 0.3)
    codes = Grid(4).codes(weights, scales, zeros)
    fitted = refined(weights, products, Grid(4), codes, scales, zeros, labels(np.zeros(weights.shape, np.int64)), 2)[1]
    np.testing.assert_array_equal(fitted, scales)


@pytest.mark.parametrize(
    "options",
    [{"bits": 4, "block": 16}, {"bits": 3}, {"bits": 4, "block": 32, "symmetric": False}, {"bits": 4, "block": -1}],
)
def test_outputs_come_closer(options: dict[str, Any]) -> None:
    x = rows(16)[-1]["x"]
    wanted = run(mlp(), x=x)["y"]
    errors = []
    for refine in (0, 3):
        model = mlp()
        quantized(model, context(rows(16)), rounding="gptq", refine=refine, **options)
        errors.append(float(np.square(run(model, x=x)["y"] - wanted).mean()))
    assert errors[1] < errors[0]


def test_convolutions_in_groups() -> None:
    errors = []
    for refine in (0, 3):
        model = images(groups=4)
        quantized(model, context(pictures(8)), bits=4, rounding="gptq", refine=refine)
        x = normal(4, 3, 8, 8, seed=40)
        errors.append(float(np.square(run(model, x=x)["y"] - run(images(groups=4), x=x)["y"]).mean()))
    assert errors[1] < errors[0]


def test_static_scales_stay_since_sums_depend_on_them() -> None:
    found = []
    for refine in (0, 2):
        model = mlp()
        quantized(model, context(rows()), scheme="static", rounding="gptq", refine=refine)
        found.append({name: held(model, name) for name in model.graph.initializers if "scale" in name})
    assert all(np.array_equal(array, found[1][name]) for name, array in found[0].items())
