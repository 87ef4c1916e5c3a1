"""A function whose loops are being changed, and the processor that it shall run on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SERIAL = 1 << 17
"""Products of a loop nest up to which starting threads costs more than it saves."""

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


class NotThis(Exception):
    """A rule does not fit."""


@dataclass
class Nest:
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


def vector_axis(nest: Nest, block: Any) -> int:
    """The axis of a block along which the result is contiguous."""
    kinds, extents = nest.kinds(block), nest.extents(block)
    spatial = [i for i, kind in enumerate(kinds) if kind == "S" and extents[i] > 1]
    return spatial[-1] if spatial else -1


def decompose(nest: Nest, block: Any, step: Any, *, unroll: Sequence[Any] = (), vector: Any = None) -> None:
    """Set the sums of a reduction to zero before the first step; its inner loops become straight code and vectors."""
    work = nest.work
    # Once its start is split off, a reduction's loops can no longer be changed.
    for loop in unroll:
        work.unroll(loop)
    if vector is not None:
        work.vectorize(vector)
    init = work.decompose_reduction(block, step)
    if vector is not None:
        work.vectorize(work.get_loops(init)[-1])


def inline(nest: Nest) -> None:
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


def _is_copy(nest: Nest, block: Any) -> bool:
    """Whether a block only moves or converts numbers."""
    from tvm import tirx
    from tvm.ir import TensorLoad

    value = nest.work.get(block).body
    value = getattr(value, "value", None)
    while isinstance(value, tirx.Cast):
        value = value.value
    return isinstance(value, TensorLoad)
