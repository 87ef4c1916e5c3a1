"""Divisions that round down: one canonical form, whatever the order in which sizes were divided."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc.shapes import Facts, symbolic
from graphc.shapes.symbolic import Dim, symbol
from tests.small_models import build

N = symbol("n")


def value(dim: Dim, n: int) -> int:
    """The number that a dim is, read off its text."""
    text = str(dim)
    while match := re.search(r"[#~](?:floor)?\(((?:[^()]|\([^()]*\))*)\)//\((\d+)\)", text):
        text = text.replace(match[0], f"(({match[1]})//{match[2]})")
    return int(eval(text, {"__builtins__": {}}, {"n": n}))


steps = st.lists(st.tuples(st.integers(-4, 4), st.integers(1, 5)), min_size=1, max_size=2)


@settings(max_examples=200)
@given(steps, st.integers(0, 60))
def test_divisions_are_what_they_say(steps: list[tuple[int, int]], n: int) -> None:
    dim: Dim = N
    wanted = n
    for more, by in steps:
        found = symbolic.floordiv(symbolic.add(dim, more), by)
        assert found is not None
        dim, wanted = found, (wanted + more) // by
    assert value(dim, n) == wanted


@given(st.integers(-9, 9), st.integers(1, 6), st.integers(-9, 9), st.integers(1, 6))
def test_two_divisions_are_one(first: int, a: int, second: int, b: int) -> None:
    twice = symbolic.floordiv(symbolic.add(symbolic.floordiv(symbolic.add(N, first), a) or 0, second), b)
    assert twice == symbolic.floordiv(symbolic.add(N, first + a * second), a * b)


def test_a_size_is_divided_by_its_formula() -> None:
    conv = symbolic.as_size(symbolic.add(symbolic.floordiv(symbolic.add(N, -10), 5) or 0, 1))
    again = symbolic.as_size(symbolic.add(symbolic.floordiv(symbolic.add(conv, -3), 2) or 0, 1))
    assert again == symbolic.as_size(symbolic.add(symbolic.floordiv(N, 10) or 0, -1))
    assert symbolic.nonnegative(again)


@pytest.mark.parametrize("shown", [True, False])
def test_a_range_over_a_size_that_exists(shown: bool) -> None:
    """Without the convolution, nothing says that its size is not negative."""
    body = "c = Conv<strides=[5]>(x, w) " if shown else ""
    body += "s = Shape<start=2,end=3>(x) n = Squeeze(s) d = Div(n, five) m = Add(d, less) r = Range(zero, m, one) "
    body += "q = Cast<to=1>(r) y = Add(c, q)" if shown else "y = Identity(r)"
    arrays = {"five": 5, "less": -1, "zero": 0, "one": 1}
    held: dict[str, np.ndarray] = {name: np.array(number, np.int64) for name, number in arrays.items()}
    held |= {"w": np.ones((1, 1, 10), np.float32)} if shown else {}
    model = build(body, x="float[B,1,L] x", **held)
    facts = Facts(model)
    facts.visit_graph(model.graph)
    known = {value.name: facts(value).shape for node in model.graph for value in node.outputs}
    if shown:
        assert known["r"] == known["c"][2:]
    else:
        assert str(known["r"][0]).startswith("?")
