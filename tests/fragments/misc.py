"""Quantized and fused operators, operators in pieces, shape arithmetic, subgraphs, and what must stay as it is."""

from __future__ import annotations

from typing import Any

from .core import Group, fragment

IMAGE = "(float[N,3,8,8] x)"
TOKENS = "(float[N,S,8] x) => (float[N,S,5] y)"


@fragment(
    "c=4 d=3",
    {"c": "channel", "d": "channel"},
    "w1[int8]: c 3 3 3; s1: c = scale; z1[int8]: c = zero; b1: c; w2[int8]: d c 1 1; s2: = scale; w3: 5 d 1 1",
)
def qdq_per_channel(s: Any) -> str:
    """Integer weights with a scale per channel and one per tensor, and quantized activations between."""
    return f"""{IMAGE} => (float[N,5,6,6] y)
        f1 = DequantizeLinear<axis=0>(w1, s1, z1)
        a = Conv(x, f1, b1)
        sa = Constant<value_float=0.02>()
        za = Constant<value = int8 {{0}}>()
        q = QuantizeLinear(a, sa, za)
        r = DequantizeLinear(q, sa, za)
        f2 = DequantizeLinear(w2, s2)
        b = Conv(r, f2)
        y = Conv(b, w3)"""


@fragment(
    "f=8",
    {"f": Group("neuron", optional=True)},
    "w1[int8]: 8 f; s1: 2 f = scale; w2: f 5",
)
def qdq_blocked(s: Any) -> str:
    """A scale for each four inputs of each neuron: the neurons are free, the inputs would go four at a time."""
    return f"""{TOKENS}
        g = DequantizeLinear<axis=0, block_size=4>(w1, s1)
        a = MatMul(x, g)
        r = Relu(a)
        y = MatMul(r, w2)"""


@fragment(
    "f=6",
    {"f": "neuron"},
    "w1[uint8]: 8 f = centred; s1: f = scale; z1[uint8]: f = centre; b1: f; w2[uint8]: f 5 = centred; s2: = scale; "
    "z2[uint8]: = centre",
)
def qdq_unsigned(s: Any) -> str:
    """Unsigned weights: zero is what the zero point says, not the integer 0."""
    return f"""{TOKENS}
        f1 = DequantizeLinear<axis=1>(w1, s1, z1)
        a = MatMul(x, f1)
        b = Add(a, b1)
        r = Relu(b)
        f2 = DequantizeLinear(w2, s2, z2)
        y = MatMul(r, f2)"""


@fragment("f=6", {"f": "neuron"}, "w1[uint8]: f 1 16 = nibbles; s1: (f 1) = scale; w2: f 5")
def matmul_nbits(s: Any) -> str:
    """Packed 4-bit weights, 32 inputs a block; a nibble of 8 stands for zero."""
    return f"""(float[N,32] x) => (float[N,5] y)
        a = com.microsoft.MatMulNBits<K=32, N={s.f}, bits=4, block_size=32>(x, w1, s1)
        r = Relu(a)
        y = MatMul(r, w2)"""


@fragment(
    "c=4 d=3", {"c": "channel", "d": "channel"}, "w1: c 3 3 3; b1: c; w2: d c 3 3; b2: d; r2: d 3 3 3; w3: 5 d 1 1"
)
def fused_conv(s: Any) -> str:
    return f"""{IMAGE} => (float[N,5,4,4] y)
        a = com.microsoft.FusedConv<activation="Relu">(x, w1, b1)
        z = Conv<dilations=[2,2]>(x, r2)
        b = com.microsoft.FusedConv<activation="Relu">(a, w2, b2, z)
        y = Conv(b, w3)"""


@fragment("f=6 g=5", {"f": "neuron", "g": "neuron"}, "w1: f 8; b1: f; w2: f g; b2: g; w3: g 5")
def fused_matmul_gelu(s: Any) -> str:
    return f"""{TOKENS}
        a = com.microsoft.FusedMatMul<transB=1, alpha=0.5>(x, w1)
        g = com.microsoft.BiasGelu(a, b1)
        b = MatMul(g, w2)
        h = com.microsoft.FastGelu(b, b2)
        k = com.microsoft.QuickGelu<alpha=1.702>(h)
        y = MatMul(k, w3)"""


@fragment(
    "m=6 f=4",
    {"m": Group("width", exact="rms", gammas=("g1", "g2")), "f": "rank"},
    "w0: 8 m; g1: m = positive; w1: m f; w2: f m; g2: m = positive; w3: m 5",
)
def skip_simplified_layer_norm(s: Any) -> str:
    eps = f"{1e-3 * s.full.m / s.m:.9g}"
    return f"""{TOKENS}
        a = MatMul(x, w0)
        n = SimplifiedLayerNormalization<axis=-1, epsilon={eps}>(a, g1)
        b = MatMul(n, w1)
        c = MatMul(b, w2)
        o, , , t = com.microsoft.SkipSimplifiedLayerNormalization<epsilon={eps}>(a, c, g2)
        u = Add(o, t)
        y = MatMul(u, w3)"""


@fragment(
    "f=6 k=4", {"f": "neuron", "k": "neuron"}, "w1: f 8; b1: f; w2: f k; b2: k; w3: k 5; one: = one; half: = positive"
)
def gelu_in_pieces(s: Any) -> str:
    """Gelu by Erf, and a rectified square, as exporters write them out."""
    return f"""{TOKENS}
        t = Transpose<perm=[1,0]>(w1)
        a0 = MatMul(x, t)
        a = Add(a0, b1)
        d = Div(a, 1.4142135)
        e = Erf(d)
        f = Add(e, one)
        g = Mul(a, f)
        h = Mul(g, half)
        b0 = MatMul(h, w2)
        b = Add(b2, b0)
        r = Relu(b)
        q = Mul(r, r)
        y = MatMul(q, w3)"""


@fragment(
    "h=2 d=4 e=3",
    {"h": "head", "d": "head_dim", "e": "head_dim"},
    "wq: 8 (h d); wk: 8 (h d); wv: 8 (h e); wo: (h e) 5",
)
def softmax_in_pieces(s: Any) -> str:
    return f"""{TOKENS}
        q0 = MatMul(x, wq)
        k0 = MatMul(x, wk)
        v0 = MatMul(x, wv)
        q1 = Reshape(q0, [0, -1, {s.h}, {s.d}])
        k1 = Reshape(k0, [0, -1, {s.h}, {s.d}])
        v1 = Reshape(v0, [0, -1, {s.h}, {s.e}])
        q = Transpose<perm=[0,2,1,3]>(q1)
        k = Transpose<perm=[0,2,3,1]>(k1)
        v = Transpose<perm=[0,2,1,3]>(v1)
        s0 = MatMul(q, k)
        m = ReduceMax(s0, [-1])
        t = Sub(s0, m)
        u = Exp(t)
        w = ReduceSum(u, [-1])
        p = Div(u, w)
        c = MatMul(p, v)
        ct = Transpose<perm=[0,2,1,3]>(c)
        o = Flatten<axis=2>(ct)
        n = Shape<end=2>(x)
        l = Constant<value_ints=[-1]>()
        z = Concat<axis=0>(n, l)
        o3 = Reshape(o, z)
        y = MatMul(o3, wo)"""


@fragment("c=4", {"c": "channel"}, "w1: c 3 3 3; z: = zero; w2: 5 c 1 1")
def bias_by_expand(s: Any) -> str:
    """The zero bias of a raw dynamo export: a scalar cast like the input and expanded to the weight's length."""
    return f"""{IMAGE} => (float[N,5,6,6] y)
        z0 = CastLike(z, x)
        n = Shape<start=0, end=1>(w1)
        b = Expand(z0, n)
        a = Conv(x, w1, b)
        y = Conv(a, w2)"""


@fragment("c=3 k=4", {"c": "channel", "k": "rank"}, "w1: c 3 1 1; w2: (c 64) k; w3: k 5")
def flatten_by_shape_arithmetic(s: Any) -> str:
    """TorchScript's view: the product of the later sizes, computed from the tensor's own shape."""
    return f"""{IMAGE} => (float[N,5] y)
        a = Conv(x, w1)
        n = Shape(a)
        i0 = Constant<value_int=0>()
        b = Gather<axis=0>(n, i0)
        bu = Unsqueeze(b, [0])
        r = Slice(n, [1], [4], [0])
        p = ReduceProd<keepdims=1>(r)
        v = Concat<axis=0>(bu, p)
        f = Reshape(a, v)
        h = MatMul(f, w2)
        y = MatMul(h, w3)"""


@fragment("h=2 d=3", {"h": "neuron", "d": "neuron"}, "w1: 8 (h d); g: h 1 1 = positive; w2: (h d) 5")
def dimension_from_shape(s: Any) -> str:
    """The head dimension is computed as the width over the number of heads."""
    return f"""{TOKENS}
        a = MatMul(x, w1)
        n = Shape(a)
        i2 = Constant<value_int=2>()
        m = Gather<axis=0>(n, i2)
        hs = Constant<value_int={s.h}>()
        d = Div(m, hs)
        du = Unsqueeze(d, [0])
        b = Slice(n, [0], [2], [0])
        hu = Constant<value_ints=[{s.h}]>()
        v = Concat<axis=0>(b, hu, du)
        r = Reshape(a, v)
        t = Transpose<perm=[0,2,1,3]>(r)
        u = Mul(t, g)
        w = Transpose<perm=[0,2,1,3]>(u)
        z = Reshape(w, n)
        y = MatMul(z, w2)"""


@fragment("f=5 g=4", {"f": "neuron"}, "w1: 8 f; w2: f 5; w3: 8 g; b3: g; w4: g 5", fixed={"w3:1": "If|subgraph|body"})
def if_holds_weights(s: Any) -> str:
    """The neurons outside the If are free; those within are fixed until bodies are analysed."""
    return """(float[N,8] x, bool c) => (float[N,5] y)
        a = MatMul(x, w1)
        r = Relu(a)
        u = MatMul(r, w2)
        v = If(c) <then_branch = t () => (float[N,5] p) { p0 = Gemm(x, w3, b3) p = MatMul(p0, w4) }, else_branch = e () => (float[N,5] q) { q = Neg(u) }>
        y = Add(u, v)"""  # noqa: E501


@fragment(
    "f=5", {}, "w0: 8 f; w: f f; w2: f 5", fixed={"w0:1": "Loop|subgraph|body", "w2:0": "Loop|subgraph|body|unknown"}
)
def loop_carries_value(s: Any) -> str:
    return f"""(float[N,8] x, int64 n, bool c) => (float[N,5] y)
        a = MatMul(x, w0)
        b = Loop(n, c, a) <body = l (int64 i, bool k, float[N,{s.f}] h) => (bool k2, float[N,{s.f}] h2) {{ k2 = Identity(k) h1 = MatMul(h, w) h2 = Tanh(h1) }}>
        y = MatMul(b, w2)"""  # noqa: E501


@fragment(
    "f=5 c=6 g=4",
    {"f": "neuron", "c": "rank"},
    "w1: 8 f; w2: f c; w3: c g; w4: g 5",
    fixed={"w3:1": "no rule|unknown|CumSum|order"},
)
def order_dependent(s: Any) -> str:
    """CumSum along the neurons fixes them, and only them."""
    return f"""{TOKENS}
        a = MatMul(x, w1)
        r = Relu(a)
        b = MatMul(r, w2)
        c = MatMul(b, w3)
        i = Constant<value_int=2>()
        d = CumSum(c, i)
        y = MatMul(d, w4)"""


@fragment("f=5", {"f": Group("neuron", optional=True)}, "w1: 8 f; b1: f = router; w2: f 5")
def softmax_over_neurons(s: Any) -> str:
    """A unit is free once nothing else competes with it: at minus infinity."""
    return f"""{TOKENS}
        a0 = MatMul(x, w1)
        a = Add(a0, b1)
        p = Softmax(a)
        y = MatMul(p, w2)"""


@fragment("f=5 g=4", {"f": "neuron", "g": "rank"}, "w1: 8 f; w2: f g; w3: g 5; b: 5 = zero")
def gemm_forms(s: Any) -> str:
    return """(float[8,N] x) => (float[N,5] y)
        a = Gemm<transA=1, alpha=0.5>(x, w1)
        r = ThresholdedRelu<alpha=0.1>(a)
        c = Gemm(r, w2)
        d = Transpose(c)
        y = Gemm<transA=1, beta=2.0>(d, w3, b)"""


@fragment("m=4", {"m": "width"}, "e1: 9 m; e2: 9 m; w: m 5", ids_below=9, fixed={"e1:0": "index|gather|input"})
def embeddings_added(s: Any) -> str:
    return """(int64[N,S] i, int64[N,S] j) => (float[N,S,5] y)
        a = Gather(e1, i)
        b = Gather(e2, j)
        c = Add(a, b)
        d = Tanh(c)
        y = MatMul(d, w)"""


@fragment("f=4", {"f": "neuron"}, "w1: 8 f; w2: f 5")
def where_and_casts(s: Any) -> str:
    return f"""{TOKENS}
        a = MatMul(x, w1)
        m = Greater(a, 0.0)
        n = Mul(a, 0.1)
        b = Where(m, a, n)
        c = Cast<to=11>(b)
        d = Cast<to=1>(c)
        y = MatMul(d, w2)"""


@fragment("a=3 b=4", {"a": "neuron", "b": "neuron"}, "w1: 8 a; w2: 8 b; w3: (a + b) 5; w4: 5 (b + a)")
def concat_two_orders(s: Any) -> str:
    return f"""{TOKENS}
        p = MatMul(x, w1)
        q = MatMul(x, w2)
        c = Concat<axis=-1>(p, q)
        d = Concat<axis=2>(q, p)
        e = MatMul(c, w3)
        t = Transpose<perm=[1,0]>(w4)
        f = MatMul(d, t)
        y = Add(e, f)"""


@fragment("f=4 t=3", {"f": "neuron", "t": Group("neuron", optional=True)}, "w1: 8 f; w2: (t f) 5")
def tile_and_expand(s: Any) -> str:
    """The neurons are tiled: each occurs in every copy."""
    return f"""(float[N,8] x) => (float[N,5] y)
        a = MatMul(x, w1)
        b = Tile(a, [1, {s.t}])
        y = MatMul(b, w2)"""


@fragment("f=6", {"f": Group("neuron", optional=True)}, "w1: 8 f; w2: f 5")
def local_function(s: Any) -> str:
    """An activation as a local function of the model."""
    return f"""{TOKENS}
        a = MatMul(x, w1)
        b = local.swish(a)
        y = MatMul(b, w2)
---
<opset_import: ["" : 21], domain: "local">
swish (u) => (w) {{ t = Sigmoid(u) w = Mul(u, t) }}"""
