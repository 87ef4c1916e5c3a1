"""Loops of matrix products and convolutions: a tile of the output is computed in registers."""

from __future__ import annotations

import importlib
import math
from typing import Any

from graphc.tvm.nest import SERIAL, Choice, Machine, Nest, NotThis, decompose, inline, vector_axis

_LONG = frozenset({"erf", "exp", "log", "pow", "sigmoid", "tanh"})
"""Functions that take many operations."""


def choices(function: Any, machine: Machine) -> list[Choice]:
    """What is worth measuring for a function, the most likely first; empty if it has no contraction."""
    from tvm import s_tir

    nest = Nest(s_tir.Schedule(function), machine)
    try:
        inline(nest)
        block = next((each for each in nest.blocks() if is_contraction(nest, each)), None)
    except Exception:  # TVM's refusals are of many kinds
        return []
    if block is None:
        return []
    vector, kinds, extents = vector_axis(nest, block), nest.kinds(block), nest.extents(block)
    rows = math.prod(n for i, n in enumerate(extents) if kinds[i] == "S" and i != vector)
    lanes = machine.lanes
    ruled = tile(rows, extents[vector], machine)
    tiles = [ruled, (4, 2 * lanes), (6, 2 * lanes), (1, 8 * lanes), (2, 4 * lanes), (3, 4 * lanes), (8, lanes)]
    tiles += [(12, lanes), (9, lanes), (5, 2 * lanes), (1, 4 * lanes), (3, 2 * lanes), (14, lanes), (13, lanes)]
    if machine.registers > 16:
        tiles += [(12, 2 * lanes), (6, 4 * lanes), (8, 2 * lanes), (4, 4 * lanes), (24, lanes)]
    fits = [
        (h, w) for h, w in dict.fromkeys(tiles) if h <= max(rows, 1) and (extents[vector] % w == 0 or w == ruled[1])
    ]
    return [Choice(h, w, pack) for pack in (True, False) for h, w in fits]


def is_contraction(nest: Nest, block: Any) -> bool:
    """Whether a block sums products of two operands that do not depend on all the same axes."""
    kinds = nest.kinds(block)
    stored = nest.work.get(block)
    reads = [r for r in stored.reads if not r.source.same_as(stored.writes[0].source)]
    if "R" not in kinds or len(reads) != 2:
        return False
    summed = math.prod(n for n, kind in zip(nest.extents(block), kinds, strict=True) if kind == "R")
    a, b = (nest.axes(block, read) for read in reads)
    spatial = {i for i, kind in enumerate(kinds) if kind == "S" and nest.extents(block)[i] > 1}
    return summed >= 4 and bool((a ^ b) & spatial) and vector_axis(nest, block) in a ^ b


def tile(rows: int, columns: int, machine: Machine) -> tuple[int, int]:
    """How many rows and columns of a product to compute in registers.

    For ``m`` rows and ``v`` vectors a step of the reduction does ``m * v`` products for ``m + v`` loads; ``m * v``
    sums, ``v`` operands and one broadcast must fit into the registers. Rows that are left over get loops of their own;
    columns that are left over make every tile slow.
    """
    best, choice = -1.0, (1, columns)
    widths = [k * machine.lanes for k in (1, 2, 4, 8)] + ([columns] if columns < machine.lanes else [])
    for width in widths:
        if columns % width and not (width == machine.lanes and columns > machine.lanes):
            continue
        vectors = -(-width // machine.lanes)
        for height in range(1, min(rows, 14) + 1):
            if height * vectors + vectors + 1 > machine.registers:
                break
            waste = (rows / (-(-rows // height) * height)) * (columns / (-(-columns // width) * width))
            ragged = 0.95 if rows % height else 1.0
            ragged *= 0.5 if columns % width else 1.0
            score = height * vectors / (height + vectors) * min(height * vectors, 8) / 8 * waste * ragged
            if score > best:
                best, choice = score, (height, width)
    return choice


def contraction(nest: Nest, block: Any) -> set[str]:
    """Schedule a sum of products and what follows it element by element; the names of all blocks that are done."""
    work, machine = nest.work, nest.machine
    done = {work.get(block).name_hint}
    kinds, extents = nest.kinds(block), nest.extents(block)
    vector = vector_axis(nest, block)
    stored = work.get(block)
    reads = [i for i, r in enumerate(stored.reads) if not r.source.same_as(stored.writes[0].source)]
    wide = next(i for i in reads if vector in nest.axes(block, stored.reads[i]))
    others = [i for i, k in enumerate(kinds) if k == "S" and i != vector]
    shared = [i for i in others if i in nest.axes(block, stored.reads[wide])]
    rows = [i for i in others if i not in shared]
    summed = [i for i, k in enumerate(kinds) if k == "R"]
    in_blocks, packs = _is_blocked(nest, block, wide, vector), _can_pack(nest, block, wide, vector)
    columns, count = extents[vector], math.prod(extents[i] for i in rows)
    batch = math.prod(extents[i] for i in shared)
    flat = _flat(nest, block, shared, rows, vector, summed)
    *outer, row, column = work.get_loops(block)[: len(shared) + 2]
    steps = work.get_loops(block)[len(shared) + 2 :]
    height, width = tile(count, columns, machine)
    if nest.choice.height:
        height, width = min(nest.choice.height, count), min(nest.choice.width, columns)
    outer_row, tile_row = nest.split(row, height)
    outer_column, tile_column = nest.split(column, width)
    tiles, panels = -(-count // height), -(-columns // width)
    parts = min(tiles, max(1, -(-4 * machine.cores // (batch * panels))))
    # Parts of equal size: what is left over would need a test in the innermost loop.
    parts = next((p for p in range(parts, min(tiles, 2 * parts) + 1) if tiles % p == 0), 1)
    chunks, outer_row = nest.split(outer_row, tiles // parts)
    vectors = width % machine.lanes == 0
    several = [tile_column]
    if vectors and width > machine.lanes and in_blocks:
        several = list(nest.split(tile_column, machine.lanes))
    work.reorder(*outer, chunks, outer_column, outer_row, *steps, tile_row, *several)
    start = work.fuse(*outer, chunks, outer_column)
    # What follows is computed on the tile, while it is in registers.
    cache = work.cache_write(block, 0, "local")
    while readers := work.get_consumers(cache):
        if len(readers) != 1 or nest.is_reduction(readers[0]):
            break
        # Of a reader that leaves columns out, TVM would write all of them.
        if math.prod(nest.extents(readers[0])) != math.prod(nest.extents(cache)):
            break
        done.add(work.get(readers[0]).name_hint)
        work.reverse_compute_inline(readers[0])
    work.transform_layout(block, ("write", 0), flat)
    work.transform_block_layout(cache, flat)
    work.reverse_compute_at(cache, outer_row, preserve_unit_loops=True)
    *_, stored_row, stored_column = work.get_loops(cache)
    if vectors:
        # As wide as the sums were made: registers are found for what is accessed in one way only.
        stored_several = list(nest.split(stored_column, machine.lanes)) if len(several) > 1 else [stored_column]
        # A long computation stays a loop, or its many copies would be in each other's way.
        for loop in () if _calls(nest, cache) else (stored_row, *stored_several[:-1]):
            work.unroll(loop)
        work.vectorize(stored_several[-1])
    if nest.choice.pack and packs and tiles >= 4 and (packs == "scattered" or columns > width):
        packed = work.cache_read(block, wide, "global")
        work.compute_at(packed, start, preserve_unit_loops=True)
        _pack(nest, packed, block, wide, len(shared) + 1)
    if batch * count * columns * math.prod(extents[i] for i in summed) > SERIAL:
        work.parallel(start)
    if count % height:
        # The last tile gets loops of its own, so that the others need no test.
        work.annotate(outer_row, "pragma_loop_partition_hint", True)
    decompose(nest, block, steps[0], unroll=[tile_row, *several[:-1]], vector=several[-1] if vectors else None)
    return done


def _calls(nest: Nest, block: Any) -> bool:
    """Whether a block computes a function such as an exponential."""
    from tvm.ir import Call

    tvm_ffi: Any = importlib.import_module("tvm_ffi")
    found: set[str] = set()
    tvm_ffi.structural_walk(
        nest.work.get(block).body, (Call, lambda call: found.add(str(getattr(call.op, "name", ""))))
    )
    return any(name.rpartition(".")[2] in _LONG for name in found)


def _flat(nest: Nest, block: Any, shared: list[int], rows: list[int], vector: int, summed: list[int]) -> Any:
    """Give a block one axis for all its rows, in the order shared, rows, vector, summed; the map of the result's axes.

    A tile of rows may begin in one row of a picture and end in the next. Of several axes TVM would take the box around
    such a tile, and store what was not computed.
    """
    from tvm import tirx
    from tvm.tirx import IndexMap

    extents, kinds = nest.extents(block), nest.kinds(block)
    spatial = [i for i, kind in enumerate(kinds) if kind == "S"]
    own = [v.var for v in nest.work.get(block).iter_vars]
    written = nest.work.get(block).writes[0].region
    if len(written) != len(spatial) or not all(
        part.min.same_as(own[i]) for part, i in zip(written, spatial, strict=True)
    ):
        raise NotThis

    def places(at: dict[int, Any]) -> list[Any]:
        row: Any = tirx.const(0, "int64")
        for i in rows:
            row = row * extents[i] + at[i]
        return [*(at[i] for i in shared), row, at[vector]]

    def whole(*index: Any) -> list[Any]:
        return [*places(dict(enumerate(index))), *(index[i] for i in summed)]

    def result(*index: Any) -> list[Any]:
        return places(dict(zip(spatial, index, strict=True)))

    nest.work.transform_block_layout(block, IndexMap.from_func(whole, len(kinds), index_dtype="int64"))
    return IndexMap.from_func(result, len(spatial), index_dtype="int64")


def _is_blocked(nest: Nest, block: Any, wide: int, vector: int) -> bool:
    """Whether the vector operand lies in blocks of columns already."""
    read = nest.work.get(block).reads[wide]
    return sum(vector in nest.used(block, part.min) for part in read.region) > 1


def _can_pack(nest: Nest, block: Any, wide: int, vector: int) -> str:
    """Whether the vector operand can be copied next to each other for a tile's columns, and how it lies now."""
    read = nest.work.get(block).reads[wide]
    if any(len(nest.used(block, part.min)) > 1 for part in read.region) or _is_blocked(nest, block, wide, vector):
        return ""
    return "together" if nest.used(block, read.region[-1].min) == {vector} else "scattered"


def _pack(nest: Nest, packed: Any, block: Any, wide: int, vector: int) -> None:
    """Lay a packed operand out with the vector axis last."""
    read = nest.work.get(block).reads[wide]
    place = next(d for d, part in enumerate(read.region) if vector in nest.used(block, part.min))
    order = [d for d in range(len(read.region)) if d != place] + [place]
    if order != list(range(len(order))):
        nest.work.transform_layout(packed, ("write", 0), lambda *index: [index[d] for d in order])
        return
    last = nest.work.get_loops(packed)[-1]
    if nest.extent(last) % nest.machine.lanes == 0:
        nest.work.vectorize(last)
