"""Control flow: bodies are functions of what they capture and what they are given, run by Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphc.fx.host import as_host, as_list, as_tensor

Body = Callable[..., Sequence[Any]]
"""Called with the inputs, then the captured values; returns the outputs in order."""

Empty = Sequence[Tensor]
"""For each output that collects a value a step: what no step collects, of shape (0, ...)."""


def branch(then: Body, otherwise: Body) -> Callable[..., Any]:
    """If: ``call(condition, captured by then, captured by else)``."""

    def call(condition: Any, by_then: Sequence[Any], by_else: Sequence[Any]) -> Sequence[Any]:
        return then(*by_then) if _true(condition) else otherwise(*by_else)

    call.__name__ = call.__qualname__ = "If"
    return call


def loop(body: Body, empty: Empty) -> Callable[..., Any]:
    """Loop: ``call(trip count or None, condition or None, carried values, captured values)``."""

    def call(trips: Any, condition: Any, carried: Sequence[Any], captured: Sequence[Any]) -> Sequence[Any]:
        limit = None if trips is None else as_list(trips)[0]
        state = list(carried)
        rows: list[list[Any]] = [[] for _ in empty]
        step = 0
        while (limit is None or step < limit) and (condition is None or _true(condition)):
            condition, *results = body(step, True if condition is None else condition, *state, *captured)
            state = results[: len(state)]
            for row, item in zip(rows, results[len(state) :], strict=True):
                row.append(as_tensor(item))
            step += 1
        return [*state, *(torch.stack(row) if row else none for row, none in zip(rows, empty, strict=True))]

    call.__name__ = call.__qualname__ = "Loop"
    return call


def scan(
    body: Body,
    empty: Empty,
    inputs: int,
    *,
    axes: Sequence[int] | None = None,
    reverse: Sequence[int] | None = None,
    output_axes: Sequence[int] | None = None,
    output_reverse: Sequence[int] | None = None,
) -> Callable[..., Any]:
    """Scan: ``call(states and then sequences, captured values)``."""
    axes, reverse = axes or [0] * inputs, reverse or [0] * inputs
    output_axes, output_reverse = output_axes or [0] * len(empty), output_reverse or [0] * len(empty)

    def call(given: Sequence[Any], captured: Sequence[Any]) -> Sequence[Any]:
        count = len(given) - inputs
        state, sequences = list(given[:count]), [as_tensor(value) for value in given[count:]]
        length = sequences[0].shape[axes[0]] if sequences else 0
        rows: list[list[Any]] = [[] for _ in empty]
        for step in range(length):
            items = [
                sequence.select(axis, length - 1 - step if back else step)
                for sequence, axis, back in zip(sequences, axes, reverse, strict=True)
            ]
            results = body(*state, *items, *captured)
            state = list(results[:count])
            for row, item in zip(rows, results[count:], strict=True):
                row.append(as_tensor(item))
        collected = [
            torch.stack(row[::-1] if back else row, axis) if row else none
            for row, none, axis, back in zip(rows, empty, output_axes, output_reverse, strict=True)
        ]
        return [*state, *collected]

    call.__name__ = call.__qualname__ = "Scan"
    return call


def _true(condition: Any) -> bool:
    held = as_host(condition)
    return bool(held[0] if isinstance(held, list | tuple) else held)
