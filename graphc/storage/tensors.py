"""The tensors of a model: which there are, and their bytes, written and hashed in pieces."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.errors import BadInput

_CHUNK = 1 << 24

_digests: weakref.WeakKeyDictionary[ir.TensorProtocol, str] = weakref.WeakKeyDictionary()
"""Hashes of tensors, which are immutable."""


class _Sink:
    """A file that hashes and counts what is written to it."""

    def __init__(self, file: BinaryIO | None = None) -> None:
        self.file, self.hash, self.length = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK):
            part = view[start : start + _CHUNK]
            self.hash.update(part)
            if self.file is not None:
                self.file.write(part)
        self.length += len(view)
        return len(view)


def write_tensor(tensor: ir.TensorProtocol, file: Any) -> None:
    """Write a tensor's elements as ONNX's ``raw_data`` has them, in pieces where they are on disk.

    Args:
        tensor: Any tensor but one of strings.
        file: Whatever has ``write``.

    Raises:
        BadInput: The tensor is on disk and cannot be read.
    """
    if isinstance(tensor, ir.ExternalTensor):
        _copy(tensor, file)
    elif tensor.dtype.bitwidth >= 8:
        for part in _pieces(tensor.numpy()):
            file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    else:
        file.write(tensor.tobytes())


def _pieces(array: np.ndarray[Any, np.dtype[Any]]) -> Iterator[np.ndarray[Any, np.dtype[Any]]]:
    """Parts of an array in row-major order; a view of scattered elements in parts of about ``_CHUNK`` bytes."""
    if array.flags.c_contiguous or array.nbytes <= _CHUNK:
        yield array
        return
    rows = max(len(array) * _CHUNK // array.nbytes, 1)
    for start in range(0, len(array), rows):
        yield from (
            _pieces(array[start : start + rows]) if rows == 1 and array.ndim > 1 else (array[start : start + rows],)
        )


def _copy(tensor: ir.ExternalTensor, file: Any) -> None:
    left = tensor.nbytes
    try:
        with Path(tensor.path).open("rb") as source:
            source.seek(tensor.offset or 0)
            while left and (chunk := source.read(min(left, _CHUNK))):
                left -= len(chunk)
                file.write(chunk)
    except FileNotFoundError:
        left = max(left, 1)
    if left:
        raise BadInput(
            "cannot read the weights",
            where=f"{tensor.path}, tensor '{tensor.name}'",
            why="the file was removed or shortened while it was in use",
        )


def write_checked(tensor: ir.TensorProtocol, file: BinaryIO) -> tuple[str, int]:
    """Write a tensor's elements and see that it was all of them; returns their ``digest``, and how many bytes.

    Raises:
        BadInput: See ``write_tensor``.
        ValueError: Its shape and dtype say another length.
    """
    sink = _Sink(file)
    write_tensor(tensor, sink)
    if sink.length != tensor.nbytes:
        raise ValueError(f"tensor '{tensor.name}' has {sink.length} bytes, its shape and dtype say {tensor.nbytes}")
    return _digests.setdefault(tensor, sink.hash.hexdigest()), sink.length


def digest(tensor: ir.TensorProtocol) -> str:
    """The SHA-256 of a tensor's elements, in hexadecimal; it is computed once."""
    known = _digests.get(tensor)
    if known is None:
        if tensor.dtype == ir.DataType.STRING:
            sink = _Sink()
            for item in np.asarray(tensor.numpy()).reshape(-1).tolist():
                encoded = item if isinstance(item, bytes) else str(item).encode()
                sink.write(f"{len(encoded)}:".encode() + encoded)
        else:
            sink = _Sink()
            write_tensor(tensor, sink)
        known = _digests[tensor] = sink.hash.hexdigest()
    return known


def constants(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Every tensor of a model: initializers, and attributes of nodes, subgraphs and functions included."""
    for graph in edit.graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
        for node in graph:
            for attr in node.attributes.values():
                if attr.is_ref():
                    continue
                # Attr.as_tensor() checks a protocol, which computes all properties of the tensor.
                if attr.type == ir.AttributeType.TENSOR:
                    yield attr.value
                elif attr.type == ir.AttributeType.TENSORS:
                    yield from attr.value
