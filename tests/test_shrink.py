"""``shrink``: what it removes, in which order of consequences, and what it leaves with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from fragments import ALL, feeds, run
from onnx import numpy_helper

from graphc.axes import cut
from graphc.axes.groups import analyse
from graphc.contract import Capabilities, Context, PassResult
from graphc.passes.narrow_norm import NarrowNorm
from graphc.passes.prune import Prune
from graphc.passes.shrink import Shrink

CONTEXT = Context(Capabilities("portable", 10, {"": 21}))
DATA = Path(__file__).parent / "data"


def model_of(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    proto.graph.initializer.extend(numpy_helper.from_array(np.float32(a), n) for n, a in weights.items())
    return proto


def shrunk(proto: onnx.ModelProto, *, ids_below: int = 3, **options: bool) -> tuple[onnx.ModelProto, PassResult]:
    """The model after the pass, having checked that it computes the same."""
    model = ir.from_proto(proto)
    result = Shrink(**options).run(model, CONTEXT)
    small = ir.to_proto(model)
    inputs = feeds(proto, ids_below)
    for name, array in run(proto, inputs).items():
        np.testing.assert_allclose(run(small, inputs)[name], array, rtol=0, atol=2e-5 * (np.abs(array).max() + 1e-6))
    return small, result


def shapes(proto: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {held.name: tuple(held.dims) for held in proto.graph.initializer}


def operators(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape)


def columns(array: np.ndarray, *gone: int) -> np.ndarray:
    array = array.copy()
    array[..., list(gone)] = 0
    return array


MLP = """mlp (float[N,4] x) => (float[N,3] y) {
    a = MatMul(x, w1)
    b = Add(a, b1)
    c = Relu(b)
    d = MatMul(c, w2)
    y = Add(d, b2)
}"""


def test_producers_alone_make_a_unit_dead() -> None:
    proto = model_of(MLP, w1=columns(normal(4, 6), 1, 3), b1=columns(normal(6), 1, 3), w2=normal(6, 3), b2=normal(3))
    small, result = shrunk(proto)
    assert shapes(small) == {"w1": (4, 4), "b1": (4,), "w2": (4, 3), "b2": (3,)}
    assert result.changes == ["neuron removed (×2)"]


def test_readers_alone_make_a_unit_dead() -> None:
    proto = model_of(MLP, w1=normal(4, 6), b1=normal(6), w2=columns(normal(3, 6), 0, 5).T, b2=normal(3))
    assert shapes(shrunk(proto)[0])["w1"] == (4, 4)


def test_a_dead_rectifier_is_a_dead_unit() -> None:
    b1 = columns(normal(6), 2)
    b1[2] = -1.0
    proto = model_of(MLP, w1=columns(normal(4, 6), 2), b1=b1, w2=normal(6, 3), b2=normal(3))
    assert shapes(shrunk(proto)[0])["w1"] == (4, 5)


def test_a_constant_unit_folds_into_the_next_bias() -> None:
    b1 = columns(normal(6), 2, 4)
    b1[2], b1[4] = 0.7, 0.3
    w2 = normal(6, 3)
    proto = model_of(MLP, w1=columns(normal(4, 6), 2, 4), b1=b1, w2=w2, b2=normal(3))
    small, result = shrunk(proto)
    assert shapes(small)["w1"] == (4, 4)
    assert "constant folded into a bias (×2)" in result.changes


CONV = """conv (float[N,3,8,8] x) => (float[N,2,H,W] y) {{
    a = Conv(x, w1, b1)
    y = Conv<pads=[{0},{0},{0},{0}]>(a, w2)
}}"""


@pytest.mark.parametrize("pad", [0, 1])
def test_a_constant_channel_stays_before_a_padded_convolution(pad: int) -> None:
    """At the border fewer taps see the constant: there is no bias that says so."""
    w1 = normal(5, 3, 3, 3)
    w1[1] = 0
    proto = model_of(CONV.format(pad), w1=w1, b1=normal(5), w2=normal(2, 5, 3, 3))
    assert shapes(shrunk(proto)[0])["w1"][0] == (5 if pad else 4)


@pytest.mark.parametrize("pad", [0, 1])
def test_a_zero_channel_goes_before_any_convolution(pad: int) -> None:
    w1 = normal(5, 3, 3, 3)
    w1[1] = 0
    proto = model_of(CONV.format(pad), w1=w1, b1=columns(normal(5), 1), w2=normal(2, 5, 3, 3))
    assert shapes(shrunk(proto)[0])["w1"][0] == 4


def test_batch_norm_scale_zero_kills_a_channel() -> None:
    text = """bn (float[N,3,8,8] x) => (float[N,2,8,8] y) {
        a = Conv<pads=[1,1,1,1]>(x, w1)
        n = BatchNormalization(a, s, o, m, v)
        r = Relu(n)
        y = Conv<pads=[1,1,1,1]>(r, w2)
    }"""
    weights = {
        "w1": normal(5, 3, 3, 3), "s": columns(normal(5), 0, 3), "o": columns(normal(5), 0), "m": normal(5),
        "v": np.abs(normal(5)) + 0.1, "w2": normal(2, 5, 3, 3),
    }  # fmt: skip
    weights["o"][3] = -0.5  # the rectifier makes it zero
    assert shapes(shrunk(model_of(text, **weights))[0])["w1"][0] == 3


def test_consequences_follow_until_nothing_is_dead() -> None:
    """The last layer ignores a unit, whose inputs are then read by nobody else, and so on."""
    text = """deep (float[N,4] x) => (float[N,3] y) {
        a = MatMul(x, w1)
        b = Relu(a)
        c = MatMul(b, w2)
        d = Relu(c)
        e = MatMul(d, w3)
        f = Relu(e)
        y = MatMul(f, w4)
    }"""
    w2, w3 = normal(5, 5), normal(5, 5)
    w2[0, 1:], w3[0, 1:] = 0, 0
    w4 = normal(5, 3)
    w4[0] = 0
    small, _ = shrunk(model_of(text, w1=normal(4, 5), w2=w2, w3=w3, w4=w4))
    assert shapes(small) == {"w1": (4, 4), "w2": (4, 4), "w3": (4, 4), "w4": (4, 3)}


def test_a_residual_branch_of_zeros_disappears() -> None:
    fragment = ALL["residual"]
    arrays = fragment.arrays()
    arrays["w2"], arrays["b2"] = np.zeros_like(arrays["w2"]), np.zeros_like(arrays["b2"])
    small, result = shrunk(fragment.build(None, arrays))
    assert {"w1", "w2", "b2"}.isdisjoint(shapes(small))
    assert "branch that adds zero removed" in result.changes
    assert operators(small).count("Conv") == 3


def test_a_residual_branch_of_constants_becomes_one() -> None:
    fragment = ALL["residual"]
    arrays = fragment.arrays()
    arrays["w2"] = np.zeros_like(arrays["w2"])
    small, result = shrunk(fragment.build(None, arrays))
    assert {"w1", "w2"}.isdisjoint(shapes(small))
    assert "branch that computes a constant replaced" in result.changes


def test_blocks_of_a_transformer_disappear() -> None:
    """Depth pruning: the projections that write to the stream are zero in one block."""
    model = ir.load(DATA / "fmnist_vit_tiny.onnx")
    proto = ir.to_proto(model)
    groups = analyse(model)
    before = operators(proto).count("MatMul")
    inner = {g.name: g for g in groups.groups if g.kind in ("head", "neuron")}
    first_head = next(g for g in inner.values() if g.kind == "head")
    first_neuron = next(g for g in inner.values() if g.kind == "neuron")
    names = {p.value.name for g in (first_head, first_neuron) for p in g.places}
    arrays = {h.name: numpy_helper.to_array(h).copy() for h in proto.graph.initializer if h.name in names}
    for group in (first_head, first_neuron):
        for place in group.places:
            arrays[place.value.name][...] = 0
    for held in proto.graph.initializer:
        if held.name in arrays:
            held.CopyFrom(numpy_helper.from_array(arrays[held.name], held.name))
    small, _ = shrunk(proto)
    assert operators(small).count("MatMul") == before - 8


def test_balanced_groups_lose_equally_many() -> None:
    fragment = ALL["grouped_conv"]
    arrays = fragment.arrays()
    w2 = arrays["w2"] = arrays["w2"].reshape(3, 2, 4, 3, 3).copy()
    w2[0, 1], w2[1, 0] = 0, 0
    arrays["b2"] = arrays["b2"] * 0
    arrays["w2"] = w2.reshape(6, 4, 3, 3)
    _, result = shrunk(fragment.build(None, arrays))
    assert not result.changed
    assert any("balanced" in refusal.reason for refusal in result.refusals)
    w2[2, 1] = 0
    small, _ = shrunk(fragment.build(None, {**arrays, "w2": w2.reshape(6, 4, 3, 3)}))
    assert shapes(small)["w2"] == (3, 4, 3, 3)


def test_the_last_unit_stays() -> None:
    proto = model_of(MLP, w1=np.zeros((4, 6)), b1=np.zeros(6), w2=normal(6, 3), b2=normal(3))
    small, result = shrunk(proto)
    assert shapes(small).get("w1", (4, 1)) == (4, 1)
    assert result.changed


def test_a_layer_norm_keeps_its_width_until_narrow_norm() -> None:
    model = ir.from_proto(ALL["layer_norm_stream"].build())
    Prune(ratio=0.5, kinds=("width",), norms=True).run(model, CONTEXT)
    proto = ir.to_proto(model)
    small, result = shrunk(proto, ids_below=11)
    assert shapes(small) == shapes(proto)
    assert any("narrow-norm" in refusal.reason for refusal in result.refusals)
    result = NarrowNorm().run(model, CONTEXT)
    narrow = ir.to_proto(model)
    assert result.changes == ["width under a norm removed (×3)"]
    assert shapes(narrow)["emb"] == (11, 3)
    assert run(narrow, feeds(narrow, 11))["y"].shape == (2, 5, 5)


def test_rms_norm_width_is_exact() -> None:
    for name in ("rms_stream_tied", "rms_operator_stream", "skip_simplified_layer_norm"):
        model = ir.from_proto(ALL[name].build())
        Prune(ratio=0.5, kinds=("width",)).run(model, CONTEXT)
        small, result = shrunk(ir.to_proto(model), ids_below=ALL[name].ids_below)
        assert "width removed (×3)" in result.changes, result.refusals
        assert not result.refusals, small


def test_the_interface_is_kept_unless_allowed() -> None:
    fragment = ALL["kv_cache"]
    model = ir.from_proto(fragment.build())
    groups = analyse(model, interface=True)
    head = next(g for g in groups.groups if g.kind == "head")
    cut.zero(model, groups, {head.name: np.array([True, False, True])})
    proto = ir.to_proto(model)
    assert shapes(shrunk(proto)[0])["wq"] == (8, 12)
    model = ir.from_proto(proto)
    Shrink(allow_interface=True).run(model, CONTEXT)
    assert shapes(ir.to_proto(model))["wo"] == (10, 5)


def test_a_shared_weight_is_cut_once_for_both_uses() -> None:
    fragment = ALL["siamese"]
    model = ir.from_proto(fragment.build())
    groups = analyse(model)
    keep = {g.name: np.arange(g.size) > 0 for g in groups.groups}
    cut.zero(model, groups, keep)
    small, _ = shrunk(ir.to_proto(model))
    assert shapes(small)["w1"] == (2, 3, 3, 3)


def test_weights_in_branches_stay() -> None:
    fragment = ALL["if_holds_weights"]
    arrays = fragment.arrays()
    arrays["w3"], arrays["b3"] = columns(arrays["w3"], 0), columns(arrays["b3"], 0)
    small, _ = shrunk(fragment.build(None, arrays))
    assert shapes(small)["w3"] == (8, 4)


def test_large_weights_stay_on_disk(tmp_path: Path) -> None:
    """External weights are neither held while deciding nor when they are sliced: the result is lazy."""
    rng = np.random.default_rng(0)
    wide = 3000
    w1, w2 = rng.normal(size=(600, wide)), rng.normal(size=(wide, 3))
    w1[:, : wide // 2] = 0
    text = MLP.replace("float[N,4] x", "float[N,600] x")
    proto = model_of(text, w1=w1, b1=columns(rng.normal(size=wide), *range(wide // 2)), w2=w2, b2=normal(3))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=1024)
    model = ir.load(tmp_path / "m.onnx")
    Shrink().run(model, CONTEXT)
    held = model.graph.initializers["w1"].const_value
    assert isinstance(held, ir.LazyTensor)
    assert tuple(held.shape) == (600, wide // 2)
    np.testing.assert_array_equal(held.numpy(), np.float32(w1[:, wide // 2 :]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fmnist_resnet", {"of": "params", "allocate": "global"}),
        ("fmnist_resnet", {"of": "flops", "criterion": "l1"}),
        ("fmnist_vit_tiny", {"kinds": ("head", "head_dim", "neuron")}),
        ("tiny_mixtral_bytes", {"kinds": ("head", "neuron", "expert")}),
        ("tiny_mixtral_bytes", {"kinds": ("all",), "criterion": "random"}),
    ],
)
def test_real_models(name: str, options: dict[str, object]) -> None:
    model = ir.load(DATA / f"{name}.onnx")
    Prune(ratio=0.3, **options).run(model, CONTEXT)  # type: ignore[arg-type]
    proto = ir.to_proto(model)
    small, result = shrunk(proto, ids_below=200)
    dead = sum(int(np.prod(s)) for s in shapes(proto).values()) - sum(int(np.prod(s)) for s in shapes(small).values())
    assert dead > 0.2 * sum(int(np.prod(s)) for s in shapes(proto).values())
    assert not result.refusals


def test_an_expert_with_weights_of_its_own_disappears() -> None:
    """The router's bias bars it: what it computes is multiplied by zero and added."""
    text = """moe (float[N,4] x) => (float[N,3] y) {
        l0 = MatMul(x, wr)
        l = Add(l0, br)
        p = Softmax<axis=-1>(l)
        i = Constant<value_ints=[0]>()
        j = Constant<value_ints=[1]>()
        p0 = Gather<axis=1>(p, i)
        p1 = Gather<axis=1>(p, j)
        a = MatMul(x, w0)
        a0 = Mul(a, p0)
        b = MatMul(x, w1)
        b1 = Mul(b, p1)
        y = Add(a0, b1)
    }"""
    barred = np.array([0, -np.inf, 0])
    small, result = shrunk(model_of(text, wr=normal(4, 3), br=barred, w0=normal(4, 3), w1=normal(4, 3)))
    assert "w1" not in shapes(small)
    assert any(change.startswith("branch that adds zero removed") for change in result.changes)


def test_dead_units_of_quantized_weights() -> None:
    """Zero is what dequantizes to zero."""
    fragment = ALL["qdq_unsigned"]
    arrays = fragment.arrays()
    for name in ("w1", "w2"):
        arrays[name] = arrays[name].copy()
    arrays["w1"][:, [1, 4]], arrays["b1"] = 128, columns(arrays["b1"], 1, 4)
    small, _ = shrunk(fragment.build(None, arrays))
    assert shapes(small)["w1"] == (8, 4)
    assert shapes(small)["s1"] == (4,)
