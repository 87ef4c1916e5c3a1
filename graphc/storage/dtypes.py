"""Whether the dtypes of an ``onnx.ModelProto`` fit together, by onnx's own inference."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
from onnx import shape_inference

from graphc.errors import BadInput
from graphc.storage import wire
from graphc.storage.wellformed import all_nodes

_SHAPES = 1 << 13
"""Bytes from which a constant is left out of shape inference: it holds no shape."""

_ERROR = re.compile(r"\(op_type:(?P<op>[^,)]*)(?:, node name: (?P<node>[^)]*))?\): (?P<why>.*)")
_TYPE_ERROR = re.compile(r"TypeInferenceError|inconsistent type|unsupported type")


def infer(proto: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """A copy of a model with inferred dtypes and shapes in it, and without the data of large constants.

    A shape that contradicts what is declared is no error: exporters declare wrong ones, and runtimes go by
    what they infer.

    Raises:
        BadInput: Dtypes contradict each other; the message names the node.
    """
    light = onnx.ModelProto.FromString(wire.strip(proto.SerializeToString(), "", _SHAPES))
    for node in all_nodes(light.graph.node):
        node.name = node.name or (node.output[0] if node.output else "")
    data = light.SerializeToString()
    try:
        result = shape_inference.infer_shapes(data, check_type=True, strict_mode=True)
    except (shape_inference.InferenceError, RuntimeError, ValueError) as error:
        for line in str(error).splitlines():
            clash = _clash(line)
            if clash is not None:
                raise BadInput(
                    "the dtypes do not fit together",
                    where=f"{path}, node '{clash['node'] or ''}' ({clash['op']})",
                    why=_dtypes_named(re.sub(r"\[\w+\] ", "", clash["why"])),
                    hint="export the model again, or put a Cast before it",
                ) from error
        try:
            result = shape_inference.infer_shapes(data)
        except (shape_inference.InferenceError, RuntimeError, ValueError):
            result = data
    if isinstance(result, bytes):
        result = onnx.ModelProto.FromString(result)
    return result


def _clash(line: str) -> re.Match[str] | None:
    """What a line of onnx's errors says of dtypes, if it does; a node repeats the errors in its bodies."""
    found = None
    if _TYPE_ERROR.search(line):
        while match := _ERROR.search(line):
            found, line = match, match["why"]
    return found


def _dtypes_named(text: str) -> str:
    """onnx's numbers of dtypes as their names."""
    names = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()}
    return re.sub(r"\((\d+)\)", lambda m: names.get(int(m[1]), m[0]), text)
