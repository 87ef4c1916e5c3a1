"""``drop-blocks``: what it takes for a block in every topology, what it drops, and what stands in for it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphc import runtime
from graphc.checking import Checker
from graphc.cli import main
from graphc.contract import Capabilities, Context, PassResult
from graphc.depth.silence import Silencing
from graphc.depth.structure import Structure, find
from graphc.errors import BadInput
from graphc.model import parameters
from graphc.passes.drop_blocks import DropBlocks
from graphc.passes.shrink import Shrink
from graphc.recipe import Recipe
from graphc.stats import Collector

CONTEXT = Context(Capabilities("portable", 10, {"": 21}))
DATA = Path(__file__).parent / "data"
WIDTH, HEADS = 8, 2


class Net:
    """Writes small networks node by node, with random weights of a fixed seed."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.random = np.random.default_rng(0)

    def op(self, operator: str, *inputs: str, out: str = "", outputs: int = 1, **attributes: Any) -> str:
        name = out or f"{operator.lower()}_{len(self.nodes)}"
        outs = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, outs, name=f"n_{name}", **attributes))
        return name if outputs == 1 else outs[0]

    def weight(self, name: str, *shape: int, values: Any = None) -> str:
        array = self.random.normal(0, 0.5, shape).astype(np.float32) if values is None else np.asarray(values)
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def ints(self, name: str, *values: int) -> str:
        if all(w.name != name for w in self.weights):
            self.weight(name, values=np.array(values, dtype=np.int64))
        return name

    def norm(self, x: str, name: str) -> str:
        return self.op("LayerNormalization", x, self.weight(f"{name}.g", WIDTH), self.weight(f"{name}.b", WIDTH))

    def linear(self, x: str, name: str, inputs: int = WIDTH, outputs: int = WIDTH) -> str:
        y = self.op("MatMul", x, self.weight(f"{name}.weight", inputs, outputs))
        return self.op("Add", y, self.weight(f"{name}.bias", outputs))

    def heads(self, x: str, *order: int) -> str:
        y = self.op("Reshape", x, self.ints("split", 0, -1, HEADS, WIDTH // HEADS))
        return self.op("Transpose", y, perm=list(order))

    def attention(self, x: str, name: str, source: str = "", mask: str = "", cache: bool = False) -> str:
        source = source or x
        q = self.heads(self.linear(x, f"{name}.q"), 0, 2, 1, 3)
        k = self.heads(self.linear(source, f"{name}.k"), 0, 2, 1, 3)
        v = self.heads(self.linear(source, f"{name}.v"), 0, 2, 1, 3)
        if cache:
            layer = name.split(".")[1]
            k = self.op("Concat", f"past.{layer}.key", k, axis=2, out=f"present.{layer}.key")
            v = self.op("Concat", f"past.{layer}.value", v, axis=2, out=f"present.{layer}.value")
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        if mask:
            scores = self.op("Add", scores, mask)
        y = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        y = self.op("Reshape", self.op("Transpose", y, perm=[0, 2, 1, 3]), self.ints("join", 0, -1, WIDTH))
        return self.linear(y, f"{name}.o")

    def mlp(self, x: str, name: str) -> str:
        return self.linear(self.op("Gelu", self.linear(x, f"{name}.up", WIDTH, 12)), f"{name}.down", 12, WIDTH)

    def model(self, inputs: dict[str, Sequence[Any]], outputs: dict[str, Sequence[Any]]) -> ir.Model:
        def infos(of: dict[str, Sequence[Any]]) -> list[Any]:
            return [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in of.items()]

        graph = helper.make_graph(self.nodes, "net", infos(inputs), infos(outputs), self.weights)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        return ir.from_proto(proto)


SEQUENCE = {"x": ["n", "s", WIDTH]}


def pre_norm(layers: int = 3, mask: bool = False, cache: bool = False) -> ir.Model:
    net = Net()
    h = net.linear("x", "embed.first")
    inputs: dict[str, Sequence[Any]] = dict(SEQUENCE)
    outputs: dict[str, Sequence[Any]] = {"y": ["n", "s", 5]}
    bias = ""
    if mask:
        # From the same input as the stream: it must not be taken for a stream itself.
        bias = net.op("Unsqueeze", net.op("ReduceMean", h, net.ints("last", -1), keepdims=0), net.ints("one2", 1, 2))
    for i in range(layers):
        name = f"layers.{i}"
        a = net.attention(net.norm(h, f"{name}.norm1"), f"{name}.attention", mask=bias, cache=cache)
        h = net.op("Add", h, a)
        h = net.op("Add", net.mlp(net.norm(h, f"{name}.norm2"), f"{name}.mlp"), h)
        if cache:
            for kind in ("key", "value"):
                inputs[f"past.{i}.{kind}"] = ["n", HEADS, "p", WIDTH // HEADS]
                outputs[f"present.{i}.{kind}"] = ["n", HEADS, "p + s", WIDTH // HEADS]
    net.op("MatMul", net.norm(h, "final.norm"), net.weight("final.head", WIDTH, 5), out="y")
    return net.model(inputs, outputs)


def post_norm() -> ir.Model:
    net = Net()
    h = net.linear("x", "embed.first")
    for i in range(3):
        name = f"layers.{i}"
        h = net.norm(net.op("Add", net.attention(h, f"{name}.attention"), h), f"{name}.norm1")
        h = net.norm(net.op("Add", net.mlp(h, f"{name}.mlp"), h), f"{name}.norm2")
    net.op("MatMul", h, net.weight("final.head", WIDTH, 5), out="y")
    return net.model(SEQUENCE, {"y": ["n", "s", 5]})


def sandwich() -> ir.Model:
    """A norm behind each branch, as well."""
    net = Net()
    h = net.linear("x", "embed.first")
    for i in range(2):
        name = f"layers.{i}"
        a = net.attention(net.norm(h, f"{name}.norm1"), f"{name}.attention")
        h = net.op("Add", h, net.norm(a, f"{name}.norm2"))
        h = net.op("Add", h, net.norm(net.mlp(net.norm(h, f"{name}.norm3"), f"{name}.mlp"), f"{name}.norm4"))
    net.op("MatMul", h, net.weight("final.head", WIDTH, 5), out="y")
    return net.model(SEQUENCE, {"y": ["n", "s", 5]})


def parallel(first: bool) -> ir.Model:
    """Attention and MLP side by side, added to the stream together or one after the other."""
    net = Net()
    h = net.linear("x", "embed.first")
    for i in range(3):
        name = f"layers.{i}"
        z = net.norm(h, f"{name}.norm")
        a, m = net.attention(z, f"{name}.attention"), net.mlp(z, f"{name}.mlp")
        h = net.op("Add", net.op("Add", a, m), h) if first else net.op("Add", net.op("Add", h, a), m)
    net.op("MatMul", h, net.weight("final.head", WIDTH, 5), out="y")
    return net.model(SEQUENCE, {"y": ["n", "s", 5]})


def encoder_decoder() -> ir.Model:
    net = Net()
    h = net.linear("x", "embed.first")
    for i in range(2):
        name = f"encoder.{i}"
        h = net.op("Add", h, net.attention(net.norm(h, f"{name}.n1"), f"{name}.attention"))
        h = net.op("Add", h, net.mlp(net.norm(h, f"{name}.n2"), f"{name}.mlp"))
    memory = net.norm(h, "encoder.final")
    h = net.linear("t", "embed.out")
    for i in range(2):
        name = f"decoder.{i}"
        h = net.op("Add", h, net.attention(net.norm(h, f"{name}.n1"), f"{name}.attention"))
        h = net.op("Add", h, net.attention(net.norm(h, f"{name}.n2"), f"{name}.cross", memory))
        h = net.op("Add", h, net.mlp(net.norm(h, f"{name}.n3"), f"{name}.mlp"))
    net.op("MatMul", h, net.weight("final.head", WIDTH, 5), out="y")
    return net.model({**SEQUENCE, "t": ["n", "u", WIDTH]}, {"y": ["n", "u", 5]})


def convolutional() -> ir.Model:
    """Identity blocks, a stage with a projected shortcut, identity blocks."""
    net = Net()

    def conv(x: str, name: str, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> str:
        weights = net.weight(f"{name}.w", outputs, inputs, kernel, kernel), net.weight(f"{name}.b", outputs)
        return net.op("Conv", x, *weights, pads=[kernel // 2] * 4, strides=[stride] * 2)

    def block(x: str, name: str, inputs: int, outputs: int) -> str:
        stride = outputs // inputs
        y = conv(net.op("Relu", conv(x, f"{name}.c1", inputs, outputs, 3, stride)), f"{name}.c2", outputs, outputs)
        return net.op("Relu", net.op("Add", y, conv(x, f"{name}.sc", inputs, outputs, 1, 2) if stride > 1 else x))

    h = net.op("Relu", conv("x", "stem.0", 3, 4))
    for i, (inputs, outputs) in enumerate([(4, 4), (4, 4), (4, 8), (8, 8)]):
        h = block(h, f"layers.{i}", inputs, outputs)
    flat = net.op("Flatten", net.op("GlobalAveragePool", h))
    net.op("MatMul", flat, net.weight("final.head", 8, 5), out="y")
    return net.model({"x": ["n", 3, 8, 8]}, {"y": ["n", 5]})


def shared() -> ir.Model:
    """One MLP in every layer, as in ALBERT."""
    net = Net()
    h = net.linear("x", "embed.first")
    up, down = net.weight("shared.0.up", WIDTH, 12), net.weight("shared.0.down", 12, WIDTH)
    for i in range(3):
        z = net.norm(h, f"layers.{i}.norm")
        h = net.op("Add", h, net.op("MatMul", net.op("Relu", net.op("MatMul", z, up)), down))
    net.op("MatMul", h, net.weight("final.head", WIDTH, 5), out="y")
    return net.model(SEQUENCE, {"y": ["n", "s", 5]})


TOPOLOGIES = {
    "pre_norm": pre_norm,
    "masked": lambda: pre_norm(mask=True),
    "cached": lambda: pre_norm(2, cache=True),
    "post_norm": post_norm,
    "sandwich": sandwich,
    "parallel": lambda: parallel(True),
    "parallel_in_a_row": lambda: parallel(False),
    "encoder_decoder": encoder_decoder,
    "convolutional": convolutional,
    "shared": shared,
}


def shape(structure: Structure) -> list[list[str]]:
    """For each chain and block, a letter for each branch: m mixes positions, p does not; "+" joins those of a sum."""
    return [
        [" ".join("+".join("pm"[b.mixes] for b in s.branches) for s in block.sums) for block in chain]
        for chain in structure.chains
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pre_norm", [["m p"] * 3]),
        ("masked", [["m p"] * 3]),
        ("cached", [["m p"] * 2]),
        ("post_norm", [["m p"] * 3]),
        ("sandwich", [["m p"] * 2]),
        ("parallel", [["m+p"] * 3]),
        ("parallel_in_a_row", [["m+p"] * 3]),
        ("encoder_decoder", [["m p"] * 2, ["m m p"] * 2]),
        ("convolutional", [["m", "m"], ["m"]]),
        ("shared", [["p"] * 3]),
    ],
)
def test_blocks_are_found_from_the_graph_alone(name: str, expected: list[list[str]]) -> None:
    structure = find(TOPOLOGIES[name]())
    assert shape(structure) == expected


def test_names_are_what_the_weights_have_in_common() -> None:
    assert [block.name for block in find(pre_norm()).blocks] == ["layers.0", "layers.1", "layers.2"]
    assert [branch.name for branch in find(pre_norm(1)).branches] == ["layers.0#0", "layers.0#1"]


def test_the_parameters_of_blocks_add_up() -> None:
    model = pre_norm()
    around = 2 * WIDTH + WIDTH * 5 + WIDTH * WIDTH + WIDTH
    floats = sum(v.const_value.size for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT)
    assert sum(block.parameters for block in find(model).blocks) == floats - around
    # What several branches share is nobody's own.
    assert all(block.parameters == 2 * WIDTH for block in find(shared()).blocks)


def test_caches_are_reported_as_outputs_of_their_branch() -> None:
    attention, mlp = find(pre_norm(2, cache=True)).blocks[1].branches
    assert [value.name for value in attention.exits] == ["present.1.key", "present.1.value"]
    assert mlp.exits == ()


def without(model: ir.Model, gone: Sequence[int]) -> tuple[ir.Model, int]:
    """The model with some branches written to zero, and how many parameters these have."""
    model = model.clone()
    branches = [find(model).branches[i] for i in gone]
    for branch in branches:
        silencing = Silencing.of(branch.value, branch.node)
        assert silencing.why == ""
        silencing.write(model)
    return model, sum(branch.parameters for branch in branches)


SIZES = {"n": 2, "s": 5, "u": 4, "p": 3}


def assert_same(a: ir.Model, b: ir.Model) -> None:
    """Both compute the same up to some float32 roundings."""
    random = np.random.default_rng(1)
    sizes = {v.name: [SIZES.get(str(d), d) for d in v.shape] for v in a.graph.inputs}
    given = {name: random.normal(size=shape).astype(np.float32) for name, shape in sizes.items()}
    want, got = (runtime.session(m, optimise=False).run(given) for m in (a, b))
    assert want.keys() == got.keys()
    for name, array in want.items():
        np.testing.assert_allclose(got[name], array, rtol=0, atol=1e-5 * np.abs(array).max())


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_shrink_after_it_computes_what_the_zeroed_model_does(data: st.DataObject) -> None:
    """Any branches of any topology go, with all of their weights, and nothing else changes."""
    model = TOPOLOGIES[data.draw(st.sampled_from(sorted(TOPOLOGIES)))]()
    count = len(find(model).branches)
    gone = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count)))
    zeroed, removed = without(model, gone)
    small = zeroed.clone()
    Shrink().run(small, CONTEXT)
    assert_same(zeroed, small)
    caches = sum(bool(find(model).branches[i].exits) for i in gone)
    # Norm, keys and values of a cache that is an output stay.
    kept = caches * (2 * WIDTH + 2 * (WIDTH * WIDTH + WIDTH))
    assert parameters(model) - parameters(small) >= removed - kept


@pytest.mark.parametrize("name", sorted(TOPOLOGIES))
def test_a_zeroed_branch_adds_nothing_and_the_others_still_do(name: str) -> None:
    """Against the same network with the branch's value multiplied by zero."""
    model = TOPOLOGIES[name]()
    for i, branch in enumerate(find(model).branches):
        other = model.clone()
        made = {v.name: v for node in other.graph for v in node.outputs}
        value, total = made[branch.value.name], made[branch.node.outputs[0].name].producer()
        zero = ir.Value(name="none", const_value=ir.tensor(np.zeros((), np.float32), name="none"))
        other.graph.register_initializer(zero)
        scaled = ir.Node("", "Mul", [value, zero], num_outputs=1)
        scaled.outputs[0].name = "silent"
        assert total is not None
        other.graph.insert_before(total, [scaled])
        total.replace_input_with(list(total.inputs).index(value), scaled.outputs[0])
        assert_same(other, without(model, [i])[0])


def samples(count: int = 4, seed: int = 3) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    return [{"x": random.normal(size=(2, 7, WIDTH)).astype(np.float32)} for _ in range(count)]


def context(given: list[dict[str, np.ndarray]], labels: Sequence[np.ndarray] = ()) -> Context:
    collector = Collector(given, labels)
    return Context(CONTEXT.target, collect=collector.collect, calibration=given, labels=labels)


def outputs(model: ir.Model, given: Sequence[dict[str, np.ndarray]], name: str = "y") -> np.ndarray:
    session = runtime.session(model, optimise=False)
    return np.concatenate([session.run(each)[name] for each in given])


def dropped(model: ir.Model, ctx: Context = CONTEXT, **options: Any) -> tuple[list[str], PassResult]:
    """The names of the blocks or branches that a run wrote to zero."""
    before = {b.name: b for b in find(model.clone()).branches}
    result = DropBlocks(**options).run(model, ctx)
    constants = model.graph.initializers
    gone = []
    for name, branch in before.items():
        zeros = [value for value, _ in Silencing.of(branch.value, branch.node).zeros]
        if zeros and not any(constants[value.name].const_value.numpy().any() for value in zeros):
            gone.append(name)
    return gone, result


def test_influence_takes_the_block_that_turns_the_stream_least() -> None:
    model = pre_norm()
    for name in ("attention.o", "mlp.down"):
        held = model.graph.initializers[f"layers.1.{name}.weight"]
        held.const_value = ir.tensor(held.const_value.numpy() * 0.01)
        model.graph.initializers[f"layers.1.{name}.bias"].const_value = ir.tensor(
            np.zeros(WIDTH, np.float32), name=f"layers.1.{name}.bias"
        )
    for criterion in ("influence", "angular", "probe", "magnitude"):
        gone, result = dropped(model.clone(), context(samples()), count=1, criterion=criterion)
        assert gone == ["layers.1#0", "layers.1#1"], criterion
        assert result.changes == ["block layers.1 written to zero"]


def test_influence_equals_the_dense_computation() -> None:
    from graphc.depth import scores

    model, given = pre_norm(), samples()
    structure = find(model)
    found = scores.similarity(scores.units(structure.blocks, "block"), model, context(given))
    tapped = model.clone()
    made = {v.name: v for node in tapped.graph for v in node.outputs}
    names = [structure.blocks[0].start.name, *(block.end.name for block in structure.blocks)]
    tapped.graph.outputs.extend(made[name] for name in names)
    streams = [outputs(tapped, given, name).reshape(-1, WIDTH).astype(np.float64) for name in names]
    for i, score in enumerate(found):
        a, b = streams[i], streams[i + 1]
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert score == pytest.approx(1 - cosines.mean(), rel=1e-5)


def test_a_probe_is_what_dropping_costs() -> None:
    from graphc.checking import metrics
    from graphc.depth import scores

    model, given = pre_norm(), samples()
    ctx = context(given)
    units = scores.units(find(model).blocks, "branch")
    found = scores.probed(model, units, 1, "error", False, ctx)
    want = outputs(model, given)
    for i, score in enumerate(found):
        zeroed, _ = without(model, [i])
        assert score == pytest.approx(metrics.error([{"y": want}], [{"y": outputs(zeroed, given)}], given), rel=1e-4)


def test_greedy_chooses_given_what_went_before() -> None:
    model, given = pre_norm(4), samples()
    gone, _ = dropped(model.clone(), context(given), count=2, unit="branch", criterion="probe", greedy=True)
    first, _ = dropped(model.clone(), context(given), count=1, unit="branch", criterion="probe")
    assert len(gone) == 2
    assert set(first) <= set(gone)
    second = {}
    for i, branch in enumerate(find(model).branches):
        if branch.name not in first:
            at = [b.name for b in find(model).branches].index(first[0])
            zeroed, _ = without(model, [at, i])
            second[branch.name] = np.linalg.norm(outputs(zeroed, given) - outputs(model, given))
    assert set(gone) == {*first, min(second, key=lambda name: second[name])}


def test_taylor_scores_are_weight_times_gradient() -> None:
    torch = pytest.importorskip("torch")
    from graphc.depth import scores
    from graphc.fx import to_torch

    model, given = pre_norm(2), samples(2)
    labels = [np.zeros((2, 7), np.int64)] * 2
    units = scores.units(find(model).blocks, "block")
    found = scores.taylor(units, model, context(given, labels))
    module = to_torch(model)
    for sample in given:
        logits = next(iter(module(torch.from_numpy(sample["x"])).values()))
        torch.nn.functional.cross_entropy(logits.reshape(-1, 5), torch.zeros(14, dtype=torch.long)).backward()
    held = dict(module.named_parameters())
    by_name = {name: held[key] for key, name in module.meta["initializers"].items() if key in held}
    for unit, score in zip(units, found, strict=True):
        own = [by_name[value.name] for value in unit.constants]
        want = sum((w * w.grad).abs().sum().item() for w in own if w.grad is not None)
        assert score == pytest.approx(want, rel=1e-4)


def test_angular_takes_consecutive_blocks() -> None:
    gone, _ = dropped(pre_norm(5), context(samples()), count=3, criterion="angular")
    blocks = sorted({int(name.split(".")[1][0]) for name in gone})
    assert len(blocks) == 3
    assert blocks[-1] - blocks[0] == 2


@pytest.mark.parametrize(("half", "counts"), [("large", [1, 2]), ("small", [2, 3])])
def test_depth_drops_the_end_where_the_loss_is_least(half: str, counts: list[int]) -> None:
    model, given = pre_norm(4), samples()
    labels = [np.random.default_rng(i).integers(0, 5, (2, 7)) for i in range(4)]
    right = np.concatenate(labels)

    def loss(of: ir.Model) -> float:
        scores = outputs(of, given).astype(np.float64)
        logs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        return -float(np.take_along_axis(logs, right[..., None], -1).mean())

    losses = {n: loss(without(model, range(8 - 2 * n, 8))[0]) for n in counts}
    best = min(losses, key=lambda n: losses[n])
    gone, _ = dropped(model, context(given, labels), criterion="depth", half=half)
    assert gone == [f"layers.{i}#{k}" for i in range(4 - best, 4) for k in (0, 1)]


def test_ends_and_patterns_are_kept() -> None:
    ctx = CONTEXT
    gone, _ = dropped(pre_norm(5), ctx, count=2, criterion="magnitude", first=2, last=1)
    assert {name[:8] for name in gone} == {"layers.2", "layers.3"}
    gone, result = dropped(pre_norm(4), ctx, count=3, criterion="random", include=("layers.1", "layers.2"))
    assert {name[:8] for name in gone} == {"layers.1", "layers.2"}
    assert "only 2 of 3 can go" in result.refusals[0].reason
    gone, _ = dropped(pre_norm(3), ctx, ratio=0.67, criterion="random", exclude=("layers.1.mlp.up.weight",))
    assert {name[:8] for name in gone} == {"layers.0", "layers.2"}


def test_levels_give_blocks_back_one_by_one() -> None:
    levels = DropBlocks(ratio=0.75, criterion="random").levels(pre_norm(4))
    assert [level.spec() for level in levels[1:]] == [
        "drop-blocks{count=2 criterion=random}",
        "drop-blocks{count=1 criterion=random}",
    ]


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_map_is_never_worse_than_plain_dropping(bias: bool) -> None:
    """On the calibration data, for any ridge, and as the fit says it is."""
    model, given = pre_norm(4), samples(6)
    if not bias:
        for node in list(model.graph):
            if node.op_type == "Add" and any((v.name or "").endswith("mlp.down.bias") for v in node.inputs if v):
                node.outputs[0].replace_all_uses_with(node.inputs[0])
                model.graph.remove(node, safe=True)
    blocks = find(model).blocks
    target = blocks[2].end.name

    def stream(of: ir.Model) -> np.ndarray:
        tapped = of.clone()
        tapped.graph.outputs.append({v.name: v for n in tapped.graph for v in n.outputs}[target])
        return outputs(tapped, given, target)

    want = stream(model)
    errors = {}
    for ridge in (None, 0.0, 0.01, 1.0, 100.0):
        clone = model.clone()
        options = {"replace": "linear", "ridge": ridge} if ridge is not None else {}
        gone, result = dropped(clone, context(given), count=2, include=("layers.1", "layers.2"), **options)
        assert len(gone) == 4
        errors[ridge] = float(np.square(stream(clone) - want).mean())
        if ridge is not None:
            assert result.changes[0].startswith("run of blocks replaced by a linear map")
            percent = int(result.changes[0].partition("(")[2].partition("%")[0])
            assert percent == pytest.approx(100 * errors[ridge] / errors[None], abs=1)
    assert errors[0.0] <= errors[0.01] <= errors[1.0] <= errors[100.0] <= errors[None]
    assert errors[0.0] < 0.9 * errors[None]


def test_a_linear_run_is_replaced_exactly() -> None:
    """Where the blocks that go are linear maps of what the projection before adds, nothing is lost."""
    net = Net()
    net.weight("layers.0.w", WIDTH, WIDTH)
    h = net.op("Add", net.op("MatMul", net.op("Tanh", "x"), "layers.0.w"), net.op("Mul", "x", "zero"))
    net.weight("zero", values=np.zeros((), np.float32))
    for i in (1, 2):
        h = net.op("Add", h, net.op("MatMul", h, net.weight(f"layers.{i}.w", WIDTH, WIDTH)))
    net.op("Identity", h, out="y")
    model, given = net.model(SEQUENCE, {"y": ["n", "s", WIDTH]}), samples(8)
    want = outputs(model, given)
    dropped(model, context(given), count=2, include=("layers.[12].w",), replace="linear", ridge=0.0)
    np.testing.assert_allclose(outputs(model, given), want, atol=1e-4 * np.abs(want).max())


def test_where_no_map_fits_the_run_is_dropped_and_it_says_why() -> None:
    gone, result = dropped(post_norm(), context(samples()), count=1, replace="linear", include=("layers.1",))
    assert gone == ["layers.1#0", "layers.1#1"]
    assert "a normalisation or an activation stands between" in result.refusals[0].reason
    net = Net()
    h = net.linear("x", "embed.first")
    for i in range(3):
        h = net.op("Add", h, net.attention(net.norm(h, f"layers.{i}.n1"), f"layers.{i}.attention"))
        h = net.op("Add", h, net.op("Relu", net.linear(net.norm(h, f"layers.{i}.n2"), f"layers.{i}.mlp")))
    net.op("Identity", h, out="y")
    model = net.model(SEQUENCE, {"y": ["n", "s", WIDTH]})
    # The projection of attention is no substitute: the MLP after it reads what it adds.
    _, result = dropped(model, context(samples()), count=1, replace="linear", include=("layers.1",))
    assert "does not end with a projection" in result.refusals[0].reason
    _, result = dropped(pre_norm(), context(samples()), count=1, replace="linear", include=("layers.0",))
    assert "no block comes before it" in result.refusals[0].reason


@pytest.mark.parametrize("how", ["sum", "last"])
def test_merged_weights_are_those_of_the_paper_or_of_the_code(how: str) -> None:
    model = pre_norm(4)
    before = {n: v.const_value.numpy().copy() for n, v in model.graph.initializers.items()}
    gone, result = dropped(model, context(samples()), count=2, replace=how, merge=3, threshold=-1.0)
    assert {name[:8] for name in gone} == {"layers.2", "layers.3"}
    assert result.changes == ["layers.2, layers.3 merged into layers.1"]
    after = {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}
    for part in ("attention.q.weight", "mlp.down.weight"):
        own, second, third = (before[f"layers.{i}.{part}"] for i in (1, 2, 3))
        want = own + (second - own) + (third - own) if how == "sum" else third
        np.testing.assert_allclose(after[f"layers.1.{part}"], want, atol=1e-5)
    norm = "layers.1.norm1.g"
    assert np.array_equal(after[norm], before[norm]) is (how == "last")
    np.testing.assert_array_equal(after["layers.0.mlp.up.weight"], before["layers.0.mlp.up.weight"])


def test_a_merge_that_changes_too_much_does_not_stand() -> None:
    model = pre_norm(4)
    before = outputs(model, samples())
    gone, result = dropped(model, context(samples()), count=2, replace="sum", merge=2, threshold=1.0)
    assert gone == []
    assert not result.changed
    np.testing.assert_array_equal(outputs(model, samples()), before)


def interface(model: ir.Model) -> tuple[list[str], list[str]]:
    return [v.name or "" for v in model.graph.inputs], [v.name or "" for v in model.graph.outputs]


def test_caches_stay_unless_the_interface_may_change() -> None:
    model = pre_norm(3, cache=True)
    before = interface(model)
    _, result = dropped(model, count=1, criterion="random", include=("layers.1",))
    assert interface(model) == before
    assert [(r.node, r.count) for r in result.refusals] == [("present.1.key", 2)]
    assert "allow-interface" in result.refusals[0].reason


def test_a_length_that_was_read_from_a_cache_that_goes_is_read_from_another() -> None:
    model = pre_norm(3, cache=True)
    past = next(v for v in model.graph.inputs if v.name == "past.0.key")
    size = ir.Node("", "Shape", [past], num_outputs=1)
    size.outputs[0].name = "length"
    model.graph.append(size)
    model.graph.outputs.append(size.outputs[0])
    step = DropBlocks(count=1, criterion="random", include=("layers.0",), allow_interface=True)
    assert step.run(model, CONTEXT).changes[-1] == "input or output removed (×4)"
    assert interface(model)[0] == ["x", "past.0.key", "past.0.value", "past.1.key", "past.1.value"]
    assert size.inputs[0] is model.graph.inputs[1]


def test_caches_of_a_layer_that_goes_leave_and_the_others_are_counted_anew() -> None:
    model = pre_norm(4, cache=True)
    plain = model.clone()
    dropped(plain, count=1, criterion="random", include=("layers.1",))
    step = DropBlocks(count=1, criterion="random", include=("layers.1",), allow_interface=True)
    result = step.run(model, CONTEXT)
    assert result.changes == ["block layers.1 written to zero", "input or output removed (×4)"]
    inputs, names = interface(model)
    kinds = [f"{i}.{kind}" for i in range(3) for kind in ("key", "value")]
    assert inputs == ["x", *(f"past.{kind}" for kind in kinds)]
    assert names == ["y", *(f"present.{kind}" for kind in kinds)]
    Shrink().run(model, CONTEXT)
    assert not [n for n in model.graph.initializers if n.startswith("layers.1.")]
    random = np.random.default_rng(0)
    old = {v.name: [SIZES.get(str(d), d) for d in v.shape] for v in plain.graph.inputs}
    given = {name: random.normal(size=shape).astype(np.float32) for name, shape in old.items()}
    want = runtime.session(plain, optimise=False).run(given)
    moved = {0: 0, 1: 2, 2: 3}
    fed = {"x": given["x"]}
    for new, was in moved.items():
        fed |= {f"past.{new}.{kind}": given[f"past.{was}.{kind}"] for kind in ("key", "value")}
    got = runtime.session(model, optimise=False).run(fed)
    np.testing.assert_allclose(got["y"], want["y"], atol=1e-5)
    for new, was in moved.items():
        for kind in ("key", "value"):
            np.testing.assert_allclose(got[f"present.{new}.{kind}"], want[f"present.{was}.{kind}"], atol=1e-5)


@pytest.mark.parametrize("data", [False, True])
def test_a_model_with_fewer_caches_is_checked_measured_and_written(data: bool, tmp_path: Path) -> None:
    path, out = tmp_path / "m.onnx", tmp_path / "o.onnx"
    model = pre_norm(4, cache=True)
    ir.save(model, path)
    recipe = "drop-blocks{count=2 criterion=magnitude first=1 last=1 allow-interface=true},shrink"
    flags = ["--max-drop", "error=5", "--report", str(tmp_path / "r.json"), "-q"]
    if data:
        random = np.random.default_rng(0)
        shapes = {v.name: [SIZES.get(str(d), d) for d in v.shape] for v in model.graph.inputs}
        arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        np.savez(tmp_path / "d.npz", **arrays)
        flags += ["--data", str(tmp_path / "d.npz")]
    assert main(["optimize", str(path), "-o", str(out), "-p", recipe, *flags]) == 0
    written = ir.load(out)
    assert len(written.graph.inputs) == 5
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["rewrite"].get("ok", True)
    assert 0 < report["approximation"]["error"] < 5
    assert not [each for each in report["passes"] if each["error"]]


def test_quantized_weights_become_their_zero_point() -> None:
    net = Net()
    h = net.linear("x", "embed.first")
    for i in range(2):
        q = net.weight(
            f"layers.{i}.q", values=np.random.default_rng(i).integers(0, 255, (WIDTH, WIDTH), dtype=np.uint8)
        )
        scale = net.weight(f"layers.{i}.s", values=np.full(WIDTH, 0.02, np.float32))
        zero = net.weight(f"layers.{i}.z", values=np.arange(120, 120 + WIDTH, dtype=np.uint8))
        h = net.op("Add", h, net.op("MatMul", h, net.op("DequantizeLinear", q, scale, zero, axis=1)))
    net.op("Identity", h, out="y")
    model = net.model(SEQUENCE, {"y": ["n", "s", WIDTH]})
    zeroed, _ = without(model, [1])
    written = zeroed.graph.initializers["layers.1.q"].const_value.numpy()
    np.testing.assert_array_equal(written, np.broadcast_to(np.arange(120, 120 + WIDTH), written.shape))


def test_what_cannot_be_zeroed_is_refused() -> None:
    net = Net()
    h = net.linear("x", "embed.first")
    h = net.op("Add", h, net.op("Sigmoid", net.linear(h, "layers.0.w")))
    branch = net.linear(h, "layers.1.w")
    net.op("Add", h, branch, out="y")
    net.op("Identity", branch, out="z")
    model = net.model(SEQUENCE, {"y": ["n", "s", WIDTH], "z": ["n", "s", WIDTH]})
    gone, result = dropped(model, count=2, criterion="random")
    assert gone == []
    assert {refusal.reason for refusal in result.refusals} == {
        "its last operator is Sigmoid, which cannot be written to zero",
        "what it ends with is also read elsewhere",
        "only 0 of 2 can go: the rest is kept by options or cannot be zero",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, "ratio cannot be 1"),
        ({"count": -1}, "count cannot be -1"),
        ({"count": 1, "ratio": 0.5}, "either count or ratio"),
        ({"unit": "branch", "criterion": "angular"}, "whole blocks"),
        ({"unit": "branch", "replace": "linear"}, "whole blocks"),
        ({"greedy": True}, "criterion=probe"),
        ({"count": 1, "criterion": "depth"}, "counts the blocks itself"),
        ({"merge": 1}, "merge cannot be 1"),
        ({"ridge": -1.0}, "ridge cannot be -1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        DropBlocks(**options)


def test_an_unknown_name_has_the_nearest_one() -> None:
    with pytest.raises(BadInput, match=r"layers\.1"):
        DropBlocks(count=1, criterion="random", include=("layer.1",)).run(pre_norm(), CONTEXT)


def test_nothing_to_drop_is_said() -> None:
    net = Net()
    net.op("Relu", net.linear("x", "a.0.b"), out="y")
    model = net.model(SEQUENCE, {"y": ["n", "s", WIDTH]})
    assert dropped(model, count=1, criterion="random")[1].refusals[0].reason == "no residual branch was found"
    assert "neither a count nor a ratio" in dropped(pre_norm())[1].refusals[0].reason


def images(part: str) -> tuple[np.ndarray, np.ndarray]:
    data = np.load(DATA / "fashion_mnist_2k.npz", allow_pickle=False)
    return ((data[f"{part}_x"][:, None] / 255 - 0.286) / 0.353).astype(np.float32), data[f"{part}_y"]


def test_a_linear_map_beats_plain_dropping_on_held_out_images() -> None:
    calibration, _ = images("calib")
    test, labels = images("test")
    given = [{"image": calibration[i : i + 50]} for i in range(0, 300, 50)]
    accuracy = {}
    for name in ("none", "linear"):
        model = ir.load(DATA / "fmnist_vit_tiny.onnx")
        DropBlocks(count=1, replace=name).run(model, context(given))  # type: ignore[arg-type]
        Shrink().run(model, CONTEXT)
        assert parameters(model) < 0.77 * parameters(ir.load(DATA / "fmnist_vit_tiny.onnx"))
        accuracy[name] = float((outputs(model, [{"image": test}], "logits").argmax(-1) == labels).mean())
    assert accuracy["linear"] > accuracy["none"] + 0.015
    assert accuracy["linear"] > 0.78


@pytest.mark.parametrize(("name", "blocks"), [("fmnist_resnet", 1), ("fmnist_vit_tiny", 4), ("tiny_mixtral_bytes", 3)])
def test_the_blocks_of_trained_models(name: str, blocks: int) -> None:
    model = ir.load(DATA / f"{name}.onnx")
    found = find(model).blocks
    assert len(found) == blocks
    middle = found[blocks // 2]
    zeroed = model.clone()
    for branch in find(zeroed).blocks[blocks // 2].branches:
        Silencing.of(branch.value, branch.node).write(zeroed)
    small = zeroed.clone()
    Shrink().run(small, CONTEXT)
    assert parameters(model) - parameters(small) >= middle.parameters > 0
    verdict = Checker(zeroed).compare(small)
    assert verdict.checked and verdict.ok, verdict.why


def test_blocks_are_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = str(DATA / "fmnist_vit_tiny.onnx")
    assert main(["inspect", path, "--blocks"]) == 0
    shown = capsys.readouterr().out
    assert "m.vit.layers.3" in shown
    assert "#0 mixes positions" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert main(["inspect", path, "--blocks", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "graphc-blocks/1"
    assert [branch["params"] for branch in found["blocks"][0]["branches"]] == [37440, 37344]
    assert main(["inspect", str(DATA / "silero_vad.onnx"), "--blocks"]) == 0
    assert "no residual branch was found" in capsys.readouterr().out


def test_the_gate_gives_blocks_back(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    ir.save(pre_norm(4), path)
    out = tmp_path / "o.onnx"
    recipe = "drop-blocks{count=3 criterion=magnitude},shrink"
    common = ["optimize", str(path), "-o", str(out), "-p", recipe, "--no-measure", "-q"]
    assert main([*common, "--max-drop", "error=10"]) == 0
    assert len(find(ir.load(out)).blocks) == 1
    assert main([*common, "--max-drop", "error=1e-9"]) == 0
    assert len(find(ir.load(out)).blocks) == 4


@pytest.mark.parametrize(
    "name",
    [
        "shortgpt",
        "shortened-llama",
        pytest.param("shortened-llama-taylor", marks=pytest.mark.slow),
        "uidl",
        "replaceme",
        "laco",
        "laco-released",
        "l3prune",
    ],
)
def test_presets_make_a_shallower_model(name: str) -> None:
    if name.endswith("taylor"):
        pytest.importorskip("torch")
    recipe = Recipe.named(name)
    assert "20" in recipe.description
    model, ctx = pre_norm(8), context(samples(2))
    changes = []
    for step in recipe.passes:
        if isinstance(step, DropBlocks) and step.replace in ("sum", "last"):
            step = dataclasses.replace(step, threshold=-1.0)
        changes += step.run(model, ctx).changes
    assert changes
    left = len(find(model).blocks)
    assert left == 6 if name != "l3prune" else 4 <= left < 8
