"""Losses that a graph may hold."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphc.fx.host import Operator


def _nll(
    x: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int | None = None, reduction: str = "mean"
) -> Tensor:
    ignored = torch.zeros_like(target, dtype=torch.bool) if ignore_index is None else target == ignore_index
    at = torch.where(ignored, torch.zeros_like(target), target).to(torch.int64)
    each = weight[at] if weight is not None else torch.ones_like(at, dtype=x.dtype)
    each = torch.where(ignored, torch.zeros_like(each), each)
    loss = -x.gather(1, at.unsqueeze(1)).squeeze(1) * each
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / each.sum()


def _cross_entropy(
    x: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int | None = None, reduction: str = "mean"
) -> tuple[Tensor, Tensor]:
    logs = F.log_softmax(x, 1)
    return _nll(logs, target, weight, ignore_index=ignore_index, reduction=reduction), logs


OPERATORS: dict[str, Operator] = {
    "NegativeLogLikelihoodLoss": Operator(_nll, fixed=(2,)),
    "SoftmaxCrossEntropyLoss": Operator(_cross_entropy, fixed=(2,), many=True),
}
