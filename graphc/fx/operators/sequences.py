"""Sequences of tensors, which torch has no type for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphc.fx.host import Items, Operator, as_list


def _construct(*values: Tensor) -> Items:
    return Items(values)


def _at(items: Items, position: Any) -> Tensor:
    return items.values[as_list(position)[0]]


def _insert(items: Items, value: Tensor, position: Any = None) -> Items:
    made = list(items.values)
    made.insert(len(made) if position is None else as_list(position)[0], value)
    return Items(made)


def _erase(items: Items, position: Any = None) -> Items:
    made = list(items.values)
    made.pop(-1 if position is None else as_list(position)[0])
    return Items(made)


def _split(x: Tensor, split: Any = None, *, axis: int = 0, keepdims: int = 1) -> Items:
    if split is None:
        return Items(torch.split(x, 1, axis) if keepdims else x.unbind(axis))
    sizes = split.tolist() if isinstance(split, Tensor) else split
    return Items(torch.split(x, list(sizes) if isinstance(sizes, Sequence) else sizes, axis))


def _concat(items: Items, *, axis: int, new_axis: int = 0) -> Tensor:
    return torch.stack(items.values, axis) if new_axis else torch.cat(items.values, axis)


OPERATORS: dict[str, Operator] = {
    "ConcatFromSequence": Operator(_concat),
    "SequenceAt": Operator(_at, host=(1,)),
    "SequenceConstruct": Operator(_construct),
    "SequenceErase": Operator(_erase, host=(1,)),
    "SequenceInsert": Operator(_insert, host=(2,)),
    "SequenceLength": Operator(lambda items: len(items.values), sizes=True),
    "SplitToSequence": Operator(_split, host=(1,)),
}
