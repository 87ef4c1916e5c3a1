"""Facts about values: symbolic dims, contents of shape arithmetic, and that every fact holds at run time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphc import runtime, shapes
from graphc.shapes import Fact, Facts, symbolic
from graphc.shapes.symbolic import Dim, symbol

DATA = Path(__file__).parent / "data"
HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
N, M = symbol("N"), symbol("M")


def facts_of(body: str) -> tuple[ir.Model, Facts]:
    model = ir.from_onnx_text(f"{HEADER} {body}")
    facts = Facts(model)
    facts.visit_graph(model.graph)
    return model, facts


def last(body: str) -> Fact:
    """The fact of the first output of a model."""
    model, facts = facts_of(body)
    return facts(model.graph.outputs[0])


def test_polynomials() -> None:
    assert symbolic.add(N, M) == symbolic.add(M, N)
    assert symbolic.sub(symbolic.add(N, 3), N) == 3
    assert symbolic.mul(symbolic.add(N, 1), M) == symbolic.add(symbolic.mul(M, N), M)
    assert symbolic.truncdiv(symbolic.mul(N, 12), 12) == N
    assert symbolic.truncdiv(-7, 2) == -3 and symbolic.floordiv(-7, 2) == -4
    assert symbolic.floordiv(N, 2) == symbolic.floordiv(N, 2) != N
    assert symbolic.floordiv(N, 0) is None
    assert symbolic.broadcast(1, N) == N and symbolic.broadcast(N, 5) == 5
    assert symbolic.broadcast(N, M) == symbolic.broadcast(M, N)
    assert symbolic.maximum(N, symbolic.add(N, 1)) == symbolic.add(N, 1)
    assert symbolic.minimum(N, 0) == 0


def test_signs() -> None:
    assert symbolic.nonnegative(N) and not symbolic.positive(N)
    assert symbolic.positive(symbolic.add(N, 1))
    assert not symbolic.nonnegative(symbolic.sub(N, 1))
    assert symbolic.unequal(symbolic.add(N, 1), N) and not symbolic.unequal(N, M)
    assert symbolic.unequal(N, -1) and not symbolic.unequal(N, 0)
    assert symbolic.nonnegative(symbolic.as_size(symbolic.sub(N, 1)))


def test_a_coefficient_out_of_range_is_refused() -> None:
    with pytest.raises(symbolic.Unrepresentable):
        symbolic.mul(symbolic.mul(N, 2**40), 2**40)


DIMS = st.recursive(
    st.one_of(st.integers(-4, 9), st.sampled_from(["N", "M"])),
    lambda inner: st.tuples(
        st.sampled_from(["add", "sub", "mul", "floordiv", "truncdiv", "maximum", "minimum"]), inner, inner
    ),
    max_leaves=8,
)


def evaluate(tree: Any, sizes: Mapping[str, int]) -> int:
    if isinstance(tree, int):
        return tree
    if isinstance(tree, str):
        return sizes[tree]
    how, left, right = tree
    a, b = evaluate(left, sizes), evaluate(right, sizes)
    match how:
        case "add":
            return a + b
        case "sub":
            return a - b
        case "mul":
            return a * b
        case "maximum":
            return max(a, b)
        case "minimum":
            return min(a, b)
    quotient = a // b
    return quotient + (how == "truncdiv" and quotient < 0 and quotient * b != a)


def build(tree: Any) -> Dim:
    if isinstance(tree, int):
        return tree
    if isinstance(tree, str):
        return symbol(tree)
    found = getattr(symbolic, tree[0])(build(tree[1]), build(tree[2]))
    if found is None:
        raise ZeroDivisionError
    return found


@given(DIMS, DIMS, st.integers(0, 5), st.integers(0, 5))
def test_what_is_certain_about_dims_is_true(left: Any, right: Any, n: int, m: int) -> None:
    try:
        a, b = build(left), build(right)
        x, y = (evaluate(tree, {"N": n, "M": m}) for tree in (left, right))
    except (ZeroDivisionError, symbolic.Unrepresentable):
        return
    assert not isinstance(a, int) or a == x
    assert a != b or x == y
    assert not symbolic.nonnegative(a) or x >= 0
    assert not symbolic.positive(a) or x > 0
    assert not symbolic.unequal(a, b) or x != y


def test_reshape_with_a_rest() -> None:
    fact = last("g (float[N,6,M] x) => (float[A,B] y) <int64[2] s = {-1,3}> { y = Reshape(x, s) }")
    assert fact.shape == (symbolic.mul(symbolic.mul(N, M), 2), 3)


def test_contents_follow_shape_arithmetic() -> None:
    fact = last(
        """g (float[N,4] x) => (int64[3] y) <int64 i = {0}, int64[1] a = {0}, int64[1] two = {2}> {
        s = Shape(x)  n = Gather(s, i)  d = Mul(n, two)  u = Slice(s, two, two)  y = Concat<axis=0>(d, s, u) }"""
    )
    assert fact.items == (symbolic.mul(N, 2), N, 4)


def test_an_int_that_would_wrap_is_not_followed() -> None:
    fact = last("g (float[N,4] x) => (int64[1] y) <int64[1] big = {9223372036854775807}> { y = Mul(big, big) }")
    assert fact.items == (None,)


def test_declared_shapes_of_intermediates_are_not_read() -> None:
    model = ir.from_onnx_text(f"{HEADER} g (float[N,4] x) => (float[N,4] y) {{ a = Exp(x)  y = Neg(a) }}")
    node = next(iter(model.graph))
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([7])
    shapes.infer(model)
    assert str(node.outputs[0].shape) == "[N,4]"


def test_names_for_unknown_dims_are_not_equal() -> None:
    model = ir.from_onnx_text(f"{HEADER} g (float[N] x, float[M] z) => (float[K] y) {{ y = Add(x, z) }}")
    for value in model.graph.inputs:
        value.shape = ir.Shape(["?"])
    facts = Facts(model)
    assert facts(model.graph.inputs[0]).shape != facts(model.graph.inputs[1]).shape


def test_branches_agree_on_what_both_give() -> None:
    fact = last(
        """g (float[N,4] x, float[M,4] z, bool c) => (float[P,Q] y) {
        y = If (c) <then_branch = t () => (float[A,B] a) { a = Exp(x) }, else_branch = e ()
        => (float[C,D] b) { b = Exp(z) }> }"""
    )
    assert fact.shape is not None and fact.shape[1] == 4 and fact.shape[0] not in (N, M)


def test_a_state_keeps_only_the_dims_that_a_loop_keeps() -> None:
    fact = last(
        """g (float[N,M] x, int64 m, bool c) => (float[P,M] y) {
        y = Loop (m, c, x) <body = b (int64 i, bool k, float[A,B] v) => (bool k2, float[C,D] w) {
            k2 = Identity(k)  w = Concat<axis=0>(v, v) }> }"""
    )
    assert fact.shape is not None and fact.shape[1] == M and fact.shape[0] != N


def test_scan() -> None:
    model, facts = facts_of(
        """g (float[N] s, float[M,N] x) => (float[N] t, float[M,N] y) {
        t, y = Scan <num_scan_inputs = 1, body = b (float[A] a, float[B] e) => (float[A] c, float[A] d) {
            c = Add(a, e)  d = Identity(c) }> (s, x) }"""
    )
    assert [facts(v).shape for v in model.graph.outputs] == [(N,), (M, N)]


def test_operators_without_a_rule_use_onnx_inference() -> None:
    fact = last("g (float[N,4,M,M] x) => (float[A,B,C,D] y) { y = DepthToSpace<blocksize=2>(x) }")
    assert fact.dtype == ir.DataType.FLOAT and fact.shape is not None and fact.shape[:2] == (N, 1)


def everything(model: ir.Model) -> ir.Model:
    """The model with every tensor of its main graph as an output."""
    shown = model.clone()
    facts = Facts(shown)
    facts.visit_graph(shown.graph)
    for node in shown.graph:
        for value in node.outputs:
            dtype = facts(value).dtype
            if value.name and dtype is not None and not value.is_graph_output():
                value.type, value.shape = ir.TensorType(dtype), None
                shown.graph.outputs.append(value)
    for value in shown.graph.outputs:
        value.shape = None
    return shown


def contradictions(model: ir.Model, feeds: Mapping[str, Any]) -> list[str]:
    """Where a run disagrees with the facts: equal dims must be equal sizes, numbers must be the numbers."""
    facts = Facts(model)
    facts.visit_graph(model.graph)
    found: dict[str, Any] = {**feeds, **runtime.session(everything(model), optimise=False, threads=1).run(feeds)}
    sizes: dict[Dim, int] = {}
    wrong = []

    def observe(where: str, dim: Dim | None, size: int) -> None:
        if dim is not None and (dim if isinstance(dim, int) else sizes.setdefault(dim, size)) != size:
            wrong.append(f"{where}: {dim} is {size}")

    for value in [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]:
        array, fact = found.get(value.name or ""), facts(value)
        if array is None:
            continue
        if fact.dtype is not None and fact.dtype.numpy() != array.dtype:
            wrong.append(f"{value.name}: dtype {fact.dtype}")
        if fact.shape is not None:
            if len(fact.shape) != array.ndim:
                wrong.append(f"{value.name}: rank {len(fact.shape)}")
                continue
            for dim, size in zip(fact.shape, array.shape, strict=True):
                observe(f"shape of {value.name}", dim, size)
        for item, element in zip(fact.items or (), array.reshape(-1).tolist(), strict=False):
            observe(f"element of {value.name}", item, int(element))
    return wrong


@pytest.mark.parametrize("path", sorted(DATA.glob("*.onnx")), ids=lambda p: p.stem)
@pytest.mark.parametrize("size", [1, 3])
def test_facts_hold_at_run_time(path: Path, size: int) -> None:
    model = ir.load(path)
    rng = np.random.default_rng(size)
    feeds = {}
    for value in model.graph.inputs:
        assert value.shape is not None and value.dtype is not None and value.name
        shape = [dim if isinstance(dim, int) else size for dim in value.shape]
        dtype = value.dtype.numpy()
        feeds[value.name] = (rng.random(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)).astype(dtype)
    try:
        assert contradictions(model, feeds) == []
    except runtime.CannotRun as error:
        pytest.skip(error.what)
