"""Attention of ONNX Runtime (``com.microsoft``), with its ways of masking and of keeping keys and values.

What they compute: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from graphc.errors import BadInput
from graphc.fx.host import Operator
from graphc.fx.operators.attention import rotate


def _heads(x: Tensor, count: int) -> Tensor:
    """(batch, length, heads * size) as (batch, heads, length, size)."""
    return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def _hidden(seen: Tensor, like: Tensor, value: float) -> Tensor:
    """What is added to scores: 0 where a boolean mask is true, else ``value``."""
    zero = torch.zeros((), dtype=like.dtype, device=like.device)
    return torch.where(seen, zero, torch.full_like(zero, value))


def _padding(mask: Tensor, batch: int, keys: int) -> Tensor:
    """A padding mask of any form as booleans that broadcast with (batch, heads, queries, keys)."""
    at = torch.arange(keys, device=mask.device)
    if mask.dim() == 1:
        seen = at < mask[:batch, None]
        if mask.shape[0] == 2 * batch:  # ends, then starts
            seen = seen & (at >= mask[batch:, None])
        elif mask.shape[0] != batch:
            raise BadInput("a packed key padding mask (3 * batch + 2) has no torch form")
        return seen[:, None, None, :]
    seen = mask != 0
    return seen[:, None, None, :] if mask.dim() == 2 else seen[:, None]


def _weighed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale or 1 / math.sqrt(q.shape[-1]))


def _bias(
    q: Tensor, k: Tensor, mask: Tensor | None, extra: Tensor | None, causal: int, filtered: float
) -> Tensor | None:
    bias = extra
    if mask is not None:
        padding = _hidden(_padding(mask, q.shape[0], k.shape[2]), q, filtered)
        bias = padding if bias is None else bias + padding
    if causal:
        rows = torch.arange(q.shape[2], device=q.device)[:, None] + (k.shape[2] - q.shape[2])
        triangle = _hidden(torch.arange(k.shape[2], device=q.device) <= rows, q, -math.inf)
        bias = triangle if bias is None else bias + triangle
    return bias


def _attention(
    x: Tensor,
    weights: Tensor,
    b: Tensor | None = None,
    mask: Tensor | None = None,
    past: Tensor | None = None,
    extra: Tensor | None = None,
    *,
    num_heads: int,
    mask_filter_value: float = -10000.0,
    qkv_hidden_sizes: Sequence[int] | None = None,
    scale: float = 0.0,
    unidirectional: int = 0,
) -> tuple[Tensor, ...]:
    qkv = x @ weights
    qkv = qkv if b is None else qkv + b
    sizes = list(qkv_hidden_sizes) if qkv_hidden_sizes else [qkv.shape[-1] // 3] * 3
    q, k, v = (_heads(part, num_heads) for part in qkv.split(sizes, -1))
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    y = _weighed(q, k, v, _bias(q, k, mask, extra, unidirectional, mask_filter_value), scale)
    same = k.shape == v.shape
    return _flat(y), torch.stack([k, v]) if same else k


def _multi_head(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    b: Tensor | None = None,
    mask: Tensor | None = None,
    extra: Tensor | None = None,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
    *,
    num_heads: int,
    mask_filter_value: float = -10000.0,
    scale: float = 0.0,
    unidirectional: int = 0,
) -> tuple[Tensor, ...]:
    if query.dim() == 5:  # (batch, length, heads, 3, size)
        q, k, v = (part.transpose(1, 2) for part in query.unbind(3))
    else:
        widths = [query.shape[-1]] * 2
        if b is not None:
            widths = [query.shape[-1], query.shape[-1], b.shape[0] - 2 * query.shape[-1]]
            b_q, b_k, b_v = b.split(widths)
            query = query + b_q
            key = key + b_k if key is not None and key.dim() == 3 else key
            value = value + b_v if value is not None and value.dim() == 3 else value
        q = _heads(query, num_heads)
        if key is None:
            raise BadInput("MultiHeadAttention without keys has no torch form")
        if key.dim() == 5:  # (batch, length, heads, 2, size)
            k, v = (part.transpose(1, 2) for part in key.unbind(3))
        else:
            assert value is not None
            k, v = (part if part.dim() == 4 else _heads(part, num_heads) for part in (key, value))
    if past_k is not None and past_v is not None:
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    y = _weighed(q, k, v, _bias(q, k, mask, extra, unidirectional, mask_filter_value), scale)
    return _flat(y), k, v


def _grouped(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_k: Tensor | None,
    past_v: Tensor | None,
    last: Tensor,
    total: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    extra: Tensor | None = None,
    sink: Tensor | None = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    do_rotary: int = 0,
    local_window_size: int = -1,
    rotary_interleaved: int = 0,
    scale: float = 0.0,
    smooth_softmax: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, ...]:
    if key is None or value is None:
        size = query.shape[-1] // (num_heads + 2 * kv_num_heads)
        query, key, value = query.split([num_heads * size, kv_num_heads * size, kv_num_heads * size], -1)
    q, k, v = _heads(query, num_heads), _heads(key, kv_num_heads), _heads(value, kv_num_heads)
    length, whole = q.shape[2], int(total.reshape(-1)[0].item())
    # The valid keys of each sequence, and those among them that were there before; the first call has none.
    valid = last.reshape(-1).long() + 1
    before = torch.zeros_like(valid) if length == whole else valid - length
    at = before[:, None] + torch.arange(length, device=q.device)
    if do_rotary and cos is not None and sin is not None:
        place = at if positions is None or positions.numel() == 1 else positions
        q = rotate(q, cos[place].unsqueeze(1), sin[place].unsqueeze(1), rotary_interleaved)
        k = rotate(k, cos[place].unsqueeze(1), sin[place].unsqueeze(1), rotary_interleaved)
    if past_k is not None and past_v is not None:
        room = max(past_k.shape[2], whole)
        k, v = _appended(past_k, k, at, room), _appended(past_v, v, at, room)
    columns = torch.arange(k.shape[2], device=q.device)
    seen = columns <= at[:, None, :, None]
    if local_window_size > 0:
        seen = seen & (columns > at[:, None, :, None] - local_window_size)
    bias = _hidden(seen, q, -math.inf)
    if extra is not None:
        bias = bias + F.pad(extra, [0, k.shape[2] - extra.shape[-1]])
    repeats = num_heads // kv_num_heads
    wide_k, wide_v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    if not softcap and not smooth_softmax and sink is None:
        return _flat(_weighed(q, wide_k, wide_v, bias, scale)), k, v
    scores = q @ wide_k.transpose(-1, -2) * (scale or 1 / math.sqrt(q.shape[-1]))
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores + bias
    if smooth_softmax or sink is not None:
        # One more entry takes its part of the probability and gives nothing for it.
        zero = torch.zeros((), dtype=q.dtype, device=q.device)
        other = (zero if sink is None else sink.reshape(1, -1, 1, 1)).expand(*scores.shape[:-1], 1)
        weights = F.softmax(torch.cat([scores, other], -1), -1)[..., :-1]
    else:
        weights = F.softmax(scores, -1)
    return _flat(weights @ wide_v), k, v


def _appended(past: Tensor, new: Tensor, at: Tensor, room: int) -> Tensor:
    """A cache with room for ``room`` positions, and new keys or values (batch, heads, length, size) in their places."""
    grown = F.pad(past, [0, 0, 0, room - past.shape[2]])
    return grown.scatter(2, at[:, None, :, None].expand(new.shape), new)


def _rotary(
    x: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: int = 0,
    is_packed_batching: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    scale: float = 1.0,
) -> Tensor:
    flat = x.dim() == 3
    if flat:
        size = rotary_embedding_dim and num_heads and x.shape[-1] // num_heads
        x = _heads(x, x.shape[-1] // (size or 2 * cos.shape[-1]))
    at = torch.arange(x.shape[2], device=x.device)[None] + positions if positions.numel() == 1 else positions
    y = rotate(x, cos[at].unsqueeze(1), sin[at].unsqueeze(1), interleaved) * scale
    return _flat(y) if flat else y


OPERATORS: dict[str, Operator] = {
    "Attention": Operator(_attention, fixed=(3, 5), many=True),
    "GroupQueryAttention": Operator(_grouped, fixed=(5, 6, 7, 8, 10), many=True),
    "MultiHeadAttention": Operator(_multi_head, fixed=(4, 5), many=True),
    "RotaryEmbedding": Operator(_rotary, fixed=(2, 3)),
}
