"""Operators that move parts of axes: slices, splits, concatenation, padding, gathers by constants."""

from __future__ import annotations

from typing import Any

import numpy as np

from graphc.axes.rules.registry import Line, View, letters, rule
from graphc.axes.size import Size, Sym

UNITS = 1 << 13
"""Picked positions up to which a constant gather is followed index by index."""

Sizes = dict[str, Size | tuple[Size, ...]]


@rule("Concat")
def concat(n: View) -> Line:
    rank, axis = n.rank(), n.axis(0)
    names = letters(rank)
    parts = [f"{names[axis]}{k}_" for k in range(n.inputs)]
    lengths = [n.shape(k)[axis] for k in range(n.inputs)]
    static = all(isinstance(s, int) for s in lengths)
    inputs = []
    sizes: Sizes = {}
    for part in parts:
        own = list(names)
        own[axis] = part if static else f"[{part}]"
        inputs.append(" ".join(own))
    out = list(names)
    if static:
        kept = [p for p, s in zip(parts, lengths, strict=True) if s != 0]
        out[axis] = f"({' + '.join(kept)})" if len(kept) > 1 else kept[0] if kept else parts[0]
    else:
        total: Size = 0
        for length in lengths:
            total = total + length
        out[axis], sizes["all_"] = "[all_]", total
    return Line(f"{', '.join(inputs)} -> {' '.join(out)}", sizes)


@rule("Split")
def split(n: View) -> Line:
    rank, axis = n.rank(), n.axis(0)
    total = n.shape()[axis]
    count = len(n.node.outputs)
    lengths = n.ints(1, "split")
    names = letters(rank)
    if not isinstance(total, int):
        fixed = list(names)
        fixed[axis] = f"[{names[axis]}]"
        outs, sizes = [], {}
        for k in range(count):
            own = list(names)
            own[axis] = f"[p{k}]"
            if lengths is not None:
                sizes[f"p{k}"] = lengths[k]
            outs.append(" ".join(own))
        return Line(f"{' '.join(fixed)},  -> {', '.join(outs)}", sizes)
    if lengths is None:
        step = -(-total // count)
        lengths = [step] * (count - 1) + [total - step * (count - 1)]
    parts = [f"p{k}" for k in range(count)]
    own = list(names)
    own[axis] = f"({' + '.join(parts)})" if count > 1 else parts[0]
    outs = [" ".join(part if i == axis else x for i, x in enumerate(names)) for part in parts]
    return Line(f"{' '.join(own)},  -> {', '.join(outs)}", dict(zip(parts, lengths, strict=True)))


def slice_axis(
    name: str, size: Size, start: Any, end: Any, step: int
) -> tuple[str, str, dict[str, Any], np.ndarray[Any, Any] | None]:
    """Patterns of one sliced axis before and after, the sizes of its parts, and picked positions if it needs them."""
    huge = 1 << 30
    if not isinstance(size, int) or isinstance(start, Sym) or isinstance(end, Sym) or start is None or end is None:
        whole = step == 1 and start == 0 and (end == size or (isinstance(end, int) and end >= huge))
        if whole:
            return name, name, {}, None
        out: dict[str, Any] = {}
        if step == 1 and start is not None and end is not None:
            out[f"{name}_"] = _slice_length(size, start, end)
        return f"[{name}]", f"[{name}_]", {k: v for k, v in out.items() if v is not None}, None
    positions = range(size)[slice(start, None if step < 0 and end < -size else end, step)]
    count = len(positions)
    if count == size and step == 1:
        return name, name, {}, None
    if count == 0:
        return f"[{name}]", f"[{name}_]", {f"{name}_": 0}, None
    if step == 1:
        cuts = [positions.start, count, size - positions.stop]
        parts = [f"{name}{k}_" for k in range(3) if cuts[k]]
        sizes = dict(zip(parts, (c for c in cuts if c), strict=True))
        kept = f"{name}1_"
        return f"({' + '.join(parts)})", kept, sizes, None
    if step > 1 and size % step == 0 and positions.start < step and count == size // step:
        cuts = [positions.start, 1, step - positions.start - 1]
        parts = [f"{name}{k}_" for k in range(3) if cuts[k]]
        sizes = dict(zip(parts, (c for c in cuts if c), strict=True))
        inner = " + ".join(parts)
        return f"({name} ({inner}))", name, {name: count, **sizes}, None
    if count == size:
        return name, f"{name}@{name}_", {}, np.array(positions)
    return f"[{name}]", f"[{name}_]", {f"{name}_": count}, None


def _slice_length(size: Size, start: Any, end: Any) -> Size | None:
    """The length of a slice of a dynamic axis where it follows for all of its sizes."""
    if isinstance(end, int) and end >= 1 << 30:
        end = size
    if isinstance(end, int) and end < 0:
        end = size + end
    if isinstance(start, int) and start < 0:
        start = size + start
    if end == size:
        length: Size = size - start
        return length
    return None


@rule("Slice")
def slice_rule(n: View) -> Line:
    shape = n.shape()
    rank = len(shape)
    if n.version < 10 or not n.has(1):
        starts, ends = list(n.attr("starts")), list(n.attr("ends"))
        axes = list(n.attr("axes") or range(len(starts)))
        steps = [1] * len(axes)
    else:
        given_axes = n.ints(3)
        starts_, ends_ = n.values(1), n.values(2)
        count = len(given_axes) if given_axes is not None else len(starts_ or ends_ or ())
        axes = given_axes if given_axes is not None else list(range(count))
        starts, ends = starts_ or [None] * count, ends_ or [None] * count
        steps = n.ints(4) or [1] * count
    names = letters(rank)
    inputs, outputs = list(names), list(names)
    sizes: dict[str, Any] = {}
    picks: dict[str, np.ndarray[Any, Any]] = {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        name = names[axis % rank]
        inputs[axis % rank], outputs[axis % rank], own, picked = slice_axis(name, shape[axis % rank], start, end, step)
        sizes |= own
        if picked is not None:
            picks[f"{name}_"] = picked
    extra = ", " * (n.inputs - 1)
    return Line(f"{' '.join(inputs)}{extra} -> {' '.join(outputs)}", sizes, picks)


@rule("Pad")
def pad(n: View) -> Line:
    shape = n.shape()
    rank = len(shape)
    pads = n.values(1) if n.has(1) else list(n.attr("pads") or n.attr("paddings") or ())
    axes = n.ints(3) if n.inputs > 3 else None
    axes = [a % rank for a in axes] if axes is not None else list(range(rank))
    names = letters(rank)
    inputs, outputs = list(names), list(names)
    sizes: Sizes = {}
    constant = n.attr("mode", "constant") == "constant"
    for k, axis in enumerate(axes):
        before: Any = pads[k] if pads else None
        after: Any = pads[k + len(axes)] if pads else None
        if before == 0 and after == 0:
            continue
        name, size = names[axis], shape[axis]
        known = isinstance(before, int) and isinstance(after, int) and isinstance(size, int)
        if not known or not constant or before < 0 or after < 0:
            inputs[axis], outputs[axis] = f"[{name}]", f"[{name}_]"
            if before is not None and after is not None:
                sizes[f"{name}_"] = size + before + after
            continue
        parts = []
        for label, length in ((f"{name}0_", before), (name, size), (f"{name}2_", after)):
            if length:
                parts.append(label)
                if label != name:
                    sizes[label] = length
        outputs[axis] = f"({' + '.join(parts)})"
    return Line(f"{' '.join(inputs)}{', ' * (n.inputs - 1)} -> {' '.join(outputs)}", sizes)


def repetition(indices: np.ndarray[Any, Any], size: int) -> str:
    """Whether constant indices repeat a whole axis: ``"each"`` (0 0 1 1), ``"all"`` (0 1 0 1), or ``""``."""
    count = len(indices)
    if size < 2 or count <= size or count % size:
        return ""
    times = count // size
    if np.array_equal(indices, np.repeat(np.arange(size), times)):
        return "each"
    return "all" if np.array_equal(indices, np.tile(np.arange(size), times)) else ""


@rule("Gather")
def gather(n: View) -> Line:
    rank, axis = n.rank(), n.axis(0)
    size = n.shape()[axis]
    names = letters(rank)
    before, after = names[:axis], names[axis + 1 :]
    index_rank = n.rank(1)

    def line(source: str, index: str, out: list[str], sizes: dict[str, Any] | None = None, picks: Any = None) -> Line:
        inputs = " ".join([*before, source, *after])
        return Line(f"{inputs}, {index} -> {' '.join([*before, *out, *after])}", sizes or {}, picks or {})

    if n.indexed(1):
        own = [f"i{k}" for k in range(index_rank)]
        return line(names[axis], f"{names[axis]}> {' '.join(own)}".rstrip(), own)
    array = n.constant(1, UNITS)
    if array is not None and isinstance(size, int) and array.ndim == 1 and array.size:
        indices = np.where(array < 0, array + size, array)
        name = names[axis]
        if len(indices) == 1 and size == 1:
            return line(name, "!", [name])
        if np.array_equal(indices, np.arange(indices[0], indices[0] + len(indices))):
            source, out, sizes, _ = slice_axis(name, size, int(indices[0]), int(indices[-1]) + 1, 1)
            return line(source, "!", [out], sizes)
        how = repetition(indices, size)
        if how:
            times = f"{name}_"
            out = f"({name} {times})" if how == "each" else f"({times} {name})"
            return line(name, "!", [out], {times: len(indices) // size})
        return line(name, "!", [f"{name}@{name}_"], picks={f"{name}_": indices})
    own = [f"i{k}" if array is None else f"[i{k}]" for k in range(index_rank)]
    return line(f"[{names[axis]}]" if size != 1 or array is None else "1", " ".join(own), own)
