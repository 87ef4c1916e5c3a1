"""Models on disk and in memory: load, save, hash, count.

Weights stay where they are, in the file of the model or in a data file beside it, and are mapped when they
are looked at; saving writes them one after the other. So a model may be larger than memory.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import onnx_ir as ir

from graphc import edit
from graphc.errors import BadInput
from graphc.storage import files, wire
from graphc.storage.tensors import constants, digest, write_checked

if TYPE_CHECKING:
    import onnx

INLINE_LIMIT = 3 << 29
"""Bytes of weights (1.5 GiB) above which they go to a data file; protobuf ends at 2 GiB."""

_EXTERNAL_FROM = 1024
"""Bytes from which a constant goes to the data file when there is one."""


def load(path: Path) -> ir.Model:
    """Load an ONNX model; large weights stay on disk and are mapped when they are read.

    Large constants are ``ir.ExternalTensor`` with absolute paths; they must only be written by ``save``.

    Args:
        path: An ``.onnx`` file.

    Raises:
        BadInput: It is no file, no ONNX, truncated, its external data is missing or outside its folder, or
            its graph is not well-formed; the message says where and what to do.
    """
    from graphc.storage import wellformed
    from graphc.storage.container import read

    proto = read(path).proto
    wellformed.check(proto, path)
    return from_proto(proto, path)


def from_proto(proto: onnx.ModelProto, path: Path) -> ir.Model:
    """A well-formed model as ``onnx_ir`` has it.

    Raises:
        BadInput: It has something that ``onnx_ir`` does not know.
    """
    try:
        model: ir.Model = ir.from_proto(proto)
    except (ir.serde.SerdeError, ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise BadInput("cannot use this ONNX model", where=str(path), why=_innermost(error)) from error
    return model


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class _Region:
    """Where a tensor's bytes are in the data file."""

    def __init__(self, offset: int, length: int) -> None:
        self.offset, self.length = offset, length


def nbytes(model: ir.Model) -> int:
    """Bytes of all constants of a model; a tensor used twice counts once."""
    return sum(t.nbytes for t in {id(t): t for t in constants(model)}.values() if t.dtype != ir.DataType.STRING)


def parameters(model: ir.Model) -> int:
    """How many trained numbers a model has: elements of its constants of float or low-precision integer type.

    Scalars (an epsilon, a scale) and 32 and 64 bit integers (shapes, indices) are none; a tensor used twice
    counts once.
    """
    weights = {id(t): t for t in constants(model) if t.size > 1 and _is_weight(t.dtype)}
    return sum(int(t.size) for t in weights.values())


def _is_weight(dtype: ir.DataType) -> bool:
    if dtype == ir.DataType.BOOL:
        return False
    return dtype.is_floating_point() or (dtype.is_integer() and dtype.bitwidth <= 8)


def _with_tensors(model: ir.Model, change: Callable[[ir.TensorProtocol], ir.TensorProtocol]) -> ir.Model:
    """A copy of a model in which every tensor that is not one of strings is what ``change`` makes of it."""
    copy = model.clone()

    def changed(tensor: ir.TensorProtocol, name: str | None) -> ir.TensorProtocol:
        if tensor.dtype == ir.DataType.STRING:
            return tensor
        new = change(tensor)
        new.name, new.doc_string = name, tensor.doc_string
        new.metadata_props.update(tensor.metadata_props)
        return new

    for graph in edit.graphs(copy):
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = changed(value.const_value, value.name)
        for node in graph:
            for key, attr in list(node.attributes.items()):
                if attr.is_ref():
                    continue
                if attr.type == ir.AttributeType.TENSOR:
                    held: ir.TensorProtocol = attr.value
                    node.attributes[key] = ir.AttrTensor(key, changed(held, held.name), attr.doc_string)
                elif attr.type == ir.AttributeType.TENSORS:
                    several = [changed(each, each.name) for each in attr.value]
                    node.attributes[key] = ir.AttrTensors(key, several, attr.doc_string)
    return copy


def _elsewhere(tensor: ir.TensorProtocol, location: str, region: _Region | None = None) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        location,
        region.offset if region else None,
        region.length if region else None,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
    )


def content_hash(model: ir.Model) -> str:
    """The SHA-256 of what a model says, structure and weights, in hexadecimal.

    It does not depend on whether the weights are in the model's file or beside it.
    """
    copy = _with_tensors(model, lambda t: _elsewhere(t, digest(t)))
    return hashlib.sha256(ir.to_proto(copy).SerializeToString(deterministic=True)).hexdigest()


def text(model: ir.Model) -> str:
    """A model as text to read and compare: small constants in full, large ones by their hash."""
    from graphc.storage.textform import lines

    return "\n".join(lines(model)) + "\n"


def serialize(model: ir.Model) -> bytes:
    """A model as one ONNX file in memory, weights included.

    Raises:
        BadInput: It would not fit in 2 GiB.
    """
    out = io.BytesIO()
    _write_inline(model, out, {})
    return out.getvalue()


def save(model: ir.Model, path: Path, *, inline_limit: int = INLINE_LIMIT) -> list[Path]:
    """Write a model as an ONNX file, with a data file beside it if its weights are large.

    The file appears at once when it is complete; the data file is named by its content and stands there
    before. The same model gives the same bytes. Weights are read one at a time. Data files of an earlier
    output of this name are removed unless another model in the folder uses them.

    Args:
        model: Any model; it is not changed.
        path: Where to; an existing file is replaced.
        inline_limit: Bytes of weights above which they go to a data file.

    Returns:
        The files written, the model first.

    Raises:
        BadInput: The output is a file the model's weights are in, or cannot be written.
    """
    path = path.absolute()
    sources = {Path(t.path) for t in constants(model) if isinstance(t, ir.ExternalTensor)}
    files.check_destination(path, tuple(sources))
    beside = nbytes(model) > inline_limit
    with files.temporary(path) as main:
        if not beside:
            _write_inline(model, main.file, {})
            with files.exclusive(path.parent):
                main.place(path)
                remove_stale(path, sources)
            return [path]
        with files.temporary(path) as data:
            regions, checksum = _write_data([model], data.file)
            data_path = path.with_name(f"{path.stem}.{checksum[:12]}.data")
            _write_inline(model, main.file, regions, data_path.name)
            with files.exclusive(path.parent):
                data.place(data_path)
                main.place(path)
                remove_stale(path, sources | {data_path})
        return [path, data_path]


def save_together(models: Mapping[str, ir.Model], folder: Path) -> list[Path]:
    """Write several models, ``NAME.onnx`` each, with one data file in which equal weights stand once.

    Args:
        models: By name; they are not changed.
        folder: Where to; it exists, and nobody else writes there.

    Returns:
        The files written, the data last.

    Raises:
        BadInput: They cannot be written.
    """
    written = []
    with files.temporary(folder / "weights.data") as data:
        regions, checksum = _write_data(list(models.values()), data.file)
        place = folder / f"weights.{checksum[:12]}.data"
        for name, model in models.items():
            path = folder / f"{name}.onnx"
            with files.temporary(path) as main:
                _write_inline(model, main.file, regions, place.name)
                main.place(path)
            written.append(path)
        data.place(place)
    return [*written, place]


def _write_data(models: Sequence[ir.Model], file: BinaryIO) -> tuple[dict[int, _Region], str]:
    """Write the large tensors of models one after the other; equal ones share a region.

    Returns:
        Regions by ``id`` of the tensor, and a checksum of the file.
    """
    regions: dict[int, _Region] = {}
    known: dict[tuple[str, int], _Region] = {}
    checksum, end = hashlib.sha256(), 0
    for tensor in (each for model in models for each in constants(model)):
        if tensor.dtype == ir.DataType.STRING or tensor.nbytes < _EXTERNAL_FROM or id(tensor) in regions:
            continue
        # Runtimes map whole pages, and vector instructions like cache lines.
        alignment = mmap.PAGESIZE if tensor.nbytes >= 1 << 20 else 64
        offset = -(-end // alignment) * alignment
        file.seek(offset)
        key = write_checked(tensor, file)
        if key not in known:
            known[key] = _Region(offset, key[1])
            end = offset + key[1]
            checksum.update(f"{offset} {key}".encode())
        regions[id(tensor)] = known[key]
    file.truncate(end)
    return regions, checksum.hexdigest()


def _write_inline(model: ir.Model, file: BinaryIO, regions: dict[int, _Region], location: str = "") -> None:
    """Write the ONNX file itself; tensors that have no region in the data file go into it."""
    inline: dict[str, wire.Inline] = {}

    def place(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        region = regions.get(id(tensor))
        if region is not None:
            return _elsewhere(tensor, location, region)
        mark = str(len(inline))
        inline[mark] = wire.Inline(tensor.nbytes, partial(write_checked, tensor))
        return _elsewhere(tensor, f"{wire.MARK}{mark};")

    stripped = ir.to_proto(_with_tensors(model, place)).SerializeToString(deterministic=True)
    pieces, length = wire.splice(stripped, inline)
    if length >= 1 << 31:
        raise BadInput("the model does not fit in one file", why="ONNX files end at 2 GiB")
    for piece in pieces:
        if isinstance(piece, bytes):
            file.write(piece)
        else:
            piece.write(file)


def remove_stale(path: Path, keep: set[Path]) -> None:
    """Remove data files that earlier outputs of this name left and no model in the folder names."""
    ours = re.compile(re.escape(path.stem) + r"\.[0-9a-f]{12}\.data")
    stale = {p for p in path.parent.iterdir() if ours.fullmatch(p.name)} - keep
    if not stale:
        return
    for other in path.parent.glob("*.onnx"):
        # An empty file cannot be mapped.
        with (
            suppress(OSError, ValueError),
            other.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            stale = {p for p in stale if content.find(p.name.encode()) < 0}
    for each in stale:
        with suppress(OSError):
            each.unlink()
