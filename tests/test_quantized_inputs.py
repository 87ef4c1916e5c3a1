"""Models that another tool has quantized: kept correct, never quantized twice, pruned where zeros can be seen."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphc import edit, pipeline, runtime
from graphc.axes.groups import analyse
from graphc.known import Knowledge
from graphc.model import load
from graphc.pruning.silence import silent
from graphc.pruning.sites import Site
from graphc.report import Report

DATA = Path(__file__).parent / "data"
PICTURES = ("fmnist_resnet", "fmnist_vit_tiny")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ONNX Runtime's own quantizers make of the trained models that ship here."""
    from onnxruntime import quantization as q
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits
    from onnxruntime.quantization.shape_inference import quant_pre_process

    folder = tmp_path_factory.mktemp("quantized")
    pictures = np.load(DATA / "fashion_mnist_2k.npz")

    class Reader(q.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            images = next(pictures[key] for key in pictures.files if pictures[key].ndim > 2)[:32]
            rows = images.reshape(4, 8, 1, 28, 28).astype(np.float32) / 255
            self._rows: Iterator[dict[str, np.ndarray]] = iter([{name: row} for row in rows])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._rows, None)

    logging.disable(logging.WARNING)
    try:
        for name in PICTURES:
            source = folder / f"{name}.onnx"
            quant_pre_process(DATA / f"{name}.onnx", source)
            given = onnx.load(source).graph.input[0].name
            for form in (q.QuantFormat.QDQ, q.QuantFormat.QOperator):
                q.quantize_static(
                    source, folder / f"{name}-{form.name}.onnx", Reader(given), quant_format=form, per_channel=True
                )
            q.quantize_dynamic(source, folder / f"{name}-dynamic.onnx", per_channel=True)
        packed = nbits.MatMulNBitsQuantizer(
            onnx.load(DATA / "tiny_mixtral_bytes.onnx"), block_size=32, is_symmetric=True, accuracy_level=0
        )
        packed.process()
        packed.model.save_model_to_file(str(folder / "tiny_mixtral_bytes-nbits.onnx"))
    finally:
        logging.disable(logging.NOTSET)
    return folder


def optimised(source: Path, recipe: str) -> Report:
    report = pipeline.optimize(source, source.with_suffix(".out"), recipe=recipe, measure=False, cache=False)
    assert report.ok and report.rewrite["checked"], report.rewrite
    return report


NAMES = [f"{name}-{form}" for name in PICTURES for form in ("QDQ", "QOperator", "dynamic")]


@pytest.mark.parametrize("name", [*NAMES, "tiny_mixtral_bytes-nbits"])
def test_quantized_models_stay_correct_and_are_not_quantized_again(made: Path, name: str) -> None:
    source = made / f"{name}.onnx"
    report = optimised(source, "simplify,fuse,shrink,recognise,simplify,quantize{embeddings=0}")
    quantize = next(each for each in report.passes if each.name == "quantize")
    assert any("quantized already" in refusal.reason for refusal in quantize.refusals)
    assert sum(change.startswith("weight stored") for change in quantize.changes) == ("nbits" in name)


@pytest.mark.parametrize("name", NAMES)
def test_pruning_takes_what_shrink_can_remove(made: Path, name: str) -> None:
    source = made / f"{name}.onnx"
    report = optimised(source, "simplify,fuse,prune{ratio=0.2 criterion=l2},shrink")
    prune, shrink = report.passes[-2:]
    if name.endswith("QDQ"):
        assert any("removed" in change for change in shrink.changes)
        assert report.output["parameters"] < 0.9 * report.input["parameters"]
    else:
        assert not prune.changes, "units whose zeros are not seen are not written dead"
        assert any("in integers: shrink could not cut it" in refusal.reason for refusal in prune.refusals)


def test_heads_with_packed_codes_are_written_dead_by_their_scales_and_removed(made: Path) -> None:
    """A code that is 0 does not stand for 0: codes stay, and scales are zero."""
    source = made / "tiny_mixtral_bytes-nbits.onnx"
    report = optimised(source, "simplify,fuse,recognise,prune{ratio=0.25 kinds=[head] criterion=l2},shrink")
    prune, shrink = report.passes[-2:]
    assert any(change.startswith("head written dead") for change in prune.changes)
    assert any(change.startswith("head removed") for change in shrink.changes), shrink
    assert report.output["parameters"] < report.input["parameters"]


@pytest.mark.parametrize("bias", [False, True])
def test_outputs_whose_scales_are_zero_are_known_to_be_their_bias(bias: bool) -> None:
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.integers(0, 256, (6, 2, 8)).astype(np.uint8),
        "s": (rng.normal(size=(6, 2)) * (np.arange(6) != 4)[:, None] * [1, 0]).astype(np.float32),
        "b": rng.normal(size=6).astype(np.float32),
    }
    inputs = ["x", "w", "s"] + (["", "", "b"] if bias else [])
    node = onnx.helper.make_node("MatMulNBits", inputs, ["y"], domain="com.microsoft", K=32, N=6, bits=4, block_size=16)
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, ["n", 32])],
        [onnx.helper.make_tensor_value_info("y", 1, ["n", 6])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items() if name in inputs],
    )
    domains = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=domains, ir_version=10))
    known = Knowledge(model, analyse(model).trace)
    (facet,) = known(model.graph.outputs[0])
    want = np.full((1, 6), np.nan)
    want[0, 4] = weights["b"][4] if bias else 0
    np.testing.assert_array_equal(facet, want)
    (made_,) = edit.nodes(model)
    x = model.graph.inputs[0]
    quiet = silent(made_, Site(made_, x, 1, "summed"), known)
    np.testing.assert_array_equal(quiet.reshape(-1), np.arange(32) >= 16)
    got = runtime.session(model, optimise=False, threads=1).run({"x": np.ones((2, 32), np.float32)})["y"]
    np.testing.assert_allclose(got[:, 4], want[0, 4])


def test_a_recurrent_layer_with_one_zero_point_for_both_weights(tmp_path: Path) -> None:
    """With x64quantprecision, ONNX Runtime does not load a DynamicQuantizeLSTM that reads one constant twice."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.integers(-127, 128, (1, 8, 16)).astype(np.int8),
        "r": rng.integers(-127, 128, (1, 4, 16)).astype(np.int8),
        "s": np.full((1, 16), 0.01, np.float32),
        "z": np.zeros((1, 16), np.int8),
        "v": np.full((1, 16), 0.02, np.float32),
    }
    node = onnx.helper.make_node(
        "DynamicQuantizeLSTM",
        ["x", "w", "r", "", "", "", "", "", "s", "z", "v", "z"],
        ["y"],
        domain="com.microsoft",
        hidden_size=4,
    )
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [3, 1, 8])],
        [onnx.helper.make_tensor_value_info("y", 1, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    domains = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    source, out = tmp_path / "in.onnx", tmp_path / "out"
    onnx.save(onnx.helper.make_model(graph, opset_imports=domains, ir_version=10), source)
    pipeline.optimize(source, out, target="onnxruntime{portable=false}", measure=False, cache=False)
    (node_,) = edit.nodes(load(out / "model.onnx"))
    assert node_.inputs[9] is not node_.inputs[11]
    runtime.session(out / "model.onnx", optimise=True, options={"session.x64quantprecision": "1"})
