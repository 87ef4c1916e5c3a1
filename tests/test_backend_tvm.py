"""The TVM backend: small models of every rule family compiled, run and compared, and clear refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphc import compiled, pipeline, runtime
from graphc.checking import inputs
from graphc.contract import no_progress
from graphc.errors import BadInput
from graphc.opset.expand import expand
from graphc.recipe import parse_backend
from graphc.shapes import fix
from graphc.tvm import install
from tests.tvm_models import build, text, weight

Array = np.ndarray[Any, np.dtype[Any]]
DATA = Path(__file__).parent / "data"


def save(model: ir.Model, path: Path) -> Path:
    ir.save(model, path)
    return path


# --- what needs no TVM -----------------------------------------------------------------------------------------------


def test_buckets_are_all_combinations() -> None:
    model = text("y = Relu(x)", "(float[batch,seq] x) => (float[batch,seq] y)")
    assert fix.buckets(model, ["batch=1,8 seq=128"]) == [{"batch": 1, "seq": 128}, {"batch": 8, "seq": 128}]
    assert fix.buckets(text("y = Relu(x)", "(float[2] x) => (float[2] y)"), []) == [{}]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "x[0]"),
        (["batch=1"], "seq: x[1]"),
        (["batch=1", "sequence=2"], "did you mean 'seq'"),
        (["batch"], "cannot read a size"),
        (["batch=0x", "seq=1"], "cannot read a size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(given: list[str], message: str) -> None:
    model = text("y = Relu(x)", "(float[batch,seq] x) => (float[batch,seq] y)")
    with pytest.raises(BadInput) as caught:
        fix.buckets(model, given)
    assert message in str(caught.value)


def test_expressions_and_nameless_dimensions_get_sizes() -> None:
    model = text("y = Relu(x)", "(float[n, past, ?] x) => (float y)")
    model.graph.inputs[0].shape = ir.Shape(["past + n", "past", None, -1])
    model.graph.inputs.append(ir.val("z", ir.DataType.FLOAT, ["n"]))
    assert set(fix.symbols(model)) == {"past", "n", "x.2", "x.3"}
    static = fix.fixed(model, {"past": 3, "n": 4, "x.2": 5, "x.3": 6})
    assert static.graph.inputs[0].shape == (7, 3, 5, 6)
    assert model.graph.inputs[0].shape != (7, 3, 5, 6)


@pytest.mark.parametrize(
    ("body", "operator"),
    [
        ("y = Elu(x)", "Elu"),
        ('y = Gelu<approximate: string = "tanh">(x)', "Gelu"),
        ("y = Swish<alpha: float = 1.5>(x)", "Swish"),
        ("y = HardSwish(x)", "HardSwish"),
        ("y = MeanVarianceNormalization(x)", "MeanVarianceNormalization"),
        ("y = Attention<is_causal: int = 1>(x, x, x)", "Attention"),
    ],
)
def test_an_operator_equals_its_body(body: str, operator: str) -> None:
    model = text(body, opset=24)
    ordinary = {"x": np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)}
    if operator == "MeanVarianceNormalization":
        ordinary["x"] += np.arange(4, dtype=np.float32).reshape(4, 1, 1)
    before = runtime.session(model, optimise=False).run(ordinary)
    assert expand(model, lambda node: node.op_type == operator) == {operator: 1}
    assert all(node.op_type != operator for node in model.graph)
    after = runtime.session(model, optimise=False).run(ordinary)
    np.testing.assert_allclose(after["y"], before["y"], rtol=1e-5, atol=1e-6)


def test_an_operator_without_a_body_stays() -> None:
    model = text("y = Relu(x)\n z = Cos(x)")
    assert expand(model, lambda node: node.op_type == "Cos") == {}
    assert [node.op_type for node in model.graph] == ["Relu", "Cos"]


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({}, "TVM is not installed"),
        ({"apache-tvm": "0.19.0"}, "TVM 0.19.0 is not supported"),
        ({"apache-tvm": "0.27.0.post1"}, "apache-tvm-ffi is missing"),
        ({"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.15.post2"}, "0.1.15.post2 does not go with"),
    ],
)
def test_what_is_installed_is_checked(
    versions: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(install, "installed", lambda name: versions.get(name, ""))
    install.require.cache_clear()
    model = save(text("y = Relu(x)"), tmp_path / "m.onnx")
    with pytest.raises(BadInput) as caught:
        pipeline.optimize(model, tmp_path / "out", target="tvm", cache=False)
    install.require.cache_clear()
    assert message in str(caught.value) and "[tvm]" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_without_a_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BadInput, match=r"(?s)no C\+\+ compiler.*apt install"):
        install.compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BadInput, match="no-such-compiler is not there"):
        install.compiler()


def test_a_flag_of_another_target_is_refused() -> None:
    with pytest.raises(BadInput, match="--shapes has no effect"):
        parse_backend("onnxruntime", {"shapes": ["batch=1"]})


def test_a_file_is_refused_before_any_work(tmp_path: Path) -> None:
    model = save(text("y = Relu(x)"), tmp_path / "m.onnx")
    with pytest.raises(BadInput, match=r"(?s)writes a folder.*-o .*out/"):
        pipeline.optimize(model, tmp_path / "out.onnx", target="tvm")


# --- what needs TVM --------------------------------------------------------------------------------------------------


FAMILIES: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "convolution": (
        "a = Conv<strides: ints = [2,2], pads: ints = [1,1,1,1]>(x, w)\n b = Relu(a)\n"
        "y = MaxPool<kernel_shape: ints = [2,2]>(b)",
        {"w": (24, 4, 3, 3)},
    ),
    "depthwise": ("y = Conv<group: int = 4, pads: ints = [1,1,1,1]>(x, w)", {"w": (4, 1, 3, 3)}),
    "grouped": ("y = Conv<group: int = 2>(x, w)", {"w": (6, 2, 1, 1)}),
    "product": ("a = MatMul(x, w)\n b = MatMul(x, x)\n y = Concat<axis: int = -1>(a, b)", {"w": (8, 40)}),
    "gemm": ("f = Flatten(x)\n y = Gemm<transB: int = 1>(f, w, b)", {"w": (10, 256), "b": (10,)}),
    "softmax": ("y = Softmax<axis: int = -1>(x)", {}),
    "norm": ("y = LayerNormalization<axis: int = -1>(x, s, b)", {"s": (8,), "b": (8,)}),
    "rms": ("y = RMSNormalization<axis: int = 1>(x, s)", {"s": (4, 8, 8)}),
    "attention": ("y = Attention<is_causal: int = 1>(x, x, x)", {}),
    "swish": ("a = Swish(x)\n y = Gelu(a)", {}),
    "sum": ("y = Sum(x, x, x)", {}),
    "smallest": ("a = Conv(x, w)\n b = Min(a, a)\n y = Max(b, a, s)", {"w": (24, 4, 3, 3), "s": ()}),
    "scalars": ("a = ReduceMax<keepdims: int = 0>(x)\n b = Min(a, s)\n y = Mul(x, b)", {"s": ()}),
    "power": ("t = Constant<value: tensor = int64 {2}>()\n y = Pow(x, t)", {}),
    "mean": ("y = GlobalAveragePool(x)", {}),
    "reduce": ("a = Constant<value: tensor = int64[1] {-1}>()\n y = ReduceSumSquare(x, a)", {}),
    "infinity": ("a = IsInf<detect_negative: int = 0>(x)\n y = Cast<to: int = 1>(a)", {}),
    "two": ("y = Relu(x)\n z = Neg(x)", {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_onnx_runtime_does(family: str, tvm: Any, tmp_path: Path) -> None:
    body, weights = FAMILIES[family]
    head = "(float[2,4,8,8] x) => (float y, float z)" if family == "two" else "(float[2,4,8,8] x) => (float y)"
    model = text(body, head, opset=24 if family in ("attention", "swish", "rms") else 21)
    own = {name: weight(name, *shape) for name, shape in weights.items()}
    model.graph.initializers.update(own)
    for node in model.graph:
        for i, value in enumerate(node.inputs):
            if value is not None and value.name in own and value is not own[value.name]:
                node.replace_input_with(i, own[value.name])
    loaded = build(model.clone(), tmp_path / "out")
    verdict = compiled.compare(model, loaded)
    assert verdict.checked and verdict.ok, verdict.why
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 4, 8, 8)).astype(np.float32)}
    wanted, found = runtime.session(model, optimise=False).run(feeds), loaded.run(feeds)
    for name, array in wanted.items():
        assert found[name].shape == array.shape and found[name].dtype == array.dtype
        assert np.max(np.abs(found[name] - array)) <= 1e-5 * max(1e-9, float(np.max(np.abs(array)))), name


def test_ragged_tiles_of_a_picture_are_right(tvm: Any, tmp_path: Path) -> None:
    """13 rows of 13 have no small divisor: a tile begins in one row of the picture and ends in the next."""
    model = text("y = Conv<pads: ints = [1,1,1,1]>(x, w)", "(float[1,16,13,13] x) => (float y)")
    model.graph.initializers["w"] = own = weight("w", 48, 16, 3, 3)
    model.graph.node(0).replace_input_with(1, own)
    verdict = compiled.compare(model, build(model.clone(), tmp_path / "out"))
    assert verdict.checked and verdict.ok, verdict.why


@pytest.mark.parametrize("columns", [13, 31, 48])
def test_columns_that_fill_no_vector_are_right(columns: int, tvm: Any, tmp_path: Path) -> None:
    """Blocks of weights are filled up with zeros; what is made of those goes nowhere."""
    body = "a = Conv<pads: ints = [1,1,1,1]>(x, w, b)\n c = Relu(a)\n y = MatMul(c, v)"
    model = text(body, "(float[1,3,7,9] x) => (float y)")
    own = {v.name: v for v in (weight("w", columns, 3, 3, 3), weight("b", columns), weight("v", 9, columns, seed=1))}
    model.graph.initializers.update(own)
    for node in model.graph:
        for i, value in enumerate(node.inputs):
            if value is not None and value.name in own:
                node.replace_input_with(i, own[value.name])
    verdict = compiled.compare(model, build(model.clone(), tmp_path / "out"))
    assert verdict.checked and verdict.ok, verdict.why


def test_packed_weights_are_unpacked(tvm: Any, tmp_path: Path) -> None:
    codes = ir.tensor(np.arange(-8, 8, dtype=np.int8).reshape(4, 4), name="q").numpy()
    model = text("a = DequantizeLinear<axis: int = 1>(q, s)\n y = MatMul(x, a)", "(float[3,4] x) => (float y)")
    q = ir.Value(name="q", shape=ir.Shape((4, 4)), type=ir.TensorType(ir.DataType.INT4))
    q.const_value = ir.Tensor(codes.astype(ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4, name="q")
    s = weight("s", 4)
    model.graph.initializers.update({"q": q, "s": s})
    node = model.graph.node(0)
    node.replace_input_with(0, q)
    node.replace_input_with(1, s)
    verdict = compiled.compare(model, build(model.clone(), tmp_path / "out"))
    assert verdict.checked and verdict.ok, verdict.why


def test_all_that_is_missing_is_named_at_once(tvm: Any, tmp_path: Path) -> None:
    model = text(
        "a = Det(x)\n b = Det(x)\n c, i = MaxPool<kernel_shape: ints = [2,2]>(x)\n y = Cast<to: int = 1>(i)",
        "(float[2,4,8,8] x) => (float a, float b, float y)",
    )
    for number, node in enumerate(model.graph):
        node.name = f"n{number}"
    with pytest.raises(BadInput) as caught:
        pipeline.optimize(save(model, tmp_path / "m.onnx"), tmp_path / "out", target="tvm")
    said = str(caught.value)
    assert "Det: there is no converter (n0" in said and "MaxPool: only its first output is supported (n2" in said
    assert "-t onnxruntime" in said and not (tmp_path / "out").exists()


def test_tensors_without_elements_are_refused(tvm: Any, tmp_path: Path) -> None:
    model = save(text("y = Relu(x)", "(float[0,8] x) => (float[0,8] y)"), tmp_path / "m.onnx")
    with pytest.raises(BadInput, match="without elements"):
        pipeline.optimize(model, tmp_path / "out", target="tvm")


def test_dynamic_sizes_need_buckets(tvm: Any, tmp_path: Path) -> None:
    model = save(text("y = Relu(x)", "(float[batch,8] x) => (float[batch,8] y)"), tmp_path / "m.onnx")
    with pytest.raises(BadInput, match=r"(?s)batch: x\[0\].*--shapes batch=1"):
        pipeline.optimize(model, tmp_path / "out", target="tvm")


@pytest.mark.parametrize("target", ["x86-64-v9", "cudda", '{"kind": "nothing"}'])
def test_a_target_that_is_not_there_is_named(target: str, tvm: Any, tmp_path: Path) -> None:
    model = save(text("y = Relu(x)"), tmp_path / "m.onnx")
    with pytest.raises(BadInput, match="target"):
        pipeline.optimize(model, tmp_path / "out", target=parse_backend("tvm", {"target": target}))


def test_an_artifact_from_end_to_end(tvm: Any, tmp_path: Path) -> None:
    """Two buckets: compiled, compared, dispatched by shape, verified, timed, run by its own scripts."""
    source, out = DATA / "fmnist_resnet.onnx", tmp_path / "out"
    report = pipeline.optimize(source, out, target=parse_backend("tvm", {"shapes": ["batch=1,3"], "threads": 2}))
    assert report.rewrite["checked"] and report.measurements["latency"]["ratio"] > 0
    manifest = json.loads((out / "graphc.json").read_text())
    assert set(manifest["files"]) >= {"model.so", "model.1.so", "weights.bin", "run.py", "libtvm_runtime.so"}
    weights = sum(t.nbytes for t in (v.const_value for v in report.model.graph.initializers.values()) if t is not None)
    assert (out / "weights.bin").stat().st_size < 1.2 * weights, "buckets share their weights"
    target = compiled.backend(out)
    assert target is not None
    loaded = target.load(out)
    name = next(iter(loaded.shapes[0]))
    assert [shapes[name][0] for shapes in loaded.shapes] == [1, 3]
    with pytest.raises(BadInput, match="not compiled for the shapes"):
        loaded.run({name: np.zeros((2, *loaded.shapes[0][name][1:]), np.float32)})
    with pytest.raises(BadInput, match="is missing"):
        loaded.run({})
    verdict = pipeline.verify(source, out)
    assert verdict.ok and verdict.checked and verdict.provider == "TVM (cpu)"
    with pytest.raises(BadInput, match="compiled: there is no graph in it"):
        pipeline.verify(out, source)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run(
        [sys.executable, str(out / "run.py"), "--check"], capture_output=True, text=True, env=environment, check=False
    )
    assert ran.returncode == 0 and ran.stdout.count("relative error") == 2, ran.stderr


def test_two_models_of_both_backends_are_timed_together(tvm: Any, tmp_path: Path) -> None:
    from graphc.measure import bench

    model = save(text("y = Softmax(x)"), tmp_path / "m.onnx")
    pipeline.optimize(model, tmp_path / "out", target="tvm", measure=False)
    rows = bench([model, tmp_path / "out"], seconds=0.2)["models"]
    assert [row["provider"] for row in rows] == ["CPUExecutionProvider", "TVM (cpu)"]
    assert all(row["memory"] > 0 and row["median"] > 0 for row in rows)


def test_the_runner_imports_no_compiler(tvm: Any, tmp_path: Path) -> None:
    model = save(text("y = Relu(x)"), tmp_path / "m.onnx")
    pipeline.optimize(model, tmp_path / "out", target="tvm", measure=False)
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'out')!r}); import run; import numpy as np\n"
    code += f"m = run.Model({str(tmp_path / 'out')!r}); print(m(x=-np.ones((2, 4, 8, 8), 'f4'))['y'].sum())\n"
    code += "print(sorted(set(sys.modules) & {'tvm', 'graphc', 'onnx', 'onnxruntime'}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert ran.stdout.split("\n")[:2] == ["0.0", "[]"], ran.stderr


@pytest.mark.slow
def test_the_cpp_runner_builds_and_runs(tvm: Any, tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    pytest.importorskip("tvm_ffi")
    out, made = tmp_path / "out", tmp_path / "build"
    model = save(text("y = Softmax(x)"), tmp_path / "m.onnx")
    pipeline.optimize(model, out, target="tvm", measure=False)
    ffi = Path(sys.modules["tvm_ffi"].__file__).parent
    subprocess.run(["cmake", "-B", made, "-S", out, f"-DTVM_FFI={ffi}"], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", made], check=True, capture_output=True)
    ran = subprocess.run([made / "runner", out], capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and "relative error" in ran.stdout, ran.stderr
    libraries = [out / "libtvm_runtime.so", ffi / "lib" / "libtvm_ffi.so", made / "runner", out / "model.so"]
    assert sum(path.stat().st_size for path in libraries) < 10_000_000


def test_inputs_of_a_bucket_fit() -> None:
    model = text("y = Relu(x)", "(float[batch,seq] x) => (float[batch,seq] y)")
    static = fix.fixed(model, {"batch": 2, "seq": 5})
    assert all(case.arrays["x"].shape == (2, 5) for case in inputs.generate(static))


def test_tuning_measures_remembers_and_goes_on(tvm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphc.tvm import emit, targets, tune

    monkeypatch.setenv("GRAPHC_CACHE_DIR", str(tmp_path / "cache"))
    measured: list[float] = []
    seconds = tune._seconds

    def counted(*arguments: Any) -> float:
        measured.append(seconds(*arguments))
        return measured[-1]

    monkeypatch.setattr(tune, "_seconds", counted)
    model = text("y = MatMul(x, w)", "(float[32,64] x) => (float y)")
    model.graph.initializers["w"] = own = weight("w", 64, 48)
    model.graph.node(0).replace_input_with(1, own)
    target = parse_backend("tvm", {"trials": 3, "threads": 2})
    needs: Mapping[str, Any] = {}
    for number, count in enumerate((3, 6)):
        folder = tmp_path / f"out{number}"
        folder.mkdir()
        budget = tune.Budget(trials=3)
        needs = emit.emit(model.clone(), folder, targets.resolve("x86-64-v3", 2), (), budget, no_progress)
        assert len(measured) == count, "what is known is not measured again"
    (folder / "graphc.json").write_text(json.dumps({"target": target.spec(), "runtime": dict(needs)}))
    assert next(iter(needs["buckets"][0]["loops"].values())).keys() == {"height", "width", "pack"}
    assert compiled.compare(model, target.load(folder)).ok


def test_every_choice_of_a_tuner_is_right(tvm: Any) -> None:
    from graphc.tvm import build as builder
    from graphc.tvm import contraction, emit, importer, nest, schedule, targets

    model = text("y = Conv<strides: ints = [2,2]>(x, w)", "(float[1,4,15,13] x) => (float y)")
    model.graph.initializers["w"] = own = weight("w", 32, 4, 3, 3)
    model.graph.node(0).replace_input_with(1, own)
    target = targets.resolve("x86-64-v3", 2)
    ((_, _, simple),) = emit.lowered(model, ())
    module = builder.prepare(importer.to_relax(simple, target), target)
    machine = nest.Machine.of(target)
    assert (machine.lanes, machine.registers) == (8, 16)
    name, function = next((n, f) for n, f in schedule.functions(module) if contraction.choices(f, machine))
    shapes = [tuple(int(size) for size in p.ty.shape) for p in function.params]
    arrays = [np.random.default_rng(i).standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)]

    def run(nest: Any) -> Array:
        kernel = tvm.compile(tvm.IRModule({"k": nest.with_attr("global_symbol", "k")}), target=target)["k"]
        given = [tvm.runtime.tensor(array) for array in arrays]
        kernel(*given)
        found: Array = given[-1].numpy()
        return found

    wanted = run(function)
    offered = contraction.choices(function, machine)
    assert len(offered) >= 6
    for choice in offered[:6] + offered[-2:]:
        nest = schedule.scheduled(function, machine, choice)
        assert nest.attrs["tirx.is_scheduled"]
        np.testing.assert_allclose(run(nest), wanted, rtol=1e-5, atol=1e-5, err_msg=f"{name} {choice}")


def test_negative_budgets_are_refused() -> None:
    with pytest.raises(BadInput, match="negative"):
        parse_backend("tvm", {"tune": -1.0})


@pytest.mark.parametrize(("arch", "message"), [("sm_90a", "tensor cores off"), ("hopper", "no CUDA architecture")])
def test_architectures_that_mislead_are_refused(arch: str, message: str) -> None:
    from graphc.tvm import cuda

    with pytest.raises(BadInput, match=message):
        cuda.architectures([arch])


def test_without_nvcc_no_source_is_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphc.tvm import cuda

    monkeypatch.setattr(shutil, "which", lambda *rest, **more: None)
    with pytest.raises(BadInput, match=r"(?s)nvcc is not there.*source code"):
        cuda.nvcc()


@pytest.mark.slow
def test_cuda_is_compiled_without_a_gpu(tvm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphc.tvm import contain, cuda, emit, targets

    def here(model: ir.Model, folder: Path, target: str, threads: int, arch: Any, *rest: Any) -> Any:
        return emit.emit(model, folder, targets.resolve(target, threads, arch), *rest)

    monkeypatch.setattr(contain, "emit", here)
    kernels: list[str] = []
    really = subprocess.run

    def seen(command: list[str], **more: Any) -> Any:
        if str(command[-1]).endswith(".cu"):
            kernels.append(Path(command[-1]).read_text())
        return really(command, **more)

    monkeypatch.setattr(subprocess, "run", seen)

    try:
        cuda.nvcc()
    except BadInput:
        pytest.skip("no nvcc: the CUDA toolkit is not installed")
    model = text("a = MatMul(x, w)\n y = Relu(a)", "(float16[128,256] x) => (float16 y)")
    data = np.random.default_rng(0).standard_normal((256, 128)).astype(np.float16)
    model.graph.initializers["w"] = own = ir.Value(
        name="w", shape=ir.Shape((256, 128)), type=ir.TensorType(ir.DataType.FLOAT16), const_value=ir.tensor(data)
    )
    model.graph.node(0).replace_input_with(1, own)
    out = tmp_path / "out"
    report = pipeline.optimize(save(model, tmp_path / "m.onnx"), out, target="tvm{target=cuda arch=[sm_80,sm_90]}")
    code = (out / "model.so").read_bytes()
    assert sorted(cuda.contents(code)) == [("ptx", 90), ("sm", 80), ("sm", 90)]
    assert b"__global__" not in code, "no source"
    assert len(kernels) == 1 and ("wmma::mma_sync" in kernels[0] or "mma.sync" in kernels[0]), "tensor cores are used"
    if not cuda.driver():
        assert any("cannot run here" in warning for warning in report.warnings)


def test_little_is_forgiven_and_no_more() -> None:
    class Off(compiled.Runnable):
        provider = "off"

        def __init__(self, by: float) -> None:
            self.by = by

        def run(self, given: Any) -> dict[str, Array]:
            return {"y": given["x"] * np.float32(2 + self.by)}

    two = ir.tensor(np.array(2, np.float32), name="two")
    model = text("y = Mul(x, two)", "(float[3,4] x) => (float[3,4] y)")
    value = ir.Value(name="two", shape=ir.Shape(()), type=ir.TensorType(ir.DataType.FLOAT), const_value=two)
    model.graph.initializers["two"] = value
    model.graph.node(0).replace_input_with(1, value)
    near = compiled.compare(model, Off(2e-5))
    assert near.ok and any("other kernels" in note for note in near.notes)
    assert not compiled.compare(model, Off(2e-3)).ok
