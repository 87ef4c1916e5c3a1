"""Boxes that an object detector keeps; no gradient flows through the choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphc.fx.host import Operator, as_list


def _corners(boxes: Tensor, centred: int) -> Tensor:
    """Boxes as (y1, x1, y2, x2) with the smaller corner first."""
    if centred:
        x, y, width, height = boxes.unbind(-1)
        return torch.stack([y - height / 2, x - width / 2, y + height / 2, x + width / 2], -1)
    a, b = boxes[..., :2], boxes[..., 2:]
    return torch.cat([torch.minimum(a, b), torch.maximum(a, b)], -1)


def _overlaps(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of a box with others."""
    inside = torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2])
    common = inside.clamp_min(0).prod(-1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(-1) - common
    return torch.where(union > 0, common / union, torch.zeros_like(common))


def _suppress(
    boxes: Tensor,
    scores: Tensor,
    most: Any = None,
    overlap: Any = None,
    least: Any = None,
    *,
    center_point_box: int = 0,
) -> Tensor:
    count = int((as_list(most) or [0])[0])
    limit, floor = (as_list(overlap) or [0.0])[0], as_list(least)
    corners = _corners(boxes, center_point_box)
    found = []
    for batch in range(scores.shape[0]):
        for kind in range(scores.shape[1]):
            each = scores[batch, kind]
            left = torch.argsort(each, descending=True, stable=True)
            if floor:
                left = left[each[left] > floor[0]]
            kept = 0
            while len(left) and kept < count:
                best, left = left[0], left[1:]
                found.append(torch.stack([best.new_tensor(batch), best.new_tensor(kind), best]))
                left = left[_overlaps(corners[batch, best], corners[batch, left]) <= limit]
                kept += 1
    return torch.stack(found) if found else torch.empty((0, 3), dtype=torch.int64, device=boxes.device)


OPERATORS: dict[str, Operator] = {
    "NonMaxSuppression": Operator(_suppress, host=(2, 3, 4)),
}
