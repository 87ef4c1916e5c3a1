"""Reductions. A name that the output lacks is summed over; averages and maxima carry their mark."""

from __future__ import annotations

from graphc.axes.rules.registry import LETTERS, NoRule, View, rule

MARKS = {
    "ReduceSum": "",
    "ReduceSumSquare": "",
    "ReduceL1": "",
    "ReduceL2": "",
    "ReduceLogSum": "",
    "ReduceMean": "~",
    "ReduceMax": "^",
    "ReduceLogSumExp": "^",
    "ReduceMin": "[]",
    "ReduceProd": "[]",
}


@rule(*MARKS)
def reduce(n: View) -> str:
    rank = n.rank()
    axes = n.ints(1, "axes")
    if not axes:
        axes = [] if n.attr("noop_with_empty_axes", 0) else list(range(rank))
    gone = {a % rank for a in axes}
    mark = MARKS[n.node.op_type]
    return f"{_marked(rank, gone, mark)},  -> {_kept(rank, gone, n.attr('keepdims', 1))}"


@rule("ArgMax", "ArgMin")
def arg(n: View) -> str:
    rank, axis = n.rank(), n.axis(0)
    return f"{_marked(rank, {axis}, '[]')} -> {_kept(rank, {axis}, n.attr('keepdims', 1))}"


def _marked(rank: int, gone: set[int], mark: str) -> str:
    if rank > len(LETTERS):
        raise NoRule("the rank is too large")
    names = LETTERS[:rank]
    return " ".join((f"[{x}]" if mark == "[]" else x + mark) if i in gone else x for i, x in enumerate(names))


def _kept(rank: int, gone: set[int], keepdims: int) -> str:
    names = LETTERS[:rank]
    return " ".join("1" if i in gone else x for i, x in enumerate(names) if keepdims or i not in gone)


def _along(n: View, default: int, mark: str, last: int | None = None) -> str:
    """Pattern of a tensor with a mark from ``axis`` up to (not including) ``last``."""
    rank, axis = n.rank(), n.axis(default)
    stop = axis + 1 if last is None else last
    return _marked(rank, set(range(axis, stop)), mark)


@rule("Softmax", "LogSoftmax")
def softmax(n: View) -> str:
    """Before opset 13 all axes from ``axis`` on are normalised together."""
    names = " ".join(LETTERS[: n.rank()])
    if n.version < 13:
        return f"{_along(n, 1, '^', n.rank())} -> {names}"
    return f"{_along(n, -1, '^')} -> {names}"


@rule("Hardmax")
def hardmax(n: View) -> str:
    names = " ".join(LETTERS[: n.rank()])
    return f"{_along(n, -1, '^', None if n.version >= 13 else n.rank())} -> {names}"


@rule("LpNormalization")
def lp_normalization(n: View) -> str:
    return f"{_along(n, -1, '~')} -> {' '.join(LETTERS[: n.rank()])}"
