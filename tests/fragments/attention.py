"""Attention in the spellings that exporters and people use."""

from __future__ import annotations

import math
from typing import Any

from .core import Group, fragment

TOKENS = "(float[N,S,8] x) => (float[N,S,5] y)"
HEADS: dict[str, Group | str] = {"h": "head", "d": "head_dim", "e": "head_dim"}


def _heads(s: Any, name: str, out: str, dim: int) -> str:
    return f"""
        {out}_r = Reshape({name}, [0, 0, {s.h}, {dim}])
        {out} = Transpose<perm=[0,2,1,3]>({out}_r)"""


def _core(s: Any, value_dim: int, q: str = "q", k: str = "k", v: str = "v", bias: str = "") -> str:
    """Scores, softmax, and heads joined into ``o``; ``q, k, v`` have shape (N, h, S, d)."""
    return f"""
        kt = Transpose<perm=[0,1,3,2]>({k})
        s0 = MatMul({q}, kt)
        s1 = Mul(s0, 0.35)
        {f"s2 = Add(s1, {bias})" if bias else "s2 = Identity(s1)"}
        p = Softmax<axis=-1>(s2)
        c = MatMul(p, {v})
        ct = Transpose<perm=[0,2,1,3]>(c)
        o = Reshape(ct, [0, 0, {s.h * value_dim}])"""


@fragment(
    "h=3 d=4 e=5", HEADS, "wq: 8 (h d); bq: (h d); wk: 8 (h d); bk: (h d); wv: 8 (h e); bv: (h e); wo: (h e) 5; bo: 5"
)
def attention_separate(s: Any) -> str:
    return f"""{TOKENS}
        q0 = MatMul(x, wq)
        q1 = Add(q0, bq)
        k0 = MatMul(x, wk)
        k1 = Add(k0, bk)
        v0 = MatMul(x, wv)
        v1 = Add(v0, bv)
        {_heads(s, "q1", "q", s.d)}{_heads(s, "k1", "k", s.d)}{_heads(s, "v1", "v", s.e)}
        {_core(s, s.e)}
        y0 = MatMul(o, wo)
        y = Add(y0, bo)"""


@fragment("h=4 d=4", {"h": "head", "d": "head_dim"}, "w: 8 (3 h d); b: (3 h d); wo: (h d) 5")
def attention_fused_3hd(s: Any) -> str:
    """timm: one reshape to five axes, a transpose, three gathers."""
    return f"""{TOKENS}
        a0 = MatMul(x, w)
        a = Add(a0, b)
        r = Reshape(a, [0, 0, 3, {s.h}, {s.d}])
        t = Transpose<perm=[2,0,3,1,4]>(r)
        i0 = Constant<value_int=0>()
        i1 = Constant<value_int=1>()
        i2 = Constant<value_int=2>()
        q = Gather<axis=0>(t, i0)
        k = Gather<axis=0>(t, i1)
        v = Gather<axis=0>(t, i2)
        {_core(s, s.d)}
        y = MatMul(o, wo)"""


@fragment("h=3 d=4 e=2", HEADS, "w: 8 (h d + h d + h e); b: (h d + h d + h e); wo: (h e) 5")
def attention_fused_split(s: Any) -> str:
    """GPT-2: the fused axis is split first, each part is reshaped."""
    n = s.h * s.d
    return f"""{TOKENS}
        a0 = MatMul(x, w)
        a = Add(a0, b)
        q0, k0, v0 = Split<axis=2>(a, [{n}, {n}, {s.h * s.e}])
        {_heads(s, "q0", "q", s.d)}{_heads(s, "k0", "k", s.d)}{_heads(s, "v0", "v", s.e)}
        {_core(s, s.e)}
        y = MatMul(o, wo)"""


@fragment("h=3 d=4 e=4", HEADS, "w: 8 (h d + h d + h e); wo: (h e) 5")
def attention_fused_equal_split(s: Any) -> str:
    """Three equal parts, which need not stay equal: the split sizes are then written out."""
    n, m = s.h * s.d, s.h * s.e
    split = "Split<axis=2, num_outputs=3>(a)" if n == m else f"Split<axis=2>(a, [{n}, {n}, {m}])"
    return f"""{TOKENS}
        a = MatMul(x, w)
        q0, k0, v0 = {split}
        {_heads(s, "q0", "q", s.d)}{_heads(s, "k0", "k", s.d)}{_heads(s, "v0", "v", s.e)}
        {_core(s, s.e)}
        y = MatMul(o, wo)"""


@fragment("h=3 d=4 e=2", HEADS, "w: 8 (h (d + d + e)); b: (h (d + d + e)); wo: (h e) 5")
def attention_fused_h3d(s: Any) -> str:
    """GPT-NeoX and BLOOM: within each head, its query, key and value."""
    n = 2 * s.d + s.e
    return f"""{TOKENS}
        a0 = MatMul(x, w)
        a = Add(a0, b)
        r = Reshape(a, [0, 0, {s.h}, {n}])
        t = Transpose<perm=[0,2,1,3]>(r)
        q, k, v = Split<axis=3>(t, [{s.d}, {s.d}, {s.e}])
        {_core(s, s.e)}
        y = MatMul(o, wo)"""


@fragment("h=3 d=4", {"h": "head", "d": "head_dim"}, "w: 8 (h d 3); wo: (h d) 5")
def attention_fused_hd3(s: Any) -> str:
    return f"""{TOKENS}
        a = MatMul(x, w)
        r = Reshape(a, [0, 0, {s.h}, {s.d}, 3])
        t = Transpose<perm=[4,0,2,1,3]>(r)
        q0, k0, v0 = Split<axis=0, num_outputs=3>(t)
        q = Squeeze(q0, [0])
        k = Squeeze(k0, [0])
        v = Squeeze(v0, [0])
        {_core(s, s.d)}
        y = MatMul(o, wo)"""


@fragment("h=3 d=4 e=2", HEADS, "wq: 8 (h d); wk: 8 d; wv: 8 e; wo: (h e) 5")
def multi_query(s: Any) -> str:
    """One key and value head for all query heads, by broadcasting."""
    return f"""{TOKENS}
        q0 = MatMul(x, wq)
        k0 = MatMul(x, wk)
        v0 = MatMul(x, wv)
        {_heads(s, "q0", "q", s.d)}
        k = Unsqueeze(k0, [1])
        v = Unsqueeze(v0, [1])
        {_core(s, s.e)}
        y = MatMul(o, wo)"""


@fragment("h=4 d=3 e=2 m=4", HEADS, "w: 8 (h d + d + e); wo: (h e) 5")
def multi_query_fused(s: Any) -> str:
    """Falcon-like: query heads, then one key and one value in the same projection."""
    return f"""{TOKENS}
        a = MatMul(x, w)
        q0, k0, v0 = Split<axis=-1>(a, [{s.h * s.d}, {s.d}, {s.e}])
        {_heads(s, "q0", "q", s.d)}
        k = Unsqueeze(k0, [1])
        v = Unsqueeze(v0, [1])
        {_core(s, s.e)}
        y = MatMul(o, wo)"""


@fragment(
    "h=2 r=3 d=4 e=5",
    {"h": "head", "r": Group("head", balanced=("h",)), "d": "head_dim", "e": "head_dim"},
    "wq: 8 (h r d); wk: 8 (h d); wv: 8 (h e); wo: (h r e) 5",
)
def grouped_query(s: Any) -> str:
    """Key and value heads are repeated by Unsqueeze, Expand and Reshape."""
    q = s.h * s.r

    def repeat(name: str, out: str, dim: int) -> str:
        return f"""
        {out}_r = Reshape({name}, [0, 0, {s.h}, {dim}])
        {out}_t = Transpose<perm=[0,2,1,3]>({out}_r)
        {out}_u = Unsqueeze({out}_t, [2])
        {out}_s = Constant<value_ints=[1,1,{s.r},1,1]>()
        {out}_x = Expand({out}_u, {out}_s)
        {out}_n = Shape<start=0, end=1>(x)
        {out}_l = Shape<start=2, end=3>({out}_t)
        {out}_q = Constant<value_ints=[{q}]>()
        {out}_d = Constant<value_ints=[{dim}]>()
        {out}_c = Concat<axis=0>({out}_n, {out}_q, {out}_l, {out}_d)
        {out} = Reshape({out}_x, {out}_c)"""

    return f"""{TOKENS}
        q0 = MatMul(x, wq)
        q_r = Reshape(q0, [0, 0, {q}, {s.d}])
        q = Transpose<perm=[0,2,1,3]>(q_r)
        k0 = MatMul(x, wk)
        v0 = MatMul(x, wv)
        {repeat("k0", "k", s.d)}
        {repeat("v0", "v", s.e)}
        kt = Transpose<perm=[0,1,3,2]>(k)
        s0 = MatMul(q, kt)
        s1 = Div(s0, 2.0)
        p = Softmax<axis=-1>(s1)
        c = MatMul(p, v)
        ct = Transpose<perm=[0,2,1,3]>(c)
        o = Reshape(ct, [0, 0, -1])
        y = MatMul(o, wo)"""


@fragment(
    "h=2 r=2 d=3 e=4",
    {"h": "head", "r": Group("head", balanced=("h",)), "d": "head_dim", "e": "head_dim"},
    "wq: 8 (h r d); wk: 8 (h d); wv: 8 (h e); wo: (h r e) 5",
)
def grouped_query_broadcast(s: Any) -> str:
    """The query is reshaped to five axes and the keys broadcast over the repetition."""
    return f"""{TOKENS}
        q0 = MatMul(x, wq)
        q1 = Reshape(q0, [0, 0, {s.h}, {s.r}, {s.d}])
        q = Transpose<perm=[0,2,3,1,4]>(q1)
        k0 = MatMul(x, wk)
        k1 = Reshape(k0, [0, 0, {s.h}, 1, {s.d}])
        k = Transpose<perm=[0,2,3,4,1]>(k1)
        v0 = MatMul(x, wv)
        v1 = Reshape(v0, [0, 0, {s.h}, 1, {s.e}])
        v = Transpose<perm=[0,2,3,1,4]>(v1)
        s0 = MatMul(q, k)
        s1 = Mul(s0, 0.5)
        p = Softmax<axis=-1>(s1)
        c = MatMul(p, v)
        ct = Transpose<perm=[0,3,1,2,4]>(c)
        o = Reshape(ct, [0, 0, {s.h * s.r * s.e}])
        y = MatMul(o, wo)"""


@fragment(
    "h=2 d=3 e=4",
    HEADS,
    "w: 8 (h d + h d + h e); t: 9 h; wo: (h e) 5",
    fixed={"t:0": "index|gather|table|position|inside a digit"},
)
def window_attention(s: Any) -> str:
    """Swin: four tokens a window, and a bias looked up in a table by a constant index."""
    n = s.h * s.d
    index = "4,3,1,0,5,4,2,1,7,6,4,3,8,7,5,4"
    return f"""(float[N,4,8] x) => (float[N,4,5] y)
        a = MatMul(x, w)
        q0, k0, v0 = Split<axis=2>(a, [{n}, {n}, {s.h * s.e}])
        {_heads(s, "q0", "q", s.d)}{_heads(s, "k0", "k", s.d)}{_heads(s, "v0", "v", s.e)}
        g = Gather<axis=0>(t, [{index}])
        g1 = Reshape(g, [4, 4, -1])
        g2 = Transpose<perm=[2,0,1]>(g1)
        g3 = Unsqueeze(g2, [0])
        {_core(s, s.e, bias="g3")}
        y = MatMul(o, wo)"""


@fragment("h=3 d=4 e=5", HEADS, "wq: 8 h d; bq: h d; wk: 8 h d; wv: 8 h e; wo: h e 5")
def einsum_attention(s: Any) -> str:
    """JAX style: three-dimensional weights and Einsum throughout."""
    return f"""{TOKENS}
        q0 = Einsum<equation="bsm,mhd->bshd">(x, wq)
        q = Add(q0, bq)
        k = Einsum<equation="bsm,mhd->bshd">(x, wk)
        v = Einsum<equation="bsm,mhe->bshe">(x, wv)
        s0 = Einsum<equation="bqhd,bkhd->bhqk">(q, k)
        p = Softmax<axis=-1>(s0)
        c = Einsum<equation="bhqk,bkhe->bqhe">(p, v)
        y = Einsum<equation="bqhe,hem->bqm">(c, wo)"""


@fragment(
    "h=3 d=4 e=5", HEADS, "wq: 8 (h d); wk: 6 (h d); wv: 6 (h e); wo: (h e) 5", fixed={"wq:0": "input", "wk:0": "input"}
)
def cross_attention(s: Any) -> str:
    return f"""(float[N,S,8] x, float[N,T,6] z, bool[N,1,1,T] m) => (float[N,S,5] y)
        q0 = MatMul(x, wq)
        k0 = MatMul(z, wk)
        v0 = MatMul(z, wv)
        {_heads(s, "q0", "q", s.d)}{_heads(s, "k0", "k", s.d)}{_heads(s, "v0", "v", s.e)}
        mf = Where(m, 0.0, -10000.0)
        {_core(s, s.e, bias="mf")}
        y = MatMul(o, wo)"""


@fragment("h=3 d=4 e=5", HEADS, "wq: 8 (h d); wk: 8 (h d); wv: 8 (h e); wo: (h e) 5")
def attention_torchscript(s: Any) -> str:
    """Raw shape arithmetic, batch and heads merged for a batched product, a split scale, and a guard against NaN."""
    return f"""{TOKENS}
        sh = Shape(x)
        i0 = Constant<value_int=0>()
        i1 = Constant<value_int=1>()
        n0 = Gather<axis=0>(sh, i0)
        t0 = Gather<axis=0>(sh, i1)
        n1 = Unsqueeze(n0, [0])
        t1 = Unsqueeze(t0, [0])
        h1 = Constant<value_ints=[{s.h}]>()
        h0 = Constant<value_int={s.h}>()
        d1 = Constant<value_ints=[{s.d}]>()
        e1 = Constant<value_ints=[{s.e}]>()
        nh = Mul(n0, h0)
        nh1 = Unsqueeze(nh, [0])
        sd = Concat<axis=0>(n1, t1, h1, d1)
        se = Concat<axis=0>(n1, t1, h1, e1)
        bd = Concat<axis=0>(nh1, t1, d1)
        be = Concat<axis=0>(nh1, t1, e1)
        q0 = MatMul(x, wq)
        q1 = Reshape(q0, sd)
        q2 = Transpose<perm=[0,2,1,3]>(q1)
        q = Reshape(q2, bd)
        k0 = MatMul(x, wk)
        k1 = Reshape(k0, sd)
        k2 = Transpose<perm=[0,2,1,3]>(k1)
        k = Reshape(k2, bd)
        v0 = MatMul(x, wv)
        v1 = Reshape(v0, se)
        v2 = Transpose<perm=[0,2,1,3]>(v1)
        v = Reshape(v2, be)
        kt = Transpose<perm=[0,2,1]>(k)
        qs = Mul(q, 0.7)
        ks = Mul(kt, 0.7)
        s0 = MatMul(qs, ks)
        p0 = Softmax<axis=-1>(s0)
        pn = IsNaN(p0)
        p = Where(pn, 0.0, p0)
        c = MatMul(p, v)
        bo = Concat<axis=0>(n1, h1, t1, e1)
        c1 = Reshape(c, bo)
        c2 = Transpose<perm=[0,2,1,3]>(c1)
        m1 = Constant<value_ints=[-1]>()
        so = Concat<axis=0>(n1, t1, m1)
        o = Reshape(c2, so)
        y = MatMul(o, wo)"""


@fragment("h=3 d=4", {"h": "head", "d": "head_dim"}, "w: (3 h d) 8 1 1; b: (3 h d); wp: (h d) 1 3 3; wo: 5 (h d) 1 1")
def attention_on_feature_map(s: Any) -> str:
    """1x1 convolutions make query, key and value; the tokens are pixels; a depthwise convolution encodes positions."""
    n = s.h * s.d
    return f"""(float[N,8,4,4] x) => (float[N,5,4,4] y)
        a = Conv(x, w, b)
        r = Reshape(a, [0, 3, {s.h}, {s.d}, 16])
        i0 = Constant<value_int=0>()
        i1 = Constant<value_int=1>()
        i2 = Constant<value_int=2>()
        q = Gather<axis=1>(r, i0)
        k = Gather<axis=1>(r, i1)
        v = Gather<axis=1>(r, i2)
        qt = Transpose<perm=[0,1,3,2]>(q)
        s0 = MatMul(qt, k)
        s1 = Mul(s0, 0.5)
        p = Softmax<axis=-1>(s1)
        pt = Transpose<perm=[0,1,3,2]>(p)
        c = MatMul(v, pt)
        o = Reshape(c, [0, {n}, 4, 4])
        vi = Reshape(v, [0, {n}, 4, 4])
        e = Conv<group={n}, pads=[1,1,1,1]>(vi, wp)
        z = Add(o, e)
        y = Conv(z, wo)"""


@fragment(
    "h=3 d=4 e=5 m=8 o=5",
    {
        "h": Group("head", interface=True),
        "d": Group("head_dim", interface=True),
        "e": Group("head_dim", interface=True),
        "m": Group("width", interface=True, optional=True),
        "o": Group("width", interface=True, optional=True),
    },
    "wq: m (h d); wk: m (h d); wv: m (h e); wo: (h e) o",
    interface="x: 2 5 m; y: 2 5 o; pk: 2 h 3 d; pv: 2 h 3 e; nk: 2 h 8 d; nv: 2 h 8 e",
    fixed={"wk:1": "graph input|graph output|interface", "wq:1": "graph input|graph output|interface"},
)
def kv_cache(s: Any) -> str:
    return f"""(float[N,S,{s.m}] x, float[N,{s.h},P,{s.d}] pk, float[N,{s.h},P,{s.e}] pv)
        => (float[N,S,{s.o}] y, float[N,{s.h},T,{s.d}] nk, float[N,{s.h},T,{s.e}] nv)
        q0 = MatMul(x, wq)
        k0 = MatMul(x, wk)
        v0 = MatMul(x, wv)
        {_heads(s, "q0", "q", s.d)}{_heads(s, "k0", "k", s.d)}{_heads(s, "v0", "v", s.e)}
        nk = Concat<axis=2>(pk, k)
        nv = Concat<axis=2>(pv, v)
        {_core(s, s.e, k="nk", v="nv")}
        y = MatMul(o, wo)"""


def _scale(s: Any) -> str:
    """The default scale of an attention operator, written out once its head_dim differs."""
    return "" if s.d == s.full.d else f", scale={1 / math.sqrt(s.full.d):.9g}"


@fragment("h=3 d=4 e=5", HEADS, "wq: 8 (h d); wk: 8 (h d); wv: 8 (h e); wo: (h e) 5", opset=23)
def attention_operator(s: Any) -> str:
    """The standard Attention of opset 23 on three-dimensional operands, with its default scale."""
    return f"""{TOKENS}
        q = MatMul(x, wq)
        k = MatMul(x, wk)
        v = MatMul(x, wv)
        o = Attention<q_num_heads={s.h}, kv_num_heads={s.h}{_scale(s)}>(q, k, v)
        y = MatMul(o, wo)"""


@fragment(
    "h=2 r=3 d=4 e=4",
    {"h": "head", "r": Group("head", balanced=("h",)), "d": "head_dim", "e": "head_dim"},
    "wq: 8 (h r d); wk: 8 (h d); wv: 8 (h e); wo: (h r e) 5",
    opset=23,
)
def attention_operator_grouped(s: Any) -> str:
    """The standard Attention on four-dimensional operands, causal, with fewer key heads than query heads."""
    return f"""{TOKENS}
        q0 = MatMul(x, wq)
        k0 = MatMul(x, wk)
        v0 = MatMul(x, wv)
        q1 = Reshape(q0, [0, 0, {s.h * s.r}, {s.d}])
        k1 = Reshape(k0, [0, 0, {s.h}, {s.d}])
        v1 = Reshape(v0, [0, 0, {s.h}, {s.e}])
        q = Transpose<perm=[0,2,1,3]>(q1)
        k = Transpose<perm=[0,2,1,3]>(k1)
        v = Transpose<perm=[0,2,1,3]>(v1)
        c = Attention<is_causal=1{_scale(s)}>(q, k, v)
        ct = Transpose<perm=[0,2,1,3]>(c)
        o = Reshape(ct, [0, 0, -1])
        y = MatMul(o, wo)"""


@fragment("h=3 d=4 e=8", HEADS, "w: 8 (h d + h d + h e); b: (h d + h d + h e); wo: (h e) 5")
def contrib_attention(s: Any) -> str:
    return f"""{TOKENS}
        o = com.microsoft.Attention<num_heads={s.h}, qkv_hidden_sizes=[{s.h * s.d},{s.h * s.d},{s.h * s.e}]{_scale(s)}>(x, w, b)
        y = MatMul(o, wo)"""  # noqa: E501


@fragment("h=3 d=4 e=8", HEADS, "wq: 8 (h d); wk: 8 (h d); wv: 8 (h e); b: (h d + h d + h e); wo: (h e) 5")
def contrib_multi_head_attention(s: Any) -> str:
    return f"""{TOKENS}
        q = MatMul(x, wq)
        k = MatMul(x, wk)
        v = MatMul(x, wv)
        o = com.microsoft.MultiHeadAttention<num_heads={s.h}{_scale(s)}>(q, k, v, b)
        y = MatMul(o, wo)"""
