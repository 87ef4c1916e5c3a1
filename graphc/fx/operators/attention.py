"""Attention and rotary embeddings (opset 23 and later)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from graphc.fx.host import Operator


def _heads(x: Tensor, count: int) -> Tensor:
    """(batch, length, heads * size) as (batch, heads, length, size)."""
    return x if x.dim() == 4 else x.reshape(*x.shape[:2], count, -1).transpose(1, 2)


def _bias(
    q: Tensor, k: Tensor, mask: Tensor | None, past: int, is_causal: int, lengths: Tensor | None
) -> Tensor | None:
    """What is added to the scores: the mask, the causal triangle and the padding of a cache, or None."""
    queries, keys = q.shape[2], k.shape[2]
    zero = torch.zeros((), dtype=q.dtype, device=q.device)
    hidden = torch.full((), -math.inf, dtype=q.dtype, device=q.device)
    bias = None
    if mask is not None:
        bias = torch.where(mask, zero, hidden) if mask.dtype == torch.bool else mask
        if bias.shape[-1] < keys:
            bias = F.pad(bias, [0, keys - bias.shape[-1]], value=-math.inf)
    at = torch.arange(keys, device=q.device)
    if is_causal:
        rows = torch.arange(queries, device=q.device)[:, None]
        # With a cache of given lengths the queries are the last ones of each sequence.
        first = past if lengths is None else (lengths - queries).reshape(-1, 1, 1, 1)
        triangle = torch.where(at <= rows + first, zero, hidden)
        bias = triangle if bias is None else bias + triangle
    if lengths is not None:
        padding = torch.where(at < lengths.reshape(-1, 1, 1, 1), zero, hidden)
        bias = padding if bias is None else bias + padding
    return bias


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int = 0,
    q_num_heads: int = 0,
    qk_matmul_output_mode: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int = 0,
    outputs: int,
) -> tuple[Tensor, ...]:
    flat = q.dim() == 3
    q, k, v = _heads(q, q_num_heads), _heads(k, kv_num_heads), _heads(v, kv_num_heads)
    past = 0
    if past_k is not None and past_v is not None:
        past = past_k.shape[2]
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    bias = _bias(q, k, mask, past, is_causal, lengths)
    present = k, v
    if q.shape[1] != k.shape[1]:
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scale = scale or 1 / math.sqrt(q.shape[-1])
    scores = q
    if outputs < 4 and not softcap:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    else:
        # The root of the scale on either side, as the standard says, keeps half precision in range.
        root = math.sqrt(scale)
        raw = (q * root) @ (k * root).transpose(-1, -2)
        capped = softcap * torch.tanh(raw / softcap) if softcap else raw
        masked = capped if bias is None else capped + bias
        # A row that sees nothing attends to nothing.
        weights = F.softmax(masked, -1).masked_fill((masked == -math.inf).all(-1, keepdim=True), 0)
        y = weights @ v
        scores = (raw, capped, masked, weights)[qk_matmul_output_mode]
    if flat:
        y = y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)
    return y, *present, scores


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: int = 0) -> Tensor:
    """Turn pairs of the last axis's leading ``2 * n`` elements by angles whose ``n`` cosines and sines are given."""
    width = 2 * cos.shape[-1]
    turned, kept = x[..., :width], x[..., width:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned, kept], -1) if kept.shape[-1] else turned


def _rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    shape = x.shape
    # (batch, length, heads, size)
    x = x.transpose(1, 2) if x.dim() == 4 else x.reshape(*shape[:2], num_heads, -1)
    half = (rotary_embedding_dim or x.shape[-1]) // 2
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    y = rotate(x, cos[..., :half].unsqueeze(2), sin[..., :half].unsqueeze(2), interleaved)
    return y.transpose(1, 2) if len(shape) == 4 else y.reshape(shape)


OPERATORS: dict[str, Operator] = {
    "Attention": Operator(_attention, fixed=(3,), many=True, counted=True),
    "RotaryEmbedding": Operator(_rotary, fixed=(1, 2)),
}
