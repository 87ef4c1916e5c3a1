"""Attention masks in a form that exports with every size dynamic.

transformers describes each kind of mask (causal, sliding window, chunks, bidirectional) as a function of positions and
lets the attention implementation turn it into a tensor. Its own way leaves masks out, slices and tests for special
cases, which bakes the example's sizes and padding into an exported graph. This one is plain arithmetic on positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ATTENTION = "eager"
"""The attention implementation whose masks are replaced."""


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: Any = "cpu",
    **_: Any,
) -> torch.Tensor:
    """An additive mask: 0 where a position is seen, the lowest number of its dtype where not.

    Args:
        batch_size: Sequences.
        q_length: New positions.
        kv_length: Positions that could be seen.
        q_offset: The first new position.
        kv_offset: The first position that could be seen.
        mask_function: ``(batch, head, query position, key position) -> bool``, on tensors that broadcast.
        attention_mask: Padding, ``[batch, kv_length]``, true where there is a token.
        dtype: Of the mask.
        device: Of the mask.

    Returns:
        ``[batch or 1, 1, q_length or 1, kv_length]``.
    """
    import torch

    kind = dtype or torch.float32
    queries = (torch.arange(q_length, device=device) + q_offset)[None, None, :, None]
    keys = (torch.arange(kv_length, device=device) + kv_offset)[None, None, None, :]
    seen = torch.ones_like(keys, dtype=torch.bool)
    if mask_function is not None:
        batch = torch.arange(batch_size, device=device)[:, None, None, None]
        seen = mask_function(batch, torch.zeros_like(keys[..., :1]), queries, keys)
    if attention_mask is not None:
        torch._check(attention_mask.shape[1] == kv_length)
        seen = seen & attention_mask[:, None, None, :].to(torch.bool)
    return torch.where(seen, torch.zeros((), dtype=kind, device=device), torch.finfo(kind).min)


@contextmanager
def exportable() -> Iterator[None]:
    """Models with the attention implementation ``ATTENTION`` get :func:`mask` in the block."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as KNOWN

    KNOWN[ATTENTION] = mask
    try:
        yield
    finally:
        del KNOWN[ATTENTION]
