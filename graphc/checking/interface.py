"""What a model declares to its callers: names, dtypes and shapes of inputs and outputs.

A lossy pass may be allowed to take inputs and outputs away (the caches of layers that go) and to number the others
anew. The model then says in its metadata what they were called, so that it can be run on data for the model as it came.
Caches may become 8-bit codes, whose scales the model has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import cache_codes

Array = np.ndarray[Any, np.dtype[Any]]

RENAMED = "graphc.interface"
"""Metadata of a model with fewer inputs or outputs than it came with: old names by new ones, as JSON."""


def shrunk(model: ir.Model, renamed: Mapping[str, str]) -> None:
    """Note that inputs or outputs of a model went, and what others of them are now called.

    Args:
        model: The model.
        renamed: The name that each had, by the name that it has.
    """
    known = renames(model) or {}
    kept = {new: old for new, old in known.items() if new not in renamed.values()}
    found = kept | {new: known.get(old, old) for new, old in renamed.items()}
    model.metadata_props[RENAMED] = json.dumps(found, sort_keys=True)


def renames(model: ir.Model) -> dict[str, str] | None:
    """What inputs and outputs with new names were called as the model came; None where nothing went."""
    text = model.metadata_props.get(RENAMED)
    if text is None:
        return None
    found: dict[str, str] = json.loads(text)
    return found


def fitting(model: ir.Model, arrays: Mapping[str, Array]) -> Mapping[str, Array]:
    """Inputs for the model as it came, as those that it has now."""
    old = renames(model)
    if old is not None:
        names = [v.name or "" for v in model.graph.inputs]
        arrays = {name: arrays[old.get(name, name)] for name in names if old.get(name, name) in arrays}
    wanted = {v.name: v.dtype.numpy() for v in model.graph.inputs if v.dtype not in (None, ir.DataType.STRING)}
    other = {name: wanted[name] for name, array in arrays.items() if wanted.get(name, array.dtype) != array.dtype}
    if not other:
        return arrays
    scales = cache_codes.scales(model)
    return {**arrays, **{name: _as(arrays[name], dtype, scales.get(name)) for name, dtype in other.items()}}


def _as(array: Array, dtype: np.dtype[Any], scale: Array | None) -> Array:
    """Floats as codes of a cache or as other floats; what is neither stays."""
    if array.dtype.kind != "f":
        return array
    if scale is not None:
        return cache_codes.encoded(array, scale)
    return array.astype(dtype) if dtype.kind not in "iub" else array


def as_came(reference: ir.Model, candidate: ir.Model) -> ir.Model:
    """A candidate; one that takes and gives floats, where its caches are codes and those of the reference are not."""
    dtypes = {v.name: v.dtype for v in (*reference.graph.inputs, *reference.graph.outputs)}
    old, values = renames(candidate) or {}, (*candidate.graph.inputs, *candidate.graph.outputs)
    return cache_codes.with_floats(candidate, {n: dtypes.get(old.get(n, n)) for v in values if (n := v.name)})


def difference(reference: ir.Model, candidate: ir.Model) -> str:
    """What differs between the inputs and outputs that two models declare; empty if nothing does.

    Names, order, dtypes and shapes must be the same, but an output may declare what was unknown: dimensions without a
    name, or with one that no input has.
    """
    symbols = {d.value for v in reference.graph.inputs for d in v.shape or () if not isinstance(d, int)}
    for kind in ("input", "output"):
        ours, theirs = (list(getattr(m.graph, f"{kind}s")) for m in (reference, candidate))
        if kind == "input":  # a default is an initializer, listed or not
            ours, theirs = ([v for v in vs if not v.is_initializer()] for vs in (ours, theirs))
        names, other = [v.name for v in ours], [v.name for v in theirs]
        if names != other:
            return f"its {kind}s are {', '.join(map(str, other))} instead of {', '.join(map(str, names))}"
        for a, b in zip(ours, theirs, strict=True):
            if a.type is not None and a.type != b.type:
                return f"{kind} '{a.name}' is {b.type} instead of {a.type}"
            if not _shape_kept(a.shape, b.shape, symbols if kind == "output" else None):
                return f"{kind} '{a.name}' has the shape {_shape_text(b.shape)} instead of {_shape_text(a.shape)}"
    return ""


def _shape_kept(ours: ir.Shape | None, theirs: ir.Shape | None, symbols: set[str | None] | None) -> bool:
    """Whether a declared shape is still what it was.

    With the ``symbols`` of the inputs, any other dimension without a number may have become known.
    """
    if ours is None or theirs is None:
        return ours is theirs or (ours is None and symbols is not None)
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        free = not isinstance(a, int) and (a.value is None or (symbols is not None and a.value not in symbols))
        if not free and a != b:
            return False
        if free and symbols is None and isinstance(b, int):
            return False
    return True


def _shape_text(shape: ir.Shape | None) -> str:
    if shape is None:
        return "unknown"
    return "[" + ", ".join(str(d) if isinstance(d, int) else str(d.value or "?") for d in shape) + "]"
