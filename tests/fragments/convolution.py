"""Convolutions: plain, grouped, depthwise, shuffled, transposed, and what lies between them and linear layers."""

from __future__ import annotations

from typing import Any

from .core import Group, fragment

IMAGE = "(float[N,3,8,8] x)"


@fragment(
    "c=6 d=4",
    {"c": "channel", "d": "channel"},
    "w1: c 3 3 3; b1: c; s: c = positive; o: c; m: c; v: c = positive; w2: d c 3 3; w3: 5 d; b3: 5",
    fixed={"w1:1": "input", "w1:2": "kernel|mixes", "w3:0": "output", "b3:0": "output"},
)
def conv_bn(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5] y)
        a = Conv<pads=[1,1,1,1]>(x, w1, b1)
        n = BatchNormalization(a, s, o, m, v)
        r = Relu(n)
        c = Conv<strides=[2,2]>(r, w2)
        p = GlobalAveragePool(c)
        f = Flatten(p)
        y = Gemm<transB=1>(f, w3, b3)"""


@fragment("f=7 g=6", {"f": "neuron", "g": "neuron"}, "w1: 8 f; b1: f; w2: f g; w3: 5 g; b3: 5")
def mlp(s: Any) -> str:
    return """(float[N,S,8] x) => (float[N,S,5] y)
        a = MatMul(x, w1)
        b = Add(a, b1)
        c = Relu(b)
        d = MatMul(c, w2)
        e = Tanh(d)
        t = Transpose<perm=[1,0]>(w3)
        h = MatMul(e, t)
        y = Add(h, b3)"""


@fragment(
    "g=3 i=4 o=2",
    {"g": "channel", "i": "channel", "o": Group("channel", balanced=("g",))},
    "w1: (g i) 3 1 1; b1: (g i); w2: (g o) i 3 3; b2: (g o); w3: 5 (g o) 1 1",
)
def grouped_conv(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,6,6] y)
        a = Conv(x, w1, b1)
        r = Relu(a)
        b = Conv<group={s.g}>(r, w2, b2)
        y = Conv(b, w3)"""


@fragment("c=6", {"c": "channel"}, "w1: c 3 1 1; w2: c 1 3 3; b2: c; w3: 5 c 1 1")
def depthwise(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,6,6] y)
        a = Conv(x, w1)
        b = Conv<group={s.c}>(a, w2, b2)
        r = Clip(b, 0.0, 6.0)
        y = Conv(r, w3)"""


@fragment(
    "c=4 m=3",
    {"c": "channel", "m": Group("channel", balanced=("c",))},
    "w1: c 3 1 1; w2: (c m) 1 3 3; b2: (c m); w3: 5 (c m) 1 1",
)
def depthwise_multiplier(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,6,6] y)
        a = Conv(x, w1)
        b = Conv<group={s.c}>(a, w2, b2)
        y = Conv(b, w3)"""


@fragment(
    "g=2 c=3 h=4 i=2",
    {"g": "channel", "c": "channel", "h": "channel", "i": Group("channel", balanced=("h",))},
    # Before the shuffle an index is (g, h, c); after it (h, c, g), so that the second convolution has h groups.
    "w1: (g h c) 3 1 1; w2: (h i) (c g) 1 1; w3: 5 (h i) 1 1",
)
def channel_shuffle(s: Any) -> str:
    n = s.h * s.c
    return f"""{IMAGE} => (float[N,5,8,8] y)
        a = Conv(x, w1)
        b = Reshape(a, [0, {s.g}, {n}, 8, 8])
        c = Transpose<perm=[0,2,1,3,4]>(b)
        d = Reshape(c, [0, {s.g * n}, 8, 8])
        e = Conv<group={s.h}>(d, w2)
        y = Conv(e, w3)"""


@fragment(
    "g=2 c=4 i=3",
    {"g": "channel", "c": "channel", "i": "channel"},
    "w1: (g i) 6 1 1; w2: (g c) i 1 1; w3: (g c) 1 3 3; w4: 5 (c g) 1 1",
)
def shuffle_unit(s: Any) -> str:
    return f"""(float[N,6,8,8] x) => (float[N,5,6,6] y)
        a = Conv(x, w1)
        r = Relu(a)
        b = Conv<group={s.g}>(r, w2)
        d = Conv<group={s.g * s.c}>(b, w3)
        e = Reshape(d, [0, {s.g}, {s.c}, 6, 6])
        f = Transpose<perm=[0,2,1,3,4]>(e)
        h = Reshape(f, [0, -1, 6, 6])
        y = Conv(h, w4)"""


@fragment(
    "c=3 k=5",
    {"c": "channel", "k": "channel"},
    "w1: (c 4) 3 1 1; b1: (c 4); w2: k c 3 3; w3: 5 k 1 1",
)
def pixel_shuffle(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,14,14] y)
        a = Conv(x, w1, b1)
        u = DepthToSpace<blocksize=2, mode="CRD">(a)
        b = Conv(u, w2)
        y = Conv(b, w3)"""


@fragment("c=3", {"c": "channel"}, "w1: (4 c) 3 1 1; b1: (4 c); w2: 5 c 3 3")
def depth_to_space_dcr(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,14,14] y)
        a = Conv(x, w1, b1)
        u = DepthToSpace<blocksize=2>(a)
        y = Conv(u, w2)"""


@fragment("c=3", {"c": "channel"}, "w1: (c 4) 3 1 1; b1: (c 4); w2: 5 c 3 3")
def pixel_shuffle_by_reshape(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,14,14] y)
        a = Conv(x, w1, b1)
        b = Reshape(a, [-1, {s.c}, 2, 2, 8, 8])
        c = Transpose<perm=[0,1,4,2,5,3]>(b)
        d = Reshape(c, [-1, {s.c}, 16, 16])
        y = Conv(d, w2)"""


@fragment("c=4 d=3", {"c": "channel", "d": "channel"}, "w1: c 3 1 1; w2: d (4 c) 1 1; w3: 5 d 1 1")
def space_to_depth(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,4,4] y)
        a = Conv(x, w1)
        b = SpaceToDepth<blocksize=2>(a)
        c = Conv(b, w2)
        y = Conv(c, w3)"""


@fragment("c=4", {"c": "channel"}, "w1: c 3 1 1; w2: 5 (4 c) 1 1")
def focus_slices(s: Any) -> str:
    """YOLO's Focus: space to depth as four strided slices and a Concat."""
    return f"""{IMAGE} => (float[N,5,4,4] y)
        a = Conv(x, w1)
        p = Slice(a, [0, 0], [99, 99], [2, 3], [2, 2])
        q = Slice(a, [1, 0], [99, 99], [2, 3], [2, 2])
        r = Slice(a, [0, 1], [99, 99], [2, 3], [2, 2])
        t = Slice(a, [1, 1], [99, 99], [2, 3], [2, 2])
        b = Concat<axis=1>(p, q, r, t)
        y = Conv(b, w2)"""


@fragment(
    "c=6 r=3", {"c": "channel", "r": "channel"}, "w1: c 3 3 3; w2: r c 1 1; b2: r; w3: c r 1 1; b3: c; w4: 5 c 1 1"
)
def squeeze_excite(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,6,6] y)
        a = Conv(x, w1)
        p = GlobalAveragePool(a)
        q = Conv(p, w2, b2)
        r = Relu(q)
        t = Conv(r, w3, b3)
        g = Sigmoid(t)
        m = Mul(a, g)
        y = Conv(m, w4)"""


@fragment("c=6 r=4", {"c": "channel", "r": "neuron"}, "w1: c 3 3 3; w2: r c; b2: r; w3: c r; b3: c; w4: 5 c 1 1")
def squeeze_excite_linear(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,6,6] y)
        a = Conv(x, w1)
        p = ReduceMean<keepdims=0>(a, [2, 3])
        q = Gemm<transB=1>(p, w2, b2)
        r = Relu(q)
        t = Gemm<transB=1>(r, w3, b3)
        g = HardSigmoid(t)
        u = Unsqueeze(g, [2, 3])
        m = Mul(u, a)
        y = Conv(m, w4)"""


@fragment(
    "c=4 d=5",
    {"c": "channel", "d": "channel"},
    "w1: c 3 3 3; w2: c d 2 2; b2: d; w3: 5 d 1 1",
)
def conv_transpose(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,12,12] y)
        a = Conv(x, w1)
        u = ConvTranspose<strides=[2,2]>(a, w2, b2)
        r = LeakyRelu(u)
        y = Conv(r, w3)"""


@fragment(
    "g=2 i=3 o=4",
    {"g": "channel", "i": Group("channel", balanced=("g",)), "o": "channel"},
    "w1: (g i) 3 3 3; w2: (g i) o 2 2; b2: (g o); w3: 5 (g o) 1 1",
)
def conv_transpose_grouped(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,12,12] y)
        a = Conv(x, w1)
        u = ConvTranspose<strides=[2,2], group={s.g}>(a, w2, b2)
        y = Conv(u, w3)"""


@fragment(
    "a=3 b=4 c=5",
    {"a": "channel", "b": "channel", "c": "channel"},
    "w1: a 3 3 3; w2: b a 2 2; w3: b c 2 2; w4: 5 (a + c) 3 3",
)
def unet_skip(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,8,8] y)
        e = Conv<pads=[1,1,1,1]>(x, w1)
        r = Relu(e)
        d = Conv<strides=[2,2]>(r, w2)
        u = ConvTranspose<strides=[2,2]>(d, w3)
        j = Concat<axis=1>(r, u)
        y = Conv<pads=[1,1,1,1]>(j, w4)"""


@fragment("c=3 k=6", {"c": "channel", "k": "rank"}, "w1: c 3 1 1; b1: c; w2: k (c 64); w3: 5 k")
def flatten_nchw(s: Any) -> str:
    return """(float[N,3,8,8] x) => (float[N,5] y)
        a = Conv(x, w1, b1)
        f = Flatten(a)
        h = Gemm<transB=1>(f, w2)
        y = Gemm<transB=1>(h, w3)"""


@fragment("c=3", {"c": "channel"}, "w1: c 3 1 1; b1: c; w2: (64 c) 5")
def flatten_nhwc(s: Any) -> str:
    return """(float[N,3,8,8] x) => (float[N,5] y)
        a = Conv(x, w1, b1)
        t = Transpose<perm=[0,2,3,1]>(a)
        f = Reshape(t, [0, -1])
        y = MatMul(f, w2)"""


@fragment("c=4 d=3", {"c": "channel", "d": "channel"}, "w1: 8 (c 16); b1: (c 16); w2: c d 2 2; w3: 5 d 1 1")
def linear_to_feature_map(s: Any) -> str:
    return f"""(float[N,8] x) => (float[N,5,8,8] y)
        a = MatMul(x, w1)
        b = Add(a, b1)
        m = Reshape(b, [-1, {s.c}, 4, 4])
        u = ConvTranspose<strides=[2,2]>(m, w2)
        r = Relu(u)
        y = Conv(r, w3)"""


@fragment("c=5 d=4", {"c": "channel", "d": "channel"}, "w1: c 3 3 3; a1: c 1 1; w2: d c 1 1; a2: 1 1 1; w3: 5 d 1 1")
def prelu(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,6,6] y)
        a = Conv(x, w1)
        b = PRelu(a, a1)
        c = Conv(b, w2)
        d = PRelu(c, a2)
        y = Conv(d, w3)"""


@fragment("c=4 d=3", {"c": "channel", "d": "channel"}, "w1: c 3 5; b1: c; w2: d c 3; w3: 5 d")
def conv1d(s: Any) -> str:
    return """(float[N,3,16] x) => (float[N,5] y)
        a = Conv(x, w1, b1)
        r = Elu(a)
        p = MaxPool<kernel_shape=[2], strides=[2]>(r)
        b = Conv(p, w2)
        m = ReduceMax<keepdims=0>(b, [2])
        y = Gemm<transB=1>(m, w3)"""


@fragment("c=4", {"c": "channel"}, "w1: c 3 3 3; w2: 5 c 1 1")
def resize_pad_pool(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,6,6] y)
        a = Conv(x, w1)
        p = Pad(a, [0, 0, 1, 1, 0, 0, 1, 1])
        m = AveragePool<kernel_shape=[3,3]>(p)
        k = Constant<value = float[4] {{1., 1., 2., 2.}}>()
        u = Resize<mode="nearest">(m, , k)
        q = MaxPool<kernel_shape=[2,2], strides=[2,2]>(u)
        y = Conv(q, w2)"""


@fragment("c=5", {"c": "channel"}, "w1: c 3 3 3; s: c 1 1 = positive; o: 1 c 1 1; w2: 5 c 1 1")
def affine_arithmetic(s: Any) -> str:
    """Batch normalisation that was written as arithmetic."""
    return f"""{IMAGE} => (float[N,5,6,6] y)
        a = Conv(x, w1)
        b = Mul(a, s)
        c = Sub(b, o)
        d = Sigmoid(c)
        e = Mul(c, d)
        y = Conv(e, w2)"""


@fragment("c=4", {}, "w1: c 3 3 3; w2: c 3 3 3", fixed={"w1:0": "output", "w2:0": "output"})
def feature_outputs(s: Any) -> str:
    return f"""{IMAGE} => (float[N,{s.c},6,6] y, float[N,{s.c},6,6] z)
        y = Conv(x, w1)
        z = Conv(x, w2)"""


@fragment("c=6", {"c": Group("channel", exact="norm")}, "w1: c 3 3 3; g: c = positive; b: c; w2: 5 c 1 1")
def group_norm_one_group(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,6,6] y)
        a = Conv(x, w1)
        n = GroupNormalization<num_groups=1>(a, g, b)
        y = Conv(n, w2)"""


@fragment(
    "g=2 c=3",
    {"g": "channel", "c": Group("channel", balanced=("g",), exact="norm")},
    "w1: (g c) 3 3 3; s: (g c) = positive; b: (g c); w2: 5 (g c) 1 1",
)
def group_norm(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,6,6] y)
        a = Conv(x, w1)
        n = GroupNormalization<num_groups={s.g}>(a, s, b)
        y = Conv(n, w2)"""


@fragment("c=4", {"c": "channel"}, "w1: c 3 3 3; s: c = positive; b: c; w2: 5 c 1 1")
def instance_norm(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,6,6] y)
        a = Conv(x, w1)
        n = InstanceNormalization(a, s, b)
        y = Conv(n, w2)"""


@fragment(
    "p=2 q=2 c=3 o=2",
    {"p": "channel", "q": "channel", "c": "channel", "o": Group("channel", balanced=("c", "p"))},
    # After the shuffle an index is (c, p, q): the second convolution's groups split the first one's outer digit.
    "w1: (p q c) 3 1 1; wd: (c p q) 1 3 3; s: (c p q) = positive; b: (c p q); m: (c p q); v: (c p q) = positive; "
    "w2: (c p o) q 1 1; w3: 5 (c p o) 1 1",
)
def shuffle_into_finer_groups(s: Any) -> str:
    n = s.p * s.q * s.c
    return f"""{IMAGE} => (float[N,5,6,6] y)
        a = Conv(x, w1)
        b1 = Reshape(a, [0, {s.p * s.q}, {s.c}, 8, 8])
        c = Transpose<perm=[0,2,1,3,4]>(b1)
        d = Reshape(c, [0, {n}, 8, 8])
        e = Conv<group={n}>(d, wd)
        f = BatchNormalization(e, s, b, m, v)
        g = Conv<group={s.c * s.p}>(f, w2)
        y = Conv(g, w3)"""
