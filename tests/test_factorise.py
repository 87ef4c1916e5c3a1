"""``factorise``: the best factors of every kind of weight, the ranks they get, and what stays alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, shape_inference

from graphc import runtime
from graphc.cli import main
from graphc.collection import Collector
from graphc.contract import Capabilities, Context, PassResult
from graphc.errors import BadInput
from graphc.factorisation.ranks import by_energy, even, uniform
from graphc.factorisation.spectrum import spectrum
from graphc.passes.factorise import Factorise
from tests.fashion import batches, fashion

CONTEXT = Context(Capabilities("portable", 10, {"": 21}))
DATA = Path(__file__).parent / "data"


def low(random: np.random.Generator, rows: int, columns: int, rank: int) -> np.ndarray[Any, Any]:
    return random.normal(size=(rows, rank)) @ random.normal(size=(rank, columns)) / np.sqrt(rank)


def network(rank: int) -> ir.Model:
    """Every kind of read of a weight of this rank: a table, MatMul and Gemm from both sides, plain and transposed."""
    random = np.random.default_rng(0)
    weights = {
        "table": low(random, 200, 32, rank),
        "right": low(random, 32, 48, rank),
        "left": low(random, 40, 48, rank),
        "gemm": low(random, 40, 24, rank),
        "bias": random.normal(size=24),
        "turned": low(random, 20, 24, rank),
        "first": low(random, 18, 20, rank),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"], name="embed"),
        helper.make_node("MatMul", ["x", "right"], ["a"], name="on_the_right"),
        helper.make_node("Transpose", ["a"], ["at"], perm=[1, 0]),
        helper.make_node("MatMul", ["left", "at"], ["b"], name="on_the_left"),
        helper.make_node("Gemm", ["b", "gemm", "bias"], ["c"], transA=1, alpha=0.5, beta=2.0, name="transposed"),
        helper.make_node("Gemm", ["c", "turned"], ["d"], transB=1, name="plain"),
        helper.make_node("Gemm", ["first", "d"], ["y"], transB=1, name="first_operand"),
    ]
    return model(nodes, weights, ("ids", TensorProto.INT64, ["n"]), ("y", TensorProto.FLOAT, [18, "n"]))


def model(nodes: list[Any], weights: dict[str, Any], given: tuple[Any, ...], result: tuple[Any, ...]) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*given)],
        [helper.make_tensor_value_info(*result)],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(shape_inference.infer_shapes(made))


def context(samples: list[dict[str, Any]]) -> Context:
    return Context(
        Capabilities("portable", 10, {"": 21}),
        collect=Collector(samples, []).collect,
        calibration=samples,
    )


def ids(count: int = 3) -> list[dict[str, Any]]:
    random = np.random.default_rng(1)
    return [{"ids": random.integers(0, 200, 64)} for _ in range(count)]


def factorised(before: ir.Model, ctx: Context, **options: Any) -> tuple[ir.Model, PassResult]:
    after = before.clone()
    return after, Factorise(**options).run(after, ctx)


def outputs(m: ir.Model, sample: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    return list(runtime.session(m, optimise=False).run(sample).values())


def relative(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


# The factors.


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 10_000), st.sampled_from(["full", "diagonal", "none"]))
def test_no_other_factors_of_that_rank_lose_less(rows: int, columns: int, seed: int, kind: str) -> None:
    """The loss is that of Eckart and Young in whitened coordinates, from either side."""
    random = np.random.default_rng(seed)
    weight = random.normal(size=(rows, columns))
    inputs = random.normal(size=(columns, 3 * columns)) * random.uniform(0.1, 3, (columns, 1))
    gram = {"full": inputs @ inputs.T, "diagonal": np.square(inputs).sum(axis=1), "none": None}[kind]
    root = {"full": lambda: np.linalg.cholesky(gram), "diagonal": lambda: np.diag(np.sqrt(gram))}.get(kind)
    root = np.eye(columns) if root is None else root()
    singular = np.linalg.svd(weight @ root, compute_uv=False)
    for rank in range(1, even((rows, columns)) + 1):
        found = spectrum(weight, gram, rank)
        error = np.linalg.norm((weight - found.left @ found.right) @ root)
        assert error == pytest.approx(np.linalg.norm(singular[rank:]), rel=1e-6, abs=1e-6 * singular[0])
        assert found.lost(rank) == pytest.approx(np.square(singular[rank:]).sum() / np.square(singular).sum(), abs=1e-9)


def test_inputs_that_do_not_span_all_channels() -> None:
    random = np.random.default_rng(0)
    inputs = random.normal(size=(30, 2)) @ random.normal(size=(2, 50))
    for rows in (10, 60):
        weight = random.normal(size=(rows, 30))
        found = spectrum(weight, inputs @ inputs.T, 5)
        assert len(found.energy) == 2
        np.testing.assert_allclose(found.left @ (found.right @ inputs), weight @ inputs, atol=1e-6)


# The ranks.


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(8, 60), st.integers(8, 60)), min_size=1, max_size=6),
    st.floats(0.01, 0.6),
    st.integers(0, 1000),
)
def test_ranks_meet_the_budget_and_nothing_cheaper_loses_less(
    shapes: list[tuple[int, int]], ratio: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    energies = [np.sort(random.exponential(size=even(s)) ** 3)[::-1] for s in shapes]
    totals = [float(e.sum() * 1.1) for e in energies]
    chosen = by_energy(shapes, energies, totals, ratio, 1)

    def spent(picks: list[int]) -> int:
        return sum(r * (m + n) if r else m * n for r, (m, n) in zip(picks, shapes, strict=True))

    def lost(picks: list[int]) -> float:
        each = zip(picks, energies, totals, strict=True)
        return sum(1 - float(e[:r].sum()) / t if r else 0.0 for r, e, t in each)

    assert spent(chosen) <= (1 - ratio) * sum(m * n for m, n in shapes)
    for _ in range(50):
        other = [int(random.integers(0, even(s) + 1)) for s in shapes]
        if spent(other) <= spent(chosen):
            assert lost(other) >= lost(chosen) - 1e-9


def test_uniform_ranks_are_those_of_the_papers() -> None:
    assert uniform([(4096, 4096), (4096, 11008), (10, 10)], 0.2, 1) == [1638, 2388, 4]
    assert uniform([(4096, 4096), (10, 10)], 0.2, 8) == [1632, 4]


# The pass.


@pytest.mark.parametrize("whitening", ["gram", "inputs", "none"])
@pytest.mark.parametrize("allocation", ["energy", "uniform"])
def test_weights_of_low_rank_lose_nothing_whatever_reads_them(whitening: str, allocation: str) -> None:
    before = network(4)
    options = {"whitening": whitening, "allocation": allocation, "multiple_of": 1}
    after, result = factorised(before, context(ids()), ratio=0.5, **options)
    assert max(result.losses.values()) < 1e-6
    assert allocation == "energy" or len(result.losses) == 6
    for sample in ids():
        (was,), (now,) = outputs(before, sample), outputs(after, sample)
        assert relative(was, now) < 1e-4
    size = [sum(v.const_value.size for v in m.graph.initializers.values()) for m in (before, after)]
    assert size[1] - 24 <= 0.5 * (size[0] - 24)


def test_full_rank_loses_as_much_as_it_says() -> None:
    before = network(64)
    after, result = factorised(before, context(ids()), ratio=0.3, include=("right",), multiple_of=1)
    (says,) = result.losses.values()

    def product(m: ir.Model, sample: dict[str, Any]) -> np.ndarray[Any, Any]:
        tapped = m.clone()
        tapped.graph.outputs[:] = [v for node in tapped.graph for v in node.outputs if v.name == "a"]
        return outputs(tapped, sample)[0]

    pairs = [(product(before, sample), product(after, sample)) for sample in ids()]
    lost = sum(np.square(a - b).sum() for a, b in pairs) / sum(np.square(a).sum() for a, _ in pairs)
    assert lost == pytest.approx(says, rel=1e-3)


@pytest.mark.parametrize(
    "more", [{}, {"auto_pad": "SAME_UPPER"}, {"strides": [2, 1], "dilations": [1, 2], "pads": [1, 2, 0, 2]}]
)
def test_convolutions(more: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    weights = {
        "w1": low(random, 12, 8 * 9, 3).reshape(12, 8, 3, 3),
        "b1": random.normal(size=12),
        "w2": random.normal(size=(12, 4, 3, 3)),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], name="plain", **more),
        helper.make_node("Conv", ["a", "w2"], ["y"], name="grouped", group=3),
    ]
    given = ("x", TensorProto.FLOAT, ["n", 8, 9, 9])
    before = model(nodes, weights, given, ("y", TensorProto.FLOAT, ["n", 12, "h", "w"]))
    samples = [{"x": random.normal(size=(2, 8, 9, 9)).astype(np.float32)}]
    after, result = factorised(before, context(samples), ratio=0.5, allocation="uniform", multiple_of=1)
    assert [r.reason for r in result.refusals] == ["the convolution is grouped"]
    assert [n.op_type for n in after.graph] == ["Conv", "Conv", "Conv"]
    assert relative(outputs(before, samples[0])[0], outputs(after, samples[0])[0]) < 1e-4


def test_a_weight_that_two_read_is_shared_and_a_tied_table_stays() -> None:
    random = np.random.default_rng(0)
    weights = {"table": low(random, 200, 32, 2), "w": low(random, 32, 32, 2)}
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("Gemm", ["b", "table"], ["y"], transB=1),
    ]
    before = model(nodes, weights, ("ids", TensorProto.INT64, ["n"]), ("y", TensorProto.FLOAT, ["n", 200]))
    after, result = factorised(before, context(ids()), ratio=0.5, kinds=("MatMul", "Gather"), multiple_of=1)
    assert [r.reason for r in result.refusals] == ["a table of embeddings that other operators read, too"]
    assert sorted(after.graph.initializers) == ["table", "w.a", "w.b"]
    assert relative(outputs(before, ids()[0])[0], outputs(after, ids()[0])[0]) < 1e-4


def test_what_saves_nothing_stays() -> None:
    before = network(64)
    after, result = factorised(before, CONTEXT, ratio=0.05, include=("right",), whitening="none", multiple_of=16)
    assert result.changed and after.graph.initializers["right.a"].const_value.shape == (32, 16)
    after, result = factorised(before, CONTEXT, ratio=0.0)
    assert not result.changed and [r.reason for r in result.refusals] == ["the ratio is 0"]


def test_rows_read_often_keep_more() -> None:
    """A table whose frequent rows lie in one plane and whose others lie elsewhere."""
    random = np.random.default_rng(0)
    table = np.concatenate([random.normal(size=(100, 4)) @ random.normal(size=(4, 32)), random.normal(size=(100, 32))])
    nodes = [helper.make_node("Gather", ["table", "ids"], ["y"], name="embed")]
    given = ("ids", TensorProto.INT64, ["n"])
    before = model(nodes, {"table": table}, given, ("y", TensorProto.FLOAT, ["n", 32]))
    often = [{"ids": np.concatenate([random.integers(0, 100, 5000), [-1]])}]
    frequent, errors = {"ids": np.arange(100)}, {}
    for whitening in ("gram", "none"):
        options = {"ratio": 0.7, "whitening": whitening, "multiple_of": 1}
        after, _ = factorised(before, context(often), **options)
        errors[whitening] = relative(outputs(before, frequent)[0], outputs(after, frequent)[0])
    assert errors["gram"] < 0.1 * errors["none"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, "ratio cannot be 1"),
        ({"kinds": ("LSTM",)}, "weights of 'LSTM'"),
        ({"multiple_of": 0}, "multiple"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Factorise(**options)


def test_bad_names_and_weights_are_named() -> None:
    with pytest.raises(BadInput, match="'right'"):
        factorised(network(4), CONTEXT, include=("rigth",), whitening="none")
    broken = network(4)
    array = broken.graph.initializers["right"].const_value.numpy().copy()
    array[3, 4] = np.nan
    broken.graph.initializers["right"].const_value = ir.tensor(array, name="right")
    with pytest.raises(BadInput, match="NaN"):
        factorised(broken, CONTEXT, whitening="none")


def test_the_gate_backs_off_and_the_report_says_what_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "m.onnx", tmp_path / "o.onnx"
    ir.save(network(64), path)
    command = [
        "optimize",
        str(path),
        "-o",
        str(out),
        "-p",
        "factorise{ratio=0.4}",
        "--max-drop",
        "error=0.1",
        "--no-measure",
    ]
    assert main(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "backed off" in shown or "factorise{ratio=" in shown, shown


@pytest.mark.slow
def test_orderings_on_a_trained_network() -> None:
    """Held-out accuracy of a ViT: the Gram matrix over sizes and plain weights; ranks by energy over uniform."""
    test, classes = fashion("test")
    ctx = context(batches("calib", 500, 50))
    accuracy = {}
    for name, options in {
        "plain": {"whitening": "none", "allocation": "uniform"},
        "sizes": {"whitening": "inputs", "allocation": "uniform"},
        "gram": {"allocation": "uniform"},
        "energy": {},
    }.items():
        after, _ = factorised(ir.load(DATA / "fmnist_vit_tiny.onnx"), ctx, ratio=0.5, **options)
        logits = runtime.session(after, optimise=False).run({"image": test})["logits"]
        accuracy[name] = float((logits.argmax(-1) == classes).mean())
    assert accuracy["plain"] <= accuracy["gram"] and accuracy["sizes"] <= accuracy["gram"], accuracy
    assert accuracy["gram"] <= accuracy["energy"] + 0.01, accuracy
