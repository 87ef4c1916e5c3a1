"""Where the tensors of safetensors files lie, so that they can be mapped instead of loaded.

A safetensors file is the length of a JSON header in eight bytes, the header, and the tensors' elements, little-endian
and row-major: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphc.errors import BadInput

_LARGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""

DTYPES = {
    "BOOL": ir.DataType.BOOL,
    "U8": ir.DataType.UINT8,
    "I8": ir.DataType.INT8,
    "U16": ir.DataType.UINT16,
    "I16": ir.DataType.INT16,
    "U32": ir.DataType.UINT32,
    "I32": ir.DataType.INT32,
    "U64": ir.DataType.UINT64,
    "I64": ir.DataType.INT64,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "F32": ir.DataType.FLOAT,
    "F64": ir.DataType.DOUBLE,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "F8_E5M2": ir.DataType.FLOAT8E5M2,
}
"""The format's names of dtypes that ONNX has too."""


@dataclass(frozen=True)
class Stored:
    """One tensor in a safetensors file.

    Attributes:
        path: The file.
        name: The tensor's name there.
        dtype: Of its elements.
        shape: Its sizes.
        offset: Of its first byte in the file.
        length: Its bytes.
    """

    path: Path
    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    offset: int
    length: int

    def tensor(self, name: str | None = None) -> ir.ExternalTensor:
        """The tensor, mapped when it is looked at."""
        return ir.ExternalTensor(
            self.path, self.offset, self.length, self.dtype, shape=ir.Shape(self.shape), name=name or self.name
        )


def index(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name; only the header is read.

    Raises:
        BadInput: It cannot be read, is no safetensors file, or is truncated.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise _damaged(path, "its header is longer than the file")
            text = file.read(length)
    except OSError as error:
        raise BadInput("cannot read the weights", where=str(path), why=error.strerror or str(error)) from None
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is no JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    start = 8 + length
    return {name: _stored(path, name, entry, start, size) for name, entry in header.items() if name != "__metadata__"}


def _stored(path: Path, name: str, entry: Any, start: int, size: int) -> Stored:
    try:
        kind, shape, (begin, end) = (
            str(entry["dtype"]),
            tuple(map(int, entry["shape"])),
            map(int, entry["data_offsets"]),
        )
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, f"its entry '{name}' is malformed") from None
    dtype = DTYPES.get(kind)
    if dtype is None:
        raise BadInput(f"cannot use weights of dtype {kind}", where=f"{path}, tensor '{name}'")
    if start + end > size:
        raise _damaged(path, f"it has {size:,} bytes, tensor '{name}' ends at {start + end:,}")
    if begin < 0 or min(shape, default=0) < 0 or (end - begin) != math.prod(shape) * dtype.bitwidth // 8:
        raise _damaged(path, f"the size of tensor '{name}' does not fit its shape")
    return Stored(path, name, dtype, shape, start + begin, end - begin)


def _damaged(path: Path, why: str) -> BadInput:
    return BadInput(
        "the weights are damaged", where=str(path), why=why, hint="copy or download the file again, it may be cut short"
    )


def shards(path: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint in several files, by its ``*.safetensors.index.json``.

    Raises:
        BadInput: The index or a file is missing or damaged, or a tensor is not where the index says.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        places: Mapping[str, str] = {str(k): str(v) for k, v in document["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BadInput("cannot read the index of the weights", where=str(path)) from None
    names = sorted(set(places.values()))
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise BadInput(
            f"{len(missing)} of {len(names)} files of weights are missing",
            where=str(path.parent),
            why=", ".join(missing[:3]) + (", ..." if len(missing) > 3 else ""),
            hint="copy or download them into the folder",
        )
    if any(Path(name).name != name for name in names):
        raise BadInput("the index names weights outside its folder", where=str(path))
    files = {name: index(path.parent / name) for name in names}
    lost = [tensor for tensor, file in places.items() if tensor not in files[file]]
    if lost:
        raise BadInput(
            "the weights do not fit their index", where=str(path), why=f"'{places[lost[0]]}' has no tensor '{lost[0]}'"
        )
    return {name: stored for file in files.values() for name, stored in file.items()}
