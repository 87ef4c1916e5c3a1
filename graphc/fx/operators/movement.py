"""Operators that move elements: shapes, slices, concatenation, padding, tiling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphc.fx.dtypes import torch_dtype
from graphc.fx.host import Host, Operator, as_list

_SMALL = 16
"""Elements up to which a new list of sizes stays on the host."""


def _shape(x: Any, *, start: int = 0, end: int | None = None) -> Host:
    return list(x.shape)[start:end]


def _reshape(x: Tensor, shape: Host, *, allowzero: int = 0) -> Tensor:
    sizes = [x.shape[i] if n == 0 and not allowzero else n for i, n in enumerate(as_list(shape))]
    return x.reshape(sizes)


def _reshape_host(x: Host, shape: Host, **_: Any) -> Any:
    items, sizes = as_list(x), as_list(shape)
    if not sizes:
        return items[0]
    return items if len(sizes) == 1 else NotImplemented


def _flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _squeeze(x: Tensor, axes: Any = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(as_list(axes)))


def _squeeze_host(x: Host, axes: Any = None) -> Any:
    return x[0] if isinstance(x, list | tuple) and len(x) == 1 else NotImplemented


def _unsqueeze(x: Tensor, axes: Any) -> Tensor:
    rank = x.dim() + len(as_list(axes))
    for axis in sorted(a % rank for a in as_list(axes)):
        x = x.unsqueeze(axis)
    return x


def _unsqueeze_host(x: Host, axes: Any) -> Any:
    return NotImplemented if isinstance(x, list | tuple) or len(as_list(axes)) != 1 else [x]


def _concat(*values: Tensor, axis: int) -> Tensor:
    return torch.cat(values, dim=axis)


def _concat_host(*values: Host, axis: int) -> Any:
    return [item for value in values for item in as_list(value)]


def _split(x: Tensor, split: Any = None, *, axis: int = 0, num_outputs: int = 0, outputs: int) -> tuple[Tensor, ...]:
    if split is None:
        size = -(-x.shape[axis] // (num_outputs or outputs))
        parts = [size] * (outputs - 1)
        return tuple(torch.split(x, [*parts, x.shape[axis] - sum(parts)], dim=axis))
    return tuple(torch.split(x, as_list(split), dim=axis))


def _split_host(x: Host, split: Any = None, *, outputs: int, **_: Any) -> Any:
    items = as_list(x)
    sizes = as_list(split) or [len(items) // outputs] * outputs
    return tuple(items[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(outputs))


def _slice(x: Tensor, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Tensor:
    starts, ends = as_list(starts), as_list(ends)
    axes = list(range(len(starts))) if axes is None else as_list(axes)
    steps = [1] * len(starts) if steps is None else as_list(steps)
    index: list[slice] = [slice(None)] * x.dim()
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step > 0:
            index[axis] = slice(start, end, step)
        else:
            # torch slices forward only.
            picked = range(*slice(start, end if end >= -x.shape[axis] else None, step).indices(x.shape[axis]))
            x = x.index_select(axis, torch.tensor(list(picked), dtype=torch.int64, device=x.device))
    return x[tuple(index)]


def _slice_host(x: Host, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    step = as_list(steps)[0] if steps is not None else 1
    return list(x)[as_list(starts)[0] : as_list(ends)[0] : step]


def _transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    return x.permute(tuple(perm) if perm is not None else tuple(reversed(range(x.dim()))))


def _expand(x: Tensor, shape: Any) -> Tensor:
    sizes = as_list(shape)
    rank = max(x.dim(), len(sizes))
    have, want = [1] * (rank - x.dim()) + list(x.shape), [1] * (rank - len(sizes)) + sizes
    return x.reshape(have).expand([h if w == 1 else w for h, w in zip(have, want, strict=True)])


def _pad(
    x: Tensor, pads: Any, value: Tensor | float | None = None, axes: Any = None, *, mode: str = "constant"
) -> Tensor:
    rank = x.dim()
    amounts = as_list(pads)
    where = [a % rank for a in as_list(axes)] if axes is not None else list(range(rank))
    low, high = [0] * rank, [0] * rank
    for i, axis in enumerate(where):
        low[axis], high[axis] = amounts[i], amounts[i + len(where)]
    if mode == "constant":
        flat = [n for axis in reversed(range(rank)) for n in (low[axis], high[axis])]
        fill = value.reshape(()).item() if isinstance(value, Tensor) else value or 0
        return F.pad(x, flat, value=fill)
    for axis in range(rank):
        if low[axis] or high[axis]:
            at = torch.arange(-low[axis], x.shape[axis] + high[axis], device=x.device)
            x = x.index_select(axis, _fold_back(at, x.shape[axis], mode))
    return x


def _fold_back(at: Tensor, size: int, mode: str) -> Tensor:
    """The source positions of padded positions, of which those of the input are 0 to ``size - 1``."""
    if mode == "edge":
        return at.clamp(0, size - 1)
    if mode == "wrap":
        return torch.remainder(at, size)
    period = max(2 * (size - 1), 1)
    at = torch.remainder(at, period)
    return torch.where(at >= size, period - at, at)


def _constant_of_shape(shape: Any, *, value: Any = (0.0, torch.float32)) -> Any:
    number, dtype = value
    return torch.full(as_list(shape), number, dtype=dtype)


def _constant_of_shape_host(shape: Any, *, value: Any = (0.0, torch.float32)) -> Any:
    sizes, (number, dtype) = as_list(shape), value
    if dtype != torch.int64 or len(sizes) != 1 or not isinstance(sizes[0], int) or sizes[0] > _SMALL:
        return NotImplemented
    return [number] * sizes[0]


def _range(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(
        *(value.reshape(()).item() for value in (start, limit, delta)), dtype=start.dtype, device=start.device
    )


def _range_host(start: Host, limit: Host, delta: Host) -> Any:
    return torch.arange(*(as_list(value)[0] for value in (start, limit, delta)))


def _trilu(x: Tensor, k: Any = None, *, upper: int = 1) -> Tensor:
    offset = as_list(k)[0] if k is not None else 0
    return torch.triu(x, offset) if upper else torch.tril(x, offset)


def _depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    n, c, h, w = x.shape
    b = blocksize
    if mode == "DCR":
        x = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(n, c // (b * b), h * b, w * b)


def _space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    n, c, h, w = x.shape
    b = blocksize
    x = x.reshape(n, c, h // b, b, w // b, b)
    x = x.permute(0, 3, 5, 1, 2, 4) if mode == "DCR" else x.permute(0, 1, 3, 5, 2, 4)
    return x.reshape(n, c * b * b, h // b, w // b)


def _eye_like(x: Tensor, *, k: int = 0, dtype: int = 0) -> Tensor:
    rows, columns = x.shape
    at = torch.arange(columns, device=x.device)[None] - torch.arange(rows, device=x.device)[:, None]
    return (at == k).to(torch_dtype(dtype) if dtype else x.dtype)


OPERATORS: dict[str, Operator] = {
    "Concat": Operator(_concat, on_host=_concat_host),
    "ConstantOfShape": Operator(_constant_of_shape, on_host=_constant_of_shape_host, host=(0,)),
    "DepthToSpace": Operator(_depth_to_space),
    "Expand": Operator(_expand, host=(1,)),
    "EyeLike": Operator(_eye_like),
    "Flatten": Operator(_flatten),
    "Pad": Operator(_pad, host=(1, 3), numbers=(2,), fixed=(2,)),
    "Range": Operator(_range, on_host=_range_host),
    "Reshape": Operator(_reshape, on_host=_reshape_host, host=(1,)),
    "Shape": Operator(_shape, sizes=True),
    "Size": Operator(lambda x: math.prod(x.shape), sizes=True),
    "Slice": Operator(_slice, on_host=_slice_host, host=(1, 2, 3, 4)),
    "SpaceToDepth": Operator(_space_to_depth),
    "Split": Operator(_split, on_host=_split_host, host=(1,), many=True, counted=True),
    "Squeeze": Operator(_squeeze, on_host=_squeeze_host, host=(1,)),
    "Tile": Operator(lambda x, repeats: x.repeat(as_list(repeats)), host=(1,)),
    "Transpose": Operator(_transpose),
    "Trilu": Operator(_trilu, host=(1,)),
    "Unsqueeze": Operator(_unsqueeze, on_host=_unsqueeze_host, host=(1,)),
}
