"""What cannot be used gets a clear error: what, where, why, what to do. Never a traceback of something else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc import model as models
from graphc.errors import BadInput, ExitCode
from graphc.frontends import load

DATA = Path(__file__).parent / "data"
RESNET = DATA / "fmnist_resnet.onnx"


def refused(path: Path, *expected: str) -> BadInput:
    """Loading raises BadInput whose text has all of ``expected`` and names the file."""
    with pytest.raises(BadInput) as caught:
        load(path)
    for part in (*expected, path.name):
        assert part in str(caught.value)
    assert caught.value.hint or caught.value.why
    assert caught.value.exit_code == ExitCode.BAD_INPUT == 2
    return caught.value


def written(tmp_path: Path, graph: str, *, opset: int = 21, imports: str = "", ir_version: int = 10) -> Path:
    """An ONNX file from the text of its graph."""
    header = f'<ir_version: {ir_version}, opset_import: ["": {opset}{imports}]>'
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx.parser.parse_model(header + graph).SerializeToString())
    return path


def external(tmp_path: Path, size: int = 5000) -> tuple[Path, Path]:
    """A model with one weight of ``size`` floats in a data file."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]> g (float[{size}] x) => (float[{size}] y) {{ y = Add(x, w) }}'
    )
    tensor = onnx.numpy_helper.from_array(np.ones(size, np.float32), "w")
    data = tmp_path / "weights.bin"
    data.write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    proto.graph.initializer.append(tensor)
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path, data


def relocated(path: Path, **entries: str) -> None:
    """Change where a model's external data is said to be."""
    proto = onnx.load(path, load_external_data=False)
    held = proto.graph.initializer[0].external_data
    del held[:]
    for key, value in entries.items():
        held.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())


def test_no_such_file(tmp_path) -> None:
    shutil.copy(RESNET, tmp_path / "model.onnx")
    assert "model.onnx" in refused(tmp_path / "modle.onnx", "there is no such file").hint


NOT_ONNX = {
    "empty": (b"", "the file is empty"),
    "text": (b"hello, I am a model\n", "a text file"),
    "onnx-text": (b'<ir_version: 10, opset_import: ["": 21]> g (float x) => (float y) { y = Abs(x) }', "ONNX text"),
    "json": (b'{"irVersion": 10}', "a JSON file"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n", "git lfs pull"),
    "zip": (b"PK\x03\x04" + bytes(100), "torch.onnx.export"),
    "pickle": (b"\x80\x02}q\x00.", "a Python pickle"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(100), "a GGUF file"),
    "ort": (b"\x18\x00\x00\x00ORTM" + bytes(100), ".ort"),
    "tflite": (b"\x1c\x00\x00\x00TFL3" + bytes(100), "TensorFlow Lite"),
    "safetensors": (b"\x10\x00\x00\x00\x00\x00\x00\x00" + b'{"a":{"x":1}}   ' + bytes(50), "a safetensors file"),
    "zeros": (bytes(1000), "not an ONNX model"),
    "noise": (bytes(range(200, 256)) * 10, "not an ONNX model"),
    "other-protobuf": (b"\x0a\x03abc\x12\x02hi", "not an ONNX model"),
    "only-a-version": (b"\x08\x0a", "it has not a graph"),
}


@pytest.mark.parametrize("name", NOT_ONNX)
def test_files_that_are_no_onnx(name, tmp_path) -> None:
    content, expected = NOT_ONNX[name]
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    refused(path, expected)


@pytest.mark.parametrize("kept", [10, 1000, 100_000, 1_250_000])
def test_truncated(kept, tmp_path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(RESNET.read_bytes()[:kept])
    refused(path, "truncated")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_is_refused_or_loads(data, tmp_path_factory) -> None:
    """Flipped and missing bytes anywhere: a BadInput, or a model; no other exception."""
    text = """<ir_version: 8, opset_import: ["": 13]> g (float[2, 3] x, bool c) => (float[2, 3] y)
        <float[3] w = {1.0, 2.0, 3.0}> { z = Mul(x, w) y = If(c) <
            then_branch = t () => (float[2, 3] a) { a = Relu(z) },
            else_branch = e () => (float[2, 3] b) { b = LeakyRelu<alpha = 0.5>(z) }> }"""
    content = bytearray(onnx.parser.parse_model(text).SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("m") / "m.onnx"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        loaded = load(path)
    except BadInput as error:
        assert str(path) in str(error)
    else:
        models.save(loaded.model, path.with_name("out.onnx"))


def test_folders(tmp_path) -> None:
    refused(tmp_path, "neither an artifact nor a model folder")
    shutil.copy(RESNET, tmp_path / "one.onnx")
    assert load(tmp_path).path == tmp_path
    shutil.copy(RESNET, tmp_path / "two.onnx")
    refused(tmp_path, "several models", "one.onnx, two.onnx")
    (tmp_path / "graphc.json").write_text(json.dumps({}))
    refused(tmp_path, "the artifact has several graphs", "one.onnx, two.onnx")
    (tmp_path / "one.onnx").unlink()
    (tmp_path / "two.onnx").unlink()
    refused(tmp_path, "the artifact is incomplete")
    shutil.copy(RESNET, tmp_path / "model.onnx")
    assert load(tmp_path).files == (tmp_path / "model.onnx",)


def test_external_data_that_fits(tmp_path) -> None:
    path, data = external(tmp_path)
    loaded = load(path)
    assert loaded.files == (path, data)
    assert loaded.model.graph.initializers["w"].const_value.numpy().sum() == 5000


def test_external_data_is_missing_or_truncated(tmp_path) -> None:
    path, data = external(tmp_path)
    data.write_bytes(data.read_bytes()[:-1])
    refused(path, "external data is truncated", "initializer 'w'", "0 to 20000, the file has 19999")
    data.unlink()
    refused(path, "external data is missing", "weights.bin")


@pytest.mark.parametrize(
    "entries, expected",
    [
        ({"location": "weights.bin", "length": "19996"}, "does not fit the tensor's shape"),
        ({"location": "weights.bin", "offset": "-4"}, "does not fit the tensor's shape"),
        ({"location": "weights.bin", "offset": "4"}, "truncated"),
        ({"location": "weights.bin", "offset": "here"}, "no valid offset"),
        ({"offset": "0"}, "must lie in the folder"),
        ({"location": "../weights.bin"}, "must lie in the folder"),
        ({"location": "sub/../../weights.bin"}, "must lie in the folder"),
        ({"location": "/etc/passwd"}, "must lie in the folder"),
    ],
)
def test_external_data_that_is_described_wrongly(entries, expected, tmp_path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path, data = external(folder)
    shutil.copy(data, tmp_path)
    relocated(path, **entries)
    refused(path, expected, "initializer 'w'")


def test_external_data_through_links(tmp_path) -> None:
    """A link out of the folder is refused; a cache whose links all lead into one folder is one folder."""
    store, folder = tmp_path / "store", tmp_path / "model"
    store.mkdir()
    folder.mkdir()
    path, data = external(store)
    (folder / "m.onnx").symlink_to(path)
    (folder / "weights.bin").symlink_to(data)
    assert load(folder / "m.onnx").model.graph.initializers["w"].const_value.numpy().sum() == 5000
    (folder / "m.onnx").unlink()
    shutil.copy(path, folder / "m.onnx")
    refused(folder / "m.onnx", "must lie in the folder", "a link to")
    (folder / "weights.bin").unlink()
    os.link(data, folder / "weights.bin")  # as package managers install files
    assert load(folder / "m.onnx").model.graph.initializers["w"].const_value.numpy().sum() == 5000


GRAPHS = {
    "cycle": ("(float[2] x) => (float[2] y) { a = Add(x, b) b = Relu(a) y = Relu(b) }",
              ["has a cycle", "makes 'b' -> the Add node that makes 'a' -> the Relu"]),
    "self": ("(float[2] x) => (float[2] y) { y = Add(x, y) }", ["has a cycle"]),
    "dangling": ("(float[2] x) => (float[2] y) { h = Relu(x) y = Add(h, hh) }",
                 ["the value 'hh' does not exist", "Add", "did you mean 'h'?"]),
    "dangling-in-branch": ("(float[2] x, bool c) => (float[2] y) { y = If(c)<then_branch = t () => (float[2] a) "
                           "{ a = Relu(q) }, else_branch = e () => (float[2] b) { b = Relu(x) }> }",
                           ["the value 'q' does not exist", "Relu"]),
    "cycle-through-branch": ("(float[2] x, bool c) => (float[2] y) { y = If(c)<then_branch = t () => (float[2] a) "
                             "{ a = Relu(z) }, else_branch = e () => (float[2] b) { b = Relu(x) }> z = Neg(y) }",
                             ["has a cycle"]),
    "made-twice": ("(float[2] x) => (float[2] y) { y = Relu(x) y = Neg(x) }", ["the value 'y' is made twice", "Neg"]),
    "made-over-an-input": ("(float[2] x) => (float[2] y) { x = Relu(x) y = Neg(x) }", ["made twice", "an input"]),
    "made-over-an-outer-value": ("(float[2] x, bool c) => (float[2] y) { z = Abs(x) y = If(c)<then_branch = t () => "
                                 "(float[2] z) { z = Relu(x) }, else_branch = e () => (float[2] b) { b = Relu(x) }> }",
                                 ["the value 'z' is made twice", "Abs"]),
    "inputs-of-one-name": ("(float[2] x, float[2] x) => (float[2] y) { y = Relu(x) }", ["two inputs are called 'x'"]),
    "no-outputs": ("(float[2] x) => () { y = Relu(x) }", ["the model has no outputs"]),
    "missing-output": ("(float[2] x) => (float[2] z) { y = Relu(x) }", ["nothing makes the output 'z'"]),
    "outer-value-as-output": ("(float[2] x, bool c) => (float[2] y) { y = If(c)<then_branch = t () => (float[2] x) {}, "
                              "else_branch = e () => (float[2] b) { b = Relu(x) }> }",
                              ["nothing makes the output 'x' in the subgraph", "Identity"]),
    "no-schema": ("(float[2] x) => (float[2] y) { y = Sigmoyd(x) }",
                  ["there is no operator Sigmoyd", "makes 'y'", "did you mean 'Sigmoid'?"]),
    "newer-operator": ("(float[2] x) => (float[2] y) { y = Swish(x) }",
                       ["the operator Swish does not exist in opset 21", "opset 24"]),
    "removed-operator": ("(float[2] x) => (float[2] y) { y = Upsample(x, x) }", ["removed in opset 10"]),
    "too-many-inputs": ("(float[2] x) => (float[2] y) { y = Relu(x, x) }", ["Relu has 2 inputs and takes 1"]),
    "too-few-inputs": ("(float[2] x) => (float[2] y) { y = Where(x, x) }", ["Where has 2 inputs and takes 3"]),
    "empty-input": ("(float[2] x) => (float[2] y) { y = Where(x, , x) }", ["lacks its input 'X'"]),
    "too-many-outputs": ("(float[2] x) => (float[2] y) { y, z = Relu(x) }", ["Relu has 2 outputs"]),
    "unknown-attribute": ("(float[2] x) => (float[2] y) { y = LeakyRelu<alhpa = 0.1>(x) }",
                          ["no attribute 'alhpa'", "did you mean 'alpha'?"]),
    "wrong-attribute": ("(float[2] x) => (float[2] y) { y = LeakyRelu<alpha = 1>(x) }",
                        ["attribute 'alpha' of LeakyRelu is INT and should be FLOAT"]),
    "missing-attribute": ("(float[2] x) => (float[2] y) { y = Cast(x) }", ["lacks its attribute 'to'"]),
    "dtypes": ("(float[2] x, int64[2] i) => (float[2] y) { h = Relu(x) y = Add(h, i) }",
               ["dtypes do not fit", "'y' (Add)", "int64"]),
    "declared-dtype": ("(float[2] x) => (int64[2] y) { y = Relu(x) }", ["dtypes do not fit", "float vs int64"]),
    "unsupported-dtype": ("(float[2] x) => (float[2] y) { y = Not(x) }", ["dtypes do not fit", "tensor(float)"]),
    "dtype-in-branch": ("(float[2] x, bool c) => (float[2] y) { y = If(c)<then_branch = t () => (float[2] a) "
                        "{ a = Not(x) }, else_branch = e () => (float[2] b) { b = Relu(x) }> }",
                        ["dtypes do not fit", "'a' (Not)"]),
    "domain-not-imported": ("(float[2] x) => (float[2] y) { y = own.Op(x) }", ["'own' is used but not imported"]),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_that_are_not_well_formed(name, tmp_path) -> None:
    graph, expected = GRAPHS[name]
    refused(written(tmp_path, f"g {graph}"), *expected)


def test_functions_that_are_not_well_formed(tmp_path) -> None:
    header = 'g (float[2] x) => (float[2] y) { y = own.f(x) } <domain: "own", opset_import: ["": 21, "own": 1]> '
    for body, expected in (
        ("f (a) => (b) { b = own.f(a) }", "calls itself"),
        ("f (a) => (b) { b = Relu(c) }", "the value 'c' does not exist"),
        ("f (a) => (b) { c = Relu(a) }", "nothing makes the output 'b'"),
    ):
        refused(written(tmp_path, header + body, imports=', "own": 1'), expected)


def edited(tmp_path: Path, edit: Callable[[onnx.ModelProto], object]) -> Path:
    """A small valid model, changed."""
    text = "g (float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}> { y = Add(x, w) }"
    path = written(tmp_path, text)
    proto = onnx.load(path)
    edit(proto)
    path.write_bytes(proto.SerializeToString())
    return path


EDITS: dict[str, tuple[Callable[[onnx.ModelProto], object], list[str]]] = {
    "opset-too-new": (lambda m: m.opset_import.pop() and m.opset_import.add(version=9000),
                      ["opset 9000 is too new", "pip install --upgrade onnx"]),
    "no-opset": (lambda m: m.opset_import.pop(), ["says no opset version"]),
    "two-opsets": (lambda m: m.opset_import.add(version=13), ["two versions of the opset 'ai.onnx'"]),
    "bytes-do-not-fit": (lambda m: m.graph.initializer[0].dims.append(3), ["does not fit its shape"]),
    "negative-dimension": (lambda m: m.graph.initializer[0].dims.__setitem__(0, -2), ["negative dimension", "'w'"]),
    "unknown-dtype": (lambda m: setattr(m.graph.initializer[0], "data_type", 99), ["unknown dtype", "'w'"]),
    "no-dtype": (lambda m: m.graph.initializer[0].ClearField("data_type"), ["unknown dtype", "'w'"]),
    "two-initializers": (lambda m: m.graph.initializer.append(m.graph.initializer[0]), ["2 initializers are"]),
    "sparse": (lambda m: m.graph.sparse_initializer.add(dims=[2]), ["sparse initializers"]),
    "no-ir-version": (lambda m: m.ClearField("ir_version"), ["not an ONNX model", "IR version"]),
    "no-graph": (lambda m: m.ClearField("graph"), ["not an ONNX model", "a graph"]),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_models_that_are_not_well_formed(name, tmp_path) -> None:
    edit, expected = EDITS[name]
    refused(edited(tmp_path, edit), *expected)


def test_a_map_output(tmp_path) -> None:
    def as_map(model: onnx.ModelProto) -> None:
        kind = model.graph.output[0].type
        kind.Clear()
        kind.map_type.key_type = onnx.TensorProto.INT64
        kind.map_type.value_type.tensor_type.elem_type = onnx.TensorProto.FLOAT

    refused(edited(tmp_path, as_map), "")


def test_what_is_unusual_but_right(tmp_path) -> None:
    """Custom operators, nodes out of order, nodes of one name, NaN weights, dtypes unknown to inference."""
    text = """g (float[2] x) => (float[2] y)
        { y = Add(b, w) b = own.Anything<level = 3>(a, x) a = Relu(x) w = Constant<value_floats = [1.0, 2.0]>() }"""
    proto = onnx.load(written(tmp_path, text, imports=', "own": 1'))
    for node in proto.graph.node:
        node.name = "same"
    weight = onnx.numpy_helper.from_array(np.array([np.nan, np.inf], np.float32), "unused")
    proto.graph.initializer.append(weight)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    loaded = load(tmp_path / "m.onnx")
    assert [n.op_type for n in loaded.model.graph] == ["Relu", "Anything", "Constant", "Add"]
    assert len({n.name for n in loaded.model.graph}) == 4
    assert loaded.result.changes == ["node renamed: its name was taken (×3)"]


def test_the_input_is_untouched(tmp_path) -> None:
    path, data = external(tmp_path)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (path, data)}
    models.save(load(path).model, tmp_path / "out.onnx")
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (path, data)} == before
