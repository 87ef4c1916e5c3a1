"""What healing makes smaller: how far the present model's outputs and hidden states are from the original's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from graphc.collection.collector import padding_mask
from graphc.collection.loss import labelled
from graphc.contract import Arrays
from graphc.edit import Array
from graphc.errors import BadInput
from graphc.healing.points import Kind

Tensors = Mapping[str, Tensor]


@dataclass
class Objective:
    """A loss of one case: over the outputs, plus weighted ones over hidden states and labels.

    For logits (and what a softmax makes of them) it is ``T^2 KL(p || q)``, ``p`` and ``q`` the softmax at temperature
    ``T`` of the original's and the present scores (Hinton et al., 2015), in nats a position; for a sigmoid's output
    the same of two outcomes. For other outputs, and for hidden states, it is the mean squared difference by the
    original's mean square. Padding does not count.

    Attributes:
        kinds: What each output holds.
        hidden: The names of the hidden states.
        temperature: ``T``.
        by_hidden: The weight of the mean over hidden states.
        by_labels: The weight of the cross-entropy of labels, where there are any.
        mask: The input that says what is padding; "" if there is none.
    """

    kinds: Mapping[str, Kind]
    hidden: Sequence[str] = ()
    temperature: float = 1.0
    by_hidden: float = 1.0
    by_labels: float = 0.0
    mask: str = ""

    @staticmethod
    def mask_of(model: ir.Model) -> str:
        """The input of a model that says what is padding."""
        return padding_mask(model)

    def __call__(self, got: Tensors, wanted: Tensors, sample: Arrays, labels: Array | None = None) -> Tensor:
        """The loss, a float32 scalar.

        Raises:
            BadInput: An output has another shape than the original's.
        """
        valid = None
        if self.mask in sample:
            valid = torch.from_numpy(sample[self.mask] != 0)
        parts = [self._output(name, got[name], wanted[name], valid) for name in self.kinds]
        loss = torch.stack(parts).mean()
        taps = [n for n in self.hidden if got[n].shape == wanted[n].shape]
        if taps and self.by_hidden:
            loss = loss + self.by_hidden * torch.stack([_states(got[n], wanted[n], valid) for n in taps]).mean()
        if labels is not None and self.by_labels:
            name = next(iter(self.kinds))
            scores = _scores(got[name].float(), self.kinds[name])
            loss = loss + self.by_labels * labelled(scores, labels)
        return loss

    def _output(self, name: str, got: Tensor, wanted: Tensor, valid: Tensor | None) -> Tensor:
        if got.shape != wanted.shape:
            raise BadInput(
                f"output '{name}' has another shape than the original's",
                why=f"{list(got.shape)} and {list(wanted.shape)}",
                hint="heal before the interface is made narrower",
            )
        kind = self.kinds[name]
        if kind == "values" or got.dim() == 0:
            return _squares(got, wanted, valid)
        if kind == "chances":
            p, q = wanted.float(), got.float().clamp(1e-7, 1 - 1e-7)
            return _mean(F.binary_cross_entropy(q, p, reduction="none") - _entropy(p), valid)
        p, q = (F.log_softmax(_scores(x.float(), kind) / self.temperature, -1) for x in (wanted, got))
        return self.temperature**2 * _mean((p.exp() * (p - q)).sum(-1), valid)


def _scores(x: Tensor, kind: Kind) -> Tensor:
    """Scores of which the softmax is the distribution that an output means."""
    return torch.log(x.clamp_min(1e-12)) if kind == "probabilities" else x


def _entropy(p: Tensor) -> Tensor:
    inside = p.clamp(1e-7, 1 - 1e-7)
    return F.binary_cross_entropy(inside, p, reduction="none")


def _squares(got: Tensor, wanted: Tensor, valid: Tensor | None) -> Tensor:
    """The mean squared difference by the mean square, over what is no padding."""
    got, wanted = got.float(), wanted.float()
    size = _mean(wanted.square(), valid)
    return _mean((got - wanted).square(), valid) / size.clamp_min(1e-12)


def _states(got: Tensor, wanted: Tensor, valid: Tensor | None) -> Tensor:
    """The same of what a hidden state still holds: an exact zero is a dead channel, which nothing can bring back."""
    alive = got != 0
    if valid is not None and got.shape[:2] == valid.shape:
        alive = alive & valid.to(got.device).reshape([*valid.shape, *[1] * (got.dim() - 2)])
    difference = torch.where(alive, got.float() - wanted.float(), 0)
    return difference.square().sum() / torch.where(alive, wanted.float(), 0).square().sum().clamp_min(1e-12)


def _mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """The mean over all entries whose first two axes are positions that count."""
    if valid is None or x.shape[:2] != valid.shape or not bool(valid.any()):
        return x.mean()
    return x[valid.to(x.device)].mean()
