"""What is trained: which constants, in which form, and which of their entries stay zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

Parts = Literal["all", "bias-norm", "lora", "codes"]

MOST_CODES = 16
"""Codes up to which they are trained: more leave little to gain, and may be bound by what sums of products hold."""

STRIDE = 10.0
"""How much further than other values a code moves in a step: it is rounded, and one apart from its neighbours."""


class Weights:
    """Trained values in float32, and the weights of a module that they stand for.

    What is exactly zero at the start stays zero: units that were pruned and not yet cut, patterns of sparse weights.

    Args:
        module: Made by ``graphc.fx.to_torch``. Of ``all`` and ``bias-norm``, its own float32 parameters are the memory
            of what is trained, and change with it.
        parts: ``all``: every weight, and the scales of quantized ones, each as the factor that it changes by.
            ``bias-norm``: those with one axis, biases and scales of norms. ``lora``: to each weight of two axes or
            more, seen as a matrix ``(first, others)``, a product of rank ``rank`` is added (Hu et al., 2021), its first
            factor random, its second zero, so that training starts from the model. ``codes``: ``all``, and quantized
            weights with ``MOST_CODES`` codes at most, between the least and the largest that each has; gradients pass
            their rounding as if there were none (Bengio et al., 2013).
        rank: Of the added products.
        seed: Of the random factors.
        keep_zeros: Whether zeros stay.
    """

    def __init__(
        self, module: nn.Module, parts: Parts, *, rank: int = 8, seed: int = 0, keep_zeros: bool = True
    ) -> None:
        self._frozen: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor] = {}
        self._matrices: dict[str, tuple[Tensor, Tensor]] = {}
        self._whole: dict[str, Tensor] = {}
        self._factors: dict[str, Tensor] = {}
        self._moved: dict[str, Tensor] = {}
        scales: Mapping[str, str] = module.meta["scales"]
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in module.named_parameters():
            long = [n for n in parameter.shape if n != 1]
            start = parameter.detach().float()
            if name in scales:
                if parts not in ("all", "codes"):
                    continue
                self._factors[name] = torch.ones_like(start).requires_grad_()
            elif parts == "lora" and len(long) > 1:
                rows, columns = start.shape[0], start[0].numel()
                r = min(rank, rows, columns)
                right = torch.randn(r, columns, generator=generator) / columns**0.5
                left = torch.zeros(rows, r)
                self._matrices[name] = left.requires_grad_(), right.requires_grad_()
            elif parts in ("all", "codes") or (parts == "bias-norm" and len(long) <= 1):
                self._whole[name] = start.requires_grad_()
            else:
                continue
            self._frozen[name] = parameter.detach()
            if keep_zeros and bool((start == 0).any()):
                self._masks[name] = start == 0
        for name, codes in module.named_buffers():
            if parts == "codes" and name in scales.values() and _few(codes, keep_zeros):
                self._moved[name] = torch.zeros(codes.shape).requires_grad_()
                self._frozen[name] = codes.detach()
                if keep_zeros:
                    self._masks[name] = codes == 0

    def __len__(self) -> int:
        """How many constants are trained."""
        return len(self._frozen)

    def to(self, device: torch.device) -> Weights:
        """Move all to a device, in place."""
        for held in (self._frozen, self._masks):
            held.update({name: value.to(device) for name, value in held.items()})
        for leaves in (self._whole, self._factors, self._moved):
            leaves.update({n: v.detach().to(device).requires_grad_() for n, v in leaves.items()})
        self._matrices = {
            n: (a.detach().to(device).requires_grad_(), b.detach().to(device).requires_grad_())
            for n, (a, b) in self._matrices.items()
        }
        return self

    def trained(self) -> dict[str, Tensor]:
        """The leaves that an optimizer moves, by name, always in the same order."""
        leaves = self._whole | self._factors | self._moved
        for name, (left, right) in self._matrices.items():
            leaves |= {f"{name}:left": left, f"{name}:right": right}
        return leaves

    def decayed(self) -> Iterator[str]:
        """The leaves that weight decay holds for: matrices, not biases and scales."""
        others = self._factors | self._moved
        matrices = (name for name, value in self.trained().items() if sum(n != 1 for n in value.shape) > 1)
        return (name for name in matrices if name not in others)

    def effective(self) -> dict[str, Tensor]:
        """The weights as the module runs with them, in its dtypes; gradients flow to the leaves."""
        made = {}
        for name, value in self._whole.items():
            made[name] = value.to(self._frozen[name].dtype)
        for name, factor in self._factors.items():
            start = self._frozen[name]
            made[name] = (start.float() * factor).to(start.dtype)
        for name, moved in self._moved.items():
            start = self._frozen[name]
            near = (start + STRIDE * moved).clamp(int(start.min()), int(start.max()))
            made[name] = near + (near.round() - near).detach()
        for name, (left, right) in self._matrices.items():
            start, mask = self._frozen[name], self._masks.get(name)
            added = (left @ right).reshape(start.shape)
            made[name] = (start.float() + (added if mask is None else added.masked_fill(mask, 0))).to(start.dtype)
        return made

    def hold_zeros(self) -> None:
        """Take out of the leaves' gradients what would move a weight that stays zero."""
        for name, value in (self._whole | self._moved).items():
            mask = self._masks.get(name)
            if mask is not None and value.grad is not None:
                value.grad.masked_fill_(mask, 0)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set the leaves."""
        with torch.no_grad():
            for name, leaf in self.trained().items():
                leaf.copy_(values[name])

    def fold(self, module: nn.Module) -> None:
        """Write the effective weights into the module's own parameters, and codes into its buffers."""
        own = dict(module.named_parameters()) | dict(module.named_buffers())
        with torch.no_grad():
            for name, value in self.effective().items():
                own[name].copy_(value)


def _few(codes: Tensor, keep_zeros: bool) -> bool:
    """Whether codes are few enough to be trained; of those without a sign it is not known which ones stand for zero."""
    if codes.dtype not in (torch.int8, torch.uint8) or (keep_zeros and codes.dtype == torch.uint8):
        return False
    return codes.numel() > 0 and int(codes.max()) - int(codes.min()) < MOST_CODES
