"""Quantized operators: scales and zero points follow the axes that they scale."""

from __future__ import annotations

from graphc.axes.rules.contraction import matmul
from graphc.axes.rules.registry import Line, NoRule, View, letters, lines, rule, same
from graphc.axes.size import divide

lines(
    """
    DynamicQuantizeLinear                   ... -> ..., ,
    com.microsoft.QLinearAdd                ..., , , ..., , , ,  -> ...
    com.microsoft.QLinearMul                ..., , , ..., , , ,  -> ...
    com.microsoft.DynamicQuantizeMatMul     ... i k, k j, , , j -> ... i j
    com.microsoft.MatMulIntegerToFloat      ... i k, k j, , , , , j -> ... i j
    """
)
same("com.microsoft.QLinearSigmoid com.microsoft.QLinearLeakyRelu", "..., , , ,  -> ...")


def _scale(n: View, i: int, name: str) -> str:
    """The pattern of a scale or zero point: along ``name`` when it has an axis, else nothing."""
    return name if n.has(i) and n.rank(i) == 1 and n.shape(i) != [1] else ""


@rule("QuantizeLinear", "DequantizeLinear", "com.microsoft.QuantizeLinear", "com.microsoft.DequantizeLinear")
def qdq(n: View) -> Line:
    """Per tensor, per index of an axis, or per block of an axis (blocks can only be cut whole)."""
    x, scale = n.shape(0), n.shape(1)
    names = letters(len(x))
    if scale in ([], [1]) and len(x) != 1:
        extra = ", " * (n.inputs - 1)
        return Line(f"...{extra} -> ...")
    if not scale:
        return Line(f"...{', ' * (n.inputs - 1)} -> ...")
    if len(scale) == 1 and not n.attr("block_size", 0):
        axis = n.axis(1) if len(x) > 1 else 0
        if scale == [1] and x[axis] != 1:
            return Line(f"...{', ' * (n.inputs - 1)} -> ...")
        per = f", {names[axis]}" * (n.inputs - 1)
        return Line(f"{' '.join(names)}{per} -> {' '.join(names)}")
    axis = n.axis(1)
    block = divide(x[axis], scale[axis]) if len(scale) == len(x) else None
    if block is None or (n.attr("block_size", 0) and n.attr("block_size", 0) != block):
        raise NoRule("blocks that do not divide the axis are not covered")
    data, per_block = list(names), list(names)
    if block != 1:
        data[axis] = f"({names[axis]} [{names[axis]}_])"
    full, small = " ".join(data), " ".join(per_block)
    return Line(f"{full}{f', {small}' * (n.inputs - 1)} -> {full}", {f"{names[axis]}_": block})


@rule("QLinearConv")
def qlinear_conv(n: View) -> Line:
    """x, its scale and zero point, w, its scale and zero point, the scale and zero point of the output, bias."""
    scale, zero = (_scale(n, i, "(g o)") for i in (4, 5))
    bias = ", (g o)" if n.has(8) else ""
    inputs = f"n (g i) [*x], , , (g o) i [*k], {scale}, {zero}, , {bias}"
    return Line(f"{inputs} -> n (g o) [*y]", {"g": n.attr("group", 1)})


@rule("QLinearMatMul")
def qlinear_matmul(n: View) -> str:
    """a, its scale and zero point, b, its scale and zero point, the scale and zero point of the output."""
    left, out = matmul(n.rank(0), n.rank(3)).split(" -> ")
    a, b = left.split(", ")
    return f"{a}, {_scale(n, 1, 'i')}, {_scale(n, 2, 'i')}, {b}, {_scale(n, 4, 'j')}, {_scale(n, 5, 'j')}, ,  -> {out}"


@rule("com.microsoft.QGemm")
def qgemm(n: View) -> str:
    a = "k i" if n.attr("transA", 0) else "i k"
    b = "j k" if n.attr("transB", 0) else "k j"
    c = "j" if n.has(6) and n.rank(6) == 1 else "1 j" if n.has(6) and n.rank(6) == 2 else ""
    return f"{a}, , , {b}, {_scale(n, 4, 'j')}, {_scale(n, 5, 'j')}, {c}, ,  -> i j"


@rule("com.microsoft.QLinearGlobalAveragePool")
def qlinear_global_average_pool(n: View) -> str:
    ones = " ".join(["1"] * (n.rank() - 2))
    if n.attr("channels_last", 0):
        return f"n [*x] c, , , ,  -> n {ones} c"
    return f"n c [*x], , , ,  -> n c {ones}"


@rule("com.microsoft.QLinearAveragePool")
def qlinear_average_pool(n: View) -> str:
    return "n [*x] c, , , ,  -> n [*y] c" if n.attr("channels_last", 0) else "n c [*x], , , ,  -> n c [*y]"


@rule("com.microsoft.QLinearSoftmax")
def qlinear_softmax(n: View) -> str:
    names = letters(n.rank())
    marked = list(names)
    marked[n.axis(-1)] += "^"
    return f"{' '.join(marked)}, , , ,  -> {' '.join(names)}"


@rule("com.microsoft.QLinearConcat")
def qlinear_concat(n: View) -> Line:
    """The output's scale and zero point, then triples of a tensor, its scale and its zero point."""
    rank, axis = n.rank(2), n.axis(0, 2)
    names = letters(rank)
    parts = [f"{names[axis]}{k}_" for k in range((n.inputs - 2) // 3)]
    inputs = ["", ""]
    for part in parts:
        own = list(names)
        own[axis] = part
        inputs += [" ".join(own), "", ""]
    out = list(names)
    out[axis] = f"({' + '.join(parts)})"
    return Line(f"{', '.join(inputs)} -> {' '.join(out)}")


@rule("com.microsoft.MatMulNBits")
def matmul_nbits(n: View) -> Line:
    """Weights of ``[N, K / block, bytes of a block]``; scales ``[N, blocks]``, flat or not.

    Inputs are cut by whole blocks. Packed zero points put several blocks into one byte: then blocks stay.
    """
    block, size, columns = n.attr("block_size"), n.attr("K"), n.attr("N")
    blocks = divide(size, block)
    if blocks is None:
        raise NoRule("K is no multiple of the block size")
    if n.has(4):
        raise NoRule("group indices are not covered")
    scales = "n k" if n.rank(2) == 2 else "(n k)"
    zeros, fixed = "", False
    if n.has(3):
        packed = n.shape(3) not in ([columns, blocks], [columns * blocks])
        fixed = packed and blocks != 1
        per_row = divide(n.shape(3)[-1], columns) if n.rank(3) == 1 else n.shape(3)[-1]
        zeros = ("n k" if n.rank(3) == 2 else "(n k)") if not packed else ("n [z]" if n.rank(3) == 2 else "(n [z])")
        if packed and per_row is None:
            raise NoRule("packed zero points do not divide into rows")
    k = "[k]" if fixed else "k"
    bias = ", , n" if n.has(5) else ""
    inputs = f"... ({k} [q]), n {k} [b], {scales.replace('k', k)}, {zeros}{bias}"
    return Line(f"{inputs.rstrip(', ')} -> ... n", {"n": columns, "k": blocks, "q": block})
