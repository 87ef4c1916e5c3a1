"""The little that loop nests are written with: a function over buffers, vectors of a register's width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Buffers = Sequence[tuple[str, Sequence[int], str]]
"""Name, shape and dtype of each argument."""

OPAQUE = 8
"""TVM's number for a function that nothing is fused with."""


def kernel(arguments: Buffers, body: Callable[..., None]) -> Any:
    """A ``PrimFunc`` whose statements ``body`` writes, given a buffer for each argument."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import ir as T

    with IRBuilder() as builder:
        with T.prim_func(private=True, s_tir=True):
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": OPAQUE})
            buffers = [T.arg(each, T.buffer(tuple(shape), dtype, layout=None)) for each, shape, dtype in arguments]
            with T.sblock("root"):
                T.reads()
                T.writes()
                body(*buffers)
        return builder.get()


def registers(lanes: int, *, dtype: str = "float32") -> Any:
    """A small buffer whose elements the compiler keeps in registers."""
    from tvm.tirx.script.builder import ir as T

    return T.alloc_buffer((lanes,), dtype, scope="local", layout=None)


def lanes_from(start: Any, lanes: int) -> Any:
    """The index of ``lanes`` elements from ``start`` on."""
    from tvm.tirx.script.builder import ir as T

    return start if lanes == 1 else T.Ramp(start, 1, lanes)


def spread(value: Any, lanes: int) -> Any:
    """A number in all lanes of a vector."""
    from tvm.tirx.script.builder import ir as T

    return value if lanes == 1 else T.Broadcast(value, lanes)


def cast(value: Any, dtype: str, lanes: int) -> Any:
    """A vector's elements in another dtype."""
    from tvm.tirx.script.builder import ir as T

    return T.cast(value, dtype if lanes == 1 else f"{dtype}x{lanes}")


def loop(extent: int, *, parallel: bool = False) -> Any:
    """A loop, over threads if wanted."""
    from tvm.tirx.script.builder import ir as T

    return T.parallel(extent) if parallel else T.serial(extent)


def store_columns(
    target: Any, row: Any, column: Any, value: Any, lanes: int, width: int, filled: int, *, dtype: str = "float32"
) -> None:
    """Store a vector in a row of ``width`` columns, which its vectors fill up to ``filled``; no more than the row."""
    from tvm.tirx.script.builder import ir as T

    def whole() -> None:
        T.buffer_store(target, value, [row, lanes_from(column, lanes)])

    if filled == width:
        whole()
    elif width % lanes == 0:
        with T.If(column < width), T.Then():
            whole()
    else:
        kept = registers(lanes, dtype=dtype)
        T.buffer_store(kept, value, [lanes_from(0, lanes)])
        for lane in range(lanes):
            with T.If(column + lane < width), T.Then():
                T.buffer_store(target, kept[lane], [row, column + lane])
