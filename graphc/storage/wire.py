"""ONNX files without their weights: the weights never pass through protobuf.

``strip`` reads the protobuf wire format of a model and leaves out the data of large tensors, noting where in
the file it lies; ``splice`` is its inverse. Both touch only messages that hold a large tensor, so that they
cost next to nothing, and a model of 2 GB is read and written with some MB of memory.

The wire format: https://protobuf.dev/programming-guides/encoding; the field numbers: ``onnx.proto``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol, TypeAlias


class Bytes(Protocol):
    """What ``bytes`` and ``mmap`` share."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: slice, /) -> bytes: ...
    def find(self, sub: bytes, start: int, end: int, /) -> int: ...


class Malformed(ValueError):
    """The bytes are no protobuf message: the text says where, ``truncated`` whether the end is missing."""

    def __init__(self, why: str, truncated: bool = False) -> None:
        super().__init__(why)
        self.truncated = truncated


_MESSAGES = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "SparseTensor": {},
    "Training": {},
    "Tensor": {},
}
"""The fields of each message that may hold a large tensor, and the message that each one is.

Sparse tensors and training information are read whole."""

_FLOAT_DATA, _RAW_DATA, _DOUBLE_DATA = 4, 9, 10
_DATA_FIELDS = (_FLOAT_DATA, _RAW_DATA, _DOUBLE_DATA)
"""Fields of a tensor that are its elements in little-endian order (float_data and double_data are packed)."""
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14


def _varint(data: Bytes, at: int, end: int) -> tuple[int, int]:
    """The number at ``at`` and the position after it."""
    shift = result = 0
    for byte in data[at : min(at + 10, end)]:
        result |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return result, at
        shift += 7
    raise Malformed(f"a number at byte {at} does not end", truncated=at >= end)


def _encode(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _tagged(field: int, length: int) -> bytes:
    """What stands before a length-delimited field."""
    return _encode(field << 3 | 2) + _encode(length)


def _fields(data: Bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Each field of a message: number, where its tag, its content and the next field begin.

    For fields that are not length-delimited (numbers) content and next field are the same place.
    """
    at = start
    while at < end:
        tag_at = at
        tag, at = _varint(data, at, end)
        field, kind = tag >> 3, tag & 7
        if kind == 2:
            length, at = _varint(data, at, end)
            content, at = at, at + length
        elif kind in (0, 1, 5):
            content = at = _varint(data, at, end)[1] if kind == 0 else at + (8 if kind == 1 else 4)
        else:
            raise Malformed(f"unknown field type {kind} at byte {tag_at}")
        if field == 0:
            raise Malformed(f"a field numbered 0 at byte {tag_at}")
        if at > end:
            raise Malformed(f"the field at byte {tag_at} ends {at - end} bytes after the end", truncated=True)
        yield field, tag_at, content, at


def strip(data: Bytes, location: str, threshold: int) -> bytes:
    """A model's bytes, every tensor of ``threshold`` bytes or more made external data of the file itself.

    Args:
        data: The whole file, e.g. an ``mmap``.
        location: What to write as the ``location`` of the external data.
        threshold: Bytes.

    Raises:
        Malformed: It is no protobuf message; below the top level only large fields are looked at.
    """

    def message(kind: str, start: int, end: int) -> bytes:
        if kind == "Tensor":
            return tensor(start, end)
        inner, out, copied = _MESSAGES[kind], [], start
        for field, tag_at, content, after in _fields(data, start, end):
            if after - content >= threshold and field in inner:
                changed = message(inner[field], content, after)
                out += [data[copied:tag_at], _tagged(field, len(changed)), changed]
                copied = after
        return b"".join(out) + data[copied:end]

    def tensor(start: int, end: int) -> bytes:
        fields = list(_fields(data, start, end))
        held = [each for each in fields if each[0] in _DATA_FIELDS]
        if len(held) != 1 or held[0][3] - held[0][2] < threshold:
            return data[start:end]
        _, tag_at, content, after = held[0]
        entries = [("location", location), ("offset", str(content)), ("length", str(after - content))]
        return data[start:tag_at] + data[after:end] + external(entries)

    return message("Model", 0, len(data))


def external(entries: Sequence[tuple[str, str]]) -> bytes:
    """The fields of a tensor that say that its data lies elsewhere."""
    out = b""
    for key, value in entries:
        pair = b"".join(_tagged(n, len(text.encode())) + text.encode() for n, text in ((1, key), (2, value)))
        out += _tagged(_EXTERNAL_DATA, len(pair)) + pair
    return out + _encode(_DATA_LOCATION << 3) + b"\x01"


@dataclass(frozen=True)
class Inline:
    """A tensor's data, to be written in place.

    Attributes:
        nbytes: Its length.
        write: Writes it.
    """

    nbytes: int
    write: Callable[[BinaryIO], object]


MARK = "graphc-inline:"
"""A tensor whose external data is at ``MARK + name + ";"`` gets ``inline[name]`` as its raw data."""

_Piece: TypeAlias = bytes | Inline


def splice(data: bytes, inline: dict[str, Inline]) -> tuple[list[_Piece], int]:
    """The bytes of a model with marked tensors filled in.

    Args:
        data: A serialized model in which tensors are marked, see ``MARK``.
        inline: The data by mark.

    Returns:
        What to write one after the other, and the length of all of it.
    """
    mark = MARK.encode()

    def message(kind: str, start: int, end: int) -> tuple[list[_Piece], int]:
        if kind == "Tensor":
            return tensor(start, end)
        inner, copied, length = _MESSAGES[kind], start, 0
        out: list[_Piece] = []
        marked = data.find(mark, start, end)
        for field, tag_at, content, after in _fields(data, start, end):
            if marked < 0:
                break
            if content <= marked < after and field in inner:
                pieces, size = message(inner[field], content, after)
                head = data[copied:tag_at] + _tagged(field, size)
                out += [head, *pieces]
                length += len(head) + size
                copied = after
            if marked < after:
                marked = data.find(mark, after, end)
        return [*out, data[copied:end]], length + end - copied

    def tensor(start: int, end: int) -> tuple[list[_Piece], int]:
        name, kept = "", b""
        for field, tag_at, content, after in _fields(data, start, end):
            if field == _EXTERNAL_DATA and (at := data.find(mark, content, after)) >= 0:
                name = data[at + len(mark) : data.find(b";", at, after)].decode()
            elif field not in (_EXTERNAL_DATA, _DATA_LOCATION):
                kept += data[tag_at:after]
        held = inline[name]
        kept += _tagged(_RAW_DATA, held.nbytes)
        return [kept, held], len(kept) + held.nbytes

    return message("Model", 0, len(data))
