"""Convolutions and pools over any number of spatial axes, with ONNX's paddings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphc.fx.host import Operator

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL: dict[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}

Ints = Sequence[int]


def _padding(
    size: Ints, kernel: Ints, strides: Ints, dilations: Ints, pads: Ints | None, auto_pad: str
) -> tuple[list[int], list[int]]:
    """The elements added before and after each spatial axis, as ``auto_pad`` or ``pads`` say."""
    rank = len(kernel)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        total = [
            max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            for n, k, s, d in zip(size, kernel, strides, dilations, strict=True)
        ]
        small = [t // 2 for t in total]
        large = [t - h for t, h in zip(total, small, strict=True)]
        return (small, large) if auto_pad == "SAME_UPPER" else (large, small)
    if auto_pad == "VALID" or pads is None:
        return [0] * rank, [0] * rank
    return list(pads[:rank]), list(pads[rank:])


def _pad(x: Tensor, low: Ints, high: Ints, value: float = 0.0) -> Tensor:
    if not any(low) and not any(high):
        return x
    return F.pad(x, [n for pair in reversed(list(zip(low, high, strict=True))) for n in pair], value=value)


def conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    rank = w.dim() - 2
    strides, dilations = strides or (1,) * rank, dilations or (1,) * rank
    low, high = _padding(x.shape[2:], w.shape[2:], strides, dilations, pads, auto_pad)
    if low != high:
        x, low = _pad(x, low, high), [0] * rank
    return _CONV[rank](x, w, b, stride=strides, padding=low, dilation=dilations, groups=group)


def _conv_transpose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    output_padding: Ints | None = None,
    output_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    rank = w.dim() - 2
    size, kernel = x.shape[2:], w.shape[2:]
    strides, dilations = strides or (1,) * rank, dilations or (1,) * rank
    extra = list(output_padding or (0,) * rank)
    whole = [(n - 1) * s + (k - 1) * d + 1 for n, k, s, d in zip(size, kernel, strides, dilations, strict=True)]
    same = auto_pad in ("SAME_UPPER", "SAME_LOWER")
    if output_shape is not None or same:
        wanted = list(output_shape[-rank:]) if output_shape else [n * s for n, s in zip(size, strides, strict=True)]
        total = [f + e - o for f, e, o in zip(whole, extra, wanted, strict=True)]
        # What is cropped; a negative crop adds zeros.
        half = [t // 2 for t in total]
        other = [t - h for t, h in zip(total, half, strict=True)]
        low, high = (half, other) if auto_pad == "SAME_UPPER" else (other, half)
    else:
        low, high = _padding(size, kernel, strides, dilations, pads, auto_pad)
    y = _CONV_TRANSPOSE[rank](x, w, None, stride=strides, groups=group, dilation=dilations)
    y = _pad(y, [-n for n in low], [e - n for e, n in zip(extra, high, strict=True)])
    return y if b is None else y + b.reshape([1, -1] + [1] * rank)


def _beyond(
    size: Ints, low: Ints, high: Ints, kernel: Ints, strides: Ints, dilations: Ints, ceil_mode: int
) -> list[int]:
    """Elements after the padding that the last window of ``ceil_mode`` reaches; none for a window in the padding."""
    extra = []
    for n, a, b, k, s, d in zip(size, low, high, kernel, strides, dilations, strict=True):
        room = n + a + b - ((k - 1) * d + 1)
        windows = (-(-room // s) if ceil_mode else room // s) + 1
        if ceil_mode and (windows - 1) * s >= n + a:
            windows -= 1
        extra.append(max((windows - 1) * s - room, 0))
    return extra


def _max_pool(
    x: Tensor,
    *,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Ints | None = None,
    pads: Ints | None = None,
    storage_order: int = 0,
    strides: Ints | None = None,
    outputs: int,
) -> tuple[Tensor, ...]:
    rank = len(kernel_shape)
    strides, dilations = strides or (1,) * rank, dilations or (1,) * rank
    low, high = _padding(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad)
    beyond = _beyond(x.shape[2:], low, high, kernel_shape, strides, dilations, ceil_mode)
    # Narrow integers have no kernel in torch, and are exact in float.
    y = x if x.is_floating_point() else x.to(torch.float32)
    padded = _pad(y, low, [h + e for h, e in zip(high, beyond, strict=True)], -math.inf)
    pooled = _MAX_POOL[rank](padded, kernel_shape, strides, 0, dilations, return_indices=outputs > 1)
    if outputs == 1:
        return (pooled.to(x.dtype),)
    values, at = pooled
    return values.to(x.dtype), _positions(at, padded.shape[2:], x, low, storage_order)


def _positions(at: Tensor, padded: Ints, x: Tensor, low: Ints, storage_order: int) -> Tensor:
    """Flat indices into the whole of ``x``, of indices into each padded plane."""
    coordinates = []
    for size in reversed(padded):
        coordinates.append(at % size)
        at = at // size
    inside = [c - n for c, n in zip(reversed(coordinates), low, strict=True)]
    sizes = list(x.shape[2:])
    flat = torch.zeros_like(at)
    pairs = list(zip(inside, sizes, strict=True))
    for coordinate, size in reversed(pairs) if storage_order else pairs:
        flat = flat * size + coordinate
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape([*x.shape[:2]] + [1] * len(sizes))
    return flat + planes * math.prod(sizes)


def _window_sum(x: Tensor, kernel: Ints, strides: Ints, dilations: Ints) -> Tensor:
    ones = torch.ones([1, 1, *kernel], dtype=x.dtype, device=x.device)
    planes = x.reshape(-1, 1, *x.shape[2:])
    y = _CONV[len(kernel)](planes, ones, stride=strides, dilation=dilations)
    return y.reshape(*x.shape[:2], *y.shape[2:])


def _average_pool(
    x: Tensor,
    *,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    rank = len(kernel_shape)
    strides, dilations = strides or (1,) * rank, dilations or (1,) * rank
    low, high = _padding(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad)
    beyond = _beyond(x.shape[2:], low, high, kernel_shape, strides, dilations, ceil_mode)
    if not any(low) and not any(high) and not any(beyond) and set(dilations) == {1}:
        return _AVG_POOL[rank](x, kernel_shape, strides)
    counted = torch.ones_like(x[:1, :1])
    counted = _pad(counted, low, high, float(count_include_pad))
    counted = _pad(counted, [0] * rank, beyond)
    padded = _pad(x, low, [h + e for h, e in zip(high, beyond, strict=True)])
    total = _window_sum(padded, kernel_shape, strides, dilations)
    return total / _window_sum(counted, kernel_shape, strides, dilations)


def _lp_pool(
    x: Tensor,
    *,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Ints | None = None,
    p: int = 2,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    rank = len(kernel_shape)
    strides, dilations = strides or (1,) * rank, dilations or (1,) * rank
    low, high = _padding(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad)
    beyond = _beyond(x.shape[2:], low, high, kernel_shape, strides, dilations, ceil_mode)
    powers = _pad(x.abs() ** p, low, [h + e for h, e in zip(high, beyond, strict=True)])
    return _window_sum(powers, kernel_shape, strides, dilations) ** (1 / p)


def _spatial(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.dim()))


OPERATORS: dict[str, Operator] = {
    "AveragePool": Operator(_average_pool),
    "Conv": Operator(conv),
    "ConvTranspose": Operator(_conv_transpose),
    "GlobalAveragePool": Operator(lambda x: x.mean(_spatial(x), keepdim=True)),
    "GlobalLpPool": Operator(lambda x, p=2: (x.abs() ** p).sum(_spatial(x), keepdim=True) ** (1 / p)),
    "GlobalMaxPool": Operator(lambda x: x.amax(_spatial(x), keepdim=True)),
    "LpPool": Operator(_lp_pool),
    "MaxPool": Operator(_max_pool, many=True, counted=True),
}
