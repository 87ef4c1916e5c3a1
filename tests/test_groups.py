"""Groups: what is found, what is said about it, and the law that cutting equals zeroing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from fragments import ALL
from fragments.core import feeds

from graphc import edit
from graphc.axes import cut
from graphc.axes.groups import Group, Groups, analyse
from graphc.errors import BadInput

Array = np.ndarray[Any, np.dtype[Any]]
DATA = Path(__file__).parent / "data"


def parse(text: str, weights: dict[str, tuple[int, ...]] | None = None, opset: int = 21) -> ir.Model:
    """A model from text, with random weights of the given shapes."""
    head = f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]>'
    proto = onnx.parser.parse_model(head + "\n" + text)
    model = ir.from_proto(proto)
    rng = np.random.default_rng(0)
    for name, shape in (weights or {}).items():
        _provide(model, name, rng.standard_normal(shape).astype(np.float32))
    return model


def _provide(model: ir.Model, name: str, array: Array) -> None:
    """Turn the input of this name into an initializer."""
    value = next(v for v in model.graph.inputs if v.name == name)
    model.graph.inputs.remove(value)
    value.const_value = ir.tensor(array, name=name)
    value.shape = ir.Shape(array.shape)
    model.graph.register_initializer(value)


def run(model: ir.Model, inputs: dict[str, Array]) -> list[Array]:
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {i.name: inputs[i.name] for i in session.get_inputs()}))


def random_mask(group: Group, rng: np.random.Generator, *, ragged: bool) -> Array:
    """Half of the units, in each block its own if the group has blocks."""
    count = max(group.min_keep, group.size // 2 // group.multiple_of * group.multiple_of, 1)
    shape = (*group.blocks, group.size) if group.blocks and ragged else (group.size,)
    mask = np.zeros(shape, dtype=bool)
    for index in np.ndindex(*shape[:-1]):
        mask[index][rng.permutation(group.size)[:count]] = True
    return mask


def law(model: ir.Model, inputs: dict[str, Array], names: list[str], seed: int) -> None:
    """Zeroed and cut copies of the model compute the same."""
    zeroed, smaller = model.clone(), model.clone()
    groups = analyse(zeroed)
    rng = np.random.default_rng(seed)
    keep = {name: random_mask(groups[name], rng, ragged=seed % 2 == 0) for name in names}
    cut.zero(zeroed, groups, keep)
    cut.cut(smaller, analyse(smaller), keep)
    for a, b in zip(run(zeroed, inputs), run(smaller, inputs), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(1.0, float(np.abs(a).max(initial=0))))


def exact(groups: Groups) -> list[str]:
    return [group.name for group in groups if group.exact]


@pytest.mark.parametrize("name", ALL)
def test_cutting_equals_zeroing_all_groups_at_once(name: str) -> None:
    fragment = ALL[name]
    proto = fragment.build()
    model = ir.from_proto(proto)
    names = exact(analyse(model))
    for seed in (0, 1):
        if names:
            law(model, feeds(proto, fragment.ids_below, seed), names, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_cutting_equals_zeroing_group_by_group(name: str) -> None:
    fragment = ALL[name]
    proto = fragment.build()
    model = ir.from_proto(proto)
    for group in exact(analyse(model)):
        for seed in range(4):
            law(model, feeds(proto, fragment.ids_below, seed), [group], seed)


def _real() -> Iterator[tuple[str, Array]]:
    rng = np.random.default_rng(0)
    yield "fmnist_resnet.onnx", rng.random((1, 1, 28, 28), dtype=np.float32)
    yield "fmnist_vit_tiny.onnx", rng.random((1, 1, 28, 28), dtype=np.float32)
    yield "tiny_mixtral_bytes.onnx", rng.integers(0, 255, (1, 6))


@pytest.mark.parametrize(("name", "array"), _real(), ids=lambda v: v if isinstance(v, str) else "")
def test_cutting_equals_zeroing_on_real_models(name: str, array: Array) -> None:
    model = ir.load(DATA / name)
    (value,) = model.graph.inputs
    law(model, {value.name or "": array}, exact(analyse(model)), 0)


MLP = """
mlp (float[N,8] x, float[8,6] up, float[6] bias, float[6,4] down) => (float[N,4] y) {
    [up] a = MatMul(x, up)
    [add] b = Add(a, bias)
    [act] c = Relu(b)
    [down] y = MatMul(c, down)
}
"""
WEIGHTS = {"up": (8, 6), "bias": (6,), "down": (6, 4)}


class TestGroup:
    """What is said about a group."""

    def test_an_mlp(self) -> None:
        groups = analyse(parse(MLP, WEIGHTS))
        (group,) = groups
        assert (group.name, group.size, group.kind) == ("up:1", 6, "neuron")
        assert [(p.value.name, p.axis, p.role) for p in group.places] == [
            ("up", 1, "produces"),
            ("bias", 0, "produces"),
            ("down", 0, "consumes"),
        ]
        assert (group.params, group.bytes) == (8 + 1 + 4, 4 * 13)
        assert group.exact and not group.normalisers and group.neutral == 0

    def test_what_is_fixed_has_a_reason(self) -> None:
        groups = analyse(parse(MLP, WEIGHTS))
        reasons = {(f.value.name, f.axis): f.reason for f in groups.fixed}
        assert reasons == {("up", 0): "an axis of a graph input", ("down", 1): "an axis of a graph output"}

    def test_interface_axes_need_permission(self) -> None:
        model = parse(MLP, WEIGHTS)
        groups = analyse(model, interface=True)
        assert sorted(g.name for g in groups) == ["down:1", "up:0", "up:1"]
        keep = {"up:0": np.arange(8) < 5, "down:1": np.arange(4) < 3}
        cut.cut(model, groups, keep)
        assert list(model.graph.inputs[0].shape or ())[1] == 5
        assert run(model, {"x": np.ones((2, 5), np.float32)})[0].shape == (2, 3)

    def test_stride_and_parts(self) -> None:
        text = """
        g (float[N,4,8] x, float[8,24] w, float[12,8] o) => (float[N,4,8] y) {
            a = MatMul(x, w)
            q, v = Split<axis=2, num_outputs=2>(a)
            b = Mul(q, v)
            s = Constant<value_ints=[0,4,3,4]>()
            c = Reshape(b, s)
            d = Transpose<perm=[0,1,3,2]>(c)
            e = Relu(d)
            f = Transpose<perm=[0,1,3,2]>(e)
            t = Constant<value_ints=[0,4,12]>()
            h = Reshape(f, t)
            y = MatMul(h, o)
        }
        """
        groups = analyse(parse(text, {"w": (8, 24), "o": (12, 8)}))
        inner = groups["w:1.0.1"]
        place = inner.places[0]
        assert (inner.size, place.offset, place.stride, place.outer) == (4, 0, 1, 3)
        assert place.indices(2).tolist() == [2, 6, 10, 14, 18, 22]
        outer = groups["w:1.0.0"]
        assert outer.places[0].stride == 4
        assert outer.places[1].indices(1).tolist() == [4, 5, 6, 7]
        assert inner.block_groups == (outer.name,)

    def test_scores_are_summed_to_units(self) -> None:
        groups = analyse(parse(MLP, WEIGHTS))
        (group,) = groups
        array = np.arange(48.0).reshape(8, 6)
        assert groups.scores(group, group.places[0], array).tolist() == array.sum(axis=0).tolist()

    def test_scores_of_blocks(self) -> None:
        text = """
        g (float[N,4,5,5] x, float[8,2,1,1] w, float[3,8,1,1] v) => (float[N,3,5,5] y) {
            a = Conv<group=2>(x, w)
            y = Conv(a, v)
        }
        """
        groups = analyse(parse(text, {"w": (8, 2, 1, 1), "v": (3, 8, 1, 1)}))
        group = groups["w:0.1"]
        assert group.blocks == (2,)
        array = np.arange(16.0).reshape(8, 2, 1, 1)
        scores = groups.scores(group, group.places[0], array)
        assert scores.tolist() == array.reshape(2, 4, 2).sum(axis=2).tolist()

    def test_names_do_not_depend_on_the_graph_being_raw(self) -> None:
        model = ir.load(DATA / "fmnist_resnet.onnx")
        assert [g.name for g in analyse(model)][:2] == ["stem.weight:0", "layers.0.c1.weight:0"]

    def test_weights_need_no_data(self) -> None:
        model = parse(MLP, WEIGHTS)
        for value in model.graph.initializers.values():
            shape = value.const_value.shape  # type: ignore[union-attr]
            length = 4 * math.prod(shape.numpy())
            value.const_value = ir.ExternalTensor(
                "missing.bin", 0, length, ir.DataType.FLOAT, shape=ir.Shape(shape.numpy()), name=value.name or ""
            )
        assert [g.name for g in analyse(model)] == ["up:1"]


class TestExplain:
    """Answers in words."""

    def test_group_weight_and_node(self) -> None:
        groups = analyse(parse(MLP, WEIGHTS))
        assert "6 units of kind neuron" in groups.explain("up:1")
        assert "consumes along axis 0 of down" in groups.explain("up:1")
        assert "graph input" in groups.explain("up")
        assert "down (MatMul)" in groups.explain("down") or "axis 1" in groups.explain("down")

    def test_a_node_that_blocks(self) -> None:
        text = """
        g (float[N,8] x, float[8,6] w, float[6,4] v) => (float[N,4] y) {
            a = MatMul(x, w)
            [custom] b = com.acme.Mystery(a)
            y = MatMul(b, v)
        }
        """
        text = text.replace("com.acme.Mystery", "com.microsoft.Mystery")
        groups = analyse(parse(text, {"w": (8, 6), "v": (6, 4)}))
        assert not len(groups)
        assert "com.microsoft.Mystery has no rule" in groups.explain("custom")
        assert "com.microsoft.Mystery has no rule" in groups.explain("w")

    def test_an_unknown_name(self) -> None:
        with pytest.raises(BadInput, match="up:1"):
            analyse(parse(MLP, WEIGHTS)).explain("up:2")


class TestCheck:
    """Masks that are not allowed are refused before anything changes."""

    @pytest.mark.parametrize(
        ("name", "mask", "why"),
        [
            ("nothing:0", np.ones(6, bool), "no group"),
            ("up:1", np.ones(5, bool), "shape"),
            ("up:1", np.ones(6), "dtype"),
            ("up:1", np.zeros(6, bool), "at least 1"),
        ],
    )
    def test_wrong_masks(self, name: str, mask: Array, why: str) -> None:
        model = parse(MLP, WEIGHTS)
        groups = analyse(model)
        (problem,) = cut.check(groups, {name: mask})
        assert why in problem
        with pytest.raises(BadInput, match="cannot be cut"):
            cut.cut(model, groups, {name: mask})
        assert model.graph.initializers["up"].shape == (8, 6)

    def test_unequal_blocks(self) -> None:
        text = """
        g (float[N,4,5,5] x, float[8,2,1,1] w, float[3,8,1,1] v) => (float[N,3,5,5] y) {
            a = Conv<group=2>(x, w)
            y = Conv(a, v)
        }
        """
        groups = analyse(parse(text, {"w": (8, 2, 1, 1), "v": (3, 8, 1, 1)}))
        mask = np.ones((2, 4), bool)
        mask[0, 0] = False
        assert "unequally" in cut.check(groups, {"w:0.1": mask})[0]
        mask[1, 3] = False
        assert not cut.check(groups, {"w:0.1": mask})

    def test_groups_of_another_model(self) -> None:
        model = parse(MLP, WEIGHTS)
        with pytest.raises(ValueError, match="another model"):
            cut.cut(model.clone(), analyse(model), {})

    def test_nothing_to_cut_changes_nothing(self) -> None:
        model = parse(MLP, WEIGHTS)
        groups = analyse(model)
        assert not cut.cut(model, groups, {"up:1": np.ones(6, bool)}).changed


class TestSharedConstants:
    """Equal biases that an exporter stored once do not tie what reads them."""

    TEXT = """
    g (float[N,8] x, float[8,6] a, float[6,6] b, float[6,4] c, float[6] bias) => (float[N,4] y) {
        p = MatMul(x, a)
        q = Add(p, bias)
        r = Relu(q)
        s = MatMul(r, b)
        same = Identity(bias)
        t = Add(s, same)
        u = Relu(t)
        y = MatMul(u, c)
    }
    """
    SHAPES = {"a": (8, 6), "b": (6, 6), "c": (6, 4), "bias": (6,)}  # noqa: RUF012

    def test_two_groups(self) -> None:
        groups = analyse(parse(self.TEXT, self.SHAPES))
        assert [g.name for g in groups] == ["a:1", "b:1"]
        assert {p.reader.op_type for g in groups for p in g.places if p.reader} == {"Add", "Identity"}

    def test_each_reader_gets_its_own_copy(self) -> None:
        model = parse(self.TEXT, self.SHAPES)
        x = {"x": np.ones((2, 8), np.float32)}
        law(model, x, ["a:1", "b:1"], 1)
        groups = analyse(model)
        cut.cut(model, groups, {"a:1": np.arange(6) < 4})
        sizes = sorted(int(v.const_value.size) for v in model.graph.initializers.values() if len(v.shape or ()) == 1)  # type: ignore[union-attr]
        assert sizes == [4, 6]


def test_weights_read_in_bodies_are_whole() -> None:
    groups = analyse(ir.from_proto(ALL["if_holds_weights"].build()))
    assert any("body" in f.reason for f in groups.fixed)


def test_a_head_size_that_is_cut_leaves_the_scale_written_out() -> None:
    fragment = ALL["attention_operator"]
    model = ir.from_proto(fragment.build())
    groups = analyse(model)
    group = next(g for g in groups if g.kind == "head_dim" and any("k" in (p.value.name or "") for p in g.places))
    mask = np.arange(group.size) < group.size - 1
    (node,) = [n for n in model.graph if n.op_type == "Attention"]
    size = fragment.sizes["d"]
    before = edit.attribute(node, "scale", 1 / math.sqrt(size))
    cut.cut(model, groups, {group.name: mask})
    assert edit.attribute(node, "scale") == pytest.approx(before)


def test_sliced_constants_stay_lazy() -> None:
    shapes = {"up": (8, 4096), "bias": (4096,), "down": (4096, 4)}
    model = parse(MLP.replace("6", "4096"), shapes)
    cut.cut(model, analyse(model), {"up:1": np.arange(4096) % 2 == 0})
    held = model.graph.initializers["up"].const_value
    assert isinstance(held, ir.LazyTensor) and tuple(held.shape) == (8, 2048)
    assert held.numpy().shape == (8, 2048)
