"""Fused operators of ONNX Runtime (``com.microsoft``): products, activations, normalisations.

What they compute: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphc.errors import BadInput
from graphc.fx.host import Operator
from graphc.fx.operators import algebra, elementwise, indexing, movement, quantisation, windows

_FIXED: dict[str, Callable[..., Tensor]] = {"Relu": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh}


def activate(x: Tensor, name: str, parameters: Sequence[float] = ()) -> Tensor:
    """An activation by its ONNX name, with its parameters in the order in which fused operators list them."""
    if not name:
        return x
    if name in _FIXED:
        return _FIXED[name](x)
    match name:
        case "LeakyRelu":
            return F.leaky_relu(x, parameters[0] if parameters else 0.01)
        case "Clip":
            return torch.clamp(x, *parameters[:2])
        case "HardSigmoid":
            alpha, beta = parameters[:2] or (0.2, 0.5)
            return torch.clamp(alpha * x + beta, 0, 1)
    raise BadInput(f"the fused activation '{name}' has no torch form")


def _fused_conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    z: Tensor | None = None,
    *,
    activation: str = "",
    activation_params: Sequence[float] = (),
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    y = windows.conv(x, w, b, auto_pad=auto_pad, dilations=dilations, group=group, pads=pads, strides=strides)
    return activate(y if z is None else y + z, activation, activation_params)


def _fused_gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    activation: str = "",
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    y = algebra.gemm(a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB)
    given = [p for p in (activation_alpha, activation_beta, activation_gamma) if p is not None]
    return activate(y, activation, given)


def _turned(x: Tensor, matrix: int, batch: int) -> Tensor:
    if batch:
        # The first axis goes before the last one: rows first, then batches.
        x = x.movedim(0, -2)
    return x.transpose(-1, -2) if matrix and x.dim() > 1 else x


def _fused_matmul(
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Tensor:
    y = _turned(a, transA, transBatchA) @ _turned(b, transB, transBatchB)
    return y if alpha == 1.0 else y * alpha


def _fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def _quick_gelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    return x * torch.sigmoid(alpha * x)


def _bias_softmax(x: Tensor, bias: Tensor, *, axis: int = 1, is_inner_broadcast: int = 1) -> Tensor:
    axis %= x.dim()
    if not is_inner_broadcast and bias.dim() < x.dim():
        bias = bias.reshape([*bias.shape[:1], *[1] * (x.dim() - bias.dim()), *bias.shape[1:]])
    return F.softmax((x + bias).flatten(axis), -1).reshape(x.shape)


def _statistics(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    mean = wide.mean(-1, keepdim=True)
    return mean, torch.rsqrt((wide - mean).square().mean(-1, keepdim=True) + epsilon)


def _skip_sum(x: Tensor, skip: Tensor, bias: Tensor | None) -> Tensor:
    total = x + skip
    return total if bias is None else total + bias


def _skip_layer_norm(
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    outputs: int,
) -> tuple[Any, ...]:
    total = _skip_sum(x, skip, bias)
    y = F.layer_norm(total, [total.shape[-1]], gamma, beta, epsilon)
    return (y, None, None, total) if outputs not in {2, 3} else (y, *_statistics(total, epsilon), total)


def _rms(x: Tensor, scale: Tensor, axis: int, epsilon: float) -> tuple[Tensor, Tensor]:
    dims = list(range(axis % x.dim(), x.dim()))
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    inverse = torch.rsqrt(wide.square().mean(dims, keepdim=True) + epsilon)
    return (wide * inverse).to(x.dtype) * scale, inverse


def _simplified_layer_norm(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> tuple[Tensor, ...]:
    return _rms(x, scale, axis, epsilon)


def _skip_simplified_layer_norm(
    x: Tensor, skip: Tensor, gamma: Tensor, bias: Tensor | None = None, *, epsilon: float = 1e-12
) -> tuple[Any, ...]:
    total = _skip_sum(x, skip, bias)
    y, inverse = _rms(total, gamma, -1, epsilon)
    return y, None, inverse, total


def _embed_layer_norm(
    ids: Tensor,
    segments: Tensor | None,
    words: Tensor,
    places: Tensor,
    kinds: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    mask_index_type: int = 0,
) -> tuple[Tensor, ...]:
    at = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape) if positions is None else positions
    total = words[ids.long()] + places[at.long()]
    if segments is not None and kinds is not None:
        total = total + kinds[segments.long()]
    zeros = torch.zeros(ids.shape[0], dtype=torch.int32, device=ids.device)
    lengths = zeros if mask is None else mask.sum(1).to(torch.int32)
    return F.layer_norm(total, [total.shape[-1]], gamma, beta, epsilon), lengths, total


def _group_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, *, activation: int, channels_last: int = 1, epsilon: float = 1e-5,
    groups: int,
) -> Tensor:  # fmt: skip
    y = F.group_norm(x.movedim(-1, 1) if channels_last else x, groups, gamma, beta, epsilon)
    y = F.silu(y) if activation else y
    return y.movedim(1, -1) if channels_last else y


def _skip_group_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, skip: Tensor, bias: Tensor | None = None, *, activation: int,
    channels_last: int = 1, epsilon: float = 1e-5, groups: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    if skip.dim() == 2:
        skip = skip[:, None, None, :] if channels_last else skip[:, :, None, None]
    total = _skip_sum(x, skip, bias if bias is None or channels_last else bias[:, None, None])
    y = _group_norm(
        total, gamma, beta, activation=activation, channels_last=channels_last, epsilon=epsilon, groups=groups
    )
    return y, total


OPERATORS: dict[str, Operator] = {
    "BiasAdd": Operator(lambda x, bias, skip: x + bias + skip),
    "BiasGelu": Operator(lambda x, bias: F.gelu(x + bias)),
    "BiasSoftmax": Operator(_bias_softmax),
    "DequantizeLinear": quantisation.OPERATORS["DequantizeLinear"],
    "EmbedLayerNormalization": Operator(_embed_layer_norm, many=True),
    "ExpandDims": movement.OPERATORS["Unsqueeze"],
    "FastGelu": Operator(_fast_gelu),
    "FusedConv": Operator(_fused_conv),
    "FusedGemm": Operator(_fused_gemm),
    "FusedMatMul": Operator(_fused_matmul),
    "GatherND": indexing.OPERATORS["GatherND"],
    "Gelu": elementwise.OPERATORS["Gelu"],
    "GroupNorm": Operator(_group_norm),
    "Inverse": Operator(torch.linalg.inv),
    "LayerNormalization": algebra.OPERATORS["LayerNormalization"],
    "Pad": movement.OPERATORS["Pad"],
    "QuantizeLinear": quantisation.OPERATORS["QuantizeLinear"],
    "QuickGelu": Operator(_quick_gelu),
    "Range": movement.OPERATORS["Range"],
    "SimplifiedLayerNormalization": Operator(_simplified_layer_norm, many=True),
    "SkipGroupNorm": Operator(_skip_group_norm, many=True),
    "SkipLayerNormalization": Operator(_skip_layer_norm, many=True, counted=True),
    "SkipSimplifiedLayerNormalization": Operator(_skip_simplified_layer_norm, many=True),
    "TransposeMatMul": Operator(_fused_matmul),
    "Trilu": movement.OPERATORS["Trilu"],
}
