"""Skips, branches and joins: residual and dense connections, shortcuts, pyramids, gated paths, shared weights."""

from __future__ import annotations

from typing import Any

from .core import Group, fragment

IMAGE = "(float[N,3,8,8] x)"
SAME = "pads=[1,1,1,1]"


@fragment(
    "c=6 m=4 k=5",
    {"c": "channel", "m": "channel", "k": "channel"},
    "w0: c 3 3 3; w1: m c 3 3; w2: c m 3 3; b2: c; w3: k c 3 3; w4: c k 3 3; w5: 5 c",
)
def residual(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5] y)
        a = Conv<{SAME}>(x, w0)
        b = Conv<{SAME}>(a, w1)
        c = Relu(b)
        d = Conv<{SAME}>(c, w2, b2)
        e = Add(a, d)
        f = Relu(e)
        g = Conv<{SAME}>(f, w3)
        h = Conv<{SAME}>(g, w4)
        i = Add(h, f)
        p = GlobalAveragePool(i)
        q = Flatten(p)
        y = Gemm<transB=1>(q, w5)"""


@fragment(
    "a=4 m=5 c=6",
    {"a": "channel", "m": "channel", "c": "channel"},
    "w0: a 3 3 3; w1: m a 3 3; w2: c m 3 3; ws: c a 1 1; bs: c; w3: 5 c 1 1",
)
def projection_shortcut(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,4,4] y)
        a = Conv<{SAME}>(x, w0)
        b = Conv<{SAME}, strides=[2,2]>(a, w1)
        c = Conv<{SAME}>(b, w2)
        d = Conv<strides=[2,2]>(a, ws, bs)
        e = Add(c, d)
        y = Conv(e, w3)"""


@fragment(
    "a=4 b=2 c=2",
    {"a": "channel", "b": "channel", "c": "channel"},
    # The shortcut pads b zero channels before and c after those of the stem.
    "w0: a 3 3 3; w1: (b + a + c) a 3 3; w2: 5 (b + a + c) 1 1",
)
def option_a_shortcut(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,4,4] y)
        a = Conv<{SAME}>(x, w0)
        b = Conv<{SAME}, strides=[2,2]>(a, w1)
        c = Slice(a, [0, 0], [99, 99], [2, 3], [2, 2])
        d = Pad(c, [0, {s.b}, 0, 0, 0, {s.c}, 0, 0])
        e = Add(b, d)
        y = Conv(e, w2)"""


@fragment(
    "a=3 b=4 c=5",
    {"a": "channel", "b": "channel", "c": "channel"},
    "w1: a 3 3 3; s1: a = positive; o1: a; m1: a; v1: a = positive; w2: b a 3 3; "
    "s2: (a + b) = positive; o2: (a + b); m2: (a + b); v2: (a + b) = positive; w3: c (a + b) 1 1; w4: 5 (a + b + c) 1 1",  # noqa: E501
)
def dense_connections(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,8,8] y)
        a = Conv<{SAME}>(x, w1)
        n = BatchNormalization(a, s1, o1, m1, v1)
        b = Conv<{SAME}>(n, w2)
        c = Concat<axis=1>(a, b)
        m = BatchNormalization(c, s2, o2, m2, v2)
        d = Conv(m, w3)
        e = Concat<axis=1>(c, d)
        y = Conv(e, w4)"""


@fragment(
    "c=6 d=4",
    {"c": "channel", "d": "channel"},
    "w0: c 3 3 3; w3: c c 3 3; b3: c; w1: c c 1 1; s: c = positive; o: c; m: c; v: c = positive; w2: d c 1 1; w4: 5 d 1 1",  # noqa: E501
)
def repvgg(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,8,8] y)
        a = Conv<{SAME}>(x, w0)
        p = Conv<{SAME}>(a, w3, b3)
        q = Conv(a, w1)
        r = BatchNormalization(a, s, o, m, v)
        t = Sum(p, q, r)
        u = Relu(t)
        d = Conv(u, w2)
        y = Conv(d, w4)"""


@fragment(
    "c=4 d=3",
    {"c": "channel", "d": "channel"},
    "w0: c 3 3 3; w1: d c 3 3; w2: 5 (d + d)",
)
def siamese(s: Any) -> str:
    return """(float[N,3,8,8] x, float[N,3,8,8] z) => (float[N,5] y)
        a = Conv(x, w0)
        b = Conv(z, w0)
        c = Conv(a, w1)
        d = Conv(b, w1)
        p = GlobalAveragePool(c)
        q = GlobalMaxPool(d)
        j = Concat<axis=1>(p, q)
        f = Flatten(j)
        y = Gemm<transB=1>(f, w2)"""


@fragment("f=6", {"f": "width"}, "w0: 8 f; w: f f; b: f; w2: f 5")
def applied_twice(s: Any) -> str:
    """One square weight used twice in a row ties its input to its output."""
    return """(float[N,8] x) => (float[N,5] y)
        a = MatMul(x, w0)
        h = MatMul(a, w)
        i = Add(h, b)
        c = Add(i, a)
        r = Relu(c)
        d = MatMul(r, w)
        e = Add(d, c)
        y = MatMul(e, w2)"""


@fragment(
    "c=4 f=7",
    {"c": "channel", "f": "neuron"},
    "w0: c 3 3 3; w1: c 1 7 7; b1: c; f1: c f; g1: f c; s: c 1 1; w2: 5 c 1 1",
)
def layer_scale(s: Any) -> str:
    """ConvNeXt without its norm: depthwise, two linear layers in NHWC, a learnt scale, and the residual."""
    return f"""{IMAGE} => (float[N,5,8,8] y)
        a = Conv<{SAME}>(x, w0)
        b = Conv<group={s.c}, pads=[3,3,3,3]>(a, w1, b1)
        c = Transpose<perm=[0,2,3,1]>(b)
        d = MatMul(c, f1)
        e = Gelu(d)
        f = MatMul(e, g1)
        g = Transpose<perm=[0,3,1,2]>(f)
        h = Mul(g, s)
        i = Add(a, h)
        y = Conv(i, w2)"""


@fragment(
    "a=4 m=3 k=5",
    {"a": "channel", "m": "channel", "k": "channel"},
    # C2f: the stem is split in two halves; the second is transformed and added to, and all parts are joined.
    "w0: (k + a) 3 1 1; w1: m a 3 3; w2: a m 3 3; w3: 5 (k + a + a) 1 1",
)
def c2f_split(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,8,8] y)
        a = Conv(x, w0)
        p, q = Split<axis=1>(a, [{s.k}, {s.a}])
        b = Conv<{SAME}>(q, w1)
        r = Relu(b)
        c = Conv<{SAME}>(r, w2)
        d = Add(q, c)
        j = Concat<axis=1>(p, q, d)
        y = Conv(j, w3)"""


@fragment("f=5", {"f": "neuron"}, "w0: 8 (2 f); b0: (2 f); w1: f 5")
def glu_chunk(s: Any) -> str:
    return """(float[N,S,8] x) => (float[N,S,5] y)
        a = MatMul(x, w0)
        b = Add(a, b0)
        p, q = Split<axis=-1, num_outputs=2>(b)
        g = Sigmoid(q)
        m = Mul(p, g)
        y = MatMul(m, w1)"""


@fragment("f=5", {"f": "neuron"}, "w0: 8 (2 f); w1: f 5")
def glu_slices(s: Any) -> str:
    return f"""(float[N,S,8] x) => (float[N,S,5] y)
        a = MatMul(x, w0)
        p = Slice(a, [0], [{s.f}], [-1], [1])
        q = Slice(a, [{s.f}], [9223372036854775807], [2], [1])
        g = Gelu<approximate="tanh">(p)
        m = Mul(g, q)
        y = MatMul(m, w1)"""


@fragment(
    "a=4 b=5 c=6",
    {"a": "channel", "b": "channel", "c": "channel"},
    "w1: a 3 3 3; w2: b a 3 3; l1: c a 1 1; l2: c b 1 1; b2: c; o: 5 c 3 3",
)
def fpn(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,8,8] y, float[N,5,4,4] z)
        p = Conv<{SAME}>(x, w1)
        q = Conv<{SAME}, strides=[2,2]>(p, w2)
        a = Conv(p, l1)
        b = Conv(q, l2, b2)
        k = Constant<value = float[4] {{1., 1., 2., 2.}}>()
        u = Resize<mode="nearest">(b, , k)
        t = Add(a, u)
        y = Conv<{SAME}>(t, o)
        z = Conv<{SAME}>(b, o)"""


@fragment("c=6", {"c": Group("channel", optional=True)}, "w1: c 3 1 1; b1: c; w2: 5 ~c 1 1")
def flip_by_gather(s: Any) -> str:
    """Reversed channels: index i of one side is index -1-i of the other."""
    return f"""{IMAGE} => (float[N,5,8,8] y)
        a = Conv(x, w1, b1)
        b = Gather<axis=1>(a, {list(range(s.c))[::-1]})
        y = Conv(b, w2)"""


@fragment("c=6", {"c": Group("channel", optional=True)}, "w1: c 3 1 1; w2: 5 ~c 1 1")
def flip_by_slice(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,8,8] y)
        a = Conv(x, w1)
        b = Slice(a, [-1], [-9223372036854775808], [1], [-1])
        y = Conv(b, w2)"""


@fragment(
    "a=3 b=2 c=5",
    {"a": "channel", "b": "channel", "c": "channel"},
    "w1: (a + b) 3 1 1; w2: c 3 1 1; w3: 5 (c + b + a) 1 1",
)
def concat_of_slices(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,8,8] y)
        p = Conv(x, w1)
        q = Conv(x, w2)
        h = Slice(p, [0], [{s.a}], [1])
        t = Slice(p, [{s.a}], [100], [1])
        j = Concat<axis=1>(q, t, h)
        y = Conv(j, w3)"""


@fragment(
    "c=5 d=4",
    {"c": "channel", "d": "channel"},
    "w1: c 3 3 3; b1: c; w2: d c 3 3; w3: 5 d 1 1; k: 1 1 1 1; v: d 1 1",
)
def broadcasts(s: Any) -> str:
    """Scalars, a learnt channel vector, and an all-ones axis: only aligned axes tie."""
    return f"""{IMAGE} => (float[N,5,4,4] y)
        a = Conv(x, w1, b1)
        b = Mul(a, k)
        c = Conv(b, w2)
        m = ReduceSum(c, [1])
        e = Mul(c, m)
        f = Add(v, e)
        g = Max(f, 0.0)
        y = Conv(g, w3)"""


@fragment(
    "c=5", {"c": Group("channel", exact="mean", optional=True)}, "w1: c 3 3 3; w2: 5 c 1 1", fixed={"w1:0": "mean"}
)
def channel_mean(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,6,6] y)
        a = Conv(x, w1)
        m = ReduceMean(a, [1])
        b = Sub(a, m)
        y = Conv(b, w2)"""


@fragment("c=4", {"c": "channel"}, "w0: c 3 3 3; w1: c c 3 3; w2: c c 3 3; w3: 5 c 1 1")
def two_parallel_branches(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,8,8] y)
        a = Conv<{SAME}>(x, w0)
        b = Conv<{SAME}>(a, w1)
        c = Conv<{SAME}>(b, w2)
        d = Mul(a, b)
        e = Add(d, c)
        y = Conv(e, w3)"""


@fragment("c=4", {}, "w0: 8 c; w1: c 5", fixed={"w0:1": "If|subgraph|body"})
def if_reads_value(s: Any) -> str:
    return """(float[N,8] x, bool f) => (float[N,5] y)
        a = MatMul(x, w0)
        y = If(f) <then_branch = t () => (float[N,5] p) { p = MatMul(a, w1) }, else_branch = e () => (float[N,5] q) { r = Relu(a) q = MatMul(r, w1) }>"""  # noqa: E501
