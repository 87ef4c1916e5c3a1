"""Arrays as samples.

- ``data.npz``: one array for each input, under its name. An array has either the rank of its input, and then its rows
  are samples where the input's first dimension is dynamic; or one axis more, and then its first axis counts the
  cases. What has no such axis (a sample rate, an initial state) is the same in every case. An array ``labels`` (or
  ``label``) that is no input says what the first output should be, for each row or each case.
- ``data.npy``: the same for a model with one input.
- a folder with one ``.npy`` for each input, named after it; or with any number of ``.npz`` files (for a model with one
  input: ``.npy`` as well), read in the order of their names as above.

Rows are fed in batches of up to ``BATCH``, or as many as a static first dimension has; rows that do not fill the last
batch of a static dimension are left out. Integers and floats are converted to the precision of the input, but never
one into the other. Nothing is ever unpickled.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc.contract import Arrays
from graphc.data.samples import Samples
from graphc.errors import BadInput, nearest

Array = np.ndarray[Any, np.dtype[Any]]

BATCH = 16
"""Rows of a dynamic first dimension that make one case."""


LABELS = ("labels", "label")
"""Names of an array that says what the outputs should be."""


def load(path: Path, model: ir.Model) -> Samples:
    """Read arrays that fit a model.

    Raises:
        BadInput: They cannot be read, or do not fit; the message names the file and the array.
    """
    inputs = {v.name or "": v for v in model.graph.inputs}
    cases: list[Arrays] = []
    labels: list[Array] = []
    for where, arrays in _sources(path, inputs):
        given = {name: array for name, array in arrays.items() if name in inputs or name not in LABELS}
        made = _cases(given, inputs, where)
        label = next((arrays[name] for name in LABELS if name in arrays and name not in inputs), None)
        if label is not None:
            labels += _labels(label, made, given, inputs, where)
        cases += made
    if labels and len(labels) != len(cases):
        raise BadInput("some files have labels and others not", where=str(path))
    return Samples(cases, labels)


def fitting(case: Mapping[str, Array], model: ir.Model, where: str) -> Arrays:
    """One case in the dtypes of the interface.

    Raises:
        BadInput: It does not fit.
    """
    inputs = {v.name or "": v for v in model.graph.inputs}
    _check_names(case, inputs, where)
    made: dict[str, Array] = {}
    for name, array in case.items():
        value = inputs[name]
        made[name] = _typed(array, value, where)
        if value.shape is None:
            continue
        dims = [_size(d) for d in value.shape]
        if array.ndim != len(dims):
            raise BadInput(
                f"the data for input '{name}' has {array.ndim} dimensions, not {len(dims)}",
                where=where,
                why=f"its shape is {list(array.shape)}, the input's {_text(dims)}",
            )
        _check_shape(name, array.shape, dims, where)
    _check_symbols(made, inputs, where)
    return made


def _labels(
    label: Array, cases: Sequence[Arrays], given: Mapping[str, Array], inputs: Mapping[str, ir.Value], where: str
) -> list[Array]:
    """The labels of every case, which are given for each row, or for each case."""
    if label.dtype.kind == "f" and np.isnan(label).any():
        raise BadInput("the labels have NaN", where=where)
    stacked = any(a.ndim == len(inputs[n].shape or ()) + 1 for n, a in given.items() if inputs[n].shape is not None)
    if stacked and len(label) == len(cases):
        return list(label)
    counts = [next((len(a) for n, a in case.items() if a.ndim and len(given[n]) > 1), 1) for case in cases]
    if label.ndim and len(label) >= sum(counts) and not stacked:
        rows = max(len(a) for a in given.values() if a.ndim)
        if len(label) == rows:
            ends = np.cumsum(counts)
            return np.split(label[: ends[-1]], ends[:-1]) if len(ends) else []
    raise BadInput(
        "the labels do not fit the samples", where=where, why=f"their shape is {list(label.shape)}, cases {len(cases)}"
    )


def _sources(path: Path, inputs: Mapping[str, ir.Value]) -> list[tuple[str, dict[str, Array]]]:
    """Each file, or the folder, with its arrays by input name."""
    required = [name for name, value in inputs.items() if not value.is_initializer()]
    if path.is_file():
        return [(str(path), _read(path, required))]
    if not path.is_dir():
        raise BadInput(
            "there is no such data",
            where=str(path),
            hint="there is .npz, .npy, text, a folder of arrays or pictures, FILE.py:FUNCTION",
        )
    files = sorted(p for p in path.iterdir() if p.suffix in (".npy", ".npz"))
    if not files:
        raise BadInput("the folder has no .npy or .npz files", where=str(path))
    single = [p for p in files if p.suffix == ".npy"]
    named = {p.stem for p in single} - set(LABELS)
    if len(single) == len(files) and (len(required) > 1 or named <= inputs.keys()):
        return [(str(path), {p.stem: _npy(p) for p in single})]
    return [(str(p), _read(p, required)) for p in files]


def _read(path: Path, required: Sequence[str]) -> dict[str, Array]:
    if path.suffix == ".npy":
        if len(required) != 1:
            raise BadInput(
                f"one array is not enough for a model with {len(required)} inputs",
                where=str(path),
                hint=f"give a .npz with arrays named {', '.join(required)}",
            )
        return {required[0]: _npy(path)}
    if path.suffix != ".npz":
        raise BadInput(
            "data cannot be of this form",
            where=str(path),
            hint="give .npz, .npy, a .txt with --tokenizer, a folder of arrays or pictures, or FILE.py:FUNCTION",
        )
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from None
    named = [name for name in arrays if name in required or name not in LABELS]
    if len(named) == 1 and len(required) == 1:
        return {required[0] if name in named else name: array for name, array in arrays.items()}
    return arrays


def _npy(path: Path) -> Array:
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> BadInput:
    pickled = "allow_pickle" in str(error) or "Python objects" in str(error)
    return BadInput(
        "the data cannot be read",
        where=str(path),
        why="it holds pickled Python objects, which can run code when read" if pickled else str(error),
        hint="save plain arrays: np.savez(path, input_name=array)" if pickled else "",
    )


def _cases(arrays: Mapping[str, Array], inputs: Mapping[str, ir.Value], where: str) -> list[Arrays]:
    _check_names(arrays, inputs, where)
    split = {name: _split(name, _typed(array, inputs[name], where), inputs[name], where)
             for name, array in arrays.items()}  # fmt: skip
    counts = {len(parts) for parts in split.values() if len(parts) != 1}
    if len(counts) > 1:
        sizes = ", ".join(f"'{name}' {len(arrays[name])}" for name in split if len(split[name]) > 1)
        raise BadInput("the arrays hold different numbers of samples", where=where, why=sizes)
    if 0 in counts:
        return []
    count = counts.pop() if counts else 1
    cases: list[Arrays] = [
        {name: parts[i if len(parts) > 1 else 0] for name, parts in split.items()} for i in range(count)
    ]
    for case in cases[:1] + cases[-1:]:
        _check_symbols(case, inputs, where)
    return cases


def _check_names(arrays: Mapping[str, Array], inputs: Mapping[str, ir.Value], where: str) -> None:
    for name in arrays:
        if name not in inputs:
            raise BadInput(f"the model has no input '{name}'", where=where, hint=nearest(name, inputs))
    missing = [n for n, v in inputs.items() if n not in arrays and not v.is_initializer()]
    if missing:
        raise BadInput(f"there is no array for input '{missing[0]}'", where=where)


def _typed(array: Array, value: ir.Value, where: str) -> Array:
    """The array in the dtype of an input, converted within its kind."""
    name = value.name
    assert value.dtype is not None
    wanted = value.dtype
    if wanted == ir.DataType.STRING:
        if array.dtype.kind not in "US":
            raise _wrong_dtype(array, value, where)
        return array.astype(object)
    target = wanted.numpy()
    if array.dtype.kind == "V" and array.dtype.itemsize == target.itemsize:
        return array.view(target)  # NumPy files do not know bfloat16 and the like
    if wanted.is_floating_point() and array.dtype.kind == "f":
        if np.isnan(array).any():
            raise BadInput(f"the data for input '{name}' has NaN", where=where)
        return array if array.dtype == target else array.astype(target)
    if wanted.is_integer() and array.dtype.kind in "iu":
        converted = array if array.dtype == target else array.astype(target)
        if array.size and not np.array_equal(converted.astype(array.dtype), array):
            raise BadInput(f"the data for input '{name}' does not fit into {wanted.name.lower()}", where=where)
        return converted
    if wanted == ir.DataType.BOOL and array.dtype.kind == "b":
        return array
    raise _wrong_dtype(array, value, where)


def _wrong_dtype(array: Array, value: ir.Value, where: str) -> BadInput:
    assert value.dtype is not None
    return BadInput(
        f"the data for input '{value.name}' is {array.dtype}, not {value.dtype.name.lower()}",
        where=where,
        hint="convert it as the model's preprocessing does",
    )


def _split(name: str, array: Array, value: ir.Value, where: str) -> list[Array]:
    """The array of every case; one for what is the same in all cases."""
    if value.shape is None:
        return [array]
    dims = [_size(d) for d in value.shape]
    rank = len(dims)
    if array.ndim == rank + 1:
        _check_shape(name, array.shape[1:], dims, where)
        return list(array)
    if array.ndim != rank:
        raise BadInput(
            f"the data for input '{name}' has {array.ndim} dimensions, not {rank} or, with samples, {rank + 1}",
            where=where,
            why=f"its shape is {list(array.shape)}, the input's {_text(dims)}",
        )
    if rank == 0:
        return [array]
    first = dims[0]
    rows = len(array)
    if isinstance(first, int):
        if rows and rows < first:
            raise BadInput(
                f"the data for input '{name}' has too few samples",
                where=where,
                why=f"one batch has {first}, the data {rows}",
            )
        _check_shape(name, (first, *array.shape[1:]), dims, where)
        batch = max(first, 1)
        return [array[i : i + batch] for i in range(0, rows - batch + 1, batch)]
    _check_shape(name, array.shape, dims, where)
    return [array[i : i + BATCH] for i in range(0, rows, BATCH)]


def _size(size: int | ir.SymbolicDim) -> int | str:
    if isinstance(size, int):
        return size if size >= 0 else ""
    return size.value or ""


def _check_shape(name: str, shape: Sequence[int], dims: Sequence[int | str], where: str) -> None:
    for axis, (size, dim) in enumerate(zip(shape, dims, strict=True)):
        if isinstance(dim, int) and size != dim:
            raise BadInput(
                f"the data for input '{name}' has size {size} in dimension {axis}, not {dim}",
                where=where,
                why=f"its shape is {list(shape)}, the input's {_text(dims)}",
            )


def _check_symbols(case: Arrays, inputs: Mapping[str, ir.Value], where: str) -> None:
    """Dimensions of one name must be of one size."""
    known: dict[str, tuple[str, int]] = {}
    for name, array in case.items():
        shape = inputs[name].shape
        for size, dim in zip(array.shape, shape or (), strict=False):
            symbol = dim.value if not isinstance(dim, int) else None
            if not symbol or not symbol.isidentifier():
                continue
            other, expected = known.setdefault(symbol, (name, size))
            if size != expected:
                raise BadInput(
                    f"the data disagrees on the dimension '{symbol}'",
                    where=where,
                    why=f"it is {expected} in '{other}' and {size} in '{name}'",
                )


def _text(dims: Sequence[int | str]) -> str:
    return "[" + ", ".join(str(d) or "?" for d in dims) + "]"
