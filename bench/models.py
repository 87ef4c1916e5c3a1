"""Make the benchmark models that need no torch: fetch, check, convert, once each.

    python bench/models.py [NAME...]

``bench/torch_models.py`` makes the others.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import cache
import catalog
import large
import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

RAPIDOCR = ("rapidocr-onnxruntime==1.4.4", "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf")
SILERO = ("silero-vad==6.2.3", "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8")


def from_wheel(wheel: tuple[str, str], member: str) -> Callable[[Path], None]:
    """The file ``member`` of a wheel, as it is."""

    def make(path: Path) -> None:
        cache.extract(wheel, member, path)

    return make


def from_repository(name: str) -> Callable[[Path], None]:
    """A model that ships in ``tests/data``."""
    return lambda path: path.write_bytes((Path(__file__).parents[1] / "tests" / "data" / name).read_bytes())


def materialised(architecture: str) -> Callable[[Path], None]:
    """A ``light_*`` model of the onnx package with random initializers for its ``ConstantOfShape`` weights.

    Constants that are all equal would let a duplicate-initializer pass merge what no trained model shares.
    Activations keep their scale: He initialisation, batch norms near the identity.
    """

    def make(path: Path) -> None:
        folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
        model = onnx.load(folder / f"light_{architecture}.onnx")
        graph = model.graph
        random = np.random.default_rng(0)
        initializers = {tensor.name: tensor for tensor in graph.initializer}
        fillers = [node for node in graph.node if node.op_type == "ConstantOfShape"]
        shapes = {node.output[0]: numpy_helper.to_array(initializers[node.input[0]]).tolist() for node in fillers}
        roles = _roles(graph)
        for name, shape in shapes.items():
            graph.initializer.append(numpy_helper.from_array(_weights(random, shape, roles[name]), name))
            graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
        for node in fillers:
            graph.node.remove(node)
        unused = {node.input[0] for node in fillers}
        for field in (graph.initializer, graph.input):
            for item in [item for item in field if item.name in unused]:
                field.remove(item)
        _soften(model)
        onnx.save(model, path)

    return make


def _soften(model: onnx.ModelProto) -> None:
    """Scale the last weights so that the logits have unit variance: a saturated softmax hides every error."""
    nodes = model.graph.node
    if not any(node.op_type == "Softmax" for node in nodes):
        return
    last = next(node for node in reversed(nodes) if node.op_type in ("Conv", "Gemm"))
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.ClearField("output")
    probe.graph.output.add(name=last.output[0])
    initialized = {tensor.name for tensor in model.graph.initializer}
    (image,) = (value for value in model.graph.input if value.name not in initialized)
    shape = [dim.dim_value for dim in image.type.tensor_type.shape.dim]
    feed = {image.name: np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
    (logits,) = onnxruntime.InferenceSession(probe.SerializeToString()).run(None, feed)
    for tensor in model.graph.initializer:
        if tensor.name in last.input:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) / logits.std(), tensor.name))


def _roles(graph: onnx.GraphProto) -> dict[str, tuple[str, int]]:
    """By value: the operator that reads it, through ``Unsqueeze``, and at which input."""
    readers = {name: (node, place) for node in graph.node for place, name in enumerate(node.input)}
    roles = {}
    for name, reader in readers.items():
        node, place = reader
        while node.op_type == "Unsqueeze" and node.output[0] in readers:
            node, place = readers[node.output[0]]
        roles[name] = (node.op_type, place)
    return roles


def _weights(random: np.random.Generator, shape: list[int], role: tuple[str, int]) -> np.ndarray:
    noise = random.standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        fan_in = shape[1] * math.prod(shape[2:])
        return noise * np.float32(math.sqrt(2 / fan_in))
    if role in (("BatchNormalization", 1), ("BatchNormalization", 4), ("Mul", 1)):
        return np.float32(1) + np.abs(noise) * np.float32(0.1)
    return noise * np.float32(0.1)


MAKERS: dict[str, Callable[[Path], None]] = {
    "ppocr-cls": from_wheel(RAPIDOCR, "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx"),
    "ppocr-det": from_wheel(RAPIDOCR, "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx"),
    "ppocr-rec": from_wheel(RAPIDOCR, "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"),
    "silero-vad": from_wheel(SILERO, "silero_vad/data/silero_vad.onnx"),
    "silero-vad-16k-op15": from_wheel(SILERO, "silero_vad/data/silero_vad_16k_op15.onnx"),
    "silero-vad-16k-sequence": from_wheel(SILERO, "silero_vad/data/silero_vad_16k_sequence.onnx"),
    "silero-vad-half": from_wheel(SILERO, "silero_vad/data/silero_vad_half.onnx"),
    "silero-vad-op18-ifless": from_wheel(SILERO, "silero_vad/data/silero_vad_op18_ifless.onnx"),
    "silero-vad-openvino-16k": from_wheel(SILERO, "silero_vad/data/silero_vad_openvino_16k.onnx"),
    "fmnist-resnet": from_repository("fmnist_resnet.onnx"),
    "fmnist-vit-tiny": from_repository("fmnist_vit_tiny.onnx"),
    "tiny-mixtral-bytes": from_repository("tiny_mixtral_bytes.onnx"),
    "light-alexnet": materialised("bvlc_alexnet"),
    "light-densenet121": materialised("densenet121"),
    "light-inception-v1": materialised("inception_v1"),
    "light-inception-v2": materialised("inception_v2"),
    "light-resnet50": materialised("resnet50"),
    "light-shufflenet": materialised("shufflenet"),
    "light-squeezenet": materialised("squeezenet"),
    "light-vgg19": materialised("vgg19"),
    "light-zfnet512": materialised("zfnet512"),
    "synthetic-2.4gb": large.write,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to make; default: all")
    names = parser.parse_args().names or list(MAKERS)
    known = {entry.name for entry in catalog.CATALOG}
    for name in names:
        if name not in MAKERS:
            parser.error(f"{name} is made by bench/torch_models.py" if name in known else f"there is no model {name}")
        path = cache.model(name)
        if not path.exists():
            print(f"making {name}", flush=True)
            # A folder of its own, so that an interrupted run leaves no half of a model behind.
            scratch = path.with_suffix(".partial")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            MAKERS[name](scratch / path.name)
            for file in sorted(scratch.iterdir(), key=lambda file: file.name == path.name):
                file.replace(path.parent / file.name)
            scratch.rmdir()


if __name__ == "__main__":
    main()
