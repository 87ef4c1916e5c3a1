"""Statistics of models whose tokens pick experts: no copy of an expert's weights for each token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from graphc import contraction, edit, runtime, shapes
from graphc.collection import Collector, with_outputs
from graphc.collection.picked import by_expert
from graphc.frontends import load

MIXTRAL = Path(__file__).parent / "data" / "tiny_mixtral_bytes.onnx"

# Sizes: T tokens, 5 channels, 4 outputs, 3 experts. The stack lies as (experts, ...).
FORMS = {
    "gather": ("float[T,2,5] x, int64[T] i", (3, 5, 4), "w = Gather(stack, i) p = MatMul(x, w)"),
    "one index for all": ("float[T,2,5] x, int64[1] i", (3, 5, 4), "w = Gather(stack, i) p = MatMul(x, w)"),
    "one token for all": ("float[1,2,5] x, int64[T] i", (3, 5, 4), "w = Gather(stack, i) p = MatMul(x, w)"),
    "32 bits": ("float[T,2,5] x, int32[T] i", (3, 5, 4), "w = Gather(stack, i) p = MatMul(x, w)"),
    "gather nd": ("float[T,2,5] x, int64[T,1] i", (3, 5, 4), "w = GatherND(stack, i) p = MatMul(x, w)"),
    "weight left": ("float[T,5,1] x, int64[T] i", (3, 4, 5), "w = Gather(stack, i) p = MatMul(w, x)"),
    "weight left, nd": ("float[T,5,2] x, int64[T,1] i", (3, 4, 5), "w = GatherND(stack, i) p = MatMul(w, x)"),
    "turned": (
        "float[T,2,5] x, int64[T] i",
        (3, 4, 5),
        "g = Gather(stack, i) w = Transpose<perm=[0,2,1]>(g) p = MatMul(x, w)",
    ),
    "turned, left": (
        "float[T,5,2] x, int64[T] i",
        (3, 5, 4),
        "g = Gather(stack, i) w = Transpose<perm=[0,2,1]>(g) p = MatMul(w, x)",
    ),
}


def parse(given: str, stack: tuple[int, ...], body: str, outputs: str = "float[T,a,b] p") -> ir.Model:
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({given}) => ({outputs}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    weights = np.random.default_rng(0).standard_normal(stack).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weights, "stack"))
    return ir.from_proto(proto)


def feeds(model: ir.Model, tokens: int, least: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(tokens)
    x, i = model.graph.inputs
    assert x.shape is not None and i.shape is not None and i.dtype is not None
    sizes = [[d if isinstance(d, int) else tokens for d in v.shape] for v in (x, i) if v.shape is not None]
    return {
        "x": rng.standard_normal(sizes[0]).astype(np.float32),
        "i": rng.integers(least, 3, sizes[1]).astype(i.dtype.numpy()),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 7])
def test_products_are_the_same(form: str, tokens: int) -> None:
    model = parse(*FORMS[form])
    wanted = runtime.session(model, optimise=False).run(feeds(model, tokens))["p"]
    assert by_expert(model) == 1
    found = runtime.session(model, optimise=False).run(feeds(model, tokens))["p"]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert not any(edit.is_op(node, "Gather", "GatherND") for node in model.graph)


def test_experts_are_counted_from_the_end() -> None:
    model = parse(*FORMS["gather"])
    given = feeds(model, 9, least=-3)
    assert (given["i"] < 0).any()
    wanted = runtime.session(model, optimise=False).run(given)["p"]
    by_expert(model)
    found = runtime.session(model, optimise=False).run(given)["p"]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "body", "outputs"),
    [
        # Someone wants the weights themselves; two products share them; an index for each of several picks.
        ("float[T,2,5] x, int64[T] i", "w = Gather(stack, i) p = MatMul(x, w)", "float[T,a,b] p, float[T,c,d] w"),
        (
            "float[T,2,5] x, int64[T] i",
            "w = Gather(stack, i) p = MatMul(x, w) n = Neg(x) q = MatMul(n, w)",
            "float[T,a,b] p, float[T,a,b] q",
        ),
        ("float[T,2,2,5] x, int64[T,2] i", "w = Gather(stack, i) p = MatMul(x, w)", "float[T,a,b,c] p"),
        ("float[T,2,5] x, int64[T] i", "w = Gather<axis=1>(stack, i) p = MatMul(x, w)", "float[a,b,c] p"),
    ],
)
def test_others_stay(given: str, body: str, outputs: str) -> None:
    model = parse(given, (3, 5, 4), body, outputs)
    before = ir.to_proto(model).SerializeToString()
    assert by_expert(model) == 0
    assert ir.to_proto(model).SerializeToString() == before


def test_no_token_has_weights_of_its_own_in_a_mixture() -> None:
    """The largest value of one token is far smaller than an expert."""
    model = load(MIXTRAL).model
    shapes.infer(model)
    found = [
        each for node in model.graph if node.op_type == "MatMul" if not isinstance(each := contraction.of(node), str)
    ]
    picked = [each for each in found if each.rows.by]
    assert len(picked) == 6
    before = ir.to_proto(model).SerializeToString()
    tapped = with_outputs(model, [each.activation.name or "" for each in picked])
    stacks = {each.weight.name for each in picked}
    readers = {n.op_type for n in tapped.graph for v in n.inputs if v is not None and v.name in stacks}
    assert readers == {"Scan"}
    assert ir.to_proto(model).SerializeToString() == before


def test_statistics_of_a_mixture_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(MIXTRAL).model
    shapes.infer(model)
    each = [c for n in model.graph if n.op_type == "MatMul" if not isinstance(c := contraction.of(n), str)]
    requests = [c.moments for c in each]
    samples = [{"input_ids": np.random.default_rng(0).integers(0, 256, (2, 24))}]
    found = Collector(samples).collect(model, requests)
    monkeypatch.setattr("graphc.collection.picked.by_expert", lambda model: 0)
    wanted = Collector(samples).collect(model, requests)
    for request in requests:
        np.testing.assert_array_equal(found[request].count, wanted[request].count)
        np.testing.assert_allclose(found[request].squares, wanted[request].squares, rtol=1e-3, atol=1e-4)
