"""Operators computed on constants, against ONNX's own node tests and ONNX Runtime."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from graphc import runtime
from graphc.shapes import fold
from graphc.shapes.kernels import DTYPES, KERNELS, CannotFold

VERSION = 21


def node(operator: str, count: int, outputs: int = 1, **attributes: Any) -> ir.Node:
    found = ir.node(operator, [ir.Value(name=f"x{i}") for i in range(count)], attributes, num_outputs=outputs)
    for i, value in enumerate(found.outputs):
        value.name = f"y{i}"
    return found


def compute(operator: str, *inputs: Any, outputs: int = 1, version: int = VERSION, **attributes: Any) -> Any:
    found = fold.evaluate(
        node(operator, len(inputs), outputs, **attributes),
        [None if x is None else np.asarray(x) for x in inputs],
        version,
    )
    return found[0] if outputs == 1 else found


def by_runtime(operator: str, *inputs: Any, **attributes: Any) -> Any:
    made = node(operator, len(inputs), **attributes)
    arrays = [np.asarray(x) for x in inputs]
    for value, array in zip(made.inputs, arrays, strict=True):
        assert value is not None
        value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(array.dtype)), ir.Shape(array.shape)
    values = [value for value in made.inputs if value is not None]
    graph = ir.Graph(values, made.outputs, nodes=[made], opset_imports={"": VERSION}, name="g")
    session = runtime.session(ir.Model(graph, ir_version=10), optimise=False, threads=1)
    return session.run({f"x{i}": array for i, array in enumerate(arrays)})["y0"]


def conformance() -> list[Any]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collected = collect_testcases(None)
    cases = []
    for case in collected:
        if case.model is None or len(case.model.graph.node) != 1:
            continue
        inputs, expected = case.data_sets[0]
        numeric = all(isinstance(x, np.ndarray) and x.dtype in DTYPES for x in (*inputs, *expected))
        if numeric and case.model.graph.node[0].op_type in KERNELS:
            cases.append(pytest.param(case, id=case.name))
    return cases


@pytest.mark.parametrize("case", conformance())
def test_onnx_node_tests(case: Any) -> None:
    model = ir.from_proto(case.model)
    inputs, expected = case.data_sets[0]
    (operator,) = model.graph
    named = {v.name: x for v, x in zip(model.graph.inputs, inputs, strict=True)}
    arrays = [None if v is None else named[v.name] for v in operator.inputs]
    try:
        found = fold.evaluate(operator, arrays, model.opset_imports[""])
    except CannotFold as reason:
        assert str(reason)
        pytest.skip(str(reason))
    for got, want in zip(found, expected, strict=False):
        assert got.dtype == want.dtype and got.shape == want.shape
        if want.dtype.kind == "f":
            eps = np.finfo(want.dtype).eps
            np.testing.assert_allclose(got, want, rtol=8 * eps, atol=8 * eps)
        else:
            np.testing.assert_array_equal(got, want)


def test_integer_division_truncates() -> None:
    a, b = np.array([7, -7, 7, -7, 6, -6]), np.array([2, 2, -2, -2, 3, 3])
    np.testing.assert_array_equal(compute("Div", a, b), [3, -3, -3, 3, 2, -2])
    np.testing.assert_array_equal(by_runtime("Div", a, b), [3, -3, -3, 3, 2, -2])


@pytest.mark.parametrize("fmod", [0, 1])
def test_mod_has_the_sign_that_onnx_says(fmod: int) -> None:
    a, b = np.array([7, -7, 7, -7]), np.array([3, 3, -3, -3])
    np.testing.assert_array_equal(compute("Mod", a, b, fmod=fmod), by_runtime("Mod", a, b, fmod=fmod))


UNDEFINED: list[tuple[str, Sequence[Any], dict[str, Any]]] = [
    ("Div", (np.array([1]), np.array([0])), {}),
    ("Mod", (np.array([1]), np.array([0])), {}),
    ("Cast", (np.array([np.nan], np.float32),), {"to": 7}),
    ("Cast", (np.array([1e20], np.float32),), {"to": 6}),
    ("Cast", (np.array([-1], np.float32),), {"to": 2}),
    ("Gather", (np.arange(3), np.array([3])), {}),
    ("Range", (np.array(0), np.array(3), np.array(0)), {}),
    ("Max", (np.array([np.nan], np.float32), np.array([1], np.float32)), {}),
    ("Clip", (np.array([np.nan], np.float32), np.float32(0)), {}),
    ("Pow", (np.array([2]), np.array([-1])), {}),
    ("Reshape", (np.arange(6), np.array([4, -1])), {}),
    ("Slice", (np.arange(6), np.array([0]), np.array([2**63 - 1]), np.array([0]), np.array([-1])), {}),
    ("Add", (np.zeros(2), np.zeros(3)), {}),
]


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes"), UNDEFINED, ids=[f"{u[0]}{i}" for i, u in enumerate(UNDEFINED)]
)
def test_what_is_not_defined_is_not_computed(operator: str, inputs: Sequence[Any], attributes: dict[str, Any]) -> None:
    with pytest.raises(CannotFold):
        compute(operator, *inputs, **attributes)


def test_casts_truncate_and_widen() -> None:
    x = np.array([1.9, -1.9, 0.0], np.float32)
    np.testing.assert_array_equal(compute("Cast", x, to=7), [1, -1, 0])
    np.testing.assert_array_equal(compute("Cast", x, to=9), [True, True, False])
    big = np.array([2**53 + 1, 2**24 + 1])
    np.testing.assert_array_equal(compute("Cast", big, to=1), by_runtime("Cast", big, to=1))


def test_reshape_copies_and_does_not() -> None:
    x = np.zeros((0, 3, 4), np.float32)
    assert compute("Reshape", x, np.array([0, 12])).shape == (0, 12)
    assert compute("Reshape", x, np.array([3, 0]), allowzero=1).shape == (3, 0)


BOUNDS = st.integers(-7, 7) | st.sampled_from([-(2**63), 2**63 - 1, 2**31 - 1])


@given(BOUNDS, BOUNDS, st.sampled_from([1, 2, 3, -1, -2, -5]))
def test_slices_clamp_as_the_runtime_does(start: int, end: int, step: int) -> None:
    assume(step > 0 or end < 2**31 - 1)
    x = np.arange(5)
    arguments = (x, np.array([start]), np.array([end]), np.array([0]), np.array([step]))
    np.testing.assert_array_equal(compute("Slice", *arguments), by_runtime("Slice", *arguments))


@given(st.integers(-5, 5), st.integers(-5, 5), st.sampled_from([-3, -1, 1, 2]))
def test_ranges_agree_with_the_runtime(start: int, limit: int, step: int) -> None:
    arguments = tuple(np.array(x) for x in (start, limit, step))
    np.testing.assert_array_equal(compute("Range", *arguments), by_runtime("Range", *arguments))


def test_integers_wrap_around() -> None:
    big = np.array([2**63 - 1])
    np.testing.assert_array_equal(compute("Add", big, np.array([1])), by_runtime("Add", big, np.array([1])))


def test_split_into_uneven_parts() -> None:
    parts = compute("Split", np.arange(7), outputs=3, num_outputs=3)
    assert [len(p) for p in parts] == [3, 3, 1]


def test_what_has_no_kernel_is_left_to_the_runtime() -> None:
    x = np.random.default_rng(0).standard_normal((1, 2, 5)).astype(np.float32)
    w = np.ones((3, 2, 3), np.float32)
    assert "Conv" not in KERNELS
    np.testing.assert_array_equal(compute("Conv", x, w), by_runtime("Conv", x, w))


def test_a_fill_takes_no_memory() -> None:
    filled = compute("ConstantOfShape", np.array([1 << 20, 1 << 20]))
    assert filled.shape == (1 << 20, 1 << 20) and not any(filled.strides)


def test_other_dtypes_are_left_alone() -> None:
    with pytest.raises(CannotFold, match="left alone"):
        compute("Identity", np.array(["a"]))
