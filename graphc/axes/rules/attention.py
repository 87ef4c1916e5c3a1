"""Fused attention and rotary embedding: heads ``h``, query heads per key head ``r``, head dimensions ``d``, ``v``.

Sequence axes are kept whole. ``d`` is what queries and keys are multiplied along, ``v`` what the values carry.
"""

from __future__ import annotations

from graphc.axes.rules.registry import Line, NoRule, View, rule
from graphc.axes.size import Size, divide


def _heads(n: View, total: Size, count: int) -> Size:
    size = divide(total, count) if count else None
    if size is None:
        raise NoRule(f"{total} does not divide into {count} heads")
    return size


def _mask(n: View, i: int, heads: str, keys: str = "m_") -> str:
    """A mask or bias that broadcasts to batch, heads, queries, keys."""
    if not n.has(i):
        return ""
    names = ["b", heads, "s", f"[{keys}]"]
    shape = n.shape(i)
    if len(shape) > 4:
        raise NoRule("a mask of this rank is not covered")
    return " ".join("1" if s == 1 else name for s, name in zip(shape, names[4 - len(shape) :], strict=True))


@rule("Attention")
def attention(n: View) -> Line:
    """The standard operator, with heads as an axis (rank 4) or as digits of the last one (rank 3)."""
    if n.rank(0) == 4:
        q, k, v = "b (h r) [s] d", "b h [t] d", "b h [t] v"
        heads, kv_heads = n.shape(0)[1], n.shape(1)[1]
        out = "b (h r) [s] v"
    else:
        q, k, v = "b [s] (h r d)", "b [t] (h d)", "b [t] (h v)"
        heads, kv_heads = n.attr("q_num_heads"), n.attr("kv_num_heads")
        out = "b [s] (h r v)"
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or heads % kv_heads:
        raise NoRule("the number of heads is not known")
    mask = _mask(n, 3, "(h r)")
    past = ["b h [p] d" if n.has(4) else "", "b h [p] v" if n.has(5) else ""]
    lengths = "b" if n.has(6) else ""
    inputs = ", ".join([q, k, v, mask, *past, lengths])
    outputs = f"{out}, b h [u] d, b h [u] v, b (h r) [s] [u]"
    return Line(f"{inputs} -> {outputs}", {"h": kv_heads, "r": heads // kv_heads})


@rule("com.microsoft.Attention")
def attention_ms(n: View) -> Line:
    """One matrix makes queries, keys and values, in this order."""
    heads = int(n.attr("num_heads"))
    if n.attr("do_rotary", 0):
        raise NoRule("rotary embedding inside Attention is not covered")
    total = n.shape(1)[1]
    if not isinstance(total, int):
        raise NoRule("the width is not known")
    widths = n.attr("qkv_hidden_sizes") or (total // 3,) * 3
    d, v = _heads(n, widths[0], heads), _heads(n, widths[2], heads)
    fused = "((h d) + (h d) + (h v))"
    past = ("[x2] b h [p] d" if d == v else "!") if n.has(4) else ""
    bias = fused if n.has(2) else ""
    mask = "!" if n.has(3) else ""
    extra = _mask(n, 5, "h")
    present = "[x2] b h [u] d" if d == v else "!"
    inputs = ", ".join(["b [s] k", f"k {fused}", bias, mask, past, extra, ""])
    if n.wants(1) and d == v:
        # One cache holds keys and values: their head dimensions are one axis.
        inputs, present = inputs.replace("(h v)", "(h d)"), "[x2] b h [u] d"
        return Line(f"{inputs} -> b [s] (h d), {present}", {"h": heads, "d": d, "x2": 2})
    return Line(f"{inputs} -> b [s] (h v), {present}", {"h": heads, "d": d, "v": v, "x2": 2})


@rule("com.microsoft.MultiHeadAttention", "com.microsoft.DecoderMaskedMultiHeadAttention")
def multi_head_attention(n: View) -> Line:
    """Separate queries, keys and values; or packed as ``[b, s, h, 3, d]``, or keys with values: ``[b, t, h, 2, d]``."""
    heads = int(n.attr("num_heads"))
    sizes: dict[str, Size | tuple[Size, ...]] = {"h": heads}
    key = value = ""
    out = "b [s] (h v)"
    if n.rank(0) == 5:
        query, out = "b [s] h 3 d", "b [s] (h d)"
        v = "d"
    else:
        query, v = "b [s] (h d)", "v"
        sizes["d"] = _heads(n, n.shape(0)[2], heads)
        if n.has(1) and n.rank(1) == 5:
            key, v, out = "b [t] h 2 d", "d", "b [s] (h d)"
        elif n.has(1) and n.rank(1) == 4:
            key, value, v, out = "b h [t] d", "b h [t] d", "d", "b [s] (h d)"
        elif n.has(1):
            key, value = "b [t] (h d)", "b [t] (h v)"
    bias = f"((h d) + (h d) + (h {v}))" if n.has(3) else ""
    if n.has(3) and v == "v":
        sizes["v"] = _heads(n, n.shape(2)[2], heads)
    mask = "!" if n.has(4) else ""
    past = ["b h [p] d" if n.has(6) else "", f"b h [p] {v}" if n.has(7) else ""]
    inputs = ", ".join([query, key, value, bias, mask, _mask(n, 5, "h"), *past, *[""] * max(0, n.inputs - 8)])
    return Line(f"{inputs} -> {out}, b h [u] d, b h [u] {v}, b h [s] [u]", sizes)


@rule("com.microsoft.GroupQueryAttention")
def group_query_attention(n: View) -> Line:
    """Keys and values have ``h`` heads, queries ``r`` for each of them; queries may hold all three, packed."""
    heads, kv_heads = int(n.attr("num_heads")), int(n.attr("kv_num_heads"))
    if heads % kv_heads:
        raise NoRule("query heads are no multiple of key heads")
    packed = not n.has(1)
    size = _heads(n, n.shape(0)[2], heads + 2 * kv_heads if packed else heads)
    d, sizes = _rotated(n, size, bool(n.attr("do_rotary", 0)), 7)
    sizes |= {"h": kv_heads, "r": heads // kv_heads}
    query = f"b [s] ((h r {d}) + (h {d}) + (h {d}))" if packed else f"b [s] (h r {d})"
    kv = "" if packed else f"b [t] (h {d})"
    past = [f"b h [p] {d}" if n.has(i) else "" for i in (3, 4)]
    table = ["[m] e" if n.has(i) else "" for i in (7, 8)]
    ids = "!" if n.has(9) else ""
    bias = _mask(n, 10, "(h r)")
    sink = "(h r)" if n.has(11) else ""
    if any(n.has(i) for i in range(12, n.inputs)):
        raise NoRule("a quantized cache is not covered")
    inputs = ", ".join([query, kv, kv, *past, "b" if n.rank(5) == 1 else "b 1", "", *table, ids, bias, sink])
    # The kernels of ONNX Runtime want head sizes of a multiple of 8, of 16 with rotary pairs.
    multiples = {"d": 8, "e": 8}
    outputs = f"b [s] (h r {d}), b h [u] {d}, b h [u] {d}, b (h r) [s] [u]"
    return Line(f"{inputs} -> {outputs}", sizes, multiples=multiples)


def _rotated(n: View, size: Size, rotary: bool, table: int) -> tuple[str, dict[str, Size | tuple[Size, ...]]]:
    """A head dimension whose pairs ``e`` are rotated together; what lies beyond the table stays as it is."""
    if not rotary:
        return "d", {"d": size}
    half = n.shape(table)[-1]
    if not isinstance(half, int) or not isinstance(size, int) or 2 * half > size:
        raise NoRule("the size of the rotary table is not known")
    pair = "(e [z2])" if n.attr("interleaved", n.attr("rotary_interleaved", 0)) else "([z2] e)"
    sizes: dict[str, Size | tuple[Size, ...]] = {"e": half, "z2": 2}
    if 2 * half == size:
        return pair, sizes
    return f"({pair} + d)", {**sizes, "d": size - 2 * half}


@rule("com.microsoft.RotaryEmbedding", "RotaryEmbedding")
def rotary_embedding(n: View) -> Line:
    """The table has one column for each rotated pair."""
    standard = n.node.op_type == "RotaryEmbedding" and n.node.domain in ("", "ai.onnx")
    table, ids = (1, 3) if standard else (2, 1)
    half = n.shape(table)[-1]
    heads = int(n.attr("num_heads", 0))
    if n.rank(0) == 4:
        size = n.shape(0)[3]
    elif heads:
        size = _heads(n, n.shape(0)[2], heads)
    else:
        size = half * 2
    d, sizes = _rotated(n, size, True, table)
    if n.rank(0) == 4:
        x = f"b h [s] {d}"
    else:
        x = f"b [s] (h {d})"
        count = divide(n.shape(0)[2], size)
        if count is None:
            raise NoRule("the width is no multiple of the head size")
        sizes["h"] = count
    tables = "[m] e" if n.rank(table) == 2 else "b [s] e"
    positions = "" if not n.has(ids) else "b [s]" if n.rank(ids) == 2 else "!"
    inputs = [x, tables, tables, positions] if standard else [x, positions, tables, tables]
    return Line(f"{', '.join(inputs)} -> {x}", sizes)


@rule("com.microsoft.MoE")
def mixture_of_experts(n: View) -> Line:
    """Stacked experts; whether the second or the third axis of a weight is its input follows from the sizes."""
    width = n.shape(0)[-1]
    first, second = n.shape(2)[1:], n.shape(4)[1:]
    if first[0] == width and second == [first[1], width] and first[1] != width:
        up, down = "e k f", "e f k"
    elif first[1] == width and second == [width, first[0]] and first[0] != width:
        up, down = "e f k", "e k f"
    else:
        raise NoRule("the layout of the experts' weights does not follow from their sizes")
    x = "... k" if n.rank(0) != 2 else "n k"
    inputs = [x, "n e^" if n.rank(0) == 2 else "[n] e^", up, "e f", down, "e k", up, "e f"]
    used = [text if n.has(i) else "" for i, text in enumerate(inputs)]
    return Line(f"{', '.join(used)} -> {x}")
