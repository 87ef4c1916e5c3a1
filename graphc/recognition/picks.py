"""Which tokens chose an expert: what exporters make of a router's indices, up to the numbers that tokens are picked by.

Three kinds of values are followed forward from the indices of a TopK: the indices themselves, masks that say where an
expert is meant, and the numbers of the places where such a mask holds, as NonZero lists them. Their axes are named:
``t`` tokens, ``s`` the slots of a token (it chooses one expert in each), ``e`` experts, ``n`` the places, ``c`` what is
known of a place, ``1`` an axis of size 1, ``*`` one that repeats a single number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.recognition.graph import Graph


@dataclass(frozen=True)
class Chosen:
    """The number of the expert, by token and slot."""

    axes: str


@dataclass(frozen=True)
class Mask:
    """1, or true, where an expert was chosen, and 0 elsewhere.

    Attributes:
        axes: With ``e`` for all experts, else without.
        expert: Which one is meant, if it is one.
    """

    axes: str
    expert: int | None = None


@dataclass(frozen=True)
class Places:
    """Numbers of the places where one expert was chosen: integers.

    Attributes:
        source: What listed them; the order of places is its own.
        expert: Which expert chose.
        axes: Such as ``cn``.
        parts: For each index along ``c``, or for the only number: ``(a, b)`` of ``a * token + b * slot``.
    """

    source: ir.Value
    expert: int
    axes: str
    parts: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> bool:
        """Whether these are the numbers of tokens alone."""
        return self.parts == ((1, 0),)


Pick = Chosen | Mask | Places


def follow(indices: ir.Value, graph: Graph) -> dict[ir.Value, Pick]:
    """What is known of the values that are made of a router's indices.

    Args:
        indices: ``(tokens, slots)``.
        graph: The graph.
    """
    found: dict[ir.Value, Pick] = {indices: Chosen("ts")}
    queue = [indices]
    while queue:
        for reader in dict.fromkeys(queue.pop().consumers()):
            if reader.domain or reader.op_type not in _RULES or reader.outputs[0] in found:
                continue
            # Nodes that read several such values are visited again with each of them.
            for value, pick in _RULES[reader.op_type](reader, found, graph):
                rank = graph.fact(value).rank
                if rank is not None and rank == len(pick.axes):
                    found[value] = pick
                    queue.append(value)
    return found


Rule = Callable[[ir.Node, dict[ir.Value, Pick], Graph], Iterator[tuple[ir.Value, Pick]]]


def _same(node: ir.Node, found: dict[ir.Value, Pick], graph: Graph) -> Iterator[tuple[ir.Value, Pick]]:
    """Identity and Cast; numbers stay whole, and what is not zero stays so."""
    pick = found.get(_given(node))
    to = edit.attribute(node, "to")
    exact = to in (None, ir.DataType.INT64, ir.DataType.INT32)
    # Masks hold 0 and 1 alone, so that any dtype holds them.
    if pick is not None and (exact or isinstance(pick, Mask)):
        yield node.outputs[0], pick


def _moved(node: ir.Node, found: dict[ir.Value, Pick], graph: Graph) -> Iterator[tuple[ir.Value, Pick]]:
    """Transpose, Unsqueeze, Squeeze, and a Reshape that makes one of the last two."""
    pick = found.get(_given(node))
    if pick is None:
        return
    axes: str | None = None
    if node.op_type == "Transpose":
        perm = edit.attribute(node, "perm") or tuple(range(len(pick.axes)))[::-1]
        axes = "".join(pick.axes[i] for i in perm)
    elif node.op_type == "Unsqueeze":
        where = _ints(node, 1)
        if where is not None:
            rank = len(pick.axes) + len(where)
            rest = iter(pick.axes)
            added = {i % rank for i in where}
            axes = "".join("1" if i in added else next(rest) for i in range(rank))
    elif node.op_type == "Squeeze":
        where = _ints(node, 1)
        if where is not None:
            gone = {i % len(pick.axes) for i in where}
            if all(pick.axes[i] == "1" for i in gone):
                axes = "".join(axis for i, axis in enumerate(pick.axes) if i not in gone)
    elif (target := _ints(node, 1)) is not None:
        long = pick.axes.replace("1", "")
        if len(long) == 1 and sorted(target)[0] == -1 and set(target) <= {-1, 1}:
            axes = "".join(long if size == -1 else "1" for size in target)
    if axes is not None:
        yield node.outputs[0], replace(pick, axes=axes)


def _equal(node: ir.Node, found: dict[ir.Value, Pick], graph: Graph) -> Iterator[tuple[ir.Value, Pick]]:
    """Indices compared with the number of one expert, or of all in a row."""
    value = next(v for v in node.inputs if v in found)
    other = next((v for v in node.inputs if v is not value), None)
    pick, held = found[value], edit.constant(other, edit.SMALL)
    if not isinstance(pick, Chosen) or held is None:
        return
    if held.size == 1 and held.ndim <= len(pick.axes):
        yield node.outputs[0], Mask(pick.axes, int(held.reshape(-1)[0]))
    elif np.array_equal(held.reshape(-1), np.arange(held.size)):
        rank = max(held.ndim, len(pick.axes))
        axes = "1" * (rank - len(pick.axes)) + pick.axes
        sizes = (1,) * (rank - held.ndim) + held.shape
        along = sizes.index(held.size)
        if axes[along] == "1":
            yield node.outputs[0], Mask(f"{axes[:along]}e{axes[along + 1 :]}")


def _one_hot(node: ir.Node, found: dict[ir.Value, Pick], graph: Graph) -> Iterator[tuple[ir.Value, Pick]]:
    pick, values = found.get(_given(node)), edit.constant(node.inputs[2], 2)
    if isinstance(pick, Chosen) and values is not None and list(values) == [0, 1]:
        axis = edit.attribute(node, "axis", -1) % (len(pick.axes) + 1)
        yield node.outputs[0], Mask(f"{pick.axes[:axis]}e{pick.axes[axis:]}")


def _parted(node: ir.Node, found: dict[ir.Value, Pick], graph: Graph) -> Iterator[tuple[ir.Value, Pick]]:
    """Gather, Slice or Split that take one expert of a mask, or parts of what is known of places."""
    pick = found.get(_given(node))
    if pick is None:
        return
    if node.op_type == "Slice":
        bounds = [_ints(node, i) for i in (1, 2, 3, 4)] if len(node.inputs) > 4 else [_ints(node, i) for i in (1, 2, 3)]
        if any(bound is None or len(bound) != 1 for bound in bounds):
            return
        start, end, axis = (bound[0] for bound in bounds[:3])  # type: ignore[index]
        step = bounds[3][0] if len(bounds) > 3 and bounds[3] is not None else 1
        size = _length(node.inputs[0], axis, graph)
        if size is not None:
            yield from _taken(node.outputs[0], pick, axis, list(range(size))[start:end:step], True)
    elif node.op_type == "Gather":
        held = edit.constant(node.inputs[1], edit.SMALL)
        axis = edit.attribute(node, "axis", 0)
        size = _length(node.inputs[0], axis, graph)
        if held is not None and held.ndim < 2 and size is not None:
            taken = [int(i) % size for i in held.reshape(-1)]
            yield from _taken(node.outputs[0], pick, axis, taken, held.ndim == 1)
    else:
        axis = edit.attribute(node, "axis", 0)
        start = 0
        for output in node.outputs:
            size = _length(output, axis, graph)
            if size is None:
                return
            yield from _taken(output, pick, axis, list(range(start, start + size)), True)
            start += size


def _taken(value: ir.Value, pick: Pick, axis: int, taken: list[int], kept: bool) -> Iterator[tuple[ir.Value, Pick]]:
    axis %= len(pick.axes)
    before, name, after = pick.axes[:axis], pick.axes[axis], pick.axes[axis + 1 :]
    if name == "e" and isinstance(pick, Mask) and len(taken) == 1:
        yield value, Mask(before + "1" * kept + after, taken[0])
    elif name == "c" and isinstance(pick, Places) and taken:
        parts = tuple(pick.parts[i] for i in taken)
        left = ("c" if len(parts) > 1 else "1") if kept else ""
        if left or len(parts) == 1:
            yield value, replace(pick, axes=before + left + after, parts=parts)


def _non_zero(node: ir.Node, found: dict[ir.Value, Pick], graph: Graph) -> Iterator[tuple[ir.Value, Pick]]:
    pick = found.get(_given(node))
    if isinstance(pick, Mask) and pick.expert is not None and sorted(pick.axes.replace("1", "")) == ["s", "t"]:
        parts = tuple((int(axis == "t"), int(axis == "s")) for axis in pick.axes)
        yield node.outputs[0], Places(node.outputs[0], pick.expert, "cn", parts)


def _scaled(node: ir.Node, found: dict[ir.Value, Pick], graph: Graph) -> Iterator[tuple[ir.Value, Pick]]:
    value = next(v for v in node.inputs if v in found)
    pick = found[value]
    factor = next((edit.scalar(v) for v in node.inputs if v is not value), None)
    if isinstance(pick, Places) and "c" not in pick.axes and isinstance(factor, int):
        yield node.outputs[0], replace(pick, parts=tuple((a * factor, b * factor) for a, b in pick.parts))


def _added(node: ir.Node, found: dict[ir.Value, Pick], graph: Graph) -> Iterator[tuple[ir.Value, Pick]]:
    one, other = (found.get(v) if v is not None else None for v in node.inputs)
    if not isinstance(one, Places) or not isinstance(other, Places) or "c" in one.axes:
        return
    if (one.source, one.axes) == (other.source, other.axes):
        (a, b), (c, d) = one.parts[0], other.parts[0]
        yield node.outputs[0], replace(one, parts=((a + c, b + d),))


def _joined(node: ir.Node, found: dict[ir.Value, Pick], graph: Graph) -> Iterator[tuple[ir.Value, Pick]]:
    picks = [found.get(v) if v is not None else None for v in node.inputs]
    first = picks[0]
    if not isinstance(first, Places):
        return
    axis = edit.attribute(node, "axis") % len(first.axes)
    parts: list[tuple[int, int]] = []
    for pick in picks:
        if not isinstance(pick, Places) or pick.source is not first.source or pick.axes[axis] not in "c1":
            return
        if (pick.axes[:axis], pick.axes[axis + 1 :]) != (first.axes[:axis], first.axes[axis + 1 :]):
            return
        parts += pick.parts
    yield node.outputs[0], replace(first, axes=f"{first.axes[:axis]}c{first.axes[axis + 1 :]}", parts=tuple(parts))


def _repeated(node: ir.Node, found: dict[ir.Value, Pick], graph: Graph) -> Iterator[tuple[ir.Value, Pick]]:
    """One number of each place, for all channels of it; that places are not repeated is for who reads it to show."""
    pick = found.get(_given(node))
    if isinstance(pick, Places) and pick.axes == "n1" and graph.fact(node.outputs[0]).rank == 2:
        yield node.outputs[0], replace(pick, axes="n*")


_RULES: dict[str, Rule] = {
    "Identity": _same,
    "Cast": _same,
    "Transpose": _moved,
    "Unsqueeze": _moved,
    "Squeeze": _moved,
    "Reshape": _moved,
    "Equal": _equal,
    "OneHot": _one_hot,
    "Gather": _parted,
    "Slice": _parted,
    "Split": _parted,
    "NonZero": _non_zero,
    "Mul": _scaled,
    "Add": _added,
    "Concat": _joined,
    "Expand": _repeated,
}


def _given(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _ints(node: ir.Node, index: int) -> list[int] | None:
    held = edit.constant(node.inputs[index], edit.SMALL) if index < len(node.inputs) else None
    return None if held is None else [int(i) for i in held.reshape(-1)]


def _length(value: ir.Value | None, axis: int, graph: Graph) -> int | None:
    dims = graph.dims(value)
    size = dims[axis] if dims is not None else None
    return size if isinstance(size, int) else None
