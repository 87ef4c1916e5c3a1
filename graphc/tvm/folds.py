"""Loops of reductions that are no products, and of what is computed element by element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from graphc.tvm.nest import SERIAL, Nest, NotThis, decompose, vector_axis


def last_is_spatial(nest: Nest) -> bool:
    """Whether every reduction keeps the last axis of what it reads."""
    for block in nest.blocks():
        if not nest.is_reduction(block):
            continue
        kinds = nest.kinds(block)
        stored = nest.work.get(block)
        read = next((r for r in stored.reads if not r.source.same_as(stored.writes[0].source)), None)
        if read is None or vector_axis(nest, block) not in nest.used(block, read.region[-1].min):
            return False
        if "S" not in kinds:
            return False
    return True


def inline_padding(nest: Nest, block: Any) -> bool:
    """Compute a padded picture where a reduction reads it, and not at all in memory; whether the block was one.

    The test is the same for all lanes of a vector; what it saves is writing and reading a whole picture.
    """
    from tvm import s_tir
    from tvm.ir import Call

    stored, readers = nest.work.get(block), nest.work.get_consumers(block)
    value = getattr(stored.body, "value", None)
    if nest.is_reduction(block) or not readers or not all(nest.is_reduction(reader) for reader in readers):
        return False
    chosen = isinstance(value, Call) and str(getattr(value.op, "name", "")).endswith(".if_then_else")
    if not chosen or len(stored.reads) != 1 or nest.extents(block)[-1] % nest.machine.lanes:
        return False
    try:
        nest.work.compute_inline(block)
    except s_tir.ScheduleError:
        return False
    return True


def fold(nest: Nest, block: Any) -> None:
    """A reduction that keeps the last axis: vectors of that axis, the reduction around them."""
    work, machine = nest.work, nest.machine
    kinds, extents = nest.kinds(block), nest.extents(block)
    loops = work.get_loops(block)
    if len(loops) != len(kinds):
        raise NotThis
    vector = vector_axis(nest, block)
    summed = [loops[i] for i, k in enumerate(kinds) if k == "R"]
    if vector < 0:
        return
    outer = [loops[i] for i, k in enumerate(kinds) if k == "S" and i != vector]
    lanes = next((k * machine.lanes for k in (4, 2, 1) if extents[vector] % (k * machine.lanes) == 0), 0)
    column = loops[vector]
    work.reorder(*outer, column, *summed)
    inside, around = None, [*outer, column]
    if lanes:
        column, inside = nest.split(column, lanes)
        work.reorder(column, *summed, inside)
        around = [*outer, column]
    elif outer and extents[vector] > machine.lanes:
        column, inside = nest.split(column, machine.lanes)
        work.reorder(column, *summed, inside)
        # What is left over gets loops of its own, so that the vectors need no test.
        work.annotate(column, "pragma_loop_partition_hint", True)
        around = outer
    start = work.fuse(*around)
    if math.prod(extents) > SERIAL:
        work.parallel(start)
    decompose(nest, block, summed[0], vector=inside)


def rows(nest: Nest) -> None:
    """Reductions along the last axis: all stages of a row in one loop, sums in as many lanes as a vector has."""
    work, machine = nest.work, nest.machine
    first = next(block for block in nest.blocks() if nest.is_reduction(block))
    spatial = [n for n, kind in zip(nest.extents(first), nest.kinds(first), strict=True) if kind == "S"]
    outer = len(spatial)
    for block in nest.blocks():
        extents = nest.extents(block)
        while outer and extents[:outer] != spatial[:outer]:
            outer -= 1
    total = sum(math.prod(nest.extents(block)) for block in nest.blocks())
    partial = {work.get(made).name_hint for block in nest.blocks() if (made := _in_lanes(nest, block)) is not None}
    blocks = nest.blocks()
    if outer:
        loops = work.get_loops(blocks[-1])[:outer]
        row = work.fuse(*loops) if outer > 1 else loops[0]
        for block in reversed(blocks[:-1]):
            work.compute_at(block, row, preserve_unit_loops=True)
        if total > SERIAL:
            work.parallel(row)
    for block in blocks:
        inside = work.get_loops(block)[1 if outer else 0 :]
        if not inside:
            continue
        if work.get(block).name_hint in partial:
            lane = next(each for each in inside if nest.extent(each) == machine.lanes)
            steps = [each for each in inside if not each.same_as(lane)]
            work.reorder(*steps, lane)
            decompose(nest, block, steps[0], vector=lane)
        elif not nest.is_reduction(block) and nest.extent(inside[-1]) % machine.lanes == 0:
            _, lane = nest.split(inside[-1], machine.lanes)
            work.vectorize(lane)


def _in_lanes(nest: Nest, block: Any) -> Any:
    """Divide a sum along the last axis into as many as a vector has lanes; the block that computes those, or None."""
    work, lanes = nest.work, nest.machine.lanes
    kinds = nest.kinds(block)
    if not kinds.endswith("R") or len(work.get(block).writes) != 1:
        return None
    last = work.get_loops(block)[-1]
    extent = nest.extent(last)
    if extent % lanes or extent < 4 * lanes:
        return None
    _, lane = nest.split(last, lanes)
    return work.rfactor(lane, kinds.count("S"))


def elementwise(nest: Nest, block: Any) -> None:
    """Element by element: vectors of the last axis, threads over the rest."""
    work, machine = nest.work, nest.machine
    loops = work.get_loops(block)
    extents = [nest.extent(loop) for loop in loops]
    total = math.prod(extents)
    if not loops:
        return
    last = loops[-1]
    if _is_plain(nest, block):
        last = work.fuse(*loops)
        loops = [last]
    count = nest.extent(last)
    lanes = next((k * machine.lanes for k in (2, 1) if count % (k * machine.lanes) == 0), 0)
    outer: Sequence[Any] = loops[:-1]
    # TVM 0.27 negates a vector of stored booleans bit by bit: true becomes 255.
    if lanes and not any(str(read.source.ty.dtype) == "bool" for read in work.get(block).reads):
        last, inside = nest.split(last, lanes)
        work.vectorize(inside)
        outer = [*outer, last]
    if total > SERIAL // 4 and outer:
        loop = work.fuse(*outer)
        tasks = nest.extent(loop)
        if tasks > 16 * machine.cores:
            loop, _ = work.split(loop, [8 * machine.cores, None])
        work.parallel(loop)


def _is_plain(nest: Nest, block: Any) -> bool:
    """Whether all that a block reads and writes has the same index, so that its axes are as good as one."""
    stored = nest.work.get(block)
    own = [v.var for v in stored.iter_vars]
    return all(
        len(region.region) == len(own)
        and all(part.min.same_as(var) for part, var in zip(region.region, own, strict=True))
        for region in (*stored.reads, *stored.writes)
    )
