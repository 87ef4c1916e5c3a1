"""Reads small safetensors files: masks and scores. The format is a JSON header and raw little-endian arrays."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from graphc.edit import Array
from graphc.errors import BadInput

_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
    "U64": "<u8", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip


def read(path: Path) -> dict[str, Array]:
    """All arrays of a safetensors file, by name.

    Raises:
        BadInput: The file cannot be read, is no safetensors file, is truncated, or holds an unknown dtype.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput("cannot read the file", where=str(path), why=error.strerror or str(error)) from None
    bad = BadInput("this is not a safetensors file", where=str(path), hint="write it with safetensors.numpy.save_file")
    if len(data) < 8:
        raise bad
    (length,) = struct.unpack("<Q", data[:8])
    if length > len(data) - 8:
        raise bad
    try:
        header = json.loads(data[8 : 8 + length])
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise bad from None
    if not isinstance(header, dict):
        raise bad
    body = data[8 + length :]
    return {name: _array(path, name, entry, body) for name, entry in header.items() if name != "__metadata__"}


def _array(path: Path, name: str, entry: object, body: bytes) -> Array:
    broken = BadInput(f"the entry '{name}' is broken", where=str(path))
    if not isinstance(entry, dict):
        raise broken
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise broken
    if dtype not in _DTYPES:
        raise BadInput(f"'{name}' has dtype {dtype}", where=str(path), hint=f"it may be: {', '.join(_DTYPES)}")
    start, end = offsets
    kind = np.dtype(_DTYPES[dtype])
    if not 0 <= start <= end <= len(body) or end - start != int(np.prod(shape, dtype=np.int64)) * kind.itemsize:
        raise BadInput(f"the data of '{name}' is truncated or has another size than its shape", where=str(path))
    return np.frombuffer(body[start:end], kind).reshape(shape)
