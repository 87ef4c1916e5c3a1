"""Inputs fit the interface, and mean something to the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc import runtime
from graphc.checking import inputs
from graphc.checking.inputs import Case, generate
from graphc.checking.roles import role
from graphc.checking.widths import fixed
from graphc.contract import Arrays
from graphc.errors import BadInput
from graphc.shapes.expressions import evaluate, symbols_in

DATA = Path(__file__).parent / "data"
HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'


def parse(text: str) -> ir.Model:
    return ir.from_onnx_text(f"{HEAD} {text}")


def runs(model: ir.Model) -> list[Case]:
    """The cases that ONNX Runtime takes."""
    pytest.importorskip("onnxruntime")
    session = runtime.session(model, optimise=False, threads=1)

    def accepts(arrays: Arrays) -> bool:
        try:
            session.run(arrays)
        except runtime.CannotRun:
            return False
        return True

    return generate(model, accepts=accepts)


def sizes(cases: list[Case], name: str, axis: int) -> set[int]:
    return {case.arrays[name].shape[axis] for case in cases}


class TestShapes:
    def test_symbols_agree_between_inputs_and_take_one(self) -> None:
        cases = generate(parse("g (float[B,S,8] x, float[B,S] y) => (float[B,S,8] z) { z = Identity(x) }"))
        for case in cases:
            assert case.arrays["x"].shape[:2] == case.arrays["y"].shape
        assert 1 in sizes(cases, "x", 0) and 1 in sizes(cases, "x", 1)
        assert len(sizes(cases, "x", 0)) >= 3 and len(sizes(cases, "x", 1)) >= 3
        assert sizes(cases, "x", 2) == {8}

    def test_different_symbols_differ(self) -> None:
        first = generate(parse("g (float[A,8] x, float[2,M,K] y) => (float[A,8] z) { z = Identity(x) }"))[0]
        assert len({first.arrays["x"].shape[0], *first.arrays["y"].shape[1:]}) == 3

    def test_static_shapes_are_kept(self) -> None:
        cases = generate(parse("g (float[3,5] x) => (float[3,5] y) { y = Relu(x) }"))
        assert {case.arrays["x"].shape for case in cases} == {(3, 5)}

    def test_expressions(self) -> None:
        model = parse("g (float[B,P,4] past, float[B,S] x) => (float[B,S] y) { y = Identity(x) }")
        mask = ir.Value(name="mask", shape=ir.Shape(["B", "P + S"]), type=ir.TensorType(ir.DataType.FLOAT))
        model.graph.inputs.append(mask)
        for case in generate(model):
            assert case.arrays["mask"].shape[1] == case.arrays["past"].shape[1] + case.arrays["x"].shape[1]

    def test_a_mask_covers_past_and_present(self) -> None:
        """The usual interface of a decoder with a cache, where the names say nothing exact."""
        text = """g (int64[batch,seq] ids, int64[batch,total] attention_mask, float[batch,2,past_seq,4] past,
                    float[10,4] table) => (float[batch,2,K,4] present, bool[batch,total] m) {
                m = Cast<to=9>(attention_mask)
                e = Gather(table, ids)
                heads = Constant<value = int64[1] {1}>() u = Unsqueeze(e, heads)
                twice = Constant<value = int64[4] {1, 2, 1, 1}>() h = Expand(u, twice)
                present = Concat<axis=2>(past, h) }"""
        model = parse(text)
        table = model.graph.inputs.pop()
        table.const_value = ir.tensor(np.zeros((10, 4), np.float32))
        model.graph.register_initializer(table)
        cases = runs(model)
        assert len(cases) >= 5
        for case in cases:
            shapes = {name: a.shape for name, a in case.arrays.items()}
            assert shapes["attention_mask"][1] == shapes["past"][2] + shapes["ids"][1]

    def test_sizes_that_do_not_run_are_replaced(self) -> None:
        """Half of the height, concatenated with the whole of a strided one: the height must be a multiple of 32."""
        text = "r = Constant<value = int64[5] {0, 0, 0, 32, -1}>() y = Reshape(x, r)"
        cases = runs(parse(f"g (float[N,3,8,W] x) => (float[N,3,8,32,K] y) {{ {text} }}"))
        assert cases
        assert all(case.arrays["x"].shape[3] % 32 == 0 for case in cases)
        assert len(sizes(cases, "x", 3)) > 1

    def test_nothing_that_runs(self) -> None:
        model = parse("g (float[N,3] x) => (float[N,3] y) { y = Relu(x) }")
        assert generate(model, accepts=lambda arrays: False) == []


class TestRoles:
    def test_indices_stay_within_their_table(self) -> None:
        text = """g (int64[B,S] ids, float[50,4] table, float[7,4] other) => (float[B,S,4] y, float[B,S,4] z) {
            c = Cast<to=6>(ids) y = Gather(table, c) z = Gather(other, ids) }"""
        for case in generate(parse(text)):
            assert case.arrays["ids"].min() >= 0
            assert case.arrays["ids"].max() < 7

    def test_the_ends_of_the_table_are_used(self) -> None:
        case = generate(parse("g (int64[B,S] i, float[50,4] t) => (float[B,S,4] y) { y = Gather(t, i) }"))[0]
        assert {0, 49} <= set(case.arrays["i"].ravel().tolist())

    def test_offsets_move_the_bound(self) -> None:
        model = parse(
            """g (int64[B,S] i, float[50,4] t) => (float[B,S,4] y) {
                k = Constant<value_int=2>() j = Add(i, k) y = Gather(t, j) }"""
        )
        assert role(model, model.graph.inputs[0]).bounds == [48]

    def test_through_branches_and_functions(self) -> None:
        text = """g (bool c, int64[S] i, float[9,4] t) => (float[S,4] y) {
            y = If (c) <then_branch = a () => (float[S,4] p) { p = Gather(t, i) },
                        else_branch = b () => (float[S,4] q) { q = Gather(t, i) }> }"""
        model = parse(text)
        assert role(model, model.graph.inputs[1]).bounds == [9, 9]
        model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
            g (int64[S] i, float[9,4] t) => (float[S,4] y) { y = own.lookup(i, t) }
            <domain: "own", opset_import: ["" : 21]>
            lookup (k, s) => (r) { depth = Constant<value_int=5>() r = OneHot(k, depth, s) }""")
        assert role(model, model.graph.inputs[0]).bounds == [5]

    def test_masks_are_zero_and_one_and_leave_no_row_empty(self) -> None:
        text = "g (int64[B,S] mask, float[B,S] x) => (float[B,S] y) { m = Cast<to=9>(mask) y = Where(m, x, x) }"
        cases = generate(parse(text))
        for case in cases:
            assert set(np.unique(case.arrays["mask"])) <= {0, 1}
            assert case.arrays["mask"].any(axis=-1).all()
        padded = {case.description.rpartition(", ")[2]: case.arrays["mask"] for case in cases}
        assert (np.diff(padded["right padding"], axis=1) <= 0).all() and (padded["right padding"] == 0).any()
        assert (np.diff(padded["left padding"], axis=1) >= 0).all()

    def test_the_inverted_float_mask(self) -> None:
        text = "g (float[B,S] m) => (float[B,S] y) { k = Constant<value_float=1.0>() y = Sub(k, m) }"
        assert all(set(np.unique(case.arrays["m"])) <= {0, 1} for case in generate(parse(text)))

    def test_known_choices_are_taken(self) -> None:
        text = "g (int64 rate, float[N] x) => (bool y) { k = Constant<value_int=16000>() y = Equal(rate, k) }"
        assert {int(case.arrays["rate"]) for case in generate(parse(text))} == {16000, 8000}

    def test_both_branches_of_a_boolean(self) -> None:
        text = """g (bool c, float[N] x) => (float[N] y) {
            y = If (c) <then_branch = a () => (float[N] p) { p = Relu(x) },
                        else_branch = b () => (float[N] q) { q = Neg(x) }> }"""
        assert {bool(case.arrays["c"]) for case in generate(parse(text))} == {True, False}

    @pytest.mark.parametrize(
        "body",
        [
            "k = Cast<to=7>(n) v, y = TopK(x, k)",
            "y = Expand(x, n)",
            "z = Constant<value_int=0>() k = Squeeze(n) y = Range(z, k, k)",
            "y = ReduceSum(x, n)",
            "y = Unsqueeze(x, n)",
            "y = Tile(x, n)",
            "y = Slice(x, n, e)",
        ],
    )
    def test_shape_operands_run(self, body: str) -> None:
        more = ", int64[1] e" if "e)" in body else ""
        dtype = "int64" if body.startswith(("k", "z")) else "float"
        assert runs(parse(f"g (float[9] x, int64[1] n{more}) => ({dtype}[*] y) {{ {body} }}".replace("[*]", "")))


class TestValues:
    def test_every_dtype(self) -> None:
        for name in (
            "double",
            "float16",
            "bfloat16",
            "int8",
            "uint8",
            "int32",
            "uint64",
            "bool",
            "string",
            "float8e4m3fn",
        ):
            for case in generate(parse(f"g ({name}[N] x) => ({name}[N] y) {{ y = Identity(x) }}")):
                array = case.arrays["x"]
                assert array.dtype == (object if name == "string" else ir.DataType[name.upper()].numpy())

    def test_special_values(self) -> None:
        cases = generate(parse("g (float[N,64] x) => (float[N,64] y) { y = Relu(x) }"))
        values = {case.description.rpartition(", ")[2]: np.abs(case.arrays["x"]) for case in cases}
        assert (values["zeros"] == 0).all()
        wide = values["magnitudes from 1e-4 to 1e2"]
        assert wide.max() > 10 and wide.min() < 1e-3
        assert all(np.isfinite(v).all() for v in values.values())

    def test_pictures_are_smooth(self) -> None:
        cases = generate(parse("g (float[N,3,H,W] x) => (float[N,3,H,W] y) { y = Relu(x) }"))
        picture = next(case.arrays["x"] for case in cases if case.description.endswith("smooth"))
        assert picture.min() >= 0 and picture.max() <= 1
        assert np.abs(np.diff(picture, axis=3)).max() < 0.2 * np.ptp(picture)

    def test_the_same_seed_gives_the_same(self) -> None:
        model = ir.load(DATA / "fmnist_vit_tiny.onnx")
        first, second, other = generate(model, seed=1), generate(model, seed=1), generate(model, seed=2)
        for a, b, c in zip(first, second, other, strict=True):
            assert a.description == b.description
            assert (a.arrays["image"] == b.arrays["image"]).all()
            assert a.description.endswith("zeros") or (a.arrays["image"] != c.arrays["image"]).any()

    def test_defaults_are_left_out_except_once(self) -> None:
        model = parse("g (float[N,4] x, float[4] bias) => (float[N,4] y) { y = Add(x, bias) }")
        bias = model.graph.inputs[1]
        bias.const_value = ir.tensor(np.ones(4, np.float32))
        model.graph.register_initializer(bias)
        given = [case.arrays for case in generate(model) if "bias" in case.arrays]
        assert len(given) == 1
        assert not np.array_equal(given[0]["bias"], np.ones(4))
        model.ir_version = 3  # there, every initializer is listed
        assert all("bias" not in case.arrays for case in generate(model))

    @pytest.mark.parametrize("kind", ["seq(float[N])", "optional(float[N])"])
    def test_what_is_no_tensor_is_refused(self, kind: str) -> None:
        with pytest.raises(BadInput, match="no tensor"):
            generate(parse(f"g ({kind} x) => ({kind} y) {{ y = Identity(x) }}"))


def test_channels_are_those_of_the_weight_that_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing larger than what may be given is ever made."""
    model = parse(
        "g (float[batch,channels,height,width] x) => (float[n,8,h,w] y) "
        "<float[1,3,1,1] m = {0.1, 0.2, 0.3}, float[8,3,4,4] w> "
        "{ c = Sub(x, m)  y = Conv<strides = [4, 4]>(c, w) }"
    )
    assert fixed(model) == {"channels": 3}
    made = generate(model, accepts=lambda arrays: arrays["x"].shape[1] == 3)
    assert len(made) >= 4 and all(case.arrays["x"].shape[1] == 3 for case in made)
    filled: list[int] = []
    usual = inputs.ordinary
    monkeypatch.setattr(
        inputs, "ordinary", lambda each, shape, *rest: filled.append(shape) or usual(each, shape, *rest)
    )
    assert not generate(model, accepts=lambda arrays: False)
    assert filled and max(int(np.prod(shape)) for shape in filled) <= inputs.MAX_ELEMENTS


@pytest.mark.parametrize(
    "body, wanted",
    [
        ("y = MatMul(x, w)", {"width": 6}),
        ("t = Transpose<perm = [0, 2, 1]>(x)  y = MatMul(t, w)", {"length": 6}),
        ("a = Relu(x)  y = Add(a, v)", {"width": 5}),
        ("y = MatMul(w, x)", {}),
    ],
)
def test_sizes_that_weights_demand(body: str, wanted: dict[str, int]) -> None:
    text = f"g (float[n,length,width] x) => (float[a,b,c] y) <float[6,4] w, float[5] v> {{ {body} }}"
    assert fixed(parse(text)) == wanted


def test_pictures_that_must_be_square() -> None:
    model = parse("g (float[n,3,height,width] x) => (float[n,3,h,w] y) { y = Relu(x) }")
    made = generate(model, accepts=lambda arrays: arrays["x"].shape[2:] == (384, 384))
    assert made


def test_no_inputs() -> None:
    cases = generate(parse("g () => (float[1] y) { y = Constant<value = float[1] {1.0}>() }"))
    assert [dict(case.arrays) for case in cases] == [{}, {}]


@pytest.mark.parametrize("path", sorted(DATA.glob("*.onnx")), ids=lambda p: p.stem)
def test_real_models_run_with_all_cases(path: Path) -> None:
    model = ir.load(path)
    assert len(runs(model)) == len(generate(model)) >= 4


@given(a=st.integers(0, 50), b=st.integers(1, 50))
@settings(max_examples=20, deadline=None)
def test_dimensions_are_arithmetic(a: int, b: int) -> None:
    sizes = {"a": a, "b": b}
    assert evaluate("a + b", sizes) == a + b
    assert evaluate("2*a + 1", sizes) == 2 * a + 1
    assert evaluate("a//b", sizes) == a // b
    assert evaluate("a - b", sizes) == max(a - b, 0)
    assert symbols_in("a + 2*b") == ["a", "b"]


def test_names_that_are_no_arithmetic() -> None:
    for name in ("p2o.DynamicDimension.0", "past-length", "a b", "__import__('os') + 1"):
        assert symbols_in(name) in ([name], ["past", "length"])
    assert inputs.MAX_ELEMENTS > 0
