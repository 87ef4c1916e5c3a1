"""Resize by interpolation along one axis at a time: a gather of neighbours, weighted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphc.errors import BadInput
from graphc.fx.host import Operator, as_list


def _source(transform: str, size: int, wanted: int, scale: float, device: Any) -> Tensor:
    """Where each output position lies in the input (float32)."""
    at = torch.arange(wanted, device=device, dtype=torch.float32)
    match transform:
        case "asymmetric":
            return at / scale
        case "align_corners":
            return at * ((size - 1) / (size * scale - 1)) if size * scale > 1 else at * 0
        case "pytorch_half_pixel":
            return (at + 0.5) / scale - 0.5 if wanted > 1 else at * 0
        case "half_pixel_symmetric":
            centre = size / 2 * (1 - wanted / (scale * size))
            return centre + (at + 0.5) / scale - 0.5
        case "half_pixel":
            return (at + 0.5) / scale - 0.5
    raise BadInput(f"Resize with coordinate_transformation_mode '{transform}' has no torch form")


def _nearest(at: Tensor, mode: str) -> Tensor:
    match mode:
        case "floor":
            return torch.floor(at)
        case "ceil":
            return torch.ceil(at)
        case "round_prefer_ceil":
            return torch.floor(at + 0.5)
    return torch.ceil(at - 0.5)


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Keys' kernel; https://en.wikipedia.org/wiki/Bicubic_interpolation."""
    x = distance.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _neighbours(at: Tensor, mode: str, cubic: float) -> list[tuple[Tensor, Tensor]]:
    """Pairs (position, weight) that each output position is the sum of."""
    base = torch.floor(at)
    if mode == "linear":
        part = at - base
        return [(base, 1 - part), (base + 1, part)]
    return [(base + n, _cubic(at - base - n, cubic)) for n in (-1, 0, 1, 2)]


def _resize(
    x: Tensor,
    roi: Any = None,
    scales: Any = None,
    sizes: Any = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    if antialias or keep_aspect_ratio_policy != "stretch":
        raise BadInput("Resize with antialias or an aspect ratio policy has no torch form")
    where = [a % x.dim() for a in axes] if axes is not None else list(range(x.dim()))
    wanted, given = as_list(sizes), as_list(scales)
    for i, axis in enumerate(where):
        size = x.shape[axis]
        target = wanted[i] if wanted else int(size * given[i])
        scale = target / size if wanted else given[i]
        if scale == 1 and target == size:
            continue
        at = _source(coordinate_transformation_mode, size, target, scale, x.device)
        if mode == "nearest":
            x = x.index_select(axis, _nearest(at, nearest_mode).long().clamp(0, size - 1))
            continue
        pairs = _neighbours(at, mode, cubic_coeff_a)
        if exclude_outside:
            pairs = [(p, torch.where((p >= 0) & (p < size), w, torch.zeros_like(w))) for p, w in pairs]
            total = torch.stack([w for _, w in pairs]).sum(0)
            pairs = [(p, w / total) for p, w in pairs]
        view = [1] * x.dim()
        view[axis] = -1
        parts = [x.index_select(axis, p.long().clamp(0, size - 1)) * w.reshape(view).to(x.dtype) for p, w in pairs]
        x = torch.stack(parts).sum(0)
    return x


OPERATORS: dict[str, Operator] = {
    "Resize": Operator(_resize, host=(1, 2, 3), fixed=(1, 2)),
}
