"""Operators that look up, scatter, sort and count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphc.fx.host import Host, Operator, as_list


def _wrap(indices: Tensor, size: int) -> Tensor:
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + size, indices)


def _gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    axis %= x.dim()
    at = _wrap(indices, x.shape[axis])
    picked = x.index_select(axis, at.reshape(-1))
    return picked.reshape([*x.shape[:axis], *at.shape, *x.shape[axis + 1 :]])


def _gather_host(x: Host, indices: Host, *, axis: int = 0) -> Any:
    items = as_list(x)
    return [items[i] for i in indices] if isinstance(indices, list | tuple) else items[indices]


def _gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return torch.gather(x, axis, _wrap(indices, x.shape[axis]))


def _nd_index(indices: Tensor, shape: Any, batch: int = 0) -> tuple[Tensor, ...]:
    """The advanced index that GatherND and ScatterND mean: one tensor an indexed axis, batch axes first."""
    lead = []
    for axis in range(batch):
        view = [1] * (indices.dim() - 1)
        view[axis] = -1
        lead.append(torch.arange(indices.shape[axis], device=indices.device).reshape(view))
    return (*lead, *(_wrap(part, shape[batch + i]) for i, part in enumerate(indices.unbind(-1))))


def _gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    return x[_nd_index(indices, x.shape, batch_dims)]


def _scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    if reduction in ("none", "add"):
        return x.index_put(_nd_index(indices, x.shape), updates, accumulate=reduction == "add")
    depth = indices.shape[-1]
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
    for part, size in zip(_nd_index(indices, x.shape), x.shape[:depth], strict=False):
        flat = flat * size + part
    rest = x.shape[depth:]
    rows, source = x.reshape(-1, rest.numel()), updates.reshape(-1, rest.numel())
    at = flat.reshape(-1, 1).expand_as(source)
    return rows.scatter_reduce(0, at, source, _REDUCTIONS[reduction]).reshape(x.shape)


_REDUCTIONS = {"mul": "prod", "max": "amax", "min": "amin", "add": "sum"}


def _scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    at = _wrap(indices, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, at, updates)
    return x.scatter_reduce(axis, at, updates, _REDUCTIONS[reduction])


def _topk(x: Tensor, k: Any, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    # A stable sort, because ONNX gives the lower index first where values are equal.
    count = as_list(k)[0]
    values, at = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    return values.narrow(axis, 0, count), at.narrow(axis, 0, count)


def _arg(x: Tensor, largest: bool, axis: int, keepdims: int, last: int) -> Tensor:
    if last:
        found = x.shape[axis] - 1 - _arg(x.flip(axis), largest, axis, keepdims, 0)
        return found
    best = x.amax(axis, keepdim=True) if largest else x.amin(axis, keepdim=True)
    # torch does not promise the first of equal values; its argmax of a mask of ones counts down from it.
    order = torch.arange(x.shape[axis], 0, -1, device=x.device)
    view = [1] * x.dim()
    view[axis] = -1
    return ((x == best) * order.reshape(view)).argmax(axis, keepdim=bool(keepdims))


def _arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _arg(x, True, axis, keepdims, select_last_index)


def _arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _arg(x, False, axis, keepdims, select_last_index)


def _cumsum(x: Tensor, axis: Any, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    dim = as_list(axis)[0]
    turned = x.flip(dim) if reverse else x
    total = torch.cumsum(turned, dim, dtype=x.dtype)
    if exclusive:
        total = total - turned
    return total.flip(dim) if reverse else total


def _cumprod(x: Tensor, axis: Any, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    dim = as_list(axis)[0]
    x = x.flip(dim) if reverse else x
    if exclusive:
        x = torch.cat([torch.ones_like(x.narrow(dim, 0, 1)), x.narrow(dim, 0, x.shape[dim] - 1)], dim)
    total = torch.cumprod(x, dim, dtype=x.dtype)
    return total.flip(dim) if reverse else total


def _compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    at = torch.nonzero(condition).reshape(-1)
    return x.reshape(-1)[at] if axis is None else x.index_select(axis, at)


def _reverse_sequence(x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    moved = x.movedim((batch_axis, time_axis), (0, 1))
    at = torch.arange(moved.shape[1], device=x.device)[None]
    ends = lengths.reshape(-1, 1)
    turned = torch.where(at < ends, ends - 1 - at, at)
    rows = torch.arange(moved.shape[0], device=x.device)[:, None]
    return moved[rows, turned].movedim((0, 1), (batch_axis, time_axis))


def _unique(x: Tensor, *, axis: int | None = None, sorted: int = 1) -> tuple[Tensor, ...]:
    flat = x.reshape(-1) if axis is None else x
    dim = 0 if axis is None else axis
    values, back, counts = torch.unique(flat, return_inverse=True, return_counts=True, dim=dim)
    # Where each distinct item occurs first.
    first = back.new_full((counts.shape[0],), flat.shape[dim])
    first = first.scatter_reduce(0, back, torch.arange(flat.shape[dim], device=x.device), "amin")
    if not sorted:
        order = torch.argsort(first)
        place = torch.argsort(order)
        values, first, back, counts = values.index_select(dim, order), first[order], place[back], counts[order]
    return values, first, back, counts


def _tensor_scatter(
    x: Tensor, update: Tensor, starts: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    axis %= x.dim()
    first = starts if starts is not None else torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    at = first[:, None] + torch.arange(update.shape[axis], device=x.device)
    at = torch.remainder(at, x.shape[axis]) if mode == "circular" else at
    view = [1] * x.dim()
    view[0], view[axis] = at.shape
    return x.scatter(axis, at.reshape(view).expand(update.shape), update)


def _one_hot(indices: Tensor, depth: Any, values: Tensor, *, axis: int = -1) -> Tensor:
    size = int(as_list(depth)[0])
    rank = indices.dim() + 1
    axis %= rank
    view = [1] * rank
    view[axis] = -1
    at = torch.remainder(indices.to(torch.int64), size).unsqueeze(axis)
    inside = ((indices >= -size) & (indices < size)).unsqueeze(axis)
    hot = (at == torch.arange(size, device=at.device).reshape(view)) & inside
    return torch.where(hot, values[1], values[0])


def _non_zero(x: Tensor) -> Tensor:
    return torch.nonzero(x).T


OPERATORS: dict[str, Operator] = {
    "ArgMax": Operator(_arg_max),
    "ArgMin": Operator(_arg_min),
    "Compress": Operator(_compress),
    "CumProd": Operator(_cumprod, host=(1,)),
    "CumSum": Operator(_cumsum, host=(1,)),
    "Gather": Operator(_gather, on_host=_gather_host),
    "GatherElements": Operator(_gather_elements),
    "GatherND": Operator(_gather_nd),
    "NonZero": Operator(_non_zero),
    "OneHot": Operator(_one_hot, host=(1,), fixed=(2,)),
    "ReverseSequence": Operator(_reverse_sequence),
    "Scatter": Operator(_scatter_elements),
    "ScatterElements": Operator(_scatter_elements),
    "ScatterND": Operator(_scatter_nd),
    "TensorScatter": Operator(_tensor_scatter),
    "TopK": Operator(_topk, host=(1,), many=True),
    "Unique": Operator(_unique, many=True),
}
