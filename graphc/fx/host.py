"""Values that stay in Python: sizes, axes and the arithmetic on them.

An integer tensor that holds sizes would break ``torch.export`` and cost a device synchronisation a read. A *host
value* is a number (rank 0) or a list of numbers (rank 1); operators that get only host values and know how to, answer
in kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Host = Any
"""A Python (or symbolic) int, float or bool, or a list of them."""

_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Items:
    """A sequence of tensors, which is no host value."""

    values: Sequence[Tensor]


def is_host(value: object) -> bool:
    """Whether a value is held in Python, not in a tensor."""
    return isinstance(value, (list, tuple, *_NUMBERS))


def as_tensor(value: Any, device: Any = None) -> Any:
    """A tensor of a host value: int64, float32 or bool; a tensor or a sequence of them as it is."""
    if isinstance(value, torch.Tensor | Items):
        return value
    items = list(value) if isinstance(value, list | tuple) else [value]
    # An empty host list is an empty list of sizes, never of floats.
    dtype = torch.int64 if not items or isinstance(items[0], int | torch.SymInt) else torch.float32
    if items and isinstance(items[0], bool | torch.SymBool):
        dtype = torch.bool
    return torch.tensor(items if isinstance(value, list | tuple) else value, dtype=dtype, device=device)


def as_host(value: Any) -> Host:
    """The number or list that a tensor of rank 0 or 1 holds; a host value as it is."""
    return value.tolist() if isinstance(value, torch.Tensor) else value


def as_list(value: Any) -> list[Any]:
    """The numbers of a host value or a small tensor, as a list; none for None."""
    held = as_host(value)
    if held is None:
        return []
    return list(held) if isinstance(held, list | tuple) else [held]


def broadcast(function: Callable[..., Any], values: Sequence[Host]) -> Host:
    """Apply a function of numbers elementwise to host values; lists of one element broadcast."""
    lengths = {len(v) for v in values if isinstance(v, list | tuple)}
    if not lengths:
        return function(*values)
    size = next(iter(lengths - {1}), 1)
    rows = [list(v) * (size if len(v) == 1 else 1) if isinstance(v, list | tuple) else [v] * size for v in values]
    return [function(*row) for row in zip(*rows, strict=True)]


@dataclass(frozen=True)
class Operator:
    """How one ONNX operator runs in torch.

    Attributes:
        run: Called with the inputs in order (None where omitted) and the attributes by name.
        on_host: Called instead where all inputs are host values; may answer NotImplemented.
        host: The inputs that ``run`` wants as Python lists or numbers, and reads with ``as_list``.
        numbers: The inputs that ``run`` also takes as Python numbers, which torch has faster kernels for.
        fixed: The float inputs that are no weights: running statistics, scales, bounds.
        many: It returns a tuple, one item an output.
        counted: ``run`` wants the number of outputs, as ``outputs``.
        sizes: It answers host values, to a tensor as well.
    """

    run: Callable[..., Any]
    on_host: Callable[..., Any] | None = None
    host: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()
    fixed: tuple[int, ...] = ()
    many: bool = False
    counted: bool = False
    sizes: bool = False

    def bind(self, name: str) -> Callable[..., Any]:
        """The function that stands in the torch.fx graph; ``device`` is where what is made of host values goes."""

        def call(*inputs: Any, device: Any = None, **attributes: Any) -> Any:
            if self.on_host and inputs and all(value is None or is_host(value) for value in inputs):
                answer = self.on_host(*inputs, **attributes)
                if answer is not NotImplemented:
                    return answer.to(device) if isinstance(answer, torch.Tensor) and device else answer
            device = next((value.device for value in inputs if isinstance(value, torch.Tensor)), device)
            ready = [
                value if value is None else as_host(value) if i in self.host else as_tensor(value, device)
                for i, value in enumerate(inputs)
            ]
            result = self.run(*ready, **attributes)
            return result.to(device) if device and isinstance(result, torch.Tensor) else result

        call.__name__ = call.__qualname__ = name
        return call
