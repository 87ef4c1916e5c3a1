"""From a file to an ``onnx.ModelProto`` without its weights, or to a clear reason why not."""

from __future__ import annotations

import math
import mmap
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from graphc.errors import BadInput
from graphc.storage import wire

_MAPPED_FROM = 1 << 24
"""Bytes of an ONNX file from which its large tensors stay in it; smaller files are read whole."""

_TENSOR_FROM = 1 << 14
"""Bytes of a tensor from which it stays in a large file."""

_EXTERNAL_FROM = 1 << 12
"""Bytes of an external tensor from which it stays in its file."""

_SIGNATURES = {
    b"PK\x03\x04": (
        "a zip archive",
        "a PyTorch checkpoint is exported with torch.onnx.export; other archives unpacked",
    ),
    b"\x80": ("a Python pickle", "export the module with torch.onnx.export"),
    b"\x89HDF": ("a Keras or HDF5 file", "convert it with tf2onnx"),
    b"GGUF": ("a GGUF file", "give the Hugging Face folder or an ONNX export"),
    b"\x1f\x8b": ("a gzip archive", "unpack it first"),
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "run: git lfs pull"),
    b"<!DOCTYPE": ("a web page", "the download failed; fetch the file itself"),
    b"<html": ("a web page", "the download failed; fetch the file itself"),
    b"{": (
        "a JSON file",
        "give the binary .onnx; for ONNX in JSON: onnx.save(onnx.load(p, format='json'), q)",
    ),
    b"<": (
        "a text file",
        "give the binary .onnx; for ONNX text: onnx.save(onnx.parser.parse_model(text), q)",
    ),
    b"": ("a text file", "give the binary .onnx"),
}
"""First bytes of what is often mistaken for ONNX: what it is, and what to do. The last three are text."""


@dataclass(frozen=True)
class Contents:
    """What an ONNX file holds.

    Attributes:
        proto: The model. Large data is external, that in the file itself, too; locations are absolute and checked.
        files: The files it is in, the ONNX file first.
    """

    proto: onnx.ModelProto
    files: tuple[Path, ...]


def read(path: Path) -> Contents:
    """Read an ONNX file, but not its weights.

    Raises:
        BadInput: It is no file, empty, truncated, no ONNX, or has external data that cannot be used.
    """
    if not path.exists():
        raise BadInput("there is no such file", where=str(path), hint=_similar(path))
    if not path.is_file():
        raise BadInput("this is no file", where=str(path), hint="give an .onnx file")
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise BadInput("the file is empty", where=str(path), hint="fetch or export the model again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                proto = _parse(content, path)
    except OSError as error:
        raise BadInput("cannot read the file", where=str(path), why=error.strerror or str(error)) from error
    data = _locate(proto, path) - {path.absolute()}
    return Contents(proto, (path, *sorted(data)))


def _similar(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path()
    there = sorted(p.name for p in folder.glob("*.onnx"))[:5]
    return f"in {folder} there is: {', '.join(there)}" if there else "check the path"


def _parse(content: mmap.mmap, path: Path) -> onnx.ModelProto:
    where = str(path)
    foreign = _foreign(content)
    if foreign is not None:
        raise BadInput(f"this is {foreign[0]}, not an ONNX model", where=where, hint=foreign[1])
    try:
        whole = len(content) < _MAPPED_FROM
        data = wire.strip(content, str(path.absolute()), len(content) if whole else _TENSOR_FROM)
        proto = onnx.ModelProto.FromString(data)
    except wire.Malformed as error:
        if error.truncated and content[:1] == b"\x08":
            raise BadInput(
                "the file is truncated", where=where, why=str(error), hint="fetch or export the model again"
            ) from error
        raise BadInput("this is not an ONNX model", where=where, why=str(error)) from error
    except DecodeError as error:
        raise BadInput(
            "the file is damaged or not an ONNX model",
            where=where,
            why="protobuf cannot parse it",
            hint="fetch or export the model again",
        ) from error
    if not proto.HasField("graph") or not proto.ir_version:
        missing = "a graph" if proto.ir_version else "an IR version"
        raise BadInput("this is not an ONNX model", where=where, why=f"it has not {missing}")
    return proto


def _foreign(content: mmap.mmap) -> tuple[str, str] | None:
    """What a file is, and what to do about it, if it is clearly something else."""
    head = content[:4096]
    if head[4:8] == b"ORTM":
        return "an ONNX Runtime .ort file", "give the .onnx it was made from"
    if head[4:8] == b"TFL3":
        return "a TensorFlow Lite file", "convert it with tf2onnx"
    # A safetensors file: the length of a JSON header, then the header.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= len(content):
        return "a safetensors file", "it has weights only; give the folder or export the model to ONNX"
    # A model has control codes among its first bytes (08 is the tag of its IR version); text has none.
    is_text = all(byte >= 32 or byte in b"\t\n\r\f" for byte in head)
    for signature, kind in _SIGNATURES.items():
        text = signature in (b"{", b"<", b"")
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(signature) and (is_text or not text):
            return kind
    return None


def tensors(proto: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, str]]:
    """Every tensor of a model, with where it is, in words."""

    def in_nodes(nodes: list[onnx.NodeProto]) -> Iterator[tuple[onnx.TensorProto, str]]:
        for node in nodes:
            for attr in node.attribute:
                if attr.type == onnx.AttributeProto.TENSOR:
                    yield attr.t, f"attribute '{attr.name}' of {describe(node)}"
                elif attr.type == onnx.AttributeProto.TENSORS:
                    for each in attr.tensors:
                        yield each, f"attribute '{attr.name}' of {describe(node)}"
                elif attr.type == onnx.AttributeProto.GRAPH:
                    yield from in_graph(attr.g)
                elif attr.type == onnx.AttributeProto.GRAPHS:
                    for graph in attr.graphs:
                        yield from in_graph(graph)

    def in_graph(graph: onnx.GraphProto) -> Iterator[tuple[onnx.TensorProto, str]]:
        for tensor in graph.initializer:
            yield tensor, f"initializer '{tensor.name}'"
        yield from in_nodes(graph.node)

    yield from in_graph(proto.graph)
    for function in proto.functions:
        yield from in_nodes(function.node)


def describe(node: onnx.NodeProto) -> str:
    """A node in words; one without a name is known by what it computes."""
    if node.name:
        return f"node '{node.name}' ({node.op_type})"
    return f"the {node.op_type} node that makes '{node.output[0] if node.output else ''}'"


def _locate(proto: onnx.ModelProto, path: Path) -> set[Path]:
    """Check all tensors' data, make the locations of external data absolute, and return the data files."""
    external = 0
    sizes: dict[str, tuple[Path, int]] = {}
    for tensor, place in tensors(proto):
        where = f"{path}, {place}"
        expected = _expected_bytes(tensor, where)
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            _check_inline(tensor, expected, where)
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if location not in sizes:
            sizes[location] = _data_file(location, path, where)
        data, size = sizes[location]
        try:
            offset, length = int(entries.get("offset") or 0), int(entries.get("length") or expected)
        except ValueError:
            raise BadInput(
                "the external data has no valid offset and length",
                where=where,
                why=f"they are '{entries.get('offset', '')}' and '{entries.get('length', '')}'",
                hint="export the model again",
            ) from None
        if length != expected or offset < 0:
            raise BadInput(
                "the external data does not fit the tensor's shape",
                where=where,
                why=f"it has {length} bytes at {offset}; dtype and shape {list(tensor.dims)} need {expected}",
                hint="export the model again",
            )
        if offset + length > size:
            raise BadInput(
                "the external data is truncated",
                where=f"{where}, {data}",
                why=f"it needs bytes {offset} to {offset + length}, the file has {size}",
                hint="fetch or export the data file again",
            )
        del tensor.external_data[:]
        if expected < _EXTERNAL_FROM:
            # Shapes and scales are looked at by everyone, and each mapped tensor holds an open file.
            with data.open("rb") as file:
                file.seek(offset)
                tensor.raw_data = file.read(expected)
            tensor.data_location = onnx.TensorProto.DEFAULT
            continue
        external += 1
        for key, value in (("location", str(data)), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
    _allow_open_files(external)
    return {data for data, _ in sizes.values()}


def _expected_bytes(tensor: onnx.TensorProto, where: str) -> int:
    """The bytes of a tensor's elements as ``raw_data`` would hold them; 0 for strings."""
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        dtype = ir.DataType.UNDEFINED
    if dtype == ir.DataType.UNDEFINED:
        raise BadInput("a tensor has an unknown dtype", where=where, why=f"its data type is {tensor.data_type}")
    if any(dim < 0 for dim in tensor.dims):
        raise BadInput("a tensor has a negative dimension", where=where, why=f"its shape is {list(tensor.dims)}")
    return 0 if dtype == ir.DataType.STRING else math.ceil(math.prod(tensor.dims) * dtype.bitwidth / 8)


def _check_inline(tensor: onnx.TensorProto, expected: int, where: str) -> None:
    size = math.prod(tensor.dims)
    dtype = ir.DataType(tensor.data_type)
    if dtype == ir.DataType.STRING:
        have, need, unit = len(tensor.string_data), size, "strings"
    elif tensor.HasField("raw_data"):
        have, need, unit = len(tensor.raw_data), expected, "bytes"
    else:
        field, per_element = _TYPED.get(dtype, ("int32_data", 1.0))
        have, need, unit = len(getattr(tensor, field)), math.ceil(size * per_element), "elements"
    if have != need:
        raise BadInput(
            "a tensor's data does not fit its shape",
            where=where,
            why=f"it has {have} {unit}; {dtype.name} {list(tensor.dims)} needs {need}",
            hint="the file is damaged, or its writer has a bug: export the model again",
        )


_TYPED = {
    ir.DataType.FLOAT: ("float_data", 1.0),
    ir.DataType.COMPLEX64: ("float_data", 2.0),
    ir.DataType.DOUBLE: ("double_data", 1.0),
    ir.DataType.COMPLEX128: ("double_data", 2.0),
    ir.DataType.INT64: ("int64_data", 1.0),
    ir.DataType.UINT64: ("uint64_data", 1.0),
    ir.DataType.UINT32: ("uint64_data", 1.0),
    ir.DataType.INT4: ("int32_data", 0.5),
    ir.DataType.UINT4: ("int32_data", 0.5),
    ir.DataType.FLOAT4E2M1: ("int32_data", 0.5),
    ir.DataType.INT2: ("int32_data", 0.25),
    ir.DataType.UINT2: ("int32_data", 0.25),
}
"""The field that holds a tensor's elements if not ``raw_data``, and its entries per element."""


def _data_file(location: str, path: Path, where: str) -> tuple[Path, int]:
    """The file of external data and its size; it must lie in the folder of the model.

    A model and its data that are both links into one folder (a Hugging Face cache) are in one folder, too.
    """
    if location == str(path.absolute()):
        return path.absolute(), path.stat().st_size
    folder = path.absolute().parent
    data = folder / location
    outside = not location or Path(location).is_absolute() or ".." in Path(location).parts
    real = data.resolve()
    allowed = (folder.resolve(), path.resolve().parent)
    if outside or not any(real.is_relative_to(each) for each in allowed):
        raise BadInput(
            "external data must lie in the folder of the model",
            where=where,
            why=f"its location is '{location}'" + ("" if outside else f", a link to {real}"),
            hint="put the data file beside the model",
        )
    if not data.is_file():
        raise BadInput(
            "the model's external data is missing",
            where=where,
            why=f"there is no file {data}",
            hint="fetch the data file, too, and put it beside the model",
        )
    return data, data.stat().st_size


def _allow_open_files(count: int) -> None:
    """Let the process map this many tensors at once: each holds an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft if soft == resource.RLIM_INFINITY else max(soft, 2 * count + 256)
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if wanted != soft:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
