"""The rule ``attention`` of ``recognise``: random spellings of one computation, near misses, exported models."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc import edit, frontends
from graphc.axes import coupled_groups
from graphc.checking import Checker
from graphc.passes.recognise import Recognise
from graphc.passes.simplify import Simplify
from tests.recognised_models import CONTEXT, FRAGMENTS, LOWEST, Writer, recognised
from tests.small_models import build, feeds, numbers, operators, reasons, run


@st.composite
def attentions(draw: st.DrawFn) -> tuple[ir.Model, dict[str, object]]:
    """A model with one attention in a random spelling, and what it must become."""
    w = Writer()
    groups, repeats = draw(st.sampled_from([(1, 1), (4, 1), (2, 3), (1, 3)]))
    d, n = draw(st.sampled_from([(4, 4), (8, 8), (4, 6)]))
    heads = groups * repeats
    cross = draw(st.booleans())
    qs = w.input("q", f"float[B,S,{heads * d}]")
    ks = w.input("k", f"float[B,{'T' if cross else 'S'},{groups * d}]")
    vs = w.input("v", f"float[B,{'T' if cross else 'S'},{groups * n}]")
    keys = "T" if cross else "S"

    def split(x: str, count: int, width: int, perm: tuple[int, ...] = (0, 2, 1, 3)) -> str:
        return w("Transpose", w("Reshape", x, [0, 0, count, width]), perm=perm)

    repeat = draw(st.sampled_from(["expand", "broadcast"])) if repeats > 1 else "none"
    if repeat == "broadcast" and groups > 1:
        repeat = "five"
    scale = d**-0.5
    where = draw(st.sampled_from(["scores", "divide", "q", "both", "none"]))
    q = split(qs, heads, d)
    if where == "q":
        q = w("Mul", q, np.float32(scale))
    if where == "both":
        q = w("Mul", np.float32([scale**0.5]), q)

    def repeated(x: str, width: int) -> str:
        wide = w("Expand", w("Unsqueeze", x, [2]), [1, 1, repeats, 1, 1])
        shape = w("Concat", w("Shape", x, start=0, end=1), [heads], w("Shape", x, start=2, end=3), [width], axis=0)
        return w("Reshape", wide, shape)

    twice = draw(st.booleans())
    k = split(ks, groups, d)
    v = split(vs, groups, n)
    if repeat == "expand":
        k, v = repeated(k, d), repeated(v, n)
    if repeat == "five":
        q = w("Transpose", w("Reshape", qs, [0, 0, groups, repeats, d]), perm=(0, 2, 3, 1, 4))
        q = w("Mul", q, np.float32(scale)) if where == "q" else q
        q = w("Mul", q, np.float32(scale**0.5)) if where == "both" else q
        k, v = w("Unsqueeze", k, [2]), w("Unsqueeze", v, [2])
        k = w("Transpose", k, perm=(0, 1, 2, 4, 3))
    elif repeat == "none" and not twice:
        k = split(ks, groups, d, (0, 2, 3, 1))
    else:
        k = w("Transpose", k, perm=(0, 1, 3, 2))
    if where == "both":
        k = w("Mul", k, np.float32(scale**0.5))
    s = w("MatMul", q, k)
    if where == "scores":
        s = w("Mul", s, np.float32(scale))
    if where == "divide":
        s = w("Div", s, np.float32([1 / scale]))
    cap = draw(st.booleans())
    if cap:
        s = w("Mul", w("Tanh", w("Div", s, np.float32(2.5))), np.float32(2.5))
    if repeat == "five":
        shape = w("Concat", w("Shape", s, start=0, end=1), [heads], w("Shape", s, start=3, end=5), axis=0)
        s = w("Reshape", s, shape)
    masks = draw(st.lists(st.sampled_from(["add", "bias", "where", "where-not", "padding"]), max_size=2))
    fill = draw(st.sampled_from([LOWEST, -np.inf]))
    for i, mask in enumerate(masks):
        if mask == "bias":
            s = w("Add", w.input(f"m{i}", f"float[{heads},S,{keys}]"), s)
        else:
            shape = f"[B,1,1,{keys}]" if mask == "padding" else f"[B,1,S,{keys}]"
            m = w.input(f"m{i}", f"bool{shape}")
            if mask == "where":
                s = w("Where", m, s, np.float32(fill))
            elif mask == "where-not":
                s = w("Where", w("Not", m), np.float32(fill), s)
            else:
                s = w("Add", s, w("Where", m, np.float32(0), np.float32(fill)))
    p = w("Softmax", s, axis=-1)
    guarded = draw(st.booleans())
    if guarded:
        p = w("Where", w("IsNaN", p), np.float32(0), p)
    if repeat == "five":
        v = repeated(split(vs, groups, n), n)
    o = w("Transpose", w("MatMul", p, v), perm=(0, 2, 1, 3))
    model = w.model(w("Reshape", o, [0, 0, heads * n]))
    return model, {"heads": heads, "groups": groups, "scale": 1.0 if where == "none" else scale, "cap": 2.5 * cap}


@settings(max_examples=60, deadline=None)
@given(attentions(), st.integers(0, 99))
def test_every_spelling_becomes_one_operator(case: tuple[ir.Model, dict[str, object]], seed: int) -> None:
    model, wanted = case
    after = model.clone()
    result = Recognise().run(after, CONTEXT)
    assert result.changes == ["Attention recognised"], result.refusals
    (node,) = [n for n in edit.nodes(after) if n.op_type == "Attention"]
    assert "Softmax" not in operators(after) and "MatMul" not in operators(after)
    # Heads are attributes: no operand is turned.
    assert "Transpose" not in operators(after)
    assert edit.attribute(node, "q_num_heads") == wanted["heads"]
    assert edit.attribute(node, "kv_num_heads") == wanted["groups"]
    assert edit.attribute(node, "scale") == pytest.approx(wanted["scale"], rel=1e-6)
    assert edit.attribute(node, "softcap", 0.0) == pytest.approx(wanted["cap"], rel=1e-6)
    for sizes in ({"B": 2, "S": 3, "T": 5}, {"B": 1, "S": 1, "T": 2}):
        inputs = feeds(model, seed, **sizes)
        expected, found = run(model, inputs)["y"], run(after, inputs)["y"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * (1 + np.nanmax(np.abs(expected), initial=0)))


def plain(score: str = "s = MatMul(a, b)", end: str = "y = MatMul(p, v)", axis: int = -1, **more: object) -> ir.Model:
    inputs = "float[B,2,S,4] q, float[B,2,T,4] k, float[B,2,T,4] v, float[B,2,S,T] m"
    body = f"a = Identity(q) b = Transpose<perm=[0,1,3,2]>(k) {score} p = Softmax<axis={axis}>(s) {end}"
    return build(body, x=inputs, outputs="y", **more)


@pytest.mark.parametrize(
    "model, reason",
    [
        (
            plain("s = MatMul(a, b)", axis=2),
            "the softmax is over axis 2, not the last",
        ),
        (plain("t = MatMul(a, b) s = Mul(t, m)"), "the scores are multiplied by something that is not one constant"),
        (plain("t = MatMul(a, b) s = Mul(t, c)", c=np.float32(-1)), "the scale of the scores is not positive"),
        (
            plain(end="z = ReduceSum(p) o = MatMul(p, v) y = Add(o, z)"),
            "the scores or the weights of the attention are read elsewhere",
        ),
        (
            plain("t = MatMul(a, b) e = Cast<to=9>(m) s = Where(e, t, c)", c=np.float32(-10)),
            "masked scores become -10, which adding a mask does not give",
        ),
        (plain("t = MatMul(a, b) s = Sub(m, t)"), "the scores are subtracted from something"),
        (plain(end="w = Mul(v, v) y = MatMul(p, w)"), None),
    ],
)
def test_near_misses(model: ir.Model, reason: str | None) -> None:
    before = operators(model)
    after, result = recognised(model)
    if reason is None:
        assert "Attention" in operators(after)
    else:
        assert operators(after) == before
        assert reason in reasons(result)


def test_heads_that_are_an_axis_stay_one() -> None:
    after, _ = recognised(plain("t = MatMul(a, b) s = Add(t, m)"))
    assert operators(after) == ["Attention"]
    node = list(edit.nodes(after))[-1]
    assert "q_num_heads" not in node.attributes


@pytest.mark.parametrize("shape, length", [("[B,1,S,M]", "M"), ("[B,2,S,M]", "M"), ("[B,1,1,M]", "M"), ("[M]", "M")])
def test_a_mask_of_unknown_length_has_as_many_keys_or_one(shape: str, length: str) -> None:
    body = "b = Transpose<perm=[0,1,3,2]>(k) t = MatMul(q, b) s = Add(t, m) p = Softmax(s) y = MatMul(p, v)"
    model = build(body, x=f"float[B,2,S,4] q, float[B,2,T,4] k, float[B,2,T,4] v, float{shape} m")
    after = model.clone()
    result = Recognise().run(after, CONTEXT)
    assert "Attention" in operators(after) and not result.refusals
    for keys, own in ((5, 5), (5, 1), (1, 1)):
        inputs = feeds(model, 1, B=2, S=3, T=keys, **{length: own})
        np.testing.assert_allclose(run(after, inputs)["y"], run(model, inputs)["y"], rtol=0, atol=1e-5)


def test_a_mask_of_unknown_queries_stays() -> None:
    body = "b = Transpose<perm=[0,1,3,2]>(k) t = MatMul(q, b) s = Add(t, m) p = Softmax(s) y = MatMul(p, v)"
    model = build(body, x="float[B,2,S,4] q, float[B,2,T,4] k, float[B,2,T,4] v, float[B,1,M,T] m")
    after, result = recognised(model)
    assert operators(after) == operators(model)
    assert reasons(result) == ["the sizes of a mask and of the scores are not known to be equal"]


def test_weights_that_are_an_output_stay() -> None:
    body = "b = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, b) p = Softmax(s) y = MatMul(p, v)"
    model = build(body, x="float[B,2,S,4] q, float[B,2,T,4] k, float[B,2,T,4] v", outputs="y p")
    after, result = recognised(model)
    assert operators(after) == operators(model)
    assert reasons(result) == ["the scores or the weights of the attention are an output of the graph"]


@pytest.mark.parametrize(
    "score, value",
    [("bshd,bthd->bhst", "bhst,bthd->bshd"), ("bthd,bshd->bhst", "bthd,bhst->bshd")],
)
def test_einsum(score: str, value: str) -> None:
    w = Writer()
    q, k, v = (w("Reshape", w.input(n, f"float[B,{t},8]"), [0, 0, 2, 4]) for n, t in zip("qkv", "STT", strict=True))
    first = (q, k) if score.startswith("bs") else (k, q)
    s = w("Mul", w("Einsum", *first, equation=f'"{score}"'), np.float32(0.5))
    p = w("Softmax", s)
    second = (p, v) if value.startswith("bhst") else (v, p)
    o = w("Einsum", *second, equation=f'"{value}"')
    model = w.model(w("Reshape", o, [0, 0, 8]))
    after, _ = recognised(model)
    assert [name for name in operators(after) if name != "Identity"] == ["Attention"]


def test_one_tensor_of_queries_keys_and_values() -> None:
    w = Writer()
    x = w.input("x", "float[B,S,6]")
    joint = w("Add", w("MatMul", x, numbers(6, 24)), numbers(24, seed=1))
    turned = w("Transpose", w("Reshape", joint, [0, 0, 3, 2, 4]), perm=(2, 0, 3, 1, 4))
    q, k, v = (w("Gather", turned, np.int64(i), axis=0) for i in range(3))
    s = w("Mul", w("MatMul", q, w("Transpose", k, perm=(0, 1, 3, 2))), np.float32(0.5))
    o = w("Transpose", w("MatMul", w("Softmax", s), v), perm=(0, 2, 1, 3))
    model = w.model(w("Reshape", o, [0, 0, 8]))
    after, _ = recognised(model)
    assert "Transpose" not in operators(after) and operators(after).count("Slice") == 3


def test_batch_times_heads_as_one_axis() -> None:
    w = Writer()
    q, k, v = (w.input(n, f"float[B,{t},8]") for n, t in zip("qkv", "STT", strict=True))
    parts = []
    for x in (q, k, v):
        turned = w("Transpose", w("Reshape", x, [0, 0, 2, 4]), perm=(0, 2, 1, 3))
        shape = w("Concat", [-1], w("Shape", x, start=1, end=2), [4], axis=0)
        parts.append(w("Reshape", turned, shape))
    s = w("Mul", w("MatMul", parts[0], w("Transpose", parts[1], perm=(0, 2, 1))), np.float32(0.5))
    o = w("MatMul", w("Softmax", s), parts[2])
    shape = w("Concat", w("Shape", q, start=0, end=1), [2], w("Shape", q, start=1, end=2), [4], axis=0)
    o = w("Transpose", w("Reshape", o, shape), perm=(0, 2, 1, 3))
    after, _ = recognised(w.model(w("Reshape", o, [0, 0, 8])))
    (node,) = [n for n in edit.nodes(after) if n.op_type == "Attention"]
    assert edit.attribute(node, "q_num_heads") == 2 and "Transpose" not in operators(after)


@pytest.mark.parametrize("name", ["llama-dynamo", "llama-torchscript", "transformer-dynamo", "transformer-torchscript"])
def test_exported_fragments(name: str) -> None:
    model = frontends.load(FRAGMENTS / f"{name}.onnx").model
    Simplify().run(model, CONTEXT)
    after = model.clone()
    result = Recognise().run(after, CONTEXT)
    assert "Attention recognised" in result.changes
    assert not [refusal for refusal in result.refusals if "Swish" not in refusal.reason]
    assert Checker(model).compare(after).ok
    assert not _kinds(model) - _kinds(after)


def _kinds(model: ir.Model) -> Counter[tuple[str, int]]:
    return Counter((group.kind, group.size) for group in coupled_groups(model))


def _masked(kind: str) -> ir.Model:
    """One attention whose queries see the keys up to their own."""
    w = Writer()
    size = "S" if kind in ("range", "turned", "trilu", "later") else 6
    q, k, v = (w.input(n, f"float[B,2,{size},4]") for n in "qkv")
    s = w("Mul", w("MatMul", q, w("Transpose", k, perm=(0, 1, 3, 2))), np.float32(0.5))
    count = w("Squeeze", w("Shape", q, start=2, end=3))
    each = w("Range", np.int64(0), count, np.int64(1))
    rows, columns = w("Unsqueeze", each, [1]), w("Unsqueeze", each, [0])
    ones = np.ones((6, 6), bool)
    match kind:
        case "range":
            s = w("Where", w("LessOrEqual", columns, rows), s, np.float32(-np.inf))
        case "later":
            s = w("Add", s, w("Where", w("Greater", columns, rows), np.float32(LOWEST), np.float32(0)))
        case "turned":
            s = w("Where", w("LessOrEqual", rows, columns), s, np.float32(-np.inf))
        case "trilu":
            square = w("Expand", np.array([[True]]), w("Shape", s, start=2, end=4))
            kept = w("Unsqueeze", w("Trilu", square, upper=0), [0, 1])
            s = w("Add", s, w("Where", w("Not", kept), np.float32(-np.inf), np.float32(0)))
        case "constant":
            s = w("Add", s, np.where(np.tril(ones), 0, -np.inf))
        case "slice":
            whole = np.tril(np.ones((1, 1, 9, 9), bool))
            s = w("Where", w("Slice", whole, [0, 0], [6, 6], [2, 3]), s, np.float32(LOWEST))
        case "window":
            s = w("Add", s, np.where(np.tril(ones) & np.triu(ones, -2), 0, -np.inf))
        case "shifted":
            s = w("Add", s, np.where(np.tril(ones, 1), 0, -np.inf))
    return w.model(w("MatMul", w("Softmax", s), v))


@pytest.mark.parametrize(
    "kind, causal",
    [
        *((kind, 1) for kind in ("range", "later", "trilu", "constant", "slice")),
        *((kind, 0) for kind in ("turned", "window", "shifted")),
    ],
)
def test_a_mask_that_is_certainly_causal_becomes_an_attribute(kind: str, causal: int) -> None:
    after, _ = recognised(_masked(kind))
    (node,) = [n for n in edit.nodes(after) if n.op_type == "Attention"]
    assert edit.attribute(node, "is_causal", 0) == causal
    assert len(node.inputs) == (3 if causal else 4)


@pytest.mark.parametrize("padded", [False, True])
def test_masks_that_were_added_up_may_be_infinite(padded: bool) -> None:
    """Twice the lowest number is -inf, which has no weight in a row of lowest numbers, where those are equal."""
    w = Writer()
    q, k, v = (w.input(n, "float[B,2,S,4]") for n in "qkv")
    s = w("MatMul", q, w("Transpose", k, perm=(0, 1, 3, 2)))
    each = w("Range", np.int64(0), w("Squeeze", w("Shape", q, start=2, end=3)), np.int64(1))
    later = w("Greater", w("Unsqueeze", each, [0]), w("Unsqueeze", each, [1]))
    denied = w("Unsqueeze", w("Not", w.input("keep", "bool[B,S]")), [1, 2])
    masks = [w("Where", hidden, np.float32(LOWEST), np.float32(0)) for hidden in (denied, later)]
    model = w.model(w("MatMul", w("Softmax", w("Add", s, w("Add", *masks))), v))
    after, result = recognised(model)
    assert result.changes == ["Attention recognised"]
    inputs = feeds(model, 0, B=2, S=5)
    inputs["keep"] = np.ones((2, 5), bool)
    inputs["keep"][0, : 5 if padded else 3] = False
    wanted, found = run(model, inputs), run(after, inputs)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5)


def test_scores_that_are_a_matrix_meanwhile() -> None:
    """As a Softmax of opset 12 is brought to a later one; how many keys there are can be read off no input."""
    w = Writer()
    x = w("Slice", w.input("x", "float[B,W,12]"), [0], [99], [1], [2])
    q, k, v = (
        w("Transpose", w("Reshape", w("MatMul", x, numbers(12, 8, seed=i)), [0, 0, 2, 4]), perm=(0, 2, 1, 3))
        for i in range(3)
    )
    scores = w("MatMul", q, w("Transpose", k, perm=(0, 1, 3, 2)))
    weights = w("Reshape", w("Softmax", w("Flatten", scores, axis=3)), w("Shape", scores))
    mixed = w("MatMul", weights, v)
    # The size is asked for again, by what has nothing to do with the attention.
    model = w.model(w("Reshape", mixed, w("Concat", w("Shape", scores, start=0, end=3), [4], axis=0)))
    after, result = recognised(model)
    assert result.changes == ["Attention recognised"], result.refusals
    assert "Softmax" not in operators(after) and operators(after).count("MatMul") == 3
    inputs = feeds(model, 0, B=2, W=7)
    np.testing.assert_allclose(run(after, inputs)["y"], run(model, inputs)["y"], rtol=0, atol=1e-5)
