"""What the ONNX Runtime backend writes loads, runs anywhere, and says nothing about where it was made."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from graphc import model as models
from graphc.backends.onnxruntime import OnnxRuntime
from graphc.contract import Capabilities
from graphc.errors import BadInput
from graphc.frontends import load
from graphc.opset.portable import portable
from graphc.recipe import parse_backend

DATA = Path(__file__).parent / "data"
OLD = Capabilities("onnxruntime", max_ir=10, max_opset={"": 21, "ai.onnx.ml": 5})
NEW = Capabilities("onnxruntime", max_ir=13, max_opset={"": 26, "ai.onnx.ml": 5})


def parsed(graph: str, opset: int = 21, imports: str = "") -> ir.Model:
    header = f'<ir_version: 10, opset_import: ["": {opset}{imports}]>'
    return ir.from_proto(onnx.parser.parse_model(header + graph))


ABS = "g (float[2] x) => (float[2] y) { y = Abs(x) }"


def test_options() -> None:
    backend = parse_backend("onnxruntime{threads=2 portable=false}")
    assert backend == OnnxRuntime(threads=2, portable=False)
    assert backend.spec() == "onnxruntime{portable=false threads=2}"
    assert not backend.capabilities().portable


def test_capabilities_without_onnxruntime(monkeypatch) -> None:
    from graphc import runtime
    from graphc.backends import onnxruntime

    def missing() -> None:
        raise BadInput("ONNX Runtime is not installed")

    monkeypatch.setattr(runtime, "capabilities", missing)
    onnxruntime._capabilities.cache_clear()
    try:
        found = OnnxRuntime().capabilities()
    finally:
        onnxruntime._capabilities.cache_clear()
    assert (found.max_ir, found.max_opset[""]) == (10, 21)


def test_a_file_needs_default_options_only(tmp_path) -> None:
    ort = pytest.importorskip("onnxruntime")
    source = load(DATA / "fmnist_resnet.onnx")
    OnnxRuntime().emit_file(source.model, tmp_path / "m.onnx")
    session = ort.InferenceSession(tmp_path / "m.onnx")
    assert session.get_inputs()[0].name == "image"
    written = onnx.load(tmp_path / "m.onnx")
    assert (written.ir_version, written.opset_import[0].version) == (10, 21)
    onnx.checker.check_model(written, full_check=True)


def emitted(folder: Path, backend: OnnxRuntime, model: ir.Model) -> Path:
    """An artifact as the pipeline makes it."""
    folder.mkdir()
    needs = backend.emit(model, folder)
    (folder / "graphc.json").write_text(json.dumps({"runtime": dict(needs)}))
    return folder


def test_an_artifact_runs(tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    source = load(DATA / "fmnist_resnet.onnx")
    folder = emitted(tmp_path / "artifact", OnnxRuntime(threads=1), source.model)
    assert sorted(p.name for p in folder.iterdir()) == ["graphc.json", "model.onnx", "run.py"]
    x = np.random.default_rng(0).standard_normal((2, 1, 28, 28)).astype(np.float32)
    from graphc import runtime

    expected = runtime.session(source.original, optimise=False).run({"image": x})["logits"]
    loaded = OnnxRuntime().load(folder)
    assert loaded.provider == "CPUExecutionProvider"
    np.testing.assert_allclose(loaded.run({"image": x})["logits"], expected, rtol=1e-4, atol=1e-5)
    np.savez(tmp_path / "inputs.npz", image=x)
    for arguments, shape in (((), "(1, 10)"), ((tmp_path / "inputs.npz",), "(2, 10)")):
        run = [sys.executable, "-I", folder / "run.py", *arguments]
        done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert done.stdout == f"logits float32 {shape}\n"


def test_the_manifest_decides_how_an_artifact_is_loaded(tmp_path, monkeypatch) -> None:
    from graphc import runtime

    asked = {}
    monkeypatch.setattr(runtime, "session", lambda path, **options: asked.update(options, path=path))
    folder = emitted(tmp_path / "artifact", OnnxRuntime(threads=3), parsed(ABS))
    OnnxRuntime(threads=1).load(folder)
    asked.pop("frugal", None)
    assert asked == {
        "path": folder / "model.onnx",
        "optimise": True,
        "provider": "CPUExecutionProvider",
        "options": {},
        "threads": 3,
    }
    OnnxRuntime(threads=1).load(folder / "model.onnx")
    assert asked["threads"] == 1
    (folder / "graphc.json").write_text("not json")
    with pytest.raises(BadInput, match="manifest"):
        OnnxRuntime().load(folder)


def test_the_same_model_gives_the_same_bytes(tmp_path) -> None:
    written = []
    for name in ("a", "b"):
        folder = emitted(tmp_path / name, OnnxRuntime(), load(DATA / "tiny_mixtral_bytes.onnx").model)
        written.append({p.name: p.read_bytes() for p in folder.iterdir()})
    assert written[0] == written[1]


def test_traces_of_the_machine_are_removed() -> None:
    model = parsed(ABS)
    node = model.graph[0]
    node.metadata_props["pkg.torch.onnx.stack_trace"] = 'File "/home/me/net.py", line 3, in forward'
    node.metadata_props["namespace"] = "net"
    node.doc_string = "/home/me/net.py:12:0"
    written = portable(model, NEW).graph[0]
    assert dict(written.metadata_props) == {"namespace": "net"}
    assert not written.doc_string
    assert node.doc_string  # the model itself is not changed
    node.doc_string = "the absolute value"
    assert portable(model, NEW).graph[0].doc_string == "the absolute value"


def test_imports_that_nothing_uses_are_dropped() -> None:
    text = """g (float[2] x) => (float[2] y) { y = own.f(x) }
        <domain: "own", opset_import: ["": 21, "far": 3, "away": 1]> f (a) => (b) { b = far.Op(a) }"""
    model = parsed(text, imports=', "own": 1, "far": 3, "ai.onnx.ml": 99')
    written = portable(model, NEW)
    assert written.opset_imports == {"": 21, "own": 1, "far": 3}
    [function] = written.functions.values()
    assert function.opset_imports == {"": 21, "far": 3}


def test_versions() -> None:
    assert portable(parsed(ABS, opset=26), NEW).opset_imports == {"": 21}
    assert portable(parsed(ABS, opset=13), NEW).opset_imports == {"": 13}
    assert portable(parsed(ABS.replace("Abs", "Swish"), opset=26), NEW).opset_imports == {"": 24}
    assert portable(parsed(ABS), NEW).ir_version == 10
    narrow = parsed("g (int2[2] x) => (int2[2] y) { y = Identity(x) }", opset=25)
    assert portable(narrow, NEW).ir_version == 13


def test_what_the_target_does_not_load_is_refused() -> None:
    with pytest.raises(BadInput, match=r"opset 24; onnxruntime loads up to 21[\s\S]*Swish"):
        portable(parsed(ABS.replace("Abs", "Swish"), opset=26), OLD)
    narrow = parsed("g (int2[2] x) => (int2[2] y) { y = Identity(x) }", opset=25)
    with pytest.raises(BadInput, match="IR version 13"):
        portable(narrow, dataclasses.replace(OLD, max_opset={"": 26}))


def test_large_weights_stand_beside(tmp_path) -> None:
    ort = pytest.importorskip("onnxruntime")
    model = parsed("g (float[5000] x) => (float[5000] y) { y = Add(x, x) }")
    weight = ir.tensor(np.ones(5000, np.float32), name="w")
    value = ir.Value(name="w", shape=weight.shape, type=ir.TensorType(ir.DataType.FLOAT), const_value=weight)
    model.graph.register_initializer(value)
    model.graph[0].replace_input_with(1, value)
    [path, data] = models.save(portable(model, NEW), tmp_path / "m.onnx", inline_limit=0)
    [y] = ort.InferenceSession(path).run(None, {"x": np.zeros(5000, np.float32)})
    assert y.sum() == 5000
    assert data.stat().st_size == 20_000


def test_an_artifact_of_a_quantized_model_is_exact(tmp_path) -> None:
    """uint8 times int8 at full range saturates in a default session on CPUs without VNNI."""
    pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (8, 64), dtype=np.uint8)
    b = rng.integers(-128, 128, (64, 16), dtype=np.int8)
    model = parsed("g (uint8[8,64] a) => (int32[8,16] y) { y = MatMulInteger(a, a) }")
    tensor = ir.tensor(b, name="b")
    weight = ir.Value(name="b", shape=tensor.shape, type=ir.TensorType(ir.DataType.INT8), const_value=tensor)
    model.graph.register_initializer(weight)
    model.graph[0].replace_input_with(1, weight)
    folder = emitted(tmp_path / "artifact", OnnxRuntime(), model)
    manifest = json.loads((folder / "graphc.json").read_text())
    assert manifest["runtime"]["session_options"] == {"session.x64quantprecision": "1"}
    found = OnnxRuntime().load(folder).run({"a": a})["y"]
    np.testing.assert_array_equal(found, a.astype(np.int32) @ b.astype(np.int32))
