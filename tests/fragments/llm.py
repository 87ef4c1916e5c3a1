"""Language models: normalised streams, gated feed-forwards, rotary embeddings, experts, adapters, state spaces."""

from __future__ import annotations

from typing import Any

from .core import Group, fragment

TOKENS = "(float[N,S,8] x) => (float[N,S,5] y)"


@fragment("f=6", {"f": "neuron"}, "wg: 8 f; wu: 8 f; wd: f 5")
def swiglu(s: Any) -> str:
    return f"""{TOKENS}
        g = MatMul(x, wg)
        t = Sigmoid(g)
        a = Mul(g, t)
        u = MatMul(x, wu)
        m = Mul(a, u)
        y = MatMul(m, wd)"""


@fragment(
    "m=6 f=5",
    {"m": Group("width", exact="rms", gammas=("g1", "g2")), "f": "neuron"},
    "emb: 11 m; g1: m = positive; wg: m f; wu: m f; wd: f m; g2: m = positive",
    fixed={"emb:0": "index|gather|output|input"},
    ids_below=11,
)
def rms_stream_tied(s: Any) -> str:
    """RMSNorm as arithmetic, a gated block on a residual stream, and a head that shares the embedding's table."""
    eps = 1e-3 * s.full.m / s.m

    def norm(x: str, gamma: str, out: str) -> str:
        return f"""
        {out}_p = Pow({x}, 2.0)
        {out}_m = ReduceMean({out}_p, [-1])
        {out}_e = Constant<value_float={eps:.9g}>()
        {out}_a = Add({out}_m, {out}_e)
        {out}_s = Sqrt({out}_a)
        {out}_r = Reciprocal({out}_s)
        {out}_n = Mul({x}, {out}_r)
        {out} = Mul({gamma}, {out}_n)"""

    return f"""(int64[N,S] ids) => (float[N,S,11] y)
        x = Gather<axis=0>(emb, ids)
        {norm("x", "g1", "n")}
        a = MatMul(n, wg)
        b = Sigmoid(a)
        c = Mul(a, b)
        u = MatMul(n, wu)
        d = Mul(c, u)
        e = MatMul(d, wd)
        h = Add(x, e)
        {norm("h", "g2", "o")}
        et = Transpose<perm=[1,0]>(emb)
        y = MatMul(o, et)"""


@fragment(
    "m=6 f=5",
    {"m": Group("width", exact="rms", gammas=("g",)), "f": "neuron"},
    "w0: 8 m; g: m = positive; w1: m f; b1: f; w2: f m; b2: m; w3: 5 m",
    opset=23,
)
def rms_operator_stream(s: Any) -> str:
    return f"""{TOKENS}
        a = MatMul(x, w0)
        n = RMSNormalization<epsilon={1e-3 * s.full.m / s.m:.9g}>(a, g)
        b0 = MatMul(n, w1)
        b = Add(b0, b1)
        c = Gelu(b)
        d0 = MatMul(c, w2)
        d = Add(d0, b2)
        e = Add(a, d)
        t = Transpose<perm=[1,0]>(w3)
        y = MatMul(e, t)"""


@fragment(
    "m=6 f=5",
    {"m": Group("width", exact="norm"), "f": "neuron"},
    "emb: 11 m; pos: 5 m; g1: m = positive; b1: m; w1: m f; c1: f; w2: f m; c2: m; g2: m = positive; b2: m; w3: m 5",
    ids_below=11,
)
def layer_norm_stream(s: Any) -> str:
    return """(int64[N,5] ids) => (float[N,5,5] y)
        t = Gather<axis=0>(emb, ids)
        x = Add(t, pos)
        n = LayerNormalization<axis=-1>(x, g1, b1)
        a0 = MatMul(n, w1)
        a = Add(a0, c1)
        b = Gelu(a)
        d0 = MatMul(b, w2)
        d = Add(d0, c2)
        h = Add(x, d)
        o = LayerNormalization<axis=-1>(h, g2, b2)
        y = MatMul(o, w3)"""


@fragment(
    "m=6 f=4",
    {"m": Group("width", exact="norm"), "f": "rank"},
    "w0: 8 m; g: m = positive; b: m; w1: m f; w2: 5 f",
)
def layer_norm_decomposed(s: Any) -> str:
    return f"""{TOKENS}
        a = MatMul(x, w0)
        m = ReduceMean(a, [-1])
        c = Sub(a, m)
        p = Pow(c, 2.0)
        v = ReduceMean(p, [-1])
        e = Add(v, 0.001)
        r = Sqrt(e)
        n = Div(c, r)
        k = Mul(n, g)
        l = Add(k, b)
        d = MatMul(l, w1)
        t = Transpose<perm=[1,0]>(w2)
        y = MatMul(d, t)"""


@fragment(
    "m=6 h=2 d=4",
    {"m": Group("width", exact="norm"), "h": "head", "d": "head_dim"},
    "wp: m 3 4 4; bp: m; cls: 1 1 m; pos: 1 5 m; g: m = positive; b: m; w: m (3 h d); wo: (h d) m; wh: 5 m; bh: 5",
    fixed={"pos:1": "mixes|position|broadcast|token|concat"},
)
def vit_patches(s: Any) -> str:
    """A patch convolution, a class token, positions, one attention block, and the class token read out."""
    return f"""(float[N,3,8,8] x) => (float[N,5] y)
        a = Conv<strides=[4,4]>(x, wp, bp)
        f = Reshape(a, [0, {s.m}, -1])
        t = Transpose<perm=[0,2,1]>(f)
        n0 = Shape<start=0, end=1>(x)
        q1 = Constant<value_ints=[-1,-1]>()
        ones = Constant<value_ints=[1,1]>()
        cs = Concat<axis=0>(n0, ones)
        c = Expand(cls, cs)
        j = Concat<axis=1>(c, t)
        z = Add(j, pos)
        l = LayerNormalization(z, g, b)
        u = MatMul(l, w)
        r = Reshape(u, [0, 5, 3, {s.h}, {s.d}])
        rt = Transpose<perm=[2,0,3,1,4]>(r)
        q0, k0, v0 = Split<axis=0, num_outputs=3>(rt)
        q = Squeeze(q0, [0])
        k = Squeeze(k0, [0])
        v = Squeeze(v0, [0])
        kt = Transpose<perm=[0,1,3,2]>(k)
        s0 = MatMul(q, kt)
        s1 = Mul(s0, 0.5)
        p = Softmax(s1)
        o0 = MatMul(p, v)
        o1 = Transpose<perm=[0,2,1,3]>(o0)
        o = Reshape(o1, [0, 5, {s.h * s.d}])
        e = MatMul(o, wo)
        h = Add(z, e)
        i0 = Constant<value_int=0>()
        ct = Gather<axis=1>(h, i0)
        y = Gemm<transB=1>(ct, wh, bh)""".replace("        q1 = Constant<value_ints=[-1,-1]>()\n", "")


def _rotated(s: Any, name: str, out: str, interleaved: bool) -> str:
    """Rotary embedding of ``name`` with shape (N, heads, S, 2 p) as ``out``."""
    if interleaved:
        return f"""
        {out}_0 = Slice({name}, [0], [9999], [3], [2])
        {out}_1 = Slice({name}, [1], [9999], [3], [2])
        {out}_a = Mul({out}_0, cos)
        {out}_b = Mul({out}_1, sin)
        {out}_c = Sub({out}_a, {out}_b)
        {out}_d = Mul({out}_0, sin)
        {out}_e = Mul({out}_1, cos)
        {out}_f = Add({out}_d, {out}_e)
        {out}_g = Unsqueeze({out}_c, [-1])
        {out}_h = Unsqueeze({out}_f, [-1])
        {out}_i = Concat<axis=-1>({out}_g, {out}_h)
        {out}_s = Shape<start=0, end=3>({name})
        {out}_m = Constant<value_ints=[-1]>()
        {out}_n = Concat<axis=0>({out}_s, {out}_m)
        {out} = Reshape({out}_i, {out}_n)"""
    return f"""
        {out}_0 = Slice({name}, [0], [{s.p}], [3], [1])
        {out}_1 = Slice({name}, [{s.p}], [9223372036854775807], [3], [1])
        {out}_2 = Neg({out}_1)
        {out}_3 = Concat<axis=-1>({out}_2, {out}_0)
        {out}_a = Mul({name}, cos)
        {out}_b = Mul({out}_3, sin)
        {out} = Add({out}_a, {out}_b)"""


def _rope_attention(s: Any, interleaved: bool) -> str:
    q, dim = s.h * s.r, 2 * s.p
    doubled = "" if interleaved else "fr = Concat<axis=-1>(fr0, fr0)"
    angles = "fr0" if interleaved else "fr"
    return f"""(float[N,S,8] x, int64[N,S] position) => (float[N,S,5] y)
        pf = Cast<to=1>(position)
        pu = Unsqueeze(pf, [1, 3])
        fr0 = Mul(pu, inv_freq)
        {doubled}
        cos = Cos({angles})
        sin = Sin({angles})
        q0 = MatMul(x, wq)
        q1 = Reshape(q0, [0, 0, {q}, {dim}])
        q2 = Transpose<perm=[0,2,1,3]>(q1)
        k0 = MatMul(x, wk)
        k1 = Reshape(k0, [0, 0, {s.h}, {dim}])
        k2 = Transpose<perm=[0,2,1,3]>(k1)
        v0 = MatMul(x, wv)
        v1 = Reshape(v0, [0, 0, {s.h}, {s.e}])
        v2 = Transpose<perm=[0,2,1,3]>(v1)
        {_rotated(s, "q2", "q", interleaved)}
        {_rotated(s, "k2", "k3", interleaved)}
        ks = Shape(k3)
        b0 = Slice(ks, [0], [2], [0])
        kt0 = Slice(ks, [2], [3], [0])
        rep = Constant<value_ints=[{s.r}]>()
        kd = Constant<value_ints=[{dim}]>()
        vd = Constant<value_ints=[{s.e}]>()
        kq = Constant<value_ints=[{q}]>()
        kn = Slice(ks, [0], [1], [0])
        kx = Concat<axis=0>(b0, rep, kt0, kd)
        vx = Concat<axis=0>(b0, rep, kt0, vd)
        kr = Concat<axis=0>(kn, kq, kt0, kd)
        vr = Concat<axis=0>(kn, kq, kt0, vd)
        ku = Unsqueeze(k3, [2])
        ke = Expand(ku, kx)
        k = Reshape(ke, kr)
        vu = Unsqueeze(v2, [2])
        ve = Expand(vu, vx)
        v = Reshape(ve, vr)
        kt = Transpose<perm=[0,1,3,2]>(k)
        s0 = MatMul(q, kt)
        s1 = Mul(s0, 0.5)
        p = Softmax(s1)
        c = MatMul(p, v)
        ct = Transpose<perm=[0,2,1,3]>(c)
        o = Reshape(ct, [0, 0, {q * s.e}])
        y = MatMul(o, wo)"""


ROPE: dict[str, Group | str] = {
    "h": "head",
    "r": Group("head", balanced=("h",)),
    "p": "head_dim",
    "e": "head_dim",
}


@fragment(
    "h=2 r=3 p=3 e=4", ROPE, "wq: 8 (h r 2 p); wk: 8 (h 2 p); wv: 8 (h e); wo: (h r e) 5; inv_freq: p", ids_below=9
)
def grouped_query_rope_half(s: Any) -> str:
    return _rope_attention(s, interleaved=False)


@fragment(
    "h=2 r=2 p=3 e=4", ROPE, "wq: 8 (h r p 2); wk: 8 (h p 2); wv: 8 (h e); wo: (h r e) 5; inv_freq: p", ids_below=9
)
def grouped_query_rope_interleaved(s: Any) -> str:
    return _rope_attention(s, interleaved=True)


@fragment(
    "h=2 p=3 e=4",
    {"h": "head", "p": "head_dim", "e": "head_dim"},
    "wq: 8 (h 2 p); wk: 8 (h 2 p); wv: 8 (h e); wo: (h e) 5; cos: 9 p; sin: 9 p",
    ids_below=9,
    opset=23,
)
def rotary_operator(s: Any) -> str:
    """RotaryEmbedding and Attention of opset 23, with a table of angles indexed by position."""
    return f"""(float[N,S,8] x, int64[N,S] position) => (float[N,S,5] y)
        q0 = MatMul(x, wq)
        k0 = MatMul(x, wk)
        v = MatMul(x, wv)
        q = RotaryEmbedding<num_heads={s.h}>(q0, cos, sin, position)
        k = RotaryEmbedding<num_heads={s.h}>(k0, cos, sin, position)
        o = Attention<q_num_heads={s.h}, kv_num_heads={s.h}, scale=0.4>(q, k, v)
        y = MatMul(o, wo)"""


EXPERTS: dict[str, Group | str] = {"x": "expert", "f": "neuron"}


@fragment("x=5 f=6", EXPERTS, "wr: 8 x; br: x = router; wg: x 8 f; wu: x 8 f; wd: x f 5")
def experts_stacked(s: Any) -> str:
    """Mixtral as exported with batched products: top 2, and a gather from three-dimensional weights."""
    return """(float[T,8] x) => (float[T,5] y)
        l0 = MatMul(x, wr)
        l = Add(l0, br)
        p = Softmax<axis=-1>(l)
        v, i = TopK<axis=-1>(p, [2])
        t = ReduceSum(v, [-1])
        w = Div(v, t)
        g = Gather<axis=0>(wg, i)
        u = Gather<axis=0>(wu, i)
        d = Gather<axis=0>(wd, i)
        x4 = Unsqueeze(x, [1, 2])
        a = MatMul(x4, g)
        b = Sigmoid(a)
        c = Mul(a, b)
        e = MatMul(x4, u)
        f = Mul(c, e)
        o0 = MatMul(f, d)
        o = Squeeze(o0, [2])
        wu1 = Unsqueeze(w, [-1])
        m = Mul(o, wu1)
        y = ReduceSum<keepdims=0>(m, [1])"""


@fragment("x=4 f=5", EXPERTS, "wr: 8 x; br: x = router; wgu: x 8 (2 f); wd: x f 5")
def experts_dense(s: Any) -> str:
    """Every expert computes; the weights of those not chosen are scattered zeros."""
    return f"""(float[T,8] x) => (float[T,5] y)
        l0 = MatMul(x, wr)
        l = Add(l0, br)
        v, i = TopK<axis=-1>(l, [2])
        p = Softmax<axis=-1>(v)
        n = Shape<start=0, end=1>(x)
        xs = Constant<value_ints=[{s.x}]>()
        ls = Concat<axis=0>(n, xs)
        z = ConstantOfShape(ls)
        r = ScatterElements<axis=1>(z, i, p)
        x3 = Unsqueeze(x, [0])
        a = MatMul(x3, wgu)
        q, u = Split<axis=-1, num_outputs=2>(a)
        g = Gelu(q)
        f = Mul(g, u)
        o = MatMul(f, wd)
        rt = Transpose<perm=[1,0]>(r)
        ru = Unsqueeze(rt, [2])
        m = Mul(o, ru)
        y = ReduceSum<keepdims=0>(m, [0])"""


@fragment(
    "f=4 g=5",
    {"f": "neuron", "g": "neuron"},
    "wr: 8 2; a1: 8 f; a2: f 5; b1: 8 g; b2: g 5",
    fixed={"wr:1": "gather|index|position|slice|concat|mixed|softmax"},
)
def experts_separate(s: Any) -> str:
    """Two experts with weights of their own, each multiplied by its column of the router."""
    return """(float[T,8] x) => (float[T,5] y)
        l = MatMul(x, wr)
        p = Softmax<axis=-1>(l)
        i0 = Constant<value_ints=[0]>()
        i1 = Constant<value_ints=[1]>()
        p0 = Gather<axis=1>(p, i0)
        p1 = Gather<axis=1>(p, i1)
        c0 = MatMul(x, a1)
        c1 = Relu(c0)
        c2 = MatMul(c1, a2)
        c = Mul(c2, p0)
        d0 = MatMul(x, b1)
        d1 = Relu(d0)
        d2 = MatMul(d1, b2)
        d = Mul(d2, p1)
        y = Add(c, d)"""


@fragment(
    "f=7 r=3 q=2",
    {"f": "neuron", "r": "rank", "q": "rank"},
    "base: 8 f; a: 8 r; b: r f; down: f 5; da: f q; db: q 5",
)
def lora_branches(s: Any) -> str:
    return f"""{TOKENS}
        u = MatMul(x, base)
        v0 = MatMul(x, a)
        v1 = MatMul(v0, b)
        v = Mul(v1, 2.0)
        w = Add(u, v)
        r = Relu(w)
        p = MatMul(r, down)
        q0 = MatMul(r, da)
        q1 = MatMul(q0, db)
        q = Mul(q1, 0.5)
        y = Add(p, q)"""


@fragment(
    "e=6 n=4 r=3",
    {"e": "channel", "n": "neuron", "r": "rank"},
    "win: 8 (2 e); cw: e 1 2; cb: e; wx: e (r + n + n); wdt: r e; bdt: e; a: e n; dd: e; wout: e 5",
)
def mamba(s: Any) -> str:
    """A selective state space over three steps, unrolled: projection, causal depthwise convolution, scan, gate."""
    steps = []
    for t in range(3):
        decay = f"""
        i{t} = Constant<value_int={t}>()
        dt{t} = Gather<axis=1>(dt, i{t})
        x{t} = Gather<axis=1>(xc, i{t})
        b{t} = Gather<axis=1>(bb, i{t})
        c{t} = Gather<axis=1>(cc, i{t})
        du{t} = Unsqueeze(dt{t}, [2])
        da{t} = Mul(du{t}, a)
        de{t} = Exp(da{t})
        bu{t} = Unsqueeze(b{t}, [1])
        db{t} = Mul(du{t}, bu{t})
        xu{t} = Unsqueeze(x{t}, [2])
        dx{t} = Mul(db{t}, xu{t})
        cu{t} = Unsqueeze(c{t}, [2])"""
        step = (
            f"\n        h{t} = Identity(dx{t})"
            if t == 0
            else f"\n        g{t} = Mul(de{t}, h{t - 1})\n        h{t} = Add(g{t}, dx{t})"
        )
        steps.append(f"{decay}{step}\n        o{t} = MatMul(h{t}, cu{t})\n        s{t} = Transpose<perm=[0,2,1]>(o{t})")
    return f"""(float[N,3,8] x) => (float[N,3,5] y)
        in = MatMul(x, win)
        xs, z = Split<axis=2, num_outputs=2>(in)
        xt = Transpose<perm=[0,2,1]>(xs)
        xk = Conv<group={s.e}, pads=[1,0]>(xt, cw, cb)
        xk2 = Transpose<perm=[0,2,1]>(xk)
        xg = Sigmoid(xk2)
        xc = Mul(xk2, xg)
        p = MatMul(xc, wx)
        d0, bb, cc = Split<axis=2>(p, [{s.r}, {s.n}, {s.n}])
        d1 = MatMul(d0, wdt)
        d2 = Add(d1, bdt)
        dt = Softplus(d2)
        {"".join(steps)}
        scan = Concat<axis=1>(s0, s1, s2)
        skip = Mul(xc, dd)
        u = Add(scan, skip)
        zg = Sigmoid(z)
        zz = Mul(z, zg)
        v = Mul(u, zz)
        y = MatMul(v, wout)"""
