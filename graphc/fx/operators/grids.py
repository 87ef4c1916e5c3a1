"""Sampling at computed places, and patches put back together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphc.errors import BadInput
from graphc.fx.host import Operator, as_list

_MODES = {"linear": "bilinear", "cubic": "bicubic", "bilinear": "bilinear", "bicubic": "bicubic", "nearest": "nearest"}


def _grid_sample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    if x.dim() > 4 and "cubic" in mode:
        raise BadInput("GridSample with cubic interpolation in three dimensions has no torch form")
    return F.grid_sample(x, grid, _MODES[mode], padding_mode, bool(align_corners))


def _affine_grid(theta: Tensor, size: Any, *, align_corners: int = 0) -> Tensor:
    return F.affine_grid(theta, as_list(size), bool(align_corners))


def _col2im(
    x: Tensor,
    image: Any,
    block: Any,
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    sizes, kernel = as_list(image), as_list(block)
    rank = len(sizes)
    dilations, strides, pads = dilations or [1] * rank, strides or [1] * rank, pads or [0] * 2 * rank
    padded = [n + pads[i] + pads[i + rank] for i, n in enumerate(sizes)]
    counts = [(p - d * (k - 1) - 1) // s + 1 for p, d, k, s in zip(padded, dilations, kernel, strides, strict=True)]
    # Where each element of each block falls in the flat padded image.
    at = torch.zeros([1] * 2 * rank, dtype=torch.int64, device=x.device)
    for axis in range(rank):
        inner = torch.arange(kernel[axis], device=x.device) * dilations[axis]
        outer = torch.arange(counts[axis], device=x.device) * strides[axis]
        place = inner.reshape([-1 if i == axis else 1 for i in range(2 * rank)])
        place = place + outer.reshape([-1 if i == rank + axis else 1 for i in range(2 * rank)])
        at = at * padded[axis] + place
    flat = x.reshape(x.shape[0], -1, math.prod(kernel) * math.prod(counts))
    whole = flat.new_zeros(*flat.shape[:2], math.prod(padded)).index_add(2, at.reshape(-1), flat)
    whole = whole.reshape(*flat.shape[:2], *padded)
    return whole[(..., *(slice(pads[i], pads[i] + n) for i, n in enumerate(sizes)))]


def _center_crop_pad(x: Tensor, shape: Any, *, axes: Sequence[int] | None = None) -> Tensor:
    sizes = as_list(shape)
    for axis, wanted in zip(axes if axes is not None else range(x.dim()), sizes, strict=True):
        have = x.shape[axis]
        if wanted <= have:
            x = x.narrow(axis, (have - wanted) // 2, wanted)
            continue
        before = (wanted - have) // 2
        parts = []
        for count in (before, wanted - have - before):
            part = list(x.shape)
            part[axis] = count
            parts.append(x.new_zeros(part))
        x = torch.cat([parts[0], x, parts[1]], axis)
    return x


OPERATORS: dict[str, Operator] = {
    "AffineGrid": Operator(_affine_grid, host=(1,)),
    "CenterCropPad": Operator(_center_crop_pad, host=(1,)),
    "Col2Im": Operator(_col2im, host=(1, 2)),
    "GridSample": Operator(_grid_sample),
}
