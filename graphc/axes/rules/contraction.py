"""Operators that sum over products: matrix products, convolutions, Einsum."""

from graphc.axes.rules.registry import Line, NoRule, View, lines, rule
from graphc.axes.size import Size

lines(
    """
    Conv(group=g:1)                      n (g i) [*x], (g o) i [*k], (g o) -> n (g o) [*y]
    ConvTranspose(group=g:1)             n (g i) [*x], (g i) o [*k], (g o) -> n (g o) [*y]
    com.microsoft.FusedConv(group=g:1)   n (g i) [*x], (g o) i [*k], (g o), n (g o) [*y] -> n (g o) [*y]
    com.microsoft.NhwcFusedConv(group=g:1)  n [*x] (g i), (g o) i [*k], (g o), n [*y] (g o) -> n [*y] (g o)
    com.microsoft.NhwcConv(group=g:1)    n [*x] (g i), (g o) [*k] i, (g o) -> n [*y] (g o)
    ConvInteger(group=g:1)               n (g i) [*x], (g o) i [*k], ,  -> n (g o) [*y]
    """
)


def matmul(a: int, b: int) -> str:
    """The line of a matrix product of these ranks."""
    left = "k" if a == 1 else "... i k"
    right = "k" if b == 1 else "... k j"
    out = " ".join((["..."] if a > 1 or b > 1 else []) + (["i"] if a > 1 else []) + (["j"] if b > 1 else []))
    if a == 1 and b == 1:
        out = ""
    return f"{left}, {right} -> {out}"


@rule("MatMul", "MatMulInteger", "com.microsoft.MatMulInteger16")
def matmul_rule(n: View) -> str:
    line = matmul(n.rank(0), n.rank(1))
    left, out = line.split(" -> ")
    if n.inputs > 2 and n.has(2) and n.rank(2) > 0 and n.shape(2) != [1]:
        left += ", i"
    elif n.inputs > 2:
        left += ", "
    if n.inputs > 3:
        left += ", j" if n.has(3) and n.rank(3) == 1 and n.shape(3) != [1] else ", "
    return f"{left} -> {out}"


@rule("com.microsoft.FusedMatMul", "com.microsoft.TransposeMatMul", "com.microsoft.FusedMatMulActivation")
def fused_matmul(n: View) -> str:
    if n.attr("transBatchA", 0) or n.attr("transBatchB", 0):
        raise NoRule("transposed batch axes are not covered")
    if n.rank(0) < 2 or n.rank(1) < 2:
        return matmul(n.rank(0), n.rank(1))
    a = "... k i" if n.attr("transA", 0) else "... i k"
    b = "... j k" if n.attr("transB", 0) else "... k j"
    return f"{a}, {b} -> ... i j"


def _addend(shape: list[Size], names: str) -> str:
    """A tensor that broadcasts to the axes ``names``, from the right."""
    return " ".join("1" if s == 1 else name for s, name in zip(shape[::-1], names[::-1], strict=False))[::-1]


@rule("Gemm", "com.microsoft.FusedGemm")
def gemm(n: View) -> str:
    a = "k i" if n.attr("transA", 0) else "i k"
    b = "j k" if n.attr("transB", 0) else "k j"
    c = f", {_addend(n.shape(2), 'ij')}" if n.has(2) else ""
    return f"{a}, {b}{c} -> i j"


@rule("Einsum")
def einsum(n: View) -> str:
    """The equation itself; letters are made lower case and unique."""
    equation = str(n.attr("equation")).replace(" ", "")
    if "..." in equation.replace("...", "", 1) and "->" not in equation:
        raise NoRule("an ellipsis without '->' is not covered")
    left, arrow, right = equation.partition("->")
    operands = left.split(",")
    if not arrow:
        letters = left.replace(",", "")
        right = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    if any(len(set(o.replace(".", ""))) < len(o.replace(".", "")) for o in operands):
        raise NoRule("a diagonal is not covered")
    names = {c: f"x{i}" for i, c in enumerate(dict.fromkeys(c for c in left if c.isalpha()))}

    def spell(operand: str) -> str:
        spaced = operand.replace("...", ".")
        return " ".join("..." if c == "." else names[c] for c in spaced)

    return f"{', '.join(map(spell, operands))} -> {spell(right)}"


@rule("Det")
def det(n: View) -> str:
    return "*b [i] [j] -> *b"


@rule("DeformConv")
def deform_conv(n: View) -> Line:
    """Offsets and masks say where to look, for each offset group; groups of channels share them."""
    groups, offset_groups = n.attr("group", 1), n.attr("offset_group", 1)
    x = "n (g i) [*x]" if offset_groups == 1 else "n [c] [*x]"
    w = "(g o) i [*k]" if offset_groups == 1 else "[o] [i] [*k]"
    out = "(g o)" if offset_groups == 1 else "[o]"
    mask = ", !" if n.inputs > 4 else ""
    return Line(f"{x}, {w}, !, {out}{mask} -> n {out} [*y]", {"g": groups})
