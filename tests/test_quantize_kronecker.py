"""Rounding with errors of outputs that make up for each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc.quantization import kronecker
from graphc.quantization.grid import Grid
from graphc.quantization.kronecker import refined
from graphc.quantization.refinement import labels
from graphc.sparsity.sweep import upper_factor

Array = np.ndarray[Any, Any]


def gram(size: int, rng: np.random.Generator) -> Array:
    """Of channels that vary together."""
    rows = rng.normal(size=(3 * size, size)) @ (np.eye(size) + rng.normal(size=(size, size)) / size**0.5)
    return np.asarray(rows.T @ rows / len(rows))


def start(outputs: int, columns: int, size: int, grid: Grid, seed: int) -> tuple[Array, ...]:
    """A weight, its two Gram matrices, nearest codes, scales, zero points and the groups that share a scale."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(outputs, columns)).astype(np.float32)
    groups = np.arange(columns) // size + np.arange(outputs)[:, None] * (-(-columns // size))
    scales, zeros = np.empty_like(weights), np.empty_like(weights)
    for group in range(groups.max() + 1):
        part = weights[groups == group]
        scales[groups == group], zeros[groups == group] = grid.scales(part.min(), part.max(), np.dtype(np.float32))
    codes = grid.codes(weights, scales, zeros)
    return weights, gram(columns, rng), gram(outputs, rng), codes, scales, zeros, groups


def loss(weights: Array, products: Array, slopes: Array, codes: Array, scales: Array, zeros: Array) -> float:
    error = (weights - (codes - zeros) * scales).astype(np.float64)
    return float(np.trace(slopes @ error @ products @ error.T))


def shrunk(slopes: Array) -> Array:
    return np.asarray(slopes / np.diagonal(slopes).mean() + kronecker.SHRUNK * np.eye(len(slopes)))


@given(st.integers(1, 9), st.integers(1, 40), st.integers(2, 16), st.sampled_from([2, 3, 4, 8]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_nothing_loses_and_codes_stay_in_reach(outputs: int, columns: int, size: int, bits: int, signed: bool) -> None:
    grid = Grid(bits, signed)
    weights, products, slopes, codes, scales, zeros, groups = start(outputs, columns, size, grid, columns)
    new, fitted = refined(weights, products, slopes, grid, codes, scales, zeros, labels(groups), 2, order=True)
    before = loss(weights, products, shrunk(slopes), codes, scales, zeros)
    assert loss(weights, products, shrunk(slopes), new, fitted, zeros) <= before * (1 + 1e-4) + 1e-6
    assert (np.rint(new) == new).all() and grid.reach[0] <= new.min() and new.max() <= grid.reach[1]
    assert all(len(np.unique(fitted[groups == group])) == 1 for group in range(groups.max() + 1))


@pytest.mark.parametrize(("outputs", "columns"), [(5, 7), (70, 130), (130, 70), (1, 66), (66, 1)])
def test_what_an_entry_and_those_before_it_have_left_is_rounded_away(outputs: int, columns: int) -> None:
    """With codes enough, no entry of ``(V+I)T E (U+I)`` is larger than half a scale."""
    rng = np.random.default_rng(outputs)
    products, slopes = gram(columns, rng), gram(outputs, rng)
    weights = rng.normal(size=(outputs, columns)).astype(np.float32)
    scales, zeros = np.full_like(weights, 0.5), np.zeros_like(weights)
    codes = kronecker._swept(weights, products, slopes, Grid(16), scales, zeros, False)
    u, v = (f / np.diagonal(f) for f in (upper_factor(products, 0), upper_factor(slopes, 0)))
    left = v.T @ (weights - codes * scales) @ u
    assert np.abs(left).max() <= 0.25 * (1 + 1e-3)


def test_outputs_that_vary_together_lose_less_than_alone() -> None:
    weights, products, slopes, codes, scales, zeros, groups = start(24, 48, 16, Grid(4), 3)
    alone = refined(weights, products, np.eye(24), Grid(4), codes, scales, zeros, labels(groups), 2, order=True)
    both = refined(weights, products, slopes, Grid(4), codes, scales, zeros, labels(groups), 2, order=True)
    assert loss(weights, products, slopes, *both, zeros) < 0.9 * loss(weights, products, slopes, *alone, zeros)


def test_scales_are_those_of_least_squares() -> None:
    weights, products, slopes, codes, scales, zeros, groups = start(3, 12, 4, Grid(3), 4)
    fitted = kronecker._rescaled(weights, products, slopes, codes - zeros, scales, labels(groups))
    # vec(G^1/2 E H^1/2) is linear in the nine scales.
    left, right = (np.linalg.cholesky(m) for m in (slopes, products))
    parts = [left.T @ np.where(groups == g, codes - zeros, 0) @ right for g in range(9)]
    wanted = np.linalg.lstsq(
        np.stack([p.reshape(-1) for p in parts], axis=1), (left.T @ weights @ right).reshape(-1), rcond=None
    )[0]
    np.testing.assert_allclose(fitted[:, ::4].reshape(-1), wanted, rtol=1e-3)


def test_zeros_stay() -> None:
    weights, products, slopes, codes, scales, zeros, groups = start(6, 16, 4, Grid(4), 5)
    weights[:, ::3], codes[:, ::3] = 0, 0
    weights[1, 4:8], codes[1, 4:8] = 0, 0
    new, fitted = refined(weights, products, slopes, Grid(4), codes, scales, zeros, labels(groups), 3, order=True)
    assert not new[weights == 0].any() and np.isfinite(fitted).all()
    np.testing.assert_array_equal(fitted[1, 4:8], scales[1, 4:8])
