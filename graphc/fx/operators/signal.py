"""Fourier transforms and window functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from graphc.fx.dtypes import torch_dtype
from graphc.fx.host import Operator, as_list


def _window(cosines: Sequence[float]) -> Operator:
    """A sum of cosines over one period."""

    def run(size: Any, *, output_datatype: int = ir.DataType.FLOAT, periodic: int = 1) -> Tensor:
        count = int(as_list(size)[0])
        angle = 2 * torch.pi * torch.arange(count, dtype=torch.float64) / (count if periodic else count - 1)
        total = torch.zeros(count, dtype=torch.float64)
        for order, factor in enumerate(cosines):
            total = total + factor * torch.cos(order * angle)
        return total.to(torch_dtype(output_datatype))

    return Operator(run, host=(0,))


def _dft(x: Tensor, length: Any = None, axis: Any = None, *, inverse: int = 0, onesided: int = 0) -> Tensor:
    dim = int(as_list(axis)[0]) if axis is not None else -2
    dim = dim + x.dim() if dim < 0 else dim
    count = int(as_list(length)[0]) if length is not None else None
    if inverse and onesided:
        whole = torch.complex(x[..., 0], x[..., 1])
        return torch.fft.irfft(whole, count, dim).unsqueeze(-1)
    signal = torch.complex(x[..., 0], x[..., 1] if x.shape[-1] == 2 else torch.zeros_like(x[..., 0]))
    y = torch.fft.ifft(signal, count, dim) if inverse else torch.fft.fft(signal, count, dim)
    if onesided:
        y = y.narrow(dim, 0, y.shape[dim] // 2 + 1)
    return torch.view_as_real(y)


def _stft(x: Tensor, step: Any, window: Tensor | None = None, length: Any = None, *, onesided: int = 1) -> Tensor:
    size = int(as_list(length)[0]) if length is not None else 0
    if window is not None:
        size = window.shape[0]
    frames = x.movedim(-1, 1).unfold(-1, size, int(as_list(step)[0]))  # (batch, 1 or 2, frames, size)
    if window is not None:
        frames = frames * window
    return _dft(frames.movedim(1, -1), onesided=onesided, axis=2)


OPERATORS: dict[str, Operator] = {
    "BlackmanWindow": _window((0.42, -0.5, 0.08)),
    "DFT": Operator(_dft, host=(1, 2)),
    "HammingWindow": _window((25 / 46, -21 / 46)),
    "HannWindow": _window((0.5, -0.5)),
    "STFT": Operator(_stft, host=(1, 3)),
}
