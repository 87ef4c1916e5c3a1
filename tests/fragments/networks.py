"""Building blocks of known networks, where several couplings meet."""

from __future__ import annotations

from typing import Any

from .core import Group, fragment

IMAGE = "(float[N,3,8,8] x)"
SAME = "pads=[1,1,1,1]"


@fragment("c=4 d=5", {"c": "channel", "d": "channel"}, "w1: c 3 1 1; w2: c 1 3 3; w3: d (c + c) 1 1; w4: 5 d 1 1")
def ghost_module(s: Any) -> str:
    """Half of the channels are a cheap depthwise view of the other half."""
    return f"""{IMAGE} => (float[N,5,8,8] y)
        a = Conv(x, w1)
        r = Relu(a)
        b = Conv<group={s.c}, {SAME}>(r, w2)
        j = Concat<axis=1>(r, b)
        d = Conv(j, w3)
        y = Conv(d, w4)"""


@fragment(
    "c=3 d=3 e=3 k=4",
    dict.fromkeys("cdek", "channel"),
    "w0: (c + d + c) 3 1 1; w1: c d 3 3; w2: e c 3 3; w3: k (c + c + e) 1 1; w4: 5 k 1 1",
)
def res2net(s: Any) -> str:
    """Each part is convolved together with the result of the one before; equal parts that need not stay equal."""
    split = "Split<axis=1, num_outputs=3>(a)" if s.c == s.d else f"Split<axis=1>(a, [{s.c}, {s.d}, {s.c}])"
    return f"""{IMAGE} => (float[N,5,8,8] y)
        a = Conv(x, w0)
        p, q, r = {split}
        b = Conv<{SAME}>(q, w1)
        t = Add(b, r)
        u = Conv<{SAME}>(t, w2)
        v = Add(p, b)
        j = Concat<axis=1>(v, b, u)
        d = Conv(j, w3)
        y = Conv(d, w4)"""


@fragment(
    "c=4 e=6 r=2",
    {"c": "channel", "e": "channel", "r": "channel"},
    "w0: c 3 3 3; w1: e c 1 1; s1: e = positive; o1: e; m1: e; v1: e = positive; wd: e 1 3 3; wr: r e 1 1; br: r; "
    "we: e r 1 1; be: e; w2: c e 1 1; w3: 5 c 1 1",
)
def inverted_residual(s: Any) -> str:
    """EfficientNet: expand, depthwise, squeeze and excite, project, add."""
    return f"""{IMAGE} => (float[N,5,8,8] y)
        a = Conv<{SAME}>(x, w0)
        b = Conv(a, w1)
        n = BatchNormalization(b, s1, o1, m1, v1)
        g = Sigmoid(n)
        h = Mul(n, g)
        d = Conv<group={s.e}, {SAME}>(h, wd)
        p = GlobalAveragePool(d)
        q = Conv(p, wr, br)
        t = Relu(q)
        u = Conv(t, we, be)
        v = Sigmoid(u)
        m = Mul(v, d)
        z = Conv(m, w2)
        k = Add(z, a)
        y = Conv(k, w3)"""


@fragment("c=5", {"c": Group("channel", optional=True)}, "w1: c 3 3 3; wa: 1 2 3 3; w2: 5 c 1 1")
def spatial_attention(s: Any) -> str:
    """CBAM: mean and maximum over the channels make a map; zero is not neutral in a maximum."""
    return f"""{IMAGE} => (float[N,5,6,6] y)
        a0 = Conv(x, w1)
        a = Relu(a0)
        m = ReduceSum(a, [1])
        k = ReduceMax(a, [1])
        j = Concat<axis=1>(m, k)
        g = Conv<{SAME}>(j, wa)
        t = Sigmoid(g)
        b = Mul(a, t)
        y = Conv(b, w2)"""


@fragment("c=6", {}, "w1: c 3 3 3; we: 1 1 3; w2: 5 c 1 1", fixed={"w1:0": "mixes|conv"})
def efficient_channel_attention(s: Any) -> str:
    """ECA: a convolution along the channels."""
    return f"""{IMAGE} => (float[N,5,6,6] y)
        a = Conv(x, w1)
        p = GlobalAveragePool(a)
        q = Squeeze(p, [3])
        t = Transpose<perm=[0,2,1]>(q)
        e = Conv<pads=[1,1]>(t, we)
        u = Transpose<perm=[0,2,1]>(e)
        v = Unsqueeze(u, [3])
        g = Sigmoid(v)
        b = Mul(a, g)
        y = Conv(b, w2)"""


@fragment("c=4", {"c": "channel"}, "v: c 3 3 3; g: c 1 1 1 = positive; b: c; w2: 5 c 1 1")
def weight_norm(s: Any) -> str:
    """A weight that the graph computes from a direction and a length."""
    return f"""{IMAGE} => (float[N,5,6,6] y)
        l = ReduceL2(v, [1, 2, 3])
        e = Add(l, 0.0001)
        d = Div(v, e)
        w = Mul(d, g)
        a = Conv(x, w, b)
        y = Conv(a, w2)"""


@fragment(
    "m=6 t=5 f=4",
    {"m": Group("width", exact="norm"), "t": "neuron", "f": "neuron"},
    "w0: 8 m; g: m = positive; b: m; wt: 7 t; bt: t; wu: t 7; wf: m f; wg: f m; w3: m 5",
    fixed={"wt:0": "input"},
)
def mlp_mixer(s: Any) -> str:
    """Tokens are mixed by a product along the sequence."""
    return """(float[N,7,8] x) => (float[N,7,5] y)
        a = MatMul(x, w0)
        n = LayerNormalization(a, g, b)
        t0 = Transpose<perm=[0,2,1]>(n)
        c0 = MatMul(t0, wt)
        c1 = Add(c0, bt)
        d = Gelu(c1)
        e = MatMul(d, wu)
        f = Transpose<perm=[0,2,1]>(e)
        h = Add(a, f)
        i = MatMul(h, wf)
        j = Relu(i)
        k = MatMul(j, wg)
        l = Add(h, k)
        y = MatMul(l, w3)"""


@fragment("c=4 d=3", {"c": "channel", "d": "channel"}, "w1: c 3 3 3; w2: d c 1 1; k: 5 d")
def cosine_classifier(s: Any) -> str:
    """Features divided by their own length, compared with prototypes: zeros do not change a length."""
    return f"""{IMAGE} => (float[N,5] y)
        a = Conv(x, w1)
        r = Relu(a)
        b = Conv(r, w2)
        p = GlobalAveragePool(b)
        f = Flatten(p)
        l = ReduceL2(f, [1])
        n = Div(f, l)
        t = Transpose<perm=[1,0]>(k)
        y = MatMul(n, t)"""


@fragment(
    "h=2 r=2 d=4 e=3",
    {"h": "head", "r": Group("head", balanced=("h",)), "d": "head_dim", "e": "head_dim"},
    "w: 8 (h r d + h d + h e); b: (h r d + h d + h e); sl: (h r) 1 1; wo: (h r e) 5",
)
def grouped_query_fused_alibi(s: Any) -> str:
    """One projection for queries and fewer keys and values; a slope for each query head on the distances."""
    q, k, v = s.h * s.r * s.d, s.h * s.d, s.h * s.e
    return f"""(float[N,5,8] x, float[1,1,5,5] dist) => (float[N,5,5] y)
        a0 = MatMul(x, w)
        a = Add(a0, b)
        q0, k0, v0 = Split<axis=2>(a, [{q}, {k}, {v}])
        q1 = Reshape(q0, [0, 0, {s.h}, {s.r}, {s.d}])
        q2 = Transpose<perm=[0,2,3,1,4]>(q1)
        k1 = Reshape(k0, [0, 0, {s.h}, {s.d}])
        k2 = Transpose<perm=[0,2,3,1]>(k1)
        k3 = Unsqueeze(k2, [2])
        v1 = Reshape(v0, [0, 0, {s.h}, {s.e}])
        v2 = Transpose<perm=[0,2,1,3]>(v1)
        v3 = Unsqueeze(v2, [2])
        s0 = MatMul(q2, k3)
        s1 = Mul(s0, 0.5)
        z = Mul(sl, dist)
        z1 = Reshape(z, [1, {s.h}, {s.r}, 5, 5])
        s2 = Add(s1, z1)
        p = Softmax(s2)
        c = MatMul(p, v3)
        c1 = Transpose<perm=[0,3,1,2,4]>(c)
        o = Reshape(c1, [0, 0, -1])
        y = MatMul(o, wo)"""


@fragment("h=3 d=4 e=5", {"h": "head", "d": "head_dim", "e": "head_dim"}, "wq: h 8 d; wk: h 8 d; wv: h 8 e; wo: h e 5")
def batched_head_weights(s: Any) -> str:
    """A weight matrix for each head in a batched product; the heads' results are added."""
    return """(float[N,S,8] x) => (float[N,S,5] y)
        u = Unsqueeze(x, [1])
        q = MatMul(u, wq)
        k = MatMul(u, wk)
        v = MatMul(u, wv)
        kt = Transpose<perm=[0,1,3,2]>(k)
        s0 = MatMul(q, kt)
        s1 = Mul(s0, 0.4)
        p = Softmax(s1)
        c = MatMul(p, v)
        o = MatMul(c, wo)
        y = ReduceSum<keepdims=0>(o, [1])"""


@fragment(
    "h=2 d=4",
    {"h": "head", "d": "head_dim"},
    "w: 8 (3 h d); b: (3 h d); t: 9 h; wo: (h d) 8; g: 8 = positive; gb: 8; wh: 8 5",
)
def shifted_windows(s: Any) -> str:
    """Swin: a map is rolled, cut into four windows, attended with a bias from a table, and put together again."""
    index = "4,3,1,0,5,4,2,1,7,6,4,3,8,7,5,4"
    return f"""(float[N,4,4,8] x) => (float[N,4,4,5] y)
        n = LayerNormalization(x, g, gb)
        r1 = Slice(n, [1], [4], [1])
        r2 = Slice(n, [0], [1], [1])
        rh = Concat<axis=1>(r1, r2)
        r3 = Slice(rh, [1], [4], [2])
        r4 = Slice(rh, [0], [1], [2])
        rw = Concat<axis=2>(r3, r4)
        p0 = Reshape(rw, [-1, 2, 2, 2, 2, 8])
        p1 = Transpose<perm=[0,1,3,2,4,5]>(p0)
        p2 = Reshape(p1, [-1, 4, 8])
        a0 = MatMul(p2, w)
        a = Add(a0, b)
        q0 = Reshape(a, [-1, 4, 3, {s.h}, {s.d}])
        q1 = Transpose<perm=[2,0,3,1,4]>(q0)
        i0 = Constant<value_int=0>()
        i1 = Constant<value_int=1>()
        i2 = Constant<value_int=2>()
        q = Gather<axis=0>(q1, i0)
        k = Gather<axis=0>(q1, i1)
        v = Gather<axis=0>(q1, i2)
        kt = Transpose<perm=[0,1,3,2]>(k)
        s0 = MatMul(q, kt)
        s1 = Mul(s0, 0.5)
        tb = Gather<axis=0>(t, [{index}])
        t1 = Reshape(tb, [4, 4, -1])
        t2 = Transpose<perm=[2,0,1]>(t1)
        t3 = Unsqueeze(t2, [0])
        s2 = Add(s1, t3)
        p = Softmax(s2)
        c = MatMul(p, v)
        c1 = Transpose<perm=[0,2,1,3]>(c)
        o = Reshape(c1, [-1, 4, {s.h * s.d}])
        e = MatMul(o, wo)
        f0 = Reshape(e, [-1, 2, 2, 2, 2, 8])
        f1 = Transpose<perm=[0,1,3,2,4,5]>(f0)
        f2 = Reshape(f1, [-1, 4, 4, 8])
        z = Add(x, f2)
        y = MatMul(z, wh)"""


@fragment(
    "c=4 k=3",
    {"c": "channel", "k": "channel"},
    "w1: c 3 3 3; w2: c 3 5 5; wf: k c 1 1; wa: c k 1 1; wb: c k 1 1; w3: 5 c 1 1",
)
def selective_kernel(s: Any) -> str:
    """Two branches weighted by a softmax between them, channel by channel."""
    return f"""{IMAGE} => (float[N,5,8,8] y)
        a = Conv<{SAME}>(x, w1)
        b = Conv<pads=[2,2,2,2]>(x, w2)
        u = Add(a, b)
        p = GlobalAveragePool(u)
        f = Conv(p, wf)
        r = Relu(f)
        g = Conv(r, wa)
        h = Conv(r, wb)
        g1 = Unsqueeze(g, [1])
        h1 = Unsqueeze(h, [1])
        j = Concat<axis=1>(g1, h1)
        t = Softmax<axis=1>(j)
        ta, tb = Split<axis=1, num_outputs=2>(t)
        sa = Squeeze(ta, [1])
        sb = Squeeze(tb, [1])
        va = Mul(a, sa)
        vb = Mul(b, sb)
        v = Add(va, vb)
        y = Conv(v, w3)"""


@fragment("c=3 d=4", {"c": "channel", "d": "channel"}, "w1: c 3 1 1; w2: d (c 4) 1 1; w3: 5 d 1 1")
def pixel_unshuffle_by_reshape(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,4,4] y)
        a = Conv(x, w1)
        b = Reshape(a, [0, {s.c}, 4, 2, 4, 2])
        c = Transpose<perm=[0,1,3,5,2,4]>(b)
        d = Reshape(c, [0, {4 * s.c}, 4, 4])
        e = Conv(d, w2)
        y = Conv(e, w3)"""


@fragment(
    "k=6 a=3 b=4 c=2 d=5",
    dict.fromkeys("kabcd", "channel"),
    "w0: k 3 3 3; wa: a k 1 1; wb: b k 3 3; wp: c k 1 1; wd: d (a + b + c) 1 1; w1: 5 d 1 1",
)
def spatial_pyramid(s: Any) -> str:
    """ASPP: branches of several dilations, and a pooled one that is expanded again."""
    return f"""{IMAGE} => (float[N,5,8,8] y)
        i = Conv<{SAME}>(x, w0)
        a = Conv(i, wa)
        b = Conv<dilations=[2,2], pads=[2,2,2,2]>(i, wb)
        p = GlobalAveragePool(i)
        q = Conv(p, wp)
        z = Constant<value_ints=[1,1,8,8]>()
        c = Expand(q, z)
        j = Concat<axis=1>(a, b, c)
        d = Conv(j, wd)
        r = Relu(d)
        y = Conv(r, w1)"""


@fragment("f=5 g=4", {"f": "neuron", "g": "neuron"}, "w0: 8 f; b0: f; wt: 8 f; bt: f; w1: f g; w2: g 5")
def highway(s: Any) -> str:
    """A gate between two paths, one of them 1 minus the other's."""
    return """(float[N,S,8] x) => (float[N,S,5] y)
        a0 = MatMul(x, w0)
        a = Add(a0, b0)
        t0 = MatMul(x, wt)
        t1 = Add(t0, bt)
        t = Sigmoid(t1)
        u = Sub(1.0, t)
        h = Tanh(a)
        p = Mul(h, t)
        q = Mul(a, u)
        r = Add(p, q)
        d = MatMul(r, w1)
        e = Relu(d)
        y = MatMul(e, w2)"""


@fragment("m=4 f=3", {"m": "width", "f": "neuron"}, "emb: 9 m; w1: m f; b1: f; w2: f 5", ids_below=9)
def masked_mean_pooling(s: Any) -> str:
    return """(int64[N,S] ids, float[N,S] mask) => (float[N,5] y)
        e = Gather(emb, ids)
        u = Unsqueeze(mask, [2])
        m = Mul(e, u)
        t = ReduceSum<keepdims=0>(m, [1])
        c = ReduceSum<keepdims=0>(u, [1])
        p = Div(t, c)
        a = MatMul(p, w1)
        b = Add(a, b1)
        r = Relu(b)
        y = MatMul(r, w2)"""
