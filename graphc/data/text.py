"""Text as samples: windows of tokens for a language model, or padded lines for an encoder.

Of the model's inputs, the tokens are ``input_ids`` or the one that indexes a table; a mask gets ones, positions count
from 0, token types are 0, and what a cache holds is of length zero. Anything else needs a function, see
:mod:`graphc.data.function`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc.checking.inputs import Input, described
from graphc.contract import Arrays
from graphc.data.arrays import BATCH
from graphc.data.samples import Samples
from graphc.data.spec import Spec
from graphc.errors import BadInput
from graphc.shapes.expressions import Sizes, evaluate, symbols_in

Array = np.ndarray[Any, np.dtype[Any]]


def load(spec: Spec, model: ir.Model) -> Samples:
    """Read a text file.

    Raises:
        BadInput: It cannot be read, there is no tokenizer, tokens do not fit the table, or the model has an input
            that text cannot fill.
    """
    where = spec.path
    try:
        written = Path(spec.path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput("the text cannot be read", where=where, why=str(error)) from None
    inputs = [described(model, v) for v in model.graph.inputs if not v.is_initializer()]
    tokens = _tokens_input(inputs, where)
    tokenizer = _tokenizer(spec)
    if spec.lines:
        rows = [e.ids for e in tokenizer.encode_batch([line for line in written.splitlines() if line.strip()])]
        cases = list(_padded(rows, tokens, spec))
    else:
        cases = list(_windows(tokenizer.encode(written, add_special_tokens=False).ids, tokens, spec))
    bound = min((b for b in tokens.role.bounds if isinstance(b, int)), default=0)
    largest = max((int(ids.max(initial=0)) for ids, _ in cases), default=0)
    if bound and largest >= bound:
        raise BadInput(
            "the tokenizer is another model's",
            where=str(spec.tokenizer),
            why=f"it makes token {largest}, and the model's table has {bound} rows",
        )
    return Samples([_case(inputs, tokens, ids, mask, where) for ids, mask in cases])


def _tokenizer(spec: Spec) -> Any:
    if spec.tokenizer is None:
        raise BadInput("text needs a tokenizer", where=spec.path, hint="--tokenizer FOLDER, or a tokenizer.json")
    path = spec.tokenizer / "tokenizer.json" if spec.tokenizer.is_dir() else spec.tokenizer
    if not path.is_file():
        raise BadInput("there is no such tokenizer", where=str(path), hint="give a folder with a tokenizer.json")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise BadInput("tokenizers is not installed", why=str(error), hint="pip install tokenizers") from None
    try:
        found = Tokenizer.from_file(str(path))
    except Exception as error:  # its errors share no other base
        raise BadInput("the tokenizer cannot be read", where=str(path), why=str(error)) from None
    found.no_truncation()
    found.no_padding()
    return found


def _tokens_input(inputs: Sequence[Input], where: str) -> Input:
    """The input that takes the tokens."""
    by_name = {each.name: each for each in inputs}
    if "input_ids" in by_name:
        return by_name["input_ids"]
    fitting = [
        each
        for each in inputs
        if each.dtype.is_integer() and len(each.dims) == 2 and each.index and not _counts(each) and not _kind(each)
    ]
    if len(fitting) != 1:
        raise BadInput(
            "the model takes no text",
            where=where,
            why=f"{len(fitting) or 'none'} of its inputs (batch, length) index a table",
            hint="give arrays (.npz), or a function FILE.py:FUNCTION that yields them",
        )
    return fitting[0]


def _counts(each: Input) -> bool:
    return "position" in each.name.lower()


def _kind(each: Input) -> bool:
    return "type" in each.name.lower() or "segment" in each.name.lower()


def _windows(ids: Sequence[int], tokens: Input, spec: Spec) -> Iterator[tuple[Array, Array]]:
    """Windows of equal length, as many in a case as a static batch has; a shorter one only if it is the only one."""
    batch, length = (d if isinstance(d, int) else 0 for d in tokens.dims)
    length = length or spec.window
    if length < 1 or spec.stride < 0:
        raise BadInput("a window needs a token at least", where=spec.path)
    starts = range(0, max(len(ids) - length, 0) + 1, spec.stride or length) if ids else range(0)
    if ids and len(ids) < length and isinstance(tokens.dims[1], int):
        raise BadInput("the text is too short", where=spec.path, why=f"{len(ids)} tokens, the model takes {length}")
    rows = [ids[start : start + length] for start in starts]
    if spec.samples:
        rows = rows[: spec.samples * max(batch, 1)]
    for at in range(0, len(rows), batch or 1):
        part = rows[at : at + (batch or 1)]
        if not batch or len(part) == batch:
            array = np.array(part, dtype=np.int64)
            yield array, np.ones_like(array)


def _padded(rows: Sequence[Sequence[int]], tokens: Input, spec: Spec) -> Iterator[tuple[Array, Array]]:
    """Rows padded on the right to the longest of their case."""
    batch, fixed = (d if isinstance(d, int) else 0 for d in tokens.dims)
    step = batch or BATCH
    for at in range(0, len(rows), step):
        part = [row[: fixed or spec.window] for row in rows[at : at + step]]
        if batch and len(part) < batch:
            return
        length = fixed or max(map(len, part))
        ids, mask = np.zeros((len(part), length), dtype=np.int64), np.zeros((len(part), length), dtype=np.int64)
        for i, row in enumerate(part):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        yield ids, mask


def _case(inputs: Sequence[Input], tokens: Input, ids: Array, mask: Array, where: str) -> Arrays:
    """All inputs for some tokens; a symbolic size that the tokens do not have is that of an empty cache."""
    sizes: dict[str, int] = {}
    for dim, size in zip(tokens.dims, ids.shape, strict=True):
        if isinstance(dim, str):
            sizes[dim] = size
    filled: dict[str, Array] = {}
    for each in inputs:
        rank = len(each.dims)
        if each is tokens:
            array = ids
        elif rank == 2 and each.dtype.is_floating_point() is False and _counts(each):
            array = np.where(mask > 0, np.cumsum(mask, axis=1) - 1, 0)
        elif rank == 2 and (each.mask or "mask" in each.name.lower()):
            array = mask
        elif rank == 2 and each.dtype.is_integer() and _kind(each):
            array = np.zeros_like(ids)
        elif rank >= 3 and each.dtype.is_floating_point() and not all(isinstance(d, int) for d in each.dims):
            array = np.zeros(_empty(each, sizes, len(ids)))
        else:
            raise BadInput(
                f"text cannot fill the input '{each.name}'",
                where=where,
                hint="give arrays (.npz), or a function FILE.py:FUNCTION that yields them",
            )
        filled[each.name] = np.ascontiguousarray(array.astype(each.dtype.numpy()))
    return filled


def _empty(each: Input, sizes: Sizes, batch: int) -> tuple[int, ...]:
    """The shape of a cache that holds nothing: the batch is known, other lengths are 0."""
    known = dict(sizes)
    for axis, dim in enumerate(each.dims):
        for symbol in symbols_in(dim) if isinstance(dim, str) else ():
            known.setdefault(symbol, batch if axis == 0 else 0)
    return tuple(evaluate(dim, known) for dim in each.dims)
