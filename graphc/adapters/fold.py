"""Adapters folded into the weights of a model, by name."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.adapters.changes import Job, Piece, chunks
from graphc.adapters.grids import Grid, Tensors, grid
from graphc.adapters.places import Placed
from graphc.edit import Array
from graphc.errors import BadInput
from graphc.rewrites import weights
from graphc.rewrites.base import Rewriter


@dataclass
class Folded:
    """What folding did; shared by all copies of a model, which then share the new weights as well.

    Attributes:
        changes: What was folded, by kind.
        errors: The relative error by the new rounding of each quantized weight, by name.
        grids: What they are quantized to, with how many there are.
        notes: What the user should know.
        made: New tensors by what they are made of.
        held: What they are made of, kept so that it stays itself.
    """

    changes: Counter[str] = field(default_factory=Counter)
    errors: dict[str, float] = field(default_factory=dict)
    grids: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    made: dict[tuple[int, bool, str], Tensors] = field(default_factory=dict)
    held: list[ir.TensorProtocol] = field(default_factory=list)


def fold(model: ir.Model, placed: Sequence[Placed], folded: Folded) -> None:
    """Fold changes into the weights of a model, which is changed in place.

    Raises:
        BadInput: A weight is quantized in a way that cannot be written again, or does not fit in its dtype.
    """
    rewriter = Rewriter(model, frozenset())
    for value, own in itertools.groupby(sorted(placed, key=_order), key=lambda each: each.site.value):
        for _, group in itertools.groupby(own, key=_uses):
            _fold(value, list(group), rewriter, folded)


def _order(each: Placed) -> tuple[str, int, str]:
    return each.site.value.name or "", id(each.site.value), _uses(each)


def _uses(each: Placed) -> str:
    """Names the uses of a weight that are meant."""
    return "" if each.site.uses is None else each.name


def _fold(value: ir.Value, group: Sequence[Placed], rewriter: Rewriter, folded: Folded) -> None:
    site = group[0].site
    jobs = [Job(each.changes, each.site.start, each.site.stop) for each in group]
    held = edit.tensor(value)
    assert held is not None
    key = id(held), site.flipped, _uses(group[0])
    found = grid(value)
    if isinstance(found, str):
        raise BadInput("an adapter cannot be folded into a weight", where=f"'{value.name}'", why=found)
    if key not in folded.made:
        folded.held.append(held)
        if found is None:
            folded.made[key] = {0: changed(held, site.flipped, site.shape, jobs, value.name or "")}
        else:
            new, error = requantized(found[1], site.flipped, site.shape, jobs)
            folded.made[key] = new
            folded.errors[group[0].name] = error
            folded.grids[found[1].what] += 1
        for each in group:
            for _, change in each.changes:
                folded.changes[f"{change.what} folded"] += 1
            folded.notes += [each.site.note] if each.site.note else []
    new = folded.made[key]
    if found is not None:
        for index, tensor in new.items():
            old = found[0].inputs[index]
            assert old is not None
            _set(old, tensor)
    elif site.uses is None:
        _set(value, new[0])
    else:
        made = rewriter.constant(site.uses[0].node, new[0], group[0].name)
        for use in site.uses:
            use.node.replace_input_with(use.index, made)
        rewriter.drop_unread(value)


def _set(value: ir.Value, new: ir.TensorProtocol) -> None:
    """Let a constant hold another tensor."""
    node = value.producer()
    if node is None:
        value.const_value = new
        return
    node.attributes.clear()
    node.attributes["value"] = ir.AttrTensor("value", new)


def changed(
    held: ir.TensorProtocol, flipped: bool, shape: tuple[int, int], jobs: Sequence[Job], name: str
) -> ir.TensorProtocol:
    """A weight with its changes, computed in float64 and rounded once; a big one when it is read.

    Args:
        held: The weight.
        flipped: Whether it is stored as (in, out).
        shape: Of its canonical matrix.
        jobs: What is done to which rows.
        name: The name of the new tensor.

    Raises:
        BadInput: Values overflow, as far as that can be seen without reading a big float32 weight.
    """

    def compute(stored: Array) -> Array:
        new = np.empty(stored.shape, stored.dtype)
        _into(_canonical(new, flipped, shape), _canonical(stored, flipped, shape), jobs)
        return new

    tensor = weights.changed(held, compute, name)
    if tensor is None:
        raise BadInput(f"'{name}' with its adapter does not fit in {held.dtype.name.lower()}")
    return tensor


def _canonical(stored: Array, flipped: bool, shape: tuple[int, int]) -> Array:
    """A view of a stored weight as its canonical matrix."""
    return stored.reshape(shape[::-1]).T if flipped else stored.reshape(shape)


def _into(new: Array, old: Array, jobs: Iterable[Job]) -> None:
    """Write the rows of the changed matrix."""

    def pieces() -> Iterator[Piece]:
        for rows in chunks(old.shape[0], old.shape[1], weights.PIECE):
            yield rows, old[rows].astype(np.float64)

    ready = [job.prepared(pieces) for job in jobs]
    for rows, base in pieces():
        total = base.copy()
        for job in ready:
            job.add(base, rows, total)
        with np.errstate(over="ignore"):
            new[rows] = total.astype(new.dtype)


def requantized(grid: Grid, flipped: bool, shape: tuple[int, int], jobs: Sequence[Job]) -> tuple[Tensors, float]:
    """A quantized weight with its changes, on a new grid of the same kind.

    Returns:
        The new constants by the input of the node that dequantizes them, and what rounding costs: the norm of the
        error relative to that of the weight.
    """
    stored = grid.values()
    exact = np.empty(stored.shape, np.float32)
    _into(_canonical(exact, flipped, shape), _canonical(stored, flipped, shape), jobs)
    stands, tensors = grid.rounded(exact.astype(np.float64))
    norm = math.sqrt(float(np.square(exact, dtype=np.float64).sum()))
    error = math.sqrt(float(np.square(stands - exact).sum()))
    return tensors, error / norm if norm else 0.0
