"""Recurrent layers, one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graphc.errors import BadInput
from graphc.fx.host import Operator

Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x_t, h, c) to the next (h, c)."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
}


def _activations(names: Sequence[str] | None, default: Sequence[str]) -> list[Callable[[Tensor], Tensor]]:
    chosen = [name.lower() for name in names or default]
    unknown = sorted(set(chosen) - set(_ACTIVATIONS))
    if unknown:
        raise BadInput(f"the activation '{unknown[0]}' of a recurrent layer has no torch form")
    return [_ACTIVATIONS[name] for name in chosen]


def _run(
    x: Tensor, step: Step, h: Tensor, c: Tensor, lengths: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """All steps of one direction: the outputs (length, batch, hidden) and the last h and c (batch, hidden)."""
    rows: list[Tensor] = []
    times = range(x.shape[0])
    for t in reversed(times) if reverse else times:
        new_h, new_c = step(x[t], h, c)
        if lengths is not None:
            # A sequence that has ended keeps its state and puts out zeros.
            alive = (lengths > t).unsqueeze(-1)
            rows.append(torch.where(alive, new_h, torch.zeros_like(new_h)))
            new_h, new_c = torch.where(alive, new_h, h), torch.where(alive, new_c, c)
        else:
            rows.append(new_h)
        h, c = new_h, new_c
    return torch.stack(rows[::-1] if reverse else rows), h, c


def _layer(
    make: Callable[[int], Step],
    x: Tensor,
    hidden: int,
    direction: str,
    layout: int,
    lengths: Tensor | None,
    start_h: Tensor | None,
    start_c: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.transpose(0, 1) if layout else x
    directions = 2 if direction == "bidirectional" else 1
    zero = x.new_zeros(directions, x.shape[1], hidden)
    starts = [zero if s is None else s.transpose(0, 1) if layout else s for s in (start_h, start_c)]
    results = [
        _run(x, make(d), starts[0][d], starts[1][d], lengths, direction == "reverse" or d == 1)
        for d in range(directions)
    ]
    y, h, c = (torch.stack(part) for part in zip(*results, strict=True))
    # (directions, length, batch, hidden) to (length, directions, batch, hidden), or batch first.
    if layout:
        return y.permute(2, 1, 0, 3), h.transpose(0, 1), c.transpose(0, 1)
    return y.transpose(0, 1), h, c


def _clipped(value: Tensor, clip: float) -> Tensor:
    return value.clamp(-clip, clip) if clip else value


def _lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    start_h: Tensor | None = None,
    start_c: Tensor | None = None,
    p: Tensor | None = None,
    *,
    hidden_size: int,
    direction: str = "forward",
    layout: int = 0,
    activations: Sequence[str] | None = None,
    clip: float = 0.0,
    input_forget: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    def make(d: int) -> Step:
        f, g, h_act = _activations(activations[3 * d : 3 * d + 3] if activations else None, ("sigmoid", "tanh", "tanh"))
        bias = b[d].reshape(2, -1).sum(0) if b is not None else 0.0
        peep_i, peep_o, peep_f = p[d].chunk(3) if p is not None else (None, None, None)

        def step(x_t: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            i, o, forget, cell = (x_t @ w[d].T + h @ r[d].T + bias).chunk(4, -1)
            if peep_i is not None and peep_f is not None:
                i, forget = i + peep_i * c, forget + peep_f * c
            i = f(_clipped(i, clip))
            forget = 1 - i if input_forget else f(_clipped(forget, clip))
            c = forget * c + i * g(_clipped(cell, clip))
            o = f(_clipped(o if peep_o is None else o + peep_o * c, clip))
            return o * h_act(c), c

        return step

    return _layer(make, x, hidden_size, direction, layout, lengths, start_h, start_c)


def _gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    start_h: Tensor | None = None,
    *,
    hidden_size: int,
    direction: str = "forward",
    layout: int = 0,
    activations: Sequence[str] | None = None,
    clip: float = 0.0,
    linear_before_reset: int = 0,
) -> tuple[Tensor, Tensor]:
    def make(d: int) -> Step:
        f, g = _activations(activations[2 * d : 2 * d + 2] if activations else None, ("sigmoid", "tanh"))
        zeros = x.new_zeros(2, 3 * hidden_size)
        w_bias, r_bias = b[d].reshape(2, -1) if b is not None else zeros
        r_zr, r_h = r[d][: 2 * hidden_size], r[d][2 * hidden_size :]
        b_zr, b_h = r_bias[: 2 * hidden_size], r_bias[2 * hidden_size :]

        def step(x_t: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            from_x = x_t @ w[d].T + w_bias
            gates = from_x[..., : 2 * hidden_size] + h @ r_zr.T + b_zr
            z, reset = f(_clipped(gates, clip)).chunk(2, -1)
            recurrent = reset * (h @ r_h.T + b_h) if linear_before_reset else (reset * h) @ r_h.T + b_h
            new = g(_clipped(from_x[..., 2 * hidden_size :] + recurrent, clip))
            return (1 - z) * new + z * h, c

        return step

    return _layer(make, x, hidden_size, direction, layout, lengths, start_h, None)[:2]


def _rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    start_h: Tensor | None = None,
    *,
    hidden_size: int,
    direction: str = "forward",
    layout: int = 0,
    activations: Sequence[str] | None = None,
    clip: float = 0.0,
) -> tuple[Tensor, Tensor]:
    def make(d: int) -> Step:
        (f,) = _activations(activations[d : d + 1] if activations else None, ("tanh",))
        bias = b[d].reshape(2, -1).sum(0) if b is not None else 0.0

        def step(x_t: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            return f(_clipped(x_t @ w[d].T + h @ r[d].T + bias, clip)), c

        return step

    return _layer(make, x, hidden_size, direction, layout, lengths, start_h, None)[:2]


OPERATORS: dict[str, Operator] = {
    "GRU": Operator(_gru, fixed=(5,), many=True),
    "LSTM": Operator(_lstm, fixed=(5, 6), many=True),
    "RNN": Operator(_rnn, fixed=(5,), many=True),
}
