"""Operators that move indices: reshapes, transposes, slices, concatenation, padding, constant gathers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from graphc.axes.rules.registry import LETTERS, Line, NoRule, View, rule
from graphc.axes.size import Size, Sym, divide, product, symbol

UNITS = 1 << 13
"""Picked positions up to which a constant gather is followed index by index."""

Sizes = dict[str, Size | tuple[Size, ...]]


def letters(count: int, start: int = 0) -> list[str]:
    """Distinct axis names: a, b, ..., z, a1, b1, ..."""
    names = (f"{c}{i or ''}" for i in itertools.count() for c in LETTERS)
    return list(itertools.islice(names, start, start + count))


@rule("Transpose")
def transpose(n: View) -> str:
    names = letters(n.rank())
    perm = n.attr("perm") or range(len(names))[::-1]
    return f"{' '.join(names)} -> {' '.join(names[p] for p in perm)}"


@rule("Squeeze")
def squeeze(n: View) -> str:
    shape = n.shape()
    axes = n.ints(1, "axes")
    gone = {a % len(shape) for a in axes} if axes is not None else {i for i, s in enumerate(shape) if s == 1}
    if axes is None and any(isinstance(s, Sym) for s in shape):
        raise NoRule("which axes have size 1 is not known")
    names = letters(len(shape))
    inputs = [f"[{x}]" if i in gone and shape[i] != 1 else "1" if i in gone else x for i, x in enumerate(names)]
    return f"{' '.join(inputs)},  -> {' '.join(x for i, x in enumerate(names) if i not in gone)}"


@rule("Unsqueeze")
def unsqueeze(n: View) -> str:
    axes = n.ints(1, "axes")
    if axes is None:
        raise NoRule("the axes are not constant")
    rank = n.rank() + len(axes)
    names = iter(letters(n.rank()))
    new = {a % rank for a in axes}
    out = ["1" if i in new else next(names) for i in range(rank)]
    return f"{' '.join(letters(n.rank()))},  -> {' '.join(out)}"


def regroup(before: Sequence[Size], after: Sequence[Size]) -> tuple[list[list[int]], list[list[int]], list[Size], bool]:
    """Common digits of two shapes with the same elements in the same order.

    Args:
        before, after: The sizes of the axes.

    Returns:
        For each axis of ``before`` and of ``after`` the numbers of its digits, outer first; the sizes of the
        digits; and whether all was matched. Where it was not, the axes left over have no digits.
    """
    left: list[list[int]] = [[] for _ in before]
    right: list[list[int]] = [[] for _ in after]
    sizes: list[Size] = []
    i, j = len(before) - 1, len(after) - 1
    p: Size = 1
    q: Size = 1
    while True:
        while p == 1 and i >= 0:
            p, i = before[i], i - 1
        while q == 1 and j >= 0:
            q, j = after[j], j - 1
        if p == 1 and q == 1:
            return left, right, sizes, True
        if (rest := divide(p, q)) is not None:
            digit, p, q = q, rest, 1
        elif (rest := divide(q, p)) is not None:
            digit, p, q = p, 1, rest
        else:
            break
        number = len(sizes)
        sizes.append(digit)
        left[i + 1].insert(0, number)
        right[j + 1].insert(0, number)

    def drop(digits: list[int]) -> None:
        numbers, digits[:] = list(digits), []
        for number in numbers:
            for other in (*left, *right):
                if number in other:
                    drop(other)

    # What is left does not factor: give up the half-used axes, then match equal axes from the front.
    drop(left[i + 1])
    drop(right[j + 1])
    for k in range(min(i + 1, j + 1)):
        if before[k] != after[k] or left[k] or right[k]:
            break
        sizes.append(before[k])
        left[k], right[k] = [len(sizes) - 1], [len(sizes) - 1]
    return left, right, sizes, False


def reshape_line(before: Sequence[Size], after: Sequence[Size], extra: str = "") -> Line:
    """The line that takes one shape to another, e.g. ``(a b) c -> a (b c)``."""
    left, right, sizes, _ = regroup(before, after)
    order = list(dict.fromkeys(number for digits in (*left, *right) for number in digits))
    names = dict(zip(order, letters(len(order)), strict=True))
    given: Sizes = {name: sizes[number] for number, name in names.items()}

    def spell(numbers: list[int], size: Size, fixed: str) -> str:
        if not numbers:
            if size == 1:
                return "1"
            given[fixed] = size
            return f"[{fixed}]"
        if len(numbers) == 1:
            return names[numbers[0]]
        return f"({' '.join(names[k] for k in numbers)})"

    inputs = " ".join(spell(d, s, f"in{k}") for k, (d, s) in enumerate(zip(left, before, strict=True)))
    outputs = " ".join(spell(d, s, f"out{k}") for k, (d, s) in enumerate(zip(right, after, strict=True)))
    return Line(f"{inputs}{extra} -> {outputs}", given)


@rule("Reshape")
def reshape(n: View) -> Line:
    target = n.values(1) if n.has(1) else list(n.attr("shape"))
    before = n.shape()
    if target is None:
        declared = n.declared()
        if declared is None:
            raise NoRule("the shape to reshape to is not known")
        target = [d if d is not None else None for d in declared]
        after: list[Size] = [_unknown(n, i) if d is None else d for i, d in enumerate(target)]
        return reshape_line(before, after, ", ")
    after = []
    hole = None
    for i, size in enumerate(target):
        if size == 0 and not isinstance(size, Sym) and not n.attr("allowzero", 0):
            after.append(before[i])
        elif size == -1 and not isinstance(size, Sym):
            hole = i
            after.append(1)
        else:
            after.append(size)
    if hole is not None:
        rest = divide(product(before), product(after))
        after[hole] = _unknown(n, hole) if rest is None else rest
    return reshape_line(before, after, ", ")


def _unknown(n: View, i: int) -> Size:
    return symbol(f"{n.node.outputs[0].name}.{i}")


@rule("Flatten")
def flatten(n: View) -> Line:
    shape = n.shape()
    axis = n.attr("axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    return reshape_line(shape, [product(shape[:axis]), product(shape[axis:])])


@rule("Expand")
def expand(n: View) -> Line:
    before = n.shape()
    target = n.values(1)
    if target is None:
        declared = n.declared()
        if declared is None or len(declared) < len(before):
            raise NoRule("the shape to expand to is not known")
        target = [_unknown(n, i) if d is None else d for i, d in enumerate(declared)]
    return _repeat(before, target)


def _repeat(before: list[Size], target: list[Any]) -> Line:
    """Axes of size 1 (or absent) become replicas; a replica of unknown size is kept whole."""
    missing = max(0, len(target) - len(before))
    rank = missing + len(before)
    target = [1] * (rank - len(target)) + list(target)
    names = letters(rank)
    inputs, outputs, sizes = [], [], {}
    for i, (name, want) in enumerate(zip(names, target, strict=True)):
        have = before[i - missing] if i >= missing else 1
        replica = have == 1 and want != 1
        if i >= missing:
            inputs.append("1" if replica else name)
        if replica:
            sizes[f"{name}_"] = want
            outputs.append(f"{name}_" if isinstance(want, int) else f"[{name}_]")
        else:
            outputs.append(name if i >= missing else "1")
    return Line(f"{' '.join(inputs)},  -> {' '.join(outputs)}", sizes)


@rule("Tile")
def tile(n: View) -> Line:
    repeats = n.values(1)
    if repeats is None:
        raise NoRule("the repeats are not known")
    names = letters(n.rank())
    out, sizes = [], {}
    for name, count, size in zip(names, repeats, n.shape(), strict=True):
        if count == 1:
            out.append(name)
            continue
        sizes[f"{name}_"] = count
        times = f"{name}_" if isinstance(count, int) else f"[{name}_]"
        out.append(times if size == 1 else f"({times} {name})")
    inputs = ["1" if s == 1 and c != 1 else x for x, s, c in zip(names, n.shape(), repeats, strict=True)]
    return Line(f"{' '.join(inputs)},  -> {' '.join(out)}", sizes)


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


@rule("DepthToSpace")
def depth_to_space(n: View) -> Line:
    block = n.attr("blocksize")
    channels = "([r] [s] c)" if n.attr("mode", "DCR") == "DCR" else "(c [r] [s])"
    return Line(f"n {channels} y x -> n c (y [r]) (x [s])", {"r": block, "s": block})


@rule("SpaceToDepth")
def space_to_depth(n: View) -> Line:
    block = n.attr("blocksize")
    return Line("n c (y [r]) (x [s]) -> n ([r] [s] c) y x", {"r": block, "s": block})


@rule("ReverseSequence")
def reverse_sequence(n: View) -> str:
    batch, time = n.attr("batch_axis", 1), n.attr("time_axis", 0)
    names = letters(n.rank())
    names[time] = f"[{names[time]}]"
    return f"{' '.join(names)}, {names[batch]} -> {' '.join(names)}"


@rule("Trilu")
def trilu(n: View) -> str:
    return "*b [i] [j],  -> *b [i] [j]"


@rule("CumSum", "CumProd")
def cumulative(n: View) -> str:
    axis = n.ints(1)
    if not axis:
        raise NoRule("the axis is not constant")
    names = letters(n.rank())
    names[axis[0]] = f"[{names[axis[0]]}]"
    return f"{' '.join(names)},  -> {' '.join(names)}"


@rule("ConstantOfShape")
def constant_of_shape(n: View) -> Line:
    target = n.values(0)
    if target is None:
        raise NoRule("the shape is not known")
    names = letters(len(target))
    out = [x if isinstance(s, int) else f"[{x}]" for x, s in zip(names, target, strict=True)]
    return Line(f" -> {' '.join(out)}", dict(zip(names, target, strict=True)))


@rule("Range")
def range_rule(n: View) -> Line:
    return Line(", , -> [a]")


@rule("EyeLike")
def eye_like(n: View) -> str:
    return "! -> !"
