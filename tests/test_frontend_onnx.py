"""The ONNX frontend on real models: what it brings to the working opset, repairs, and leaves alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from graphc import model as models
from graphc.frontends import load
from graphc.frontends.onnx import locate
from graphc.storage.tensors import constants

DATA = Path(__file__).parent / "data"
LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def opset(model) -> int:
    return model.opset_imports[""]


@pytest.mark.parametrize("name", ["fmnist_resnet", "fmnist_vit_tiny", "tiny_mixtral_bytes"])
def test_real_models(name) -> None:
    loaded = load(DATA / f"{name}.onnx")
    assert opset(loaded.model) >= 21
    assert loaded.files == (DATA / f"{name}.onnx",)
    assert not loaded.result.refusals
    names = [[v.name for v in (*m.graph.inputs, *m.graph.outputs)] for m in (loaded.original, loaded.model)]
    assert names[0] == names[1]
    assert models.nbytes(loaded.model) - models.nbytes(loaded.original) < 1000
    shared = {id(t) for t in constants(loaded.original)}
    weights = [t for t in constants(loaded.model) if t.nbytes > 1000]
    assert all(id(t) in shared for t in weights)


@pytest.mark.parametrize("name", ["light_squeezenet", "light_shufflenet", "light_inception_v2"])
def test_models_of_2018(name) -> None:
    """IR version 3 and opset 9, from Caffe2, with initializers as inputs; equal outputs, bit for bit."""
    ort = pytest.importorskip("onnxruntime")
    loaded = load(LIGHT / f"{name}.onnx")
    assert (loaded.original.ir_version, opset(loaded.original), opset(loaded.model)) == (3, 9, 21)
    assert len(loaded.model.graph.inputs) == 1
    assert loaded.result.changes[-1] == "opset 9 -> 21"
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    x = loaded.model.graph.inputs[0]
    assert x.shape is not None
    feeds = {x.name: np.random.default_rng(0).standard_normal(x.shape.numpy()).astype(np.float32)}
    outputs = [
        ort.InferenceSession(data, options).run(None, feeds)[0]
        for data in ((LIGHT / f"{name}.onnx").read_bytes(), models.serialize(loaded.model))
    ]
    np.testing.assert_array_equal(outputs[0], outputs[1])


def test_a_model_at_the_working_opset_is_left_as_it_is(tmp_path) -> None:
    text = '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) { y = Abs(x) }'
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    loaded = load(path)
    assert models.text(loaded.model) == models.text(loaded.original)
    assert not loaded.result.changed


LOWERED = {
    "unchanged": ("Relu(x)", 21),
    "more-dtypes-allowed-since": ("Elu(x)", 21),
    "new-attribute-since": ("Cast<to = 1>(x)", 24),
    "new-operator": ("Swish(x)", 24),
    "dtype-allowed-since": ("Cast<to = 1>(i)", 25),
}


@pytest.mark.parametrize("name", LOWERED)
def test_the_lowest_opset_that_means_the_same(name, tmp_path) -> None:
    """So that a model of the newest opset runs where only older ones are known."""
    node, expected = LOWERED[name]
    newest = onnx.defs.onnx_opset_version()
    inputs = "int2[2] i" if "(i)" in node else "float[2] x"
    text = f'<ir_version: 13, opset_import: ["": {newest}]> g ({inputs}) => (float[2] y) {{ y = {node} }}'
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    loaded = load(path)
    assert opset(loaded.model) == expected == opset(loaded.original)
    assert loaded.result.changes == [f"opset {newest} -> {expected}: all operators are the same in both"]


def test_a_model_too_old_to_convert_stays(tmp_path) -> None:
    text = '<ir_version: 3, opset_import: ["": 5]> g (float[2] x) => (float[2] y) { y = Abs(x) }'
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    loaded = load(path)
    assert opset(loaded.model) == 5
    assert "stays at opset 5" in loaded.result.refusals[0].reason


def test_folders(tmp_path) -> None:
    shutil.copy(DATA / "fmnist_resnet.onnx", tmp_path / "net.onnx")
    assert locate(tmp_path) == tmp_path / "net.onnx"
    (tmp_path / "graphc.json").write_text("{}")
    shutil.copy(tmp_path / "net.onnx", tmp_path / "model.onnx")
    assert locate(tmp_path) == tmp_path / "model.onnx"
    assert load(tmp_path).files == (tmp_path / "model.onnx",)


@pytest.mark.slow
def test_every_case_of_onnx_itself_loads(tmp_path) -> None:
    """Nothing that is valid is refused."""
    from onnx.backend.test.case.node import collect_testcases

    path = tmp_path / "m.onnx"
    for case in collect_testcases(None):
        if case.model is not None:
            path.write_bytes(case.model.SerializeToString())
            load(path)
