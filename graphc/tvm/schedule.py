"""Loops for CPU code that was not tuned: TVM's own are plain nests, one scalar at a time.

Three rules cover nearly all of a network's time. A *contraction* (matrix product, convolution) computes a tile of the
output in registers: some rows times some vectors, with the reduction innermost around it. A *fold* along an axis that
is not the last (pooling, depthwise convolution, a mean over an image) goes over vectors of the last axis. A *row*
(softmax, norms) keeps all its stages in one loop over rows and sums in several lanes. What remains is element by
element: parallel and vectorised. A function that no rule takes keeps its plain loops, which are always right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphc.tvm import folds
from graphc.tvm.contraction import contraction, is_contraction
from graphc.tvm.nest import RULED, Choice, Machine, Nest, inline


def functions(module: Any) -> list[tuple[Any, Any]]:
    """The loop nests of a module, with their names."""
    from tvm import tirx

    return [
        (name, function)
        for name, function in module.functions_items()
        if isinstance(function, tirx.PrimFunc) and not (function.attrs or {}).get("tirx.is_scheduled")
    ]


def schedule(module: Any, target: Any, choices: Mapping[str, Choice] | None = None) -> dict[str, str]:
    """Give every function of a module loops that suit a processor.

    Args:
        module: Changed in place.
        target: A TVM target, a processor.
        choices: What a tuner found, by function name.

    Returns:
        Why functions keep the loops that they had, by name.
    """
    machine, kept = Machine.of(target), {}
    for name, function in functions(module):
        better = scheduled(function, machine, (choices or {}).get(name.name_hint, RULED))
        if better is function:
            kept[name.name_hint] = _why(function)
        else:
            module[name] = better
    return kept


def scheduled(function: Any, machine: Machine, choice: Choice = RULED) -> Any:
    """A function with better loops, or the function itself where no rule takes it."""
    from tvm import s_tir

    for rule in (_blocks, _each):
        try:
            work = s_tir.Schedule(function)
            rule(Nest(work, machine, choice))
        except Exception:  # TVM's refusals are of many kinds
            continue
        return work.mod["main"].with_attr("tirx.is_scheduled", True)
    return function


def _why(function: Any) -> str:
    """Why no rule takes a function."""
    from tvm import s_tir

    try:
        nest = Nest(s_tir.Schedule(function), Machine(1, 1, 1))
        blocks = nest.blocks()
    except Exception:  # there is no root block
        return "TVM writes it as one piece"
    try:
        for block in blocks:
            nest.extents(block)
    except TypeError:
        return "its sizes are known at run time only"
    return "no rule fits its loops"


def _blocks(nest: Nest) -> None:
    """Inline what can be, then schedule each contraction with what follows it, and the rest by its kind."""
    inline(nest)
    names = [nest.work.get(block).name_hint for block in nest.blocks()]
    if not any(nest.is_reduction(block) for block in nest.blocks()):
        for name in names:
            folds.elementwise(nest, nest.work.get_sblock(name))
        return
    if any(is_contraction(nest, block) for block in nest.blocks()):
        done: set[str] = set()
        for name in names:
            if name in done:
                continue
            block = nest.work.get_sblock(name)
            if is_contraction(nest, block):
                done |= contraction(nest, block)
            elif nest.is_reduction(block):
                folds.fold(nest, block)
            else:
                folds.elementwise(nest, block)
        return
    if folds.last_is_spatial(nest):
        names = [name for name in names if not folds.inline_padding(nest, nest.work.get_sblock(name))]
        for name in names:
            block = nest.work.get_sblock(name)
            (folds.fold if nest.is_reduction(block) else folds.elementwise)(nest, block)
        return
    folds.rows(nest)


def _each(nest: Nest) -> None:
    """The careful form: every block by itself."""
    for block in nest.blocks():
        (folds.fold if nest.is_reduction(block) else folds.elementwise)(nest, block)
