"""Exponentials and their kin as TVM's code computes them: as close as float32 gets, for every kind of number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Array = np.ndarray[Any, np.dtype[Any]]
FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "exp": np.exp,
    "erf": np.vectorize(math.erf),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_as_close_as_float32_gets(name: str, tvm: Any) -> None:
    from tvm import te, tirx

    from graphc.tvm import functions, targets

    functions.register()
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 88.5, 88.8, -87.5, -103.0, -200.0, 200.0, 1e-30, 1e30]
    some = np.random.default_rng(0).standard_normal(50_000)
    given = np.concatenate([special, some, 10 * some, 40 * some, 1e-3 * some, np.zeros(3)]).astype(np.float32)
    given = given[: given.size // 8 * 8]
    x = te.placeholder(given.shape, name="x")
    y = te.compute(given.shape, lambda i: getattr(tirx, name)(x[i]), name="y")
    work = tvm.s_tir.Schedule(te.create_prim_func([x, y]))
    (loop,) = work.get_loops(work.get_sblock("y"))
    work.vectorize(work.split(loop, [None, 8])[1])
    kernel = tvm.compile(work.mod, target=targets.resolve("x86-64-v3", 1))["main"]
    found = tvm.runtime.tensor(np.zeros_like(given))
    kernel(tvm.runtime.tensor(given), found)
    with np.errstate(all="ignore"):
        wanted = FUNCTIONS[name](given.astype(np.float64))
        error = np.abs(found.numpy() - wanted) / np.maximum(np.abs(wanted), 1e-31)
    assert np.array_equal(np.isnan(found.numpy()), np.isnan(given))
    large = wanted > np.finfo(np.float32).max
    assert np.all(np.isinf(found.numpy()[large]))
    assert np.nanmax(np.where(large, 0, error)) < 5e-7
