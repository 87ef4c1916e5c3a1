"""Recurrent layers, whose weights hold several gates side by side and, for two directions, two of everything."""

from __future__ import annotations

from typing import Any

from .core import Group, fragment


@fragment("h=4", {"h": "neuron"}, "w: 1 (4 h) 8; r: 1 (4 h) h; b: 1 (8 h); wo: 5 h")
def lstm(s: Any) -> str:
    return f"""(float[S,N,8] x) => (float[S,N,5] y)
        a = LSTM<hidden_size={s.h}>(x, w, r, b)
        q = Squeeze(a, [1])
        t = Transpose<perm=[1,0]>(wo)
        y = MatMul(q, t)"""


@fragment(
    "h=4 k=3",
    {"h": "neuron", "k": "neuron"},
    "w: 2 (4 h) 8; r: 2 (4 h) h; b: 2 (8 h); w2: 1 (4 k) (2 h); r2: 1 (4 k) k; wo: k 5",
)
def bilstm_stacked(s: Any) -> str:
    """Both directions share one hidden size; their outputs stand side by side for the next layer."""
    return f"""(float[S,N,8] x) => (float[N,5] y)
        a = LSTM<hidden_size={s.h}, direction="bidirectional">(x, w, r, b)
        p = Transpose<perm=[0,2,1,3]>(a)
        q = Reshape(p, [0, 0, {2 * s.h}])
        y2, last = LSTM<hidden_size={s.k}>(q, w2, r2)
        l = Squeeze(last, [0])
        y = MatMul(l, wo)"""


@fragment("h=4", {"h": "neuron"}, "w: 1 (3 h) 8; r: 1 (3 h) h; b: 1 (6 h); wo: h 5")
def gru(s: Any) -> str:
    return f"""(float[S,N,8] x) => (float[S,N,5] y)
        a = GRU<hidden_size={s.h}, linear_before_reset=1>(x, w, r, b)
        q = Squeeze(a, [1])
        y = MatMul(q, wo)"""


@fragment("h=4", {"h": "neuron"}, "w: 2 h 8; r: 2 h h; b: 2 (2 h); wo: (2 h) 5")
def rnn_bidirectional_last(s: Any) -> str:
    """The last states of both directions, joined by a Transpose and a Reshape."""
    return f"""(float[S,N,8] x) => (float[N,5] y)
        a, l = RNN<hidden_size={s.h}, direction="bidirectional">(x, w, r, b)
        t = Transpose<perm=[1,0,2]>(l)
        f = Reshape(t, [0, -1])
        y = MatMul(f, wo)"""


@fragment(
    "h=3 m=8 o=5",
    {
        "h": Group("neuron", interface=True),
        "m": Group("width", interface=True, optional=True),
        "o": Group("width", interface=True, optional=True),
    },
    "w: 1 (4 h) m; r: 1 (4 h) h; b: 1 (8 h); wo: h o",
    interface="x: 5 2 m; y: 5 2 o; h0: 1 2 h; c0: 1 2 h; h1: 1 2 h; c1: 1 2 h",
    fixed={"r:2": "graph input|graph output|interface"},
)
def lstm_with_state(s: Any) -> str:
    return f"""(float[S,N,{s.m}] x, float[1,N,{s.h}] h0, float[1,N,{s.h}] c0)
        => (float[S,N,{s.o}] y, float[1,N,{s.h}] h1, float[1,N,{s.h}] c1)
        a, h1, c1 = LSTM<hidden_size={s.h}>(x, w, r, b, , h0, c0)
        q = Squeeze(a, [1])
        y = MatMul(q, wo)"""
