"""Traps that were found in real graphs, each as the smallest graph that has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from graphc.cli import main


def _model(text: str, *, weights: dict[str, Any] | None = None, seed: int = 0) -> onnx.ModelProto:
    """A model from text; ``weights`` become initializers of the main graph (a shape means random values)."""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(seed)
    for name, value in (weights or {}).items():
        array = rng.standard_normal(value).astype(np.float32) if isinstance(value, tuple) else np.asarray(value)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def _optimize(model: onnx.ModelProto, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Any, onnx.ModelProto]:
    onnx.save(model, folder / "m.onnx")
    code = main(
        ["optimize", str(folder / "m.onnx"), "-o", str(folder / "o.onnx"), "--json", "--no-cache", "--no-measure"]
    )
    captured = capsys.readouterr()
    assert code == 0, captured.err
    report = json.loads(captured.out)
    assert report["rewrite"].get("ok", True) and not any(p["error"] for p in report["passes"]), report
    return report, onnx.load(folder / "o.onnx")


def _operators(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


BRANCHES = """
<ir_version: 8, opset_import: ["" : 16]>
agraph (float[N, 4] x, bool c) => (float[N, 4] y)
<float[4] shared = {1, 2, 3, 4}> {
    a = Relu (x)
    y = If (c) <
        then_branch = g1 () => (float[N, 4] t) {
            w = Constant <value = float[4] {0.5, 0.5, 0.5, 0.5}> ()
            k = Mul (w, shared)
            t = Mul (a, k)
        },
        else_branch = g2 () => (float[N, 4] e) {
            w = Constant <value = float[4] {2.0, 2.0, 2.0, 2.0}> ()
            b = Identity (a)
            e = Add (b, w)
        }
    >
}
"""


def test_weights_as_constants_in_branches_that_read_outer_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, out = _optimize(_model(BRANCHES), tmp_path, capsys)
    assert report["rewrite"]["checked"]
    (branch,) = (n for n in out.graph.node if n.op_type == "If")
    bodies = [[n.op_type for n in a.g.node if n.op_type != "Constant"] for a in branch.attribute]
    assert sorted(bodies) == [["Add"], ["Mul"]], "the product of two constants is folded, the Identity is gone"


def test_initializers_that_are_inputs_stay_overridable_from_ir_4(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    agraph (float[N, 4] x, float[4] w) => (float[N, 4] y) { a = Add (w, w) y = Mul (x, a) }"""
    report, out = _optimize(_model(text, weights={"w": (4,)}), tmp_path, capsys)
    assert [v.name for v in out.graph.input] == ["x", "w"] and "Add" in _operators(out)
    reasons = [r["reason"] for p in report["passes"] for r in p["refusals"]]
    assert any("input" in r for r in reasons), reasons


def test_ir_3_lists_weights_as_inputs_because_it_had_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """<ir_version: 3, opset_import: ["" : 9]>
    agraph (float[N, 4] x, float[4] w) => (float[N, 4] y) { a = Add (w, w) y = Mul (x, a) }"""
    _, out = _optimize(_model(text, weights={"w": (4,)}), tmp_path, capsys)
    assert [v.name for v in out.graph.input] == ["x"] and _operators(out) == ["Mul"]
    assert out.ir_version >= 4


def test_other_domains_and_their_imports_survive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1, "ai.onnx.ml" : 3, "ai.onnx.training" : 1]>
    agraph (float[N, 8] x) => (float[N, 8] y) {
        a = Identity (x)
        b = com.microsoft.FusedMatMul <alpha = 0.5> (a, w)
        y = com.microsoft.BiasGelu (b, c) }"""
    _, out = _optimize(_model(text, weights={"w": (8, 8), "c": (8,)}), tmp_path, capsys)
    assert _operators(out) == ["FusedMatMul", "BiasGelu"]
    assert {i.domain for i in out.opset_import} >= {"", "com.microsoft"}


@pytest.mark.parametrize("opset", [9, 10, 11, 12, 13, 15, 18, 20])
def test_every_opset_from_9_comes_up_to_the_working_one(
    opset: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = "s = Squeeze <axes = [1]> (m)" if opset < 13 else "s = Squeeze (m, one)"
    reduce = "m = ReduceMean <axes = [1], keepdims = 1> (r)" if opset < 18 else "m = ReduceMean (r, one)"
    version = {9: 4, 10: 5, 11: 6}.get(opset, 7)
    text = f"""<ir_version: {version}, opset_import: ["" : {opset}]>
    agraph (float[N, 6, 5] x) => (float[N, 5] y) {{ r = Relu (x) {reduce} {axes} z = Softmax (s) y = Identity (z) }}"""
    weights = {} if opset < 13 else {"one": np.array([1])}
    if version < 4:
        text = text.replace(") =>", ", int64[1] one) =>")
    report, out = _optimize(_model(text, weights=weights), tmp_path, capsys)
    assert report["rewrite"]["checked"] and {i.domain: i.version for i in out.opset_import}[""] >= 21


def test_a_declared_intermediate_shape_is_no_proof(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    agraph (float[N, 4] x) => (float[M, 4] y) <float[1, 4] a> { a = Relu (x) s = Shape (a) y = Expand (a, s) }"""
    report, out = _optimize(_model(text), tmp_path, capsys)
    assert report["rewrite"]["checked"] and _operators(out) == ["Relu"]


def test_batchnorm_behind_an_activation_stays_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    agraph (float[N, 3, 8, 8] x) => (float[N, 4, 6, 6] y) {
        a = Conv (x, w) b = Relu (a) y = BatchNormalization (b, s, t, m, v) }"""
    weights = {"w": (4, 3, 3, 3), "s": (4,), "t": (4,), "m": (4,), "v": np.full(4, 0.7, np.float32)}
    report, _ = _optimize(_model(text, weights=weights), tmp_path, capsys)
    reasons = [r["reason"] for p in report["passes"] if p["name"] == "fuse" for r in p["refusals"]]
    assert any("Relu" in r for r in reasons), reasons


def test_batchnorm_as_arithmetic_in_nhwc_with_casts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    agraph (float[N, 8, 8, 3] x) => (float[N, 6, 6, 4] y) {
        p = Transpose <perm = [0, 3, 1, 2]> (x) c = Conv (p, w) t = Transpose <perm = [0, 2, 3, 1]> (c)
        d = Sub (t, m) q = Cast <to = 1> (d) e = Mul (q, s) y = Add (e, b) }"""
    report, out = _optimize(
        _model(text, weights={"w": (4, 3, 3, 3), "m": (4,), "s": (4,), "b": (4,)}), tmp_path, capsys
    )
    assert report["rewrite"]["checked"]
    assert set(_operators(out)) <= {"Transpose", "Conv", "Mul", "Add", "Sub"} and "Cast" not in _operators(out)


def test_a_cache_graph_keeps_its_interface(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    agraph (float[batch, seq, 16] x, float[batch, 2, past, 8] past_key, float[batch, 2, past, 8] past_value)
        => (float[batch, seq, 16] y, float[batch, 2, total, 8] key, float[batch, 2, total, 8] value)
    <int64[4] split = {0, 0, 2, 8}, int64[3] merge = {0, 0, 16}> {
        q0 = MatMul (x, wq) q1 = Reshape (q0, split) q = Transpose <perm = [0, 2, 1, 3]> (q1)
        k0 = MatMul (x, wk) k1 = Reshape (k0, split) k2 = Transpose <perm = [0, 2, 1, 3]> (k1)
        v0 = MatMul (x, wv) v1 = Reshape (v0, split) v2 = Transpose <perm = [0, 2, 1, 3]> (v1)
        key = Concat <axis = 2> (past_key, k2) value = Concat <axis = 2> (past_value, v2)
        kt = Transpose <perm = [0, 1, 3, 2]> (key) s = MatMul (q, kt) p = Softmax <axis = -1> (s)
        o = MatMul (p, value) o1 = Transpose <perm = [0, 2, 1, 3]> (o) o2 = Reshape (o1, merge) y = MatMul (o2, wo) }"""
    report, out = _optimize(_model(text, weights=dict.fromkeys(("wq", "wk", "wv", "wo"), (16, 16))), tmp_path, capsys)
    assert report["rewrite"]["checked"]
    assert [v.name for v in out.graph.input] == ["x", "past_key", "past_value"]
    assert [v.name for v in out.graph.output] == ["y", "key", "value"]
    assert out.graph.input[1].type.tensor_type.shape.dim[2].dim_param == "past"


def test_weight_names_survive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    agraph (float[N, 6] x) => (float[N, 5] y) { a = Identity (weight) y = MatMul (x, a) }"""
    _, out = _optimize(_model(text, weights={"weight": (6, 5)}), tmp_path, capsys)
    assert [t.name for t in out.graph.initializer] == ["weight"]
