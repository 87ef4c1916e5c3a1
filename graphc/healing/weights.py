"""What is trained: which constants, in which form, and which of their entries stay zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

Parts = Literal["all", "bias-norm", "lora"]


class Weights:
    """Trained values in float32, and the weights of a module that they stand for.

    What is exactly zero at the start stays zero: units that were pruned and not yet cut, patterns of sparse weights.

    Args:
        module: Made by ``graphc.fx.to_torch``. Of ``all`` and ``bias-norm``, its own float32 parameters are the memory
            of what is trained, and change with it.
        parts: ``all``: every weight. ``bias-norm``: those with one axis, biases and scales of norms. ``lora``: to each
            weight of two axes or more, seen as a matrix ``(first, others)``, a product of rank ``rank`` is added
            (Hu et al., 2021), its first factor random, its second zero, so that training starts from the model.
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
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in module.named_parameters():
            long = [n for n in parameter.shape if n != 1]
            start = parameter.detach().float()
            if parts == "lora" and len(long) > 1:
                rows, columns = start.shape[0], start[0].numel()
                r = min(rank, rows, columns)
                right = torch.randn(r, columns, generator=generator) / columns**0.5
                left = torch.zeros(rows, r)
                self._matrices[name] = left.requires_grad_(), right.requires_grad_()
            elif parts == "all" or (parts == "bias-norm" and len(long) <= 1):
                self._whole[name] = start.requires_grad_()
            else:
                continue
            self._frozen[name] = parameter.detach()
            if keep_zeros and bool((start == 0).any()):
                self._masks[name] = start == 0

    def __len__(self) -> int:
        """How many constants are trained."""
        return len(self._frozen)

    def to(self, device: torch.device) -> Weights:
        """Move all to a device, in place."""
        for held in (self._frozen, self._masks):
            held.update({name: value.to(device) for name, value in held.items()})
        self._whole = {n: v.detach().to(device).requires_grad_() for n, v in self._whole.items()}
        self._matrices = {
            n: (a.detach().to(device).requires_grad_(), b.detach().to(device).requires_grad_())
            for n, (a, b) in self._matrices.items()
        }
        return self

    def trained(self) -> dict[str, Tensor]:
        """The leaves that an optimizer moves, by name, always in the same order."""
        leaves = dict(self._whole)
        for name, (left, right) in self._matrices.items():
            leaves |= {f"{name}:left": left, f"{name}:right": right}
        return leaves

    def decayed(self) -> Iterator[str]:
        """The leaves that weight decay holds for: matrices, not biases and scales."""
        return (name for name, value in self.trained().items() if sum(n != 1 for n in value.shape) > 1)

    def effective(self) -> dict[str, Tensor]:
        """The weights as the module runs with them, in its dtypes; gradients flow to the leaves."""
        made = {}
        for name, value in self._whole.items():
            made[name] = value.to(self._frozen[name].dtype)
        for name, (left, right) in self._matrices.items():
            start, mask = self._frozen[name], self._masks.get(name)
            added = (left @ right).reshape(start.shape)
            made[name] = (start.float() + (added if mask is None else added.masked_fill(mask, 0))).to(start.dtype)
        return made

    def hold_zeros(self) -> None:
        """Take out of the leaves' gradients what would move a weight that stays zero."""
        for name, value in self._whole.items():
            mask = self._masks.get(name)
            if mask is not None and value.grad is not None:
                value.grad.masked_fill_(mask, 0)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set the leaves."""
        with torch.no_grad():
            for name, leaf in self.trained().items():
                leaf.copy_(values[name])

    def fold(self, module: nn.Module) -> None:
        """Write the effective weights into the module's own parameters."""
        own = dict(module.named_parameters())
        with torch.no_grad():
            for name, value in self.effective().items():
                own[name].copy_(value)
