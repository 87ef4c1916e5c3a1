"""Pruning and quantization of decoders whose attention has its cache inside: cutting equals zeroing, caches follow."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphc import edit
from graphc.axes import cut
from graphc.axes.groups import Group, analyse
from graphc.passes.lower import Lower
from graphc.passes.shrink import Shrink
from graphc.recipe import Recipe
from tests.recognised_models import CONTEXT, always
from tests.small_models import build, feeds, numbers, run

WIDTH, SIZE, GROUPS, REPEATS, INNER = 16, 8, 2, 2, 24
HEADS = GROUPS * REPEATS

UNREACHED = {("head_dim", False)}
"""Channels of queries and keys stay: the past may hold what new keys no longer have."""


def decoder(*, lowered: bool, new: str = "S") -> ir.Model:
    """One layer: rotary attention of few key heads with a cache and a padding mask, and a gated block."""
    rope = "RotaryEmbedding<num_heads={}>({}, cos, sin)"
    body = (
        "a = RMSNormalization(x, n1) q0 = MatMul(a, wq) k0 = MatMul(a, wk) v = MatMul(a, wv) "
        f"q = {rope.format(HEADS, 'q0')} k = {rope.format(GROUPS, 'k0')} "
        f"z, k1, v1 = Attention<q_num_heads={HEADS},kv_num_heads={GROUPS},scale=0.3>(q, k, v, mask, past_k, past_v) "
        "o = MatMul(z, wo) b = Add(x, o) c = RMSNormalization(b, n2) g = MatMul(c, wg) s = Sigmoid(g) "
        "act = Mul(g, s) u = MatMul(c, wu) m = Mul(act, u) d = MatMul(m, wd) e = Add(b, d) y = MatMul(e, head)"
    )
    rank = {"wq": (WIDTH, HEADS * SIZE), "wk": (WIDTH, GROUPS * SIZE), "wv": (WIDTH, GROUPS * SIZE)}
    rank |= {"wo": (HEADS * SIZE, WIDTH), "wg": (WIDTH, INNER), "wu": (WIDTH, INNER), "wd": (INNER, WIDTH)}
    rank |= {"head": (WIDTH, 40), "n1": (WIDTH,), "n2": (WIDTH,)}
    held = {name: numbers(*shape, seed=i) for i, (name, shape) in enumerate(rank.items())}
    inputs = f"float[B,{new},{WIDTH}] x, float[B,{new},{SIZE // 2}] cos, float[B,{new},{SIZE // 2}] sin, "
    inputs += f"float[B,1,{new},T] mask, float[B,{GROUPS},P,{SIZE}] past_k, float[B,{GROUPS},P,{SIZE}] past_v"
    model = build(body, x=inputs, outputs="y k1 v1", opset=23, **held)
    next(v for v in model.graph.inputs if v.name == "mask").shape = ir.Shape(
        ["B", 1, int(new) if new.isdigit() else new, f"P + {new}"]
    )
    if lowered:
        result = Lower(only=("group-query-attention",)).run(model, always(0.5))
        assert result.changes == ["GroupQueryAttention written"], result.refusals
    return model


def example(model: ir.Model, new: int, past: int) -> dict[str, np.ndarray]:
    found = feeds(model, 0, B=2, S=new, P=past, T=past + new, **{"P + S": past + new, "P + 1": past + 1})
    found["mask"] = np.where(np.arange(past + new) < past // 2, np.float32(-1e4), np.float32(0)) * np.ones_like(
        found["mask"]
    )
    return found


def attention(model: ir.Model) -> ir.Node:
    (node,) = [n for n in edit.nodes(model) if n.op_type in ("Attention", "GroupQueryAttention")]
    return node


def counts(model: ir.Model) -> tuple[int, int]:
    node = attention(model)
    name = "q_num_heads" if node.op_type == "Attention" else "num_heads"
    return edit.attribute(node, name), edit.attribute(node, "kv_num_heads")


def kept(group: Group, mask: np.ndarray, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs or outputs without the units that are cut: heads of caches, channels of caches and tables."""
    cuts: dict[str, tuple[int, np.ndarray]] = {}
    if group.kind == "head" and not group.blocks:
        cuts = dict.fromkeys(("past_k", "past_v", "k1", "v1"), (1, mask))
    elif group.kind == "head_dim" and group.blocks:
        cuts = dict.fromkeys(("past_v", "v1"), (3, mask))
    elif group.kind == "head_dim":
        cuts = dict.fromkeys(("past_k", "k1"), (3, np.tile(mask, 2))) | dict.fromkeys(("cos", "sin"), (2, mask))
    return {
        name: np.compress(cuts[name][1], array, axis=cuts[name][0]) if name in cuts else array
        for name, array in arrays.items()
    }


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("interface", [False, True])
def test_cutting_equals_zeroing(lowered: bool, interface: bool) -> None:
    """Query heads and neurons behind a fixed interface; with another one key heads and channels, and their caches."""
    new = "1" if lowered else "S"
    seen = set()
    groups = analyse(decoder(lowered=lowered, new=new), interface=interface)
    for index, found in enumerate(groups.groups):
        if found.kind not in ("head", "head_dim", "neuron") or found.size <= found.min_keep:
            continue
        model = decoder(lowered=lowered, new=new)
        groups = analyse(model, interface=interface)
        group = groups.groups[index]
        mask = np.arange(group.size) != 1
        cut.zero(model, groups, {group.name: np.broadcast_to(mask, (*group.blocks, group.size))})
        small = model.clone()
        result = Shrink(allow_interface=interface).run(small, CONTEXT)
        if (group.kind, bool(group.blocks)) in UNREACHED:
            assert not result.changes
            continue
        assert result.changes, (group.name, result.refusals)
        for past in (0, 5):
            inputs = example(model, 1 if lowered else 3, past)
            wanted = kept(group, mask, run(model, inputs))
            for name, array in run(small, kept(group, mask, inputs)).items():
                np.testing.assert_allclose(array, wanted[name], rtol=0, atol=1e-5, err_msg=f"{group.name} {name}")
        seen.add((group.kind, bool(group.blocks)))
        before, after = counts(model), counts(small)
        match group.kind, bool(group.blocks):
            case "head", True:
                assert after == (before[0] - GROUPS, before[1])
            case "head", False:
                assert after == (before[0] - REPEATS, before[1] - 1)
            case _:
                assert after == before
    expected = {("head", True), ("neuron", False)}
    if interface:
        expected |= {("head", False)} | (set() if lowered else {("head_dim", True)})
    assert seen == expected


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("kind", ["head", "neuron"])
def test_a_decoder_is_pruned_and_then_quantized(lowered: bool, kind: str) -> None:
    """Both passes on a fused decoder: fewer heads or neurons, eight-bit weights, the same caches."""
    new = "1" if lowered else "S"
    model = decoder(lowered=lowered, new=new)
    for text in (f"prune{{ratio=0.4 kinds=[{kind}] multiple_of=1}}", "shrink"):
        for each in Recipe.parse(text).passes:
            result = each.run(model, CONTEXT)
            assert result.changes, result.refusals
    assert (counts(model)[0] < HEADS) == (kind == "head")
    inputs = example(model, 1 if lowered else 3, 4)
    wanted = run(model, inputs)
    coded = model.clone()
    for each in Recipe.parse("quantize{scheme=weights bits=8 least=1}").passes:
        result = each.run(coded, CONTEXT)
        assert result.changes, result.refusals
    assert any(n.op_type == "DequantizeLinear" for n in edit.nodes(coded))
    found = run(coded, inputs)
    for name, array in wanted.items():
        assert found[name].shape == array.shape
        # Codes of eight bits: half a step of a 127th of the largest number, through a few products.
        assert np.abs(found[name] - array).max() <= 0.05 * np.abs(array).max()
