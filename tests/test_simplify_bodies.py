"""The pass simplify in branches, loops and functions, and what they share with the graph around them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.passes.simplify import Simplify
from tests.test_simplify import CONTEXT, check, operators, read, run


def test_a_body_that_returns_an_outer_value() -> None:
    model = read(
        """g (float[N] x, bool c) => (float[N] y) { a = Exp(x)
        y = If (c) <then_branch = t () => (float[N] a1) { a1 = Identity(a) }, else_branch = e ()
        => (float[N] r) { r = Neg(a) }> }"""
    )
    proto = ir.to_proto(model)
    then = next(a.g for a in proto.graph.node[1].attribute if a.name == "then_branch")
    del then.node[:]
    then.output[0].name = "a"
    model = ir.from_proto(proto)
    Simplify().run(model, CONTEXT)
    x = np.array([1.0], np.float32)
    np.testing.assert_allclose(run(model, {"x": x, "c": np.array(True)})["y"], np.exp(x), rtol=1e-6)


def test_names_of_branches_do_not_clash_when_they_are_inlined() -> None:
    model = read(
        """g (float[N] x) => (float[N] y) <bool c = {1}> {
        a = If (c) <then_branch = t () => (float[N] r) { q = Exp(x)  r = Neg(q) },
        else_branch = e () => (float[N] r) { r = Neg(x) }>
        b = If (c) <then_branch = t () => (float[N] r) { q = Neg(x)  r = Exp(q) },
        else_branch = e () => (float[N] r) { r = Neg(x) }>
        y = Add(a, b) }"""
    )
    after, _ = check(model)
    assert sorted(operators(after)) == ["Add", "Exp", "Exp", "Neg", "Neg"]


def test_branches_share_what_is_computed_outside() -> None:
    model = read(
        """g (float[N] x, bool c) => (float[N] y) { a = Exp(x)  z = Neg(a)
        b = If (c) <then_branch = t () => (float[N] r) { q = Exp(x)  r = Mul(q, x) },
        else_branch = e () => (float[N] r2) { r2 = Abs(x) }>
        y = Add(z, b) }"""
    )
    after, _ = check(model)
    assert operators(after).count("Exp") == 1


def test_a_loop_that_grows_its_state() -> None:
    model = read(
        """g (float[N] x, int64 m) => (float[M] y) <bool c = {1}> {
        a = Loop (m, c, x) <body = b (int64 i, bool k, float[N] v) => (bool k2, float[N] w) {
            k2 = Identity(k)  s = Shape(v)  z = ConstantOfShape(s)  w = Concat<axis=0>(v, z) }>
        t = Shape(a)  o = ConstantOfShape<value=float[1]{1}>(t)  y = Add(a, o) }"""
    )
    after = model.clone()
    Simplify().run(after, CONTEXT)
    for trips in (0, 1, 3):
        feeds = {"x": np.ones(2, np.float32), "m": np.array(trips, np.int64)}
        np.testing.assert_array_equal(run(after, feeds)["y"], run(model, feeds)["y"])


def test_functions_are_inlined() -> None:
    model = read(
        """g (float[N] x) => (float[N] y) { a = local.twice(x)  y = local.twice(a) }
        <domain: "local", opset_import: ["" : 21]> twice (v) => (w) { w = Add(v, v) }""",
        '<ir_version: 10, opset_import: ["" : 21, "local" : 1]>',
    )
    after, result = check(model)
    assert operators(after) == ["Add", "Add"] and not after.functions
    assert "function inlined" in result.changes


def test_unread_outputs_of_bodies_go() -> None:
    model = read(
        """g (float[N] x, bool c) => (float[N] y) {
        a, y, b = If (c) <
            then_branch = t () => (float[N] p, float[N] q, float[N] r) { p = Exp(x)  q = Neg(x)  r = Abs(x) },
            else_branch = e () => (float[N] s, float[N] u, float[N] v) { s = Exp(x)  u = Abs(x)  v = Abs(x) }> }"""
    )
    after, _ = check(model)
    assert sorted(operators(after)) == ["Abs", "If", "Neg"]


def test_states_of_a_loop_that_do_not_change() -> None:
    model = read(
        """g (float[N] x, int64 m) => (float[N] y, float[N] z) <bool c = {1}> {
        y, w, u = Loop (m, c, x, x, x) <body = b (int64 i, bool k, float[N] v, float[N] s, float[N] d)
            => (bool k2, float[N] v2, float[N] s2, float[N] d2) {
            k2 = Identity(k)  v2 = Add(v, s)  s2 = Identity(s)  d2 = Exp(v) }>
        z = Neg(w) }"""
    )
    after, _ = check(model)
    assert sorted(operators(after)) == ["Add", "Identity", "Loop", "Neg"]
    loop = next(node for node in after.graph if node.op_type == "Loop")
    assert len(loop.inputs) == 3


def test_inlined_bodies_bring_no_node_names_twice() -> None:
    model = read("""g (float[N] x) => (float[N] y) <bool yes = {1}> {
        a = Add (x, x)
        y = If (yes) < then_branch = t () => (float[N] t0) { t1 = Add (a, x) t0 = Mul (t1, x) },
                       else_branch = e () => (float[N] e0) { e0 = Add (a, a) } > }""")
    for node in edit.nodes(model):
        node.name = f"node_{node.op_type}"
    after, _ = check(model, {"N": 3})
    names = [node.name for node in edit.nodes(after)]
    assert len(names) == len(set(names)) == 3
