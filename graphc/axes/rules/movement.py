"""Operators that move whole axes: reshapes, transposes, repeats, and reorderings of digits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphc.axes.rules.registry import Line, NoRule, View, letters, rule
from graphc.axes.size import Size, Sym, divide, product, symbol

Sizes = dict[str, Size | tuple[Size, ...]]


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
