"""Sessions, what the runtime says of itself, and its errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphc import edit, runtime
from graphc.contract import Runnable
from graphc.errors import BadInput
from graphc.memory import peak_memory
from graphc.runtime import mapping

pytest.importorskip("onnxruntime")

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
RESNET = Path(__file__).parent / "data" / "fmnist_resnet.onnx"


def parse(text: str) -> ir.Model:
    return ir.from_onnx_text(f"{HEAD} {text}")


def linear(weights: dict[str, ir.TensorProtocol]) -> ir.Model:
    """``y = (x @ w0) @ w1 ...`` with square weights."""
    size = next(iter(weights.values())).shape[0]
    steps = [f"{'y' if i == len(weights) - 1 else f'h{i}'} = MatMul({'x' if not i else f'h{i - 1}'}, {name})"
             for i, name in enumerate(weights)]  # fmt: skip
    model = parse(f"g (float[N,{size}] x) => (float[N,{size}] y) {{ {' '.join(steps)} }}")
    for node, (name, tensor) in zip(list(model.graph), weights.items(), strict=True):
        node.replace_input_with(1, edit.initializer(model.graph, tensor, name))
    return model


class TestSession:
    def test_outputs_by_name(self) -> None:
        session = runtime.session(
            parse("g (float[N] x) => (float[N] y, float[N] z) { y = Relu(x) z = Neg(x) }"), optimise=False
        )
        found = session.run({"x": np.array([-1, 2], np.float32)})
        assert list(found) == ["y", "z"]
        assert found["y"].tolist() == [0, 2]
        assert (session.input_names, session.output_names) == (("x",), ("y", "z"))
        assert session.provider == runtime.CPU

    @pytest.mark.parametrize(
        ("kind", "dtype"),
        [
            ("bfloat16", ml_dtypes.bfloat16),
            ("float8e4m3fn", ml_dtypes.float8_e4m3fn),
            ("float8e5m2", ml_dtypes.float8_e5m2),
            ("float16", np.float16),
            ("string", object),
            ("bool", np.bool_),
        ],
    )
    def test_dtypes_that_numpy_lacks(self, kind: str, dtype: Any) -> None:
        session = runtime.session(parse(f"g ({kind}[N] x) => ({kind}[N] y) {{ y = Identity(x) }}"), optimise=False)
        given = np.array(["a", ""], dtype) if kind == "string" else np.array([0, 1], dtype)
        found = session.run({"x": given})["y"]
        assert found.dtype == given.dtype
        assert (found == given).all()

    def test_sequences_are_named_by_index(self) -> None:
        text = "g (float[4] x) => (seq(float[K]) y) { y = SplitToSequence(x, two) }"
        model = parse(text.replace("float[4] x)", "float[4] x, int64 two)"))
        found = runtime.session(model, optimise=False).run({"x": np.arange(4, dtype=np.float32), "two": np.array(2)})
        assert {name: a.tolist() for name, a in found.items()} == {"y[0]": [0, 1], "y[1]": [2, 3]}

    def test_options_reach_the_runtime(self) -> None:
        session = runtime.session(RESNET, optimise=False, options={"session.record_ep_graph_assignment_info": "1"})
        assert session.placement()[runtime.CPU]["Conv"] > 5
        assert runtime.session(RESNET, optimise=False).placement() == {}

    def test_an_unknown_provider(self) -> None:
        with pytest.raises(BadInput, match="did you mean 'CPUExecutionProvider'"):
            runtime.session(RESNET, optimise=False, provider="CPUExecutionProvide")

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match="no such model file"):
            runtime.session(tmp_path / "none.onnx", optimise=False)


class TestBigModels:
    """Constants beyond ``BIG``, which is lowered here, are mapped and not serialised."""

    @pytest.fixture(autouse=True)
    def _small_is_big(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runtime, "BIG", 1000)

    def tensors(self, folder: Path) -> dict[str, ir.TensorProtocol]:
        """The same kind of weights in a file, in memory and computed on demand."""
        arrays = [np.random.default_rng(i).standard_normal((40, 40)).astype(np.float32) for i in range(3)]
        (folder / "weights").write_bytes(b"12345678" + arrays[0].tobytes())
        stored = ir.ExternalTensor(
            "weights", 8, 6400, ir.DataType.FLOAT, shape=ir.Shape((40, 40)), name="w0", base_dir=folder
        )
        lazy = ir.LazyTensor(
            lambda: ir.tensor(arrays[2]), dtype=ir.DataType.FLOAT, shape=ir.Shape((40, 40)), name="w2", cache=False
        )
        return {"w0": stored, "w1": ir.tensor(arrays[1], name="w1"), "w2": lazy}

    @pytest.mark.parametrize("optimise", [False, True])
    def test_every_kind_of_tensor(self, tmp_path: Path, optimise: bool) -> None:
        tensors = self.tensors(tmp_path)
        x = np.random.default_rng(9).standard_normal((2, 40)).astype(np.float32)
        expected = x
        for tensor in tensors.values():
            expected = expected @ tensor.numpy()
        model = linear(tensors)
        session = runtime.session(model, optimise=optimise, frugal=True)
        np.testing.assert_allclose(session.run({"x": x})["y"], expected, rtol=1e-4, atol=1e-4)
        assert model.graph.initializers["w0"].const_value is tensors["w0"]

    def test_temporary_files_go_with_the_session(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        place = tmp_path / "temporary"
        place.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(place))
        session = runtime.session(linear(self.tensors(tmp_path)), optimise=False)
        assert len(list(place.iterdir())) == 1
        session.close()
        assert not list(place.iterdir())

    @pytest.mark.parametrize("optimise", [False, True])
    def test_large_constant_nodes_and_branches(self, optimise: bool) -> None:
        """Two branches hold different weights under one name, as Constant node and as initializer."""
        branch = "() => (float[1,40] {0}) {{ w = Constant<value = float[1] {{0.0}}>() {0} = MatMul(x, w) }}"
        model = parse(f"""g (bool c, float[1,40] x) => (float[1,40] y) {{
            y = If (c) <then_branch = t {branch.format("a")}, else_branch = e {branch.format("b")}> }}""")
        weights = [np.full((40, 40), i + 1, np.float32) for i in range(2)]
        for body, array in zip(model.graph.subgraphs(), weights, strict=True):
            body[0].attributes["value"] = ir.AttrTensor("value", ir.tensor(array))
            assert body[0].outputs[0].name == "w"
        session = runtime.session(model, optimise=optimise)
        x = np.ones((1, 40), np.float32)
        for choice, expected in ((True, 40), (False, 80)):
            assert session.run({"x": x, "c": np.array(choice)})["y"][0, 0] == expected

    @pytest.mark.parametrize("optimise", [False, True])
    def test_weights_are_stored_as_they_are_read(self, tmp_path: Path, optimise: bool) -> None:
        """No transposed copy in memory: in the main graph, in a branch, and where others read the weight as it is."""
        model = parse("""g (bool c, float[N,40] x) => (float[N,40] y) {
            t0 = Transpose <perm = [1, 0]> (w0) a = MatMul(x, t0)
            t1 = Transpose (w1) b = MatMul(a, t1) d = MatMul(b, w1)
            y = If (c) <then_branch = t () => (float[N,40] e) { t2 = Transpose(w2) e = MatMul(d, t2) },
                        else_branch = e () => (float[N,40] f) { f = Neg(d) }> }""")
        tensors = self.tensors(tmp_path)
        made = {name: edit.initializer(model.graph, tensor, name) for name, tensor in tensors.items()}
        for node in edit.nodes(model):
            for i, value in enumerate(node.inputs):
                if value is not None and value.name in made:
                    node.replace_input_with(i, made[value.name])
        proto, kept = mapping.mapped(model, runtime.settings(optimise=optimise), lend=not optimise)
        assert all(node.op_type != "Transpose" for node in edit.nodes(ir.from_proto(onnx.load_from_string(proto))))
        assert any(node.op_type == "Transpose" for node in model.graph), "the model stays as it is"
        kept.clear()
        x = np.random.default_rng(9).standard_normal((2, 40)).astype(np.float32)
        w0, w1, w2 = (tensor.numpy() for tensor in tensors.values())
        session = runtime.session(model, optimise=optimise, frugal=True)
        expected = x @ w0.T @ w1.T @ w1
        for choice, wanted in ((True, expected @ w2.T), (False, -expected)):
            np.testing.assert_allclose(session.run({"x": x, "c": np.array(choice)})["y"], wanted, rtol=1e-4, atol=1e-3)

    def test_four_bit_weights(self) -> None:
        """They are packed in files and in the runtime, but not in NumPy."""
        values = np.arange(-8, 8).repeat(200).reshape(40, 80)
        model = parse("g (float[N,80] s) => (float[40,80] y) { f = Cast<to=1>(w) y = Identity(f) }")
        node = model.graph[0]
        tensor = ir.tensor(values.astype(ml_dtypes.int4), name="w")
        node.replace_input_with(0, edit.initializer(model.graph, tensor, "w"))
        found = runtime.session(model, optimise=False).run({"s": np.zeros((1, 80), np.float32)})
        np.testing.assert_array_equal(found["y"], values)

    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is asked of Linux")
    def test_weights_cost_no_anonymous_memory(self, tmp_path: Path) -> None:
        size = 1 << 24
        (tmp_path / "weights").write_bytes(b"\0" * (size * 4))
        tensor = ir.ExternalTensor(
            "weights", 0, size * 4, ir.DataType.FLOAT, shape=ir.Shape((4096, 4096)), name="w", base_dir=tmp_path
        )
        model = linear({"w": tensor})
        path = tmp_path / "model.onnx"
        onnx.save(ir.to_proto(model), path)
        x = {"x": np.ones((1, 4096), np.float32)}
        mapped = peak_memory(path, x, optimise=False, frugal=True)
        copied = peak_memory(path, x, optimise=False, frugal=False)
        assert mapped.anonymous < copied.anonymous - size * 4 * 0.9
        assert mapped.peak > mapped.base > 0


def test_small_models_with_mapped_weights_are_serialised(tmp_path: Path) -> None:
    array = np.arange(4, dtype=np.float32).reshape(2, 2)
    (tmp_path / "weights").write_bytes(array.tobytes())
    tensor = ir.ExternalTensor("weights", 0, 16, ir.DataType.FLOAT, shape=ir.Shape((2, 2)), name="w", base_dir=tmp_path)
    model = linear({"w": tensor})
    found = runtime.session(model, optimise=True).run({"x": np.eye(2, dtype=np.float32)})
    np.testing.assert_array_equal(found["y"], array)
    assert model.graph.initializers["w"].const_value is tensor
    assert mapping.constants_nbytes(model) == 16


class TestErrors:
    def test_an_unknown_operator_is_named(self) -> None:
        head = HEAD.replace("]>", ', "my.ops" : 1]>')
        model = ir.from_onnx_text(f"{head} g (float[N] x) => (float[N] y) {{ y = my.ops.Magic(x) }}")
        with pytest.raises(runtime.CannotRun) as caught:
            runtime.session(model, optimise=False)
        assert caught.value.operator == ("my.ops", "Magic")
        assert "my.ops:Magic" in str(caught.value)

    def test_a_missing_kernel_is_named(self) -> None:
        model = parse("g (bfloat16[N] x) => (bfloat16[N] y) { y = Tanh(x) }")
        model.graph[0].name = "the_tanh"
        with pytest.raises(runtime.CannotRun) as caught:
            runtime.session(model, optimise=False)
        assert caught.value.operator == ("", "Tanh")
        assert caught.value.node == "the_tanh"

    def test_a_failing_node_is_named(self) -> None:
        model = parse("g (float[N,K] x) => (float[N,M] y) { y = MatMul(x, x) }")
        model.graph[0].name = "the_product"
        session = runtime.session(model, optimise=False)
        with pytest.raises(runtime.CannotRun) as caught:
            session.run({"x": np.zeros((2, 3), np.float32)})
        assert caught.value.node == "the_product"
        assert "dimension mismatch" in str(caught.value)

    def test_wrong_dtype_of_a_node(self) -> None:
        model = parse("g (uint8[N,K] x) => (uint8[N,M] y) { y = MatMul(x, x) }")
        model.graph[0].name = "the_product"
        with pytest.raises(runtime.CannotRun) as caught:
            runtime.session(model, optimise=False)
        assert caught.value.node == "the_product"

    def test_a_too_new_model(self) -> None:
        model = parse("g (float[N] x) => (float[N] y) { y = Identity(x) }")
        model.ir_version = 99
        with pytest.raises(runtime.CannotRun, match="IR version"):
            runtime.session(model, optimise=False)

    def test_no_source_locations_of_the_runtime(self, tmp_path: Path) -> None:
        path = tmp_path / "text.onnx"
        path.write_text("no model")
        with pytest.raises(runtime.CannotRun) as caught:
            runtime.session(path, optimise=False)
        assert ".cc" not in str(caught.value) and "ONNXRuntimeError" not in str(caught.value)


class TestInstallation:
    @pytest.fixture(autouse=True)
    def _forget(self) -> Any:
        for cached in (runtime.require, runtime.installed):
            cached.cache_clear()
        yield
        for cached in (runtime.require, runtime.installed):
            cached.cache_clear()

    def test_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        monkeypatch.setattr(runtime, "installed", dict)
        with pytest.raises(BadInput, match=r"pip install .*\[cpu\]'"):
            runtime.session(RESNET, optimise=False)

    def test_both_wheels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.metadata.version", lambda name: "1.31")
        with pytest.raises(BadInput, match="pip uninstall") as caught:
            runtime.require()
        assert "both" in str(caught.value)


def test_capabilities_are_true() -> None:
    found = runtime.capabilities()
    assert found is runtime.capabilities()
    assert found.has_kernel("", "MatMul") and found.has_kernel("com.microsoft", "MatMulNBits")
    assert not found.has_kernel("", "NoSuchOperator")
    assert found.providers[0] == runtime.CPU

    def loads(ir_version: int, opset: int) -> bool:
        model = parse("g (float[N] x) => (float[N] y) { y = Identity(x) }")
        model.ir_version = ir_version
        model.graph.opset_imports[""] = opset
        try:
            runtime.session(model, optimise=False)
        except runtime.CannotRun:
            return False
        return True

    assert loads(found.max_ir, found.max_opset[""])
    assert not loads(found.max_ir + 1, found.max_opset[""])
    assert not loads(found.max_ir, found.max_opset[""] + 1)


def test_capabilities_asked_in_a_child_are_the_same() -> None:
    from graphc.runtime.probe import ask

    assert ask(isolated=True) == runtime.capabilities()


def test_what_a_crash_leaves_unanswered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gpu wheel without CUDA crashes when it is asked for its kernels, the last question."""
    from graphc.runtime import probe

    answered = subprocess.CompletedProcess([], -11, stdout='noise\n{"max_ir": 12}\n{"providers": ["A"]}\n')
    monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: answered)
    found = probe.ask(isolated=True)
    assert (found.max_ir, found.providers, found.kernels) == (12, ("A",), frozenset())
    assert found.max_opset[""] == 21


class _Worker(Runnable):
    """Takes some seconds of a clock that only it moves."""

    provider = "clock"
    now = 0.0
    log = ""

    def __init__(self, label: str, seconds: float) -> None:
        self.label, self.seconds = label, seconds

    def run(self, inputs: Any) -> dict[str, Any]:
        _Worker.log += self.label
        _Worker.now += self.seconds
        return {}


def test_measure_alternates_and_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", lambda: _Worker.now)
    runnables = {"a": _Worker("a", 2.0), "b": _Worker("b", 6.0)}
    found = runtime.measure(runnables, {"a": np.zeros(1)}, rounds=5, warmup=1)
    assert _Worker.log == "ab" + "abbaabbaab"
    assert (found["a"].median, found["a"].ratio, found["a"].rounds) == (2, 1, 5)
    assert (found["b"].low, found["b"].median, found["b"].high) == (6, 6, 6)
    assert (found["b"].ratio_low, found["b"].ratio, found["b"].ratio_high) == (3, 3, 3)
    assert found["b"].provider == "clock"
    assert runtime.measure(runnables, {}, seconds=79.0)["a"].rounds == 10


def test_transposed_and_small_mapped_weights_are_read_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transposed view is not lent as it lies in memory, and no small constant names a file elsewhere."""
    monkeypatch.setattr(runtime, "BIG", 0)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((96, 64), dtype=np.float32)
    bias = rng.standard_normal(96, dtype=np.float32)
    (tmp_path / "bias").write_bytes(bias.tobytes())
    x = ir.Value(name="x", shape=ir.Shape([2, 64]), type=ir.TensorType(ir.DataType.FLOAT))
    transposed = ir.Value(name="w", const_value=ir.Tensor(weight.T, name="w"))
    mapped = ir.ExternalTensor(tmp_path / "bias", 0, bias.nbytes, ir.DataType.FLOAT, shape=ir.Shape([96]), name="b")
    small = ir.Value(name="b", const_value=mapped)
    product = ir.node("MatMul", [x, transposed])
    result = ir.node("Add", [product.outputs[0], small])
    result.outputs[0].name = "y"
    result.outputs[0].type = x.type
    graph = ir.Graph(
        [x],
        result.outputs,
        nodes=[product, result],
        initializers=[transposed, small],
        opset_imports={"": 21},
        name="g",
    )
    given = rng.standard_normal((2, 64), dtype=np.float32)
    found = runtime.session(ir.Model(graph, ir_version=10), optimise=False).run({"x": given})["y"]
    np.testing.assert_allclose(found, given @ weight.T + bias, rtol=1e-5, atol=1e-5)
