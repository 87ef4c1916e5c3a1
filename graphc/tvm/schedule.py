"""Loops for CPU code that was not tuned: TVM's own are plain nests, one scalar at a time.

Three rules cover nearly all of a network's time. A *contraction* (matrix product, convolution) computes a tile of the
output in registers: some rows times some vectors, with the reduction innermost around it. A *fold* along an axis that
is not the last (pooling, depthwise convolution, a mean over an image) goes over vectors of the last axis. A *row*
(softmax, norms) keeps all its stages in one loop over rows and sums in several lanes. What remains is element by
element: parallel and vectorised. A function that no rule takes keeps its plain loops, which are always right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SERIAL = 1 << 14
"""Scalar operations of a loop nest up to which starting threads costs more than it saves."""

_LEVELS = {"x86-64": 4, "x86-64-v2": 4, "x86-64-v3": 8, "x86-64-v4": 16}


@dataclass(frozen=True)
class Machine:
    """What schedules need to know of a processor.

    Attributes:
        lanes: 32-bit numbers in a vector register.
        registers: Vector registers.
        cores: Cores to keep busy.
    """

    lanes: int
    registers: int
    cores: int

    @staticmethod
    def of(target: Any) -> Machine:
        """The machine that a target describes; 8 lanes where it is not known to have more or fewer."""
        from tvm.target import codegen

        name = str(target.attrs.get("mcpu", ""))
        cores = int(target.attrs.get("num-cores", 0) or 1)
        lanes = _LEVELS.get(name, 0)
        if not lanes:
            with target:
                wide = codegen.llvm_cpu_has_features("avx512f", target)
                lanes = 16 if wide else 8 if codegen.llvm_cpu_has_features("avx2", target) else 4
        return Machine(lanes, 32 if lanes == 16 else 16, cores)


@dataclass(frozen=True)
class Choice:
    """What a tuner may decide of a contraction's loops.

    Attributes:
        height, width: The tile: rows and columns that are computed in registers; 0 leaves both to ``tile``.
        pack: Whether the vector operand may be copied next to each other.
    """

    height: int = 0
    width: int = 0
    pack: bool = True


RULED = Choice()
"""What the rules decide by themselves."""


def functions(module: Any) -> list[tuple[Any, Any]]:
    """The loop nests of a module, with their names."""
    from tvm import tirx

    return [
        (name, function)
        for name, function in module.functions_items()
        if isinstance(function, tirx.PrimFunc) and not (function.attrs or {}).get("tirx.is_scheduled")
    ]


def schedule(module: Any, target: Any, choices: Mapping[str, Choice] | None = None) -> Any:
    """Give every function of a module loops that suit the target; on others than a CPU it stays as it is.

    Args:
        module: Changed in place.
        target: A TVM target.
        choices: What a tuner found, by function name.
    """
    if target.kind.name != "llvm":
        return module
    machine = Machine.of(target)
    for name, function in functions(module):
        module[name] = scheduled(function, machine, (choices or {}).get(name.name_hint, RULED))
    return module


def scheduled(function: Any, machine: Machine, choice: Choice = RULED) -> Any:
    """A function with better loops, or the function itself where no rule takes it."""
    from tvm import s_tir

    for rule in (_blocks, _each):
        work = s_tir.Schedule(function)
        try:
            rule(_Nest(work, machine, choice))
        except Exception:  # TVM's refusals are of many kinds
            continue
        return work.mod["main"].with_attr("tirx.is_scheduled", True)
    return function


class _NotThis(Exception):
    """A rule does not fit."""


@dataclass
class _Nest:
    """A function that is being scheduled.

    Attributes:
        work: TVM's schedule of it.
        machine: What it shall run on.
        choice: What a tuner decided.
    """

    work: Any
    machine: Machine
    choice: Choice = RULED

    def blocks(self) -> list[Any]:
        return list(self.work.get_child_blocks(self.work.get_sblock("root")))

    def kinds(self, block: Any) -> str:
        """``S`` or ``R`` for each axis of a block: of the result, or summed over."""
        return "".join("R" if v.iter_type == 2 else "S" for v in self.work.get(block).iter_vars)

    def extent(self, loop: Any) -> int:
        return int(self.work.get(loop).extent)

    def extents(self, block: Any) -> list[int]:
        return [int(v.dom.extent) for v in self.work.get(block).iter_vars]

    def is_reduction(self, block: Any) -> bool:
        return "R" in self.kinds(block)

    def axes(self, block: Any, region: Any) -> set[int]:
        """The axes of a block that an access depends on."""
        return {i for part in region.region for i in self.used(block, part.min)}

    def used(self, block: Any, expression: Any) -> set[int]:
        from tvm.s_tir.dlight.analysis.common_analysis import collect_vars_used_in_prim_expr

        own = [v.var for v in self.work.get(block).iter_vars]
        found = collect_vars_used_in_prim_expr(expression)
        return {i for i, var in enumerate(own) if any(var.same_as(other) for other in found)}

    def split(self, loop: Any, inner: int) -> tuple[Any, Any]:
        outer, inside = self.work.split(loop, [None, inner])
        return outer, inside


def _blocks(nest: _Nest) -> None:
    """Inline what can be, then schedule each contraction with what follows it, and the rest by its kind."""
    _inline(nest)
    names = [nest.work.get(block).name_hint for block in nest.blocks()]
    if not any(nest.is_reduction(block) for block in nest.blocks()):
        for name in names:
            _elementwise(nest, nest.work.get_sblock(name))
        return
    if any(_is_contraction(nest, block) for block in nest.blocks()):
        done: set[str] = set()
        for name in names:
            if name in done:
                continue
            block = nest.work.get_sblock(name)
            if _is_contraction(nest, block):
                done |= _contraction(nest, block)
            elif nest.is_reduction(block):
                _fold(nest, block)
            else:
                _elementwise(nest, block)
        return
    if _last_is_spatial(nest):
        for name in names:
            block = nest.work.get_sblock(name)
            (_fold if nest.is_reduction(block) else _elementwise)(nest, block)
        return
    _rows(nest)


def _each(nest: _Nest) -> None:
    """The careful form: every block by itself."""
    for block in nest.blocks():
        (_fold if nest.is_reduction(block) else _elementwise)(nest, block)


def _inline(nest: _Nest) -> None:
    """Compute what is element by element where it is read, unless a reduction would compute it again and again."""
    from tvm import s_tir

    for block in nest.blocks():
        if nest.is_reduction(block):
            continue
        readers = nest.work.get_consumers(block)
        again = any(nest.is_reduction(reader) for reader in readers) or len(readers) > 1
        if not readers or (again and not _is_copy(nest, block)):
            continue
        try:
            nest.work.compute_inline(block)
        except s_tir.ScheduleError:
            continue


def _is_copy(nest: _Nest, block: Any) -> bool:
    """Whether a block only moves or converts numbers."""
    from tvm import tirx
    from tvm.ir import TensorLoad

    value = nest.work.get(block).body
    value = getattr(value, "value", None)
    while isinstance(value, tirx.Cast):
        value = value.value
    return isinstance(value, TensorLoad)


def _is_contraction(nest: _Nest, block: Any) -> bool:
    """Whether a block sums products of two operands that do not depend on all the same axes."""
    kinds = nest.kinds(block)
    stored = nest.work.get(block)
    reads = [r for r in stored.reads if not r.source.same_as(stored.writes[0].source)]
    if "R" not in kinds or len(reads) != 2:
        return False
    summed = math.prod(n for n, kind in zip(nest.extents(block), kinds, strict=True) if kind == "R")
    a, b = (nest.axes(block, read) for read in reads)
    spatial = {i for i, kind in enumerate(kinds) if kind == "S" and nest.extents(block)[i] > 1}
    return summed >= 4 and bool((a ^ b) & spatial) and _vector_axis(nest, block) in a ^ b


def choices(function: Any, machine: Machine) -> list[Choice]:
    """What is worth measuring for a function, the most likely first; empty if it has no contraction."""
    from tvm import s_tir

    nest = _Nest(s_tir.Schedule(function), machine)
    try:
        _inline(nest)
        block = next((each for each in nest.blocks() if _is_contraction(nest, each)), None)
    except Exception:  # TVM's refusals are of many kinds
        return []
    if block is None:
        return []
    vector, kinds, extents = _vector_axis(nest, block), nest.kinds(block), nest.extents(block)
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


def _vector_axis(nest: _Nest, block: Any) -> int:
    """The axis of a block along which the result is contiguous."""
    kinds, extents = nest.kinds(block), nest.extents(block)
    spatial = [i for i, kind in enumerate(kinds) if kind == "S" and extents[i] > 1]
    return spatial[-1] if spatial else -1


def tile(rows: int, columns: int, machine: Machine) -> tuple[int, int]:
    """How many rows and columns of a product to compute in registers.

    For ``m`` rows and ``v`` vectors a step of the reduction does ``m * v`` products for ``m + v`` loads; ``m * v``
    sums, ``v`` operands and one broadcast must fit into the registers. What does not divide the product evenly is worse
    than any tile that does.
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
            ragged = 0.8 if rows % height else 1.0
            ragged *= 0.5 if columns % width else 1.0
            score = height * vectors / (height + vectors) * min(height * vectors, 8) / 8 * waste * ragged
            if score > best:
                best, choice = score, (height, width)
    return choice


def _contraction(nest: _Nest, block: Any) -> set[str]:
    """Schedule a sum of products and what follows it element by element; the names of all blocks that are done."""
    work, machine = nest.work, nest.machine
    done = {work.get(block).name_hint}
    kinds, extents = nest.kinds(block), nest.extents(block)
    vector = _vector_axis(nest, block)
    stored = work.get(block)
    reads = [i for i, r in enumerate(stored.reads) if not r.source.same_as(stored.writes[0].source)]
    wide = next(i for i in reads if vector in nest.axes(block, stored.reads[i]))
    others = [i for i, k in enumerate(kinds) if k == "S" and i != vector]
    shared = [i for i in others if i in nest.axes(block, stored.reads[wide])]
    rows = [i for i in others if i not in shared]
    summed = [i for i, k in enumerate(kinds) if k == "R"]
    packs = _can_pack(nest, block, wide, vector)
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
    work.reorder(*outer, chunks, outer_column, outer_row, *steps, tile_row, tile_column)
    start = work.fuse(*outer, chunks, outer_column)
    # What follows is computed on the tile, while it is in registers.
    cache = work.cache_write(block, 0, "local")
    while readers := work.get_consumers(cache):
        if len(readers) != 1 or nest.is_reduction(readers[0]):
            break
        done.add(work.get(readers[0]).name_hint)
        work.reverse_compute_inline(readers[0])
    work.transform_layout(block, ("write", 0), flat)
    work.transform_block_layout(cache, flat)
    work.reverse_compute_at(cache, outer_row, preserve_unit_loops=True)
    vectors = width % machine.lanes == 0
    if vectors:
        work.vectorize(work.get_loops(cache)[-1])
    if nest.choice.pack and packs and tiles >= 4 and (packs == "scattered" or columns > width):
        packed = work.cache_read(block, wide, "global")
        work.compute_at(packed, start, preserve_unit_loops=True)
        _pack(nest, packed, block, wide, len(shared) + 1)
    if batch * count * columns * math.prod(extents[i] for i in summed) > SERIAL:
        work.parallel(start)
    _decompose(nest, block, steps[0], unroll=tile_row, vector=tile_column if vectors else None)
    return done


def _flat(nest: _Nest, block: Any, shared: list[int], rows: list[int], vector: int, summed: list[int]) -> Any:
    """Give a block one axis for all its rows, in the order shared, rows, vector, summed; the map of the result's axes.

    A tile of rows may begin in one row of a picture and end in the next. Of several axes TVM would take the box around
    such a tile, and store what was not computed.
    """
    from tvm.tirx import IndexMap

    extents, kinds = nest.extents(block), nest.kinds(block)
    spatial = [i for i, kind in enumerate(kinds) if kind == "S"]
    own = [v.var for v in nest.work.get(block).iter_vars]
    written = nest.work.get(block).writes[0].region
    if len(written) != len(spatial) or not all(
        part.min.same_as(own[i]) for part, i in zip(written, spatial, strict=True)
    ):
        raise _NotThis

    def places(at: dict[int, Any]) -> list[Any]:
        row: Any = 0
        for i in rows:
            row = row * extents[i] + at[i]
        return [*(at[i] for i in shared), row, at[vector]]

    def whole(*index: Any) -> list[Any]:
        return [*places(dict(enumerate(index))), *(index[i] for i in summed)]

    def result(*index: Any) -> list[Any]:
        return places(dict(zip(spatial, index, strict=True)))

    nest.work.transform_block_layout(block, IndexMap.from_func(whole, len(kinds), index_dtype="int64"))
    return IndexMap.from_func(result, len(spatial), index_dtype="int64")


def _decompose(nest: _Nest, block: Any, step: Any, *, unroll: Any = None, vector: Any = None) -> None:
    """Set the sums of a reduction to zero before the first step; its inner loops become straight code and vectors."""
    work = nest.work
    # Once its start is split off, a reduction's loops can no longer be changed.
    if unroll is not None:
        work.unroll(unroll)
    if vector is not None:
        work.vectorize(vector)
    init = work.decompose_reduction(block, step)
    if vector is not None:
        work.vectorize(work.get_loops(init)[-1])


def _can_pack(nest: _Nest, block: Any, wide: int, vector: int) -> str:
    """Whether the vector operand can be copied next to each other for a tile's columns, and how it lies now."""
    read = nest.work.get(block).reads[wide]
    if any(len(nest.used(block, part.min)) > 1 for part in read.region):
        return ""
    return "together" if nest.used(block, read.region[-1].min) == {vector} else "scattered"


def _pack(nest: _Nest, packed: Any, block: Any, wide: int, vector: int) -> None:
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


def _last_is_spatial(nest: _Nest) -> bool:
    """Whether every reduction keeps the last axis of what it reads."""
    for block in nest.blocks():
        if not nest.is_reduction(block):
            continue
        kinds = nest.kinds(block)
        stored = nest.work.get(block)
        read = next((r for r in stored.reads if not r.source.same_as(stored.writes[0].source)), None)
        if read is None or _vector_axis(nest, block) not in nest.used(block, read.region[-1].min):
            return False
        if "S" not in kinds:
            return False
    return True


def _fold(nest: _Nest, block: Any) -> None:
    """A reduction that keeps the last axis: vectors of that axis, the reduction around them."""
    work, machine = nest.work, nest.machine
    kinds, extents = nest.kinds(block), nest.extents(block)
    loops = work.get_loops(block)
    if len(loops) != len(kinds):
        raise _NotThis
    vector = _vector_axis(nest, block)
    summed = [loops[i] for i, k in enumerate(kinds) if k == "R"]
    if vector < 0:
        return
    outer = [loops[i] for i, k in enumerate(kinds) if k == "S" and i != vector]
    lanes = next((k * machine.lanes for k in (4, 2, 1) if extents[vector] % (k * machine.lanes) == 0), 0)
    column = loops[vector]
    work.reorder(*outer, column, *summed)
    inside = None
    if lanes:
        column, inside = nest.split(column, lanes)
        work.reorder(column, *summed, inside)
    start = work.fuse(*outer, column)
    if math.prod(extents) > SERIAL:
        work.parallel(start)
    _decompose(nest, block, summed[0], vector=inside)


def _rows(nest: _Nest) -> None:
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
            _decompose(nest, block, steps[0], vector=lane)
        elif not nest.is_reduction(block) and nest.extent(inside[-1]) % machine.lanes == 0:
            _, lane = nest.split(inside[-1], machine.lanes)
            work.vectorize(lane)


def _in_lanes(nest: _Nest, block: Any) -> Any:
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


def _elementwise(nest: _Nest, block: Any) -> None:
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
    if lanes:
        last, inside = nest.split(last, lanes)
        work.vectorize(inside)
        outer = [*outer, last]
    if total > SERIAL and outer:
        loop = work.fuse(*outer)
        tasks = nest.extent(loop)
        if tasks > 16 * machine.cores:
            loop, _ = work.split(loop, [8 * machine.cores, None])
        work.parallel(loop)


def _is_plain(nest: _Nest, block: Any) -> bool:
    """Whether all that a block reads and writes has the same index, so that its axes are as good as one."""
    stored = nest.work.get(block)
    own = [v.var for v in stored.iter_vars]
    return all(
        len(region.region) == len(own)
        and all(part.min.same_as(var) for part, var in zip(region.region, own, strict=True))
        for region in (*stored.reads, *stored.writes)
    )
