"""Which axes of the inputs stay dynamic, and what their sizes are called."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from graphc.errors import BadInput, nearest
from graphc.export.arguments import Arguments, Leaf

Axes = dict[int, str]
"""Axes of one input that shall be dynamic, each with its name; the empty name lets one be chosen."""

AUTO, BATCH = "auto", "batch"
Dynamic = str | bool | Mapping[str, Any] | None
"""``"auto"`` (or True), ``"batch"`` for the first axes alone, None (or False) for static sizes, or
``{input: {axis: name}}``."""


def plan(given: Arguments, dynamic: Dynamic) -> list[Axes]:
    """The axes to keep dynamic, for every leaf of the arguments.

    ``"auto"`` asks for the batch and the sequence where they may be: the first axis of every tensor, all axes of
    tensors of up to three axes, and the axes of larger ones that are as long as a sequence elsewhere (masks).

    Args:
        given: The arguments.
        dynamic: See ``Dynamic``. Inputs are named as in ``given.leaves``, axes may also be a list of names; an input
            of several tensors by its parameter, and then for all of them.

    Raises:
        BadInput: An input or an axis does not exist.
    """
    if dynamic is None or dynamic is False:
        return [{} for _ in given.leaves]
    if dynamic is True or dynamic == AUTO:
        return _auto(given)
    if dynamic == BATCH:
        return [{0: each[0]} if 0 in each else {} for each in _auto(given)]
    if not isinstance(dynamic, Mapping):
        raise BadInput(
            f"cannot read the dynamic axes {dynamic!r}", hint="give 'auto', 'batch', none, or {input: {axis: name}}"
        )
    return _explicit(given, dynamic)


def _auto(given: Arguments) -> list[Axes]:
    lengths = {int(leaf.value.shape[1]) for leaf in given.tensors if leaf.value.dim() in (2, 3) and not _is_float(leaf)}
    found: list[Axes] = []
    for leaf in given.leaves:
        if not leaf.is_tensor:
            found.append({})
            continue
        shape = leaf.value.shape
        axes = range(len(shape)) if len(shape) <= 3 else [0, *(i for i in range(1, len(shape)) if shape[i] in lengths)]
        found.append(dict.fromkeys(axes, ""))
    return found


def _is_float(leaf: Leaf) -> bool:
    return bool(leaf.value.dtype.is_floating_point)


def _explicit(given: Arguments, dynamic: Mapping[str, Any]) -> list[Axes]:
    names = {leaf.name for leaf in given.tensors} | {leaf.parameter for leaf in given.tensors}
    for name in dynamic:
        if name not in names:
            raise BadInput(f"there is no input '{name}' to make dynamic", hint=nearest(name, names))
    found = []
    for leaf in given.leaves:
        wanted = dynamic.get(leaf.name, dynamic.get(leaf.parameter)) if leaf.is_tensor else None
        found.append(_axes(leaf, wanted))
    return found


def _axes(leaf: Leaf, wanted: Any) -> Axes:
    if not wanted:
        return {}
    pairs = wanted.items() if isinstance(wanted, Mapping) else enumerate(wanted)
    rank = leaf.value.dim()
    axes: Axes = {}
    for axis, name in pairs:
        if name is None:
            continue
        if not isinstance(axis, int) or not -rank <= axis < rank:
            raise BadInput(f"input '{leaf.name}' has no axis {axis}", why=f"its shape is {list(leaf.value.shape)}")
        text = name if isinstance(name, str) else getattr(name, "__name__", "")
        axes[axis % rank] = "" if not text.isidentifier() or text in ("AUTO", "DYNAMIC") else text
    return axes


def names(inputs: Sequence[tuple[str, Sequence[str | int], Axes]]) -> dict[str, str]:
    """Readable names for the symbols that torch made up.

    Args:
        inputs: Of every tensor: its name, its sizes (a number, or an expression over symbols as text), and what was
            asked for.

    Returns:
        The new name by symbol. ``batch`` for a first axis, ``sequence`` for the second one of two or three, ``height``
        and ``width`` for the last two of four, else the input's name and the number of the axis.
    """
    found: dict[str, str] = {}
    taken: set[str] = set()

    def call(symbol: str, name: str) -> None:
        if symbol in found or not re.fullmatch(r"[su]\d+", symbol):
            return
        found[symbol] = name
        taken.add(name)

    for _, sizes, axes in inputs:
        for axis, size in enumerate(sizes):
            if isinstance(size, str) and axes.get(axis):
                call(size, axes[axis])
    for wanted in ("batch", "sequence", "height", "width", ""):
        for tensor, sizes, _ in inputs:
            for axis, size in enumerate(sizes):
                name = usual(axis, len(sizes))
                if isinstance(size, str) and size not in found and (not wanted or name == wanted):
                    call(size, name if name and name not in taken else f"{tensor}_{axis}")
    return found


def usual(axis: int, rank: int) -> str:
    """What the size of an axis is most often; empty if there is no telling."""
    if axis == 0:
        return "batch"
    if axis == 1 and rank in (2, 3):
        return "sequence"
    return {2: "height", 3: "width"}.get(axis, "") if rank == 4 else ""


def renamed(expression: str, by: Mapping[str, str]) -> str:
    """A size expression with symbols replaced."""
    return re.sub(r"\b[su]\d+\b", lambda found: by.get(found[0], found[0]), expression)
