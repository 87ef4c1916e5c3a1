"""Data-dependent indexing: top-k, gathers, scatters, one-hot; routers tie to the experts that they index."""

from __future__ import annotations

from graphc.axes.rules.registry import Line, NoRule, View, letters, lines, rule
from graphc.axes.size import Sym

lines(
    """
    NonMaxSuppression  !, !, , ,  -> !
    Unique             ! -> !, !, !, !
    Multinomial        n [c] -> n [s]
    Compress           !, ! -> !
    RandomNormal        -> !
    RandomUniform       -> !
    """
)


@rule("TopK")
def top_k(n: View) -> Line:
    """The values of the second output are indices along the axis that competes."""
    names = letters(n.rank())
    axis = n.axis(-1)
    name = names[axis]
    before = list(names)
    before[axis] = f"{name}^" if n.attr("largest", 1) else f"[{name}]"
    after = list(names)
    after[axis] = f"[{name}_]"
    k = n.values(1) if n.has(1) else [n.attr("k")]
    sizes = {f"{name}_": k[0]} if k else {}
    return Line(f"{' '.join(before)},  -> {' '.join(after)}, {name}> {' '.join(after)}", sizes)


@rule("NonZero")
def non_zero(n: View) -> Line:
    return Line("! -> [r] [n]", {"r": n.rank()})


def _along(n: View, axis: int) -> tuple[list[str], list[str]]:
    """Patterns of data and of an index tensor of the same rank, which must have the same other axes."""
    data, index = n.shape(0), n.shape(1)
    names = letters(len(data))
    source, picked = list(names), list(names)
    for i, (a, b) in enumerate(zip(data, index, strict=True)):
        if i != axis and a != b:
            source[i], picked[i] = f"[{names[i]}]", f"[{names[i]}_]"
    if not n.indexed(1):
        source[axis] = f"[{names[axis]}]"
    picked[axis] = "k_"
    return source, picked


@rule("GatherElements")
def gather_elements(n: View) -> Line:
    axis = n.axis(0)
    source, picked = _along(n, axis)
    prefix = f"{source[axis]}> " if n.indexed(1) else ""
    return Line(f"{' '.join(source)}, {prefix}{' '.join(picked)} -> {' '.join(picked)}")


@rule("ScatterElements", "Scatter")
def scatter_elements(n: View) -> Line:
    axis = n.axis(0)
    source, picked = _along(n, axis)
    picked[axis] = "[k_]"
    prefix = f"{source[axis]}> " if n.indexed(1) else ""
    index = " ".join(picked)
    return Line(f"{' '.join(source)}, {prefix}{index}, {index} -> {' '.join(source)}")


@rule("GatherND")
def gather_nd(n: View) -> Line:
    """The last axis of the indices says how many axes of the data they address."""
    batch = n.attr("batch_dims", 0)
    depth = n.shape(1)[-1]
    if isinstance(depth, Sym):
        raise NoRule("how many axes are addressed is not known")
    data = letters(n.rank(0))
    index = data[:batch] + [f"i{k}" for k in range(n.rank(1) - 1 - batch)]
    rest = data[batch + depth :]
    prefix = ""
    addressed = [f"[{x}]" for x in data[batch : batch + depth]]
    if depth == 1 and n.indexed(1):
        addressed, prefix = [data[batch]], f"{data[batch]}> "
    source = " ".join([*data[:batch], *addressed, *rest])
    last = "1" if depth == 1 else "[z_]"
    return Line(f"{source}, {prefix}{' '.join([*index, last])} -> {' '.join([*index, *rest])}")


@rule("ScatterND")
def scatter_nd(n: View) -> Line:
    depth = n.shape(1)[-1]
    if isinstance(depth, Sym):
        raise NoRule("how many axes are addressed is not known")
    data = letters(n.rank(0))
    index = [f"[i{k}]" for k in range(n.rank(1) - 1)]
    rest = data[depth:]
    source = " ".join([*(f"[{x}]" for x in data[:depth]), *rest])
    last = "1" if depth == 1 else "[z_]"
    return Line(f"{source}, {' '.join([*index, last])}, {' '.join([*index, *rest])} -> {source}")


@rule("TensorScatter")
def tensor_scatter(n: View) -> str:
    """Writes a part of a sequence into a cache."""
    names, axis = letters(n.rank()), n.axis(-2)
    cache, update = list(names), list(names)
    cache[axis], update[axis] = f"[{names[axis]}]", f"[{names[axis]}_]"
    return f"{' '.join(cache)}, {' '.join(update)}, {names[0]} -> {' '.join(cache)}"


@rule("OneHot")
def one_hot(n: View) -> Line:
    """The new axis is the one that the indices go along, if that is known and has this depth."""
    names = letters(n.rank())
    axis = int(n.attr("axis", -1)) % (n.rank() + 1)
    depth = n.values(1)
    out = list(names)
    if n.indexed(0):
        out.insert(axis, "e_")
        return Line(f"e_> {' '.join(names)}, ,  -> {' '.join(out)}", {"e_": depth[0]} if depth else {})
    out.insert(axis, "[e_]")
    return Line(f"{' '.join(names)}, ,  -> {' '.join(out)}", {"e_": depth[0]} if depth else {})
