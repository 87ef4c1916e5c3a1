"""Keys and values of a cache inside of Attention: random spellings, near misses, and Attention that a model has."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc import edit, shapes
from graphc.passes.recognise import Recognise
from graphc.passes.simplify import Simplify
from tests.recognised_models import CONTEXT, LOWEST, Writer, recognised
from tests.small_models import build, feeds, operators, reasons, run

SIZES = ({"B": 2, "S": 3, "P": 4}, {"B": 1, "S": 1, "P": 2}, {"B": 2, "S": 2, "P": 0}, {"B": 3, "S": 1, "P": 0})


def compare(model: ir.Model, after: ir.Model, seed: int = 0) -> None:
    """Both compute the same at several sizes, an empty past among them."""
    for sizes in SIZES:
        total = sizes["P"] + sizes["S"]
        inputs = feeds(model, seed, **sizes, **{"P + S": total, "total": total})
        expected, found = run(model, inputs), run(after, inputs)
        for name, array in expected.items():
            assert found[name].shape == array.shape
            np.testing.assert_allclose(
                found[name], array, rtol=0, atol=1e-5 * (1 + np.nanmax(np.abs(array), initial=0))
            )


class Decoder(Writer):
    """One attention with a cache.

    Args:
        groups, repeats: Heads of keys, and how many of queries share each.
        d, n: Sizes of keys and of values.
    """

    def __init__(self, groups: int, repeats: int, d: int, n: int) -> None:
        super().__init__()
        self.groups, self.repeats, self.d, self.n = groups, repeats, d, n
        self.heads = groups * repeats
        self.q = self.heads_of(self.input("q", f"float[B,S,{self.heads * d}]"), self.heads, d)

    def heads_of(self, x: str, count: int, width: int) -> str:
        return self("Transpose", self("Reshape", x, [0, 0, count, width]), perm=(0, 2, 1, 3))

    def new(self, role: str) -> str:
        width = self.d if role == "k" else self.n
        return self.heads_of(self.input(role, f"float[B,S,{self.groups * width}]"), self.groups, width)

    def past(self, role: str) -> str:
        return self.input(f"past_{role}", f"float[B,{self.groups},P,{self.d if role == 'k' else self.n}]")

    def repeated(self, x: str, width: int) -> str:
        if self.repeats == 1:
            return x
        wide = self("Expand", self("Unsqueeze", x, [2]), [1, 1, self.repeats, 1, 1])
        shape = self("Concat", self("Shape", x, start=0, end=1), [self.heads], self("Shape", x, start=2), axis=0)
        return self("Reshape", wide, shape)

    def attend(self, k: str, v: str, mask: str | None) -> str:
        k, v = self.repeated(k, self.d), self.repeated(v, self.n)
        s = self("Mul", self("MatMul", self.q, self("Transpose", k, perm=(0, 1, 3, 2))), np.float32(0.5))
        s = s if mask is None else self("Add", s, mask)
        return self.merged(self("MatMul", self("Softmax", s, axis=-1), v))

    def merged(self, y: str) -> str:
        return self("Reshape", self("Transpose", y, perm=(0, 2, 1, 3)), [0, 0, self.heads * self.n])

    def finish(self, result: str, presents: dict[str, str], known: bool = True) -> ir.Model:
        """The model; ``presents`` has what each output is, ``known`` says whether the mask's length is declared."""
        lines = [*self.body, f"y = Identity({result})", *(f"{name} = Identity({x})" for name, x in presents.items())]
        outputs = " ".join(["y", *presents])
        model = build(" ".join(lines), x=", ".join(self.inputs), outputs=outputs, opset=23, **self.constants)
        for value in model.graph.inputs:
            if value.name == "m" and known:
                value.shape = ir.Shape(["B", "P + S"])
        Simplify().run(model, CONTEXT)
        return model


@st.composite
def decoders(draw: st.DrawFn) -> ir.Model:
    """A decoder's attention in a random spelling."""
    groups, repeats = draw(st.sampled_from([(1, 1), (2, 1), (2, 3), (1, 3)]))
    d, n = draw(st.sampled_from([(4, 4), (4, 6)]))
    w = Decoder(groups, repeats, d, n)
    stacked = draw(st.booleans()) and d == n
    if stacked:
        both = w.input("pasts", f"float[2,B,{groups},P,{d}]")
        pasts = {role: w("Gather", both, np.int64(i), axis=0) for i, role in enumerate("kv")}
    else:
        pasts = {role: w.past(role) for role in "kv"}
    joined = {role: w("Concat", pasts[role], w.new(role), axis=draw(st.sampled_from([2, -2]))) for role in "kv"}
    kind = draw(st.sampled_from(["padding", "causal", "none"]))
    mask = None
    if kind != "none":
        length = w("Shape", joined["k"] if draw(st.booleans()) else joined["v"], start=2, end=3)
        keys = w("Range", np.int64(0), w("Squeeze", length), np.int64(1))
        past = w("Squeeze", w("Shape", pasts["k"], start=2, end=3))
        queries = w("Add", w("Range", np.int64(0), w("Squeeze", w("Shape", "q", start=1, end=2)), np.int64(1)), past)
        seen = w("LessOrEqual", w("Unsqueeze", keys, [0]), w("Unsqueeze", queries, [1]))
        if kind == "padding":
            seen = w("And", seen, w("Unsqueeze", w.input("m", "bool[B,total]"), [1, 2]))
        mask = w("Where", seen, np.float32(0), np.float32(LOWEST))
    y = w.attend(joined["k"], joined["v"], mask)
    shown = draw(st.booleans())
    return w.finish(y, {f"present_{role}": joined[role] for role in "kv"} if shown else {}, draw(st.booleans()))


@settings(max_examples=40, deadline=None)
@given(decoders(), st.integers(0, 99))
def test_past_and_present_go_into_the_operator(model: ir.Model, seed: int) -> None:
    after = model.clone()
    result = Recognise().run(after, CONTEXT)
    assert result.changes == ["Attention with its cache recognised"], result.refusals
    Simplify().run(after, CONTEXT)
    (node,) = [n for n in edit.nodes(after) if n.op_type == "Attention"]
    assert len(node.outputs) == 3 and node.inputs[4] is not None
    assert not {"Softmax", "MatMul", "Transpose"} & set(operators(after))
    assert not any(edit.is_op(v.producer(), "Concat") for v in node.inputs if v is not None)
    assert [v.name for v in after.graph.outputs] == [v.name for v in model.graph.outputs]
    compare(model, after, seed)


def test_a_cache_of_turned_keys_stays_outside() -> None:
    w = Decoder(2, 1, 4, 4)
    k = w("Concat", w.input("past_k", "float[B,2,4,P]"), w("Transpose", w.new("k"), perm=(0, 1, 3, 2)), axis=3)
    v = w("Concat", w.past("v"), w.new("v"), axis=2)
    s = w("Mul", w("MatMul", w.q, k), np.float32(0.5))
    model = w.finish(w.merged(w("MatMul", w("Softmax", s), v)), {"present_k": k, "present_v": v})
    after = model.clone()
    result = Recognise().run(after, CONTEXT)
    assert result.changes == ["Attention recognised"]
    assert reasons(result) == ["the cache is not laid out as batch, heads, positions, channels"]
    compare(model, after)


def test_a_cache_of_keys_alone_stays_outside() -> None:
    w = Decoder(2, 1, 4, 4)
    k = w("Concat", w.past("k"), w.new("k"), axis=2)
    v = w.input("v", "float[B,2,P + S,4]".replace("P + S", "total"))
    model = w.finish(w.attend(k, v, None), {"present_k": k})
    next(value for value in model.graph.inputs if value.name == "v").shape = ir.Shape(["B", 2, "P + S", 4])
    after = model.clone()
    result = Recognise().run(after, CONTEXT)
    assert reasons(result) == ["keys are joined to a past and values are not, or the reverse"]
    compare(model, after)


def test_a_cache_of_three_parts_stays_outside() -> None:
    w = Decoder(2, 1, 4, 4)
    more = {role: w.input(f"more_{role}", "float[B,2,S,4]") for role in "kv"}
    k, v = (w("Concat", w.past(role), more[role], w.new(role), axis=2) for role in "kv")
    model = w.finish(w.attend(k, v, None), {"present_k": k, "present_v": v})
    after, result = model.clone(), None
    result = Recognise().run(after, CONTEXT)
    assert "Concat" in operators(after)
    assert reasons(result) == ["the cache is joined of more than two parts"]
    compare(model, after)


def test_keys_that_the_graph_computes_are_no_past() -> None:
    """Two streams that attend to each other: a Concat of what the graph computes stays one."""
    w = Decoder(2, 1, 4, 4)
    k, v = (w("Concat", w("Exp", w.past(role)), w.new(role), axis=2) for role in "kv")
    model = w.finish(w.attend(k, v, None), {})
    after = model.clone()
    result = Recognise().run(after, CONTEXT)
    assert result.changes == ["Attention recognised"] and not result.refusals
    compare(model, after)


def test_a_mask_made_of_the_present_leaves_the_cache_outside() -> None:
    w = Decoder(1, 1, 4, 4)
    k, v = (w("Concat", w.past(role), w.new(role), axis=2) for role in "kv")
    mask = w("Unsqueeze", w("ReduceSum", k, [3], keepdims=0), [2])
    model = w.finish(w.attend(k, v, mask), {"present_k": k, "present_v": v})
    after = model.clone()
    result = Recognise().run(after, CONTEXT)
    assert reasons(result) == ["what the attention reads depends on the present keys or values"]
    compare(model, after)


def test_scaled_keys_are_cached_as_they_are() -> None:
    """A factor behind the cache goes into the scale, one in front of it stays there."""
    w = Decoder(2, 1, 4, 4)
    k = w("Concat", w.past("k"), w("Mul", w.new("k"), np.float32(3)), axis=2)
    v = w("Concat", w.past("v"), w.new("v"), axis=2)
    model = w.finish(w.attend(w("Mul", k, np.float32(0.5)), v, None), {"present_k": k, "present_v": v})
    after = model.clone()
    result = Recognise().run(after, CONTEXT)
    assert result.changes == ["Attention with its cache recognised"]
    (node,) = [n for n in edit.nodes(after) if n.op_type == "Attention"]
    assert edit.attribute(node, "scale") == 0.25 and "Mul" in operators(after)
    compare(model, after)


def attention(w: Decoder, k: str, v: str, **more: object) -> str:
    """Attention as exporters write it: heads as an axis, repeated, transposes around."""
    return w.merged(w("Attention", w.q, w.repeated(k, w.d), w.repeated(v, w.n), scale=0.5, **more))


@pytest.mark.parametrize("repeats", [1, 3])
def test_attention_of_the_model_takes_its_cache(repeats: int) -> None:
    w = Decoder(2, repeats, 4, 6)
    k, v = (w("Concat", w.past(role), w.new(role), axis=2) for role in "kv")
    model = w.finish(attention(w, k, v), {"present_k": k, "present_v": v})
    after = model.clone()
    result = Recognise().run(after, CONTEXT)
    assert result.changes == ["Attention with its cache recognised"], result.refusals
    assert set(operators(after)) <= {"Attention", "Identity"}
    compare(model, after)
    assert not Recognise().run(after, CONTEXT).changed


def test_attention_of_the_model_loses_its_transposes_and_repeats() -> None:
    w = Decoder(2, 3, 4, 4)
    after, result = recognised(w.finish(attention(w, w.new("k"), w.new("v"), is_causal=1), {}))
    assert result.changes == ["Attention reads where its operands are made"]
    assert set(operators(after)) <= {"Attention", "Identity"}
    (node,) = [n for n in edit.nodes(after) if n.op_type == "Attention"]
    assert edit.attribute(node, "is_causal") == 1 and edit.attribute(node, "kv_num_heads") == 2


def test_causal_attention_of_the_model_keeps_its_cache_outside() -> None:
    w = Decoder(2, 1, 4, 4)
    k, v = (w("Concat", w.past(role), w.new(role), axis=2) for role in "kv")
    model = w.finish(attention(w, k, v, is_causal=1), {"present_k": k, "present_v": v})
    after = model.clone()
    result = Recognise().run(after, CONTEXT)
    assert reasons(result) == ["which keys a causal mask hides is another question with a past"]
    compare(model, after)


def test_shapes_of_attention_with_a_past() -> None:
    body = "y, k1, v1 = Attention<q_num_heads=4,kv_num_heads=2>(q, k, v, m, past_k, past_v)"
    new = "float[B,S,16] q, float[B,S,8] k, float[B,S,12] v, float[B,1,S,T] m"
    x = f"{new}, float[B,2,P,4] past_k, float[B,2,P,6] past_v"
    model = build(body, x=x, outputs="y k1 v1", opset=23)
    facts = shapes.Facts(model)
    facts.visit_graph(model.graph)
    found = [tuple(map(str, facts(value).shape or ())) for value in model.graph.outputs]
    assert found == [("B", "S", "24"), ("B", "2", "P + S", "4"), ("B", "2", "P + S", "6")]
