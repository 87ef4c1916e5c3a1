"""Axis trees: unification makes axes agree, and the keep algebra agrees with it; sizes are exact polynomials."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc.axes.algebra import Axis, Kind, Unifier, concat, digits, find, leaves, prod, terms
from graphc.axes.rules.movement import regroup
from graphc.axes.rules.parts import repetition
from graphc.axes.selection import Selection
from graphc.axes.size import Sym, divide, product, symbol

B, S = symbol("batch"), symbol("seq")


@st.composite
def trees(draw: st.DrawFn, size: int, depth: int = 3) -> Axis:
    """A random tree of this size."""
    choices = ["leaf"]
    factors = [d for d in range(2, size) if size % d == 0]
    if depth and factors:
        choices.append("prod")
    if depth and size > 2:
        choices.append("sum")
    match draw(st.sampled_from(choices)):
        case "prod":
            outer = draw(st.sampled_from(factors))
            return prod([draw(trees(outer, depth - 1)), draw(trees(size // outer, depth - 1))])
        case "sum":
            at = draw(st.integers(1, size - 1))
            return concat([draw(trees(at, depth - 1)), draw(trees(size - at, depth - 1))])
    return Axis(size)


def _selection(axes: Sequence[Axis], whole: Sequence[Axis], seed: int) -> Selection:
    """Random masks for all leaves but those that must stay whole."""
    rng = np.random.default_rng(seed)
    fixed = {leaf for axis in whole for leaf in leaves(axis)}
    chosen = {}
    for leaf in dict.fromkeys(x for axis in axes for x in leaves(axis)):
        if leaf not in fixed and isinstance(leaf.size, int) and leaf.size > 1:
            chosen[leaf] = rng.random(leaf.size) < 0.6
    return Selection(chosen)


@settings(max_examples=300)
@given(st.data(), st.sampled_from([6, 8, 12, 16, 24, 30, 36]), st.integers(0, 99))
def test_unified_axes_keep_the_same_indices(data: st.DataObject, size: int, seed: int) -> None:
    a, b = data.draw(trees(size)), data.draw(trees(size))
    unifier = Unifier()
    unifier.unify(a, b)
    whole = [axis for conflict in unifier.conflicts for axis in conflict.axes]
    selection = _selection([a, b], whole, seed)
    assert np.array_equal(selection.mask(a), selection.mask(b))
    assert selection.size(a) == selection.mask(a).sum()
    assert find(a).size == find(b).size == size


@settings(max_examples=200)
@given(st.data(), st.sampled_from([8, 12, 24]), st.integers(0, 99))
def test_three_unifications_agree_in_any_order(data: st.DataObject, size: int, seed: int) -> None:
    axes = [data.draw(trees(size)) for _ in range(3)]
    unifier = Unifier()
    for i, j in data.draw(st.permutations([(0, 1), (1, 2), (0, 2)])):
        unifier.unify(axes[i], axes[j])
    whole = [axis for conflict in unifier.conflicts for axis in conflict.axes]
    selection = _selection(axes, whole, seed)
    masks = [selection.mask(axis) for axis in axes]
    assert np.array_equal(masks[0], masks[1]) and np.array_equal(masks[1], masks[2])


@given(st.data(), st.sampled_from([6, 12, 24]))
def test_a_whole_leaf_takes_any_tree(data: st.DataObject, size: int) -> None:
    tree, leaf, unifier = data.draw(trees(size)), Axis(size), Unifier()
    unifier.unify(leaf, tree)
    assert not unifier.conflicts
    assert list(leaves(leaf)) == list(leaves(tree))


def test_repeated_splits_of_a_fused_axis_agree() -> None:
    """qkv: one axis split in three, each part reshaped to heads and dimensions, heads tied: one leaf for the heads."""
    unifier, fused = Unifier(), Axis(2304)
    parts = unifier.cut(fused, [768, 768, 768])
    heads = []
    for part in parts:
        h, _ = unifier.split(part, [12, 64])
        heads.append(h)
    unifier.unify(heads[0], heads[1])
    unifier.unify(heads[1], heads[2])
    assert repr(fused) == "((12 64) + (12 64) + (12 64))"
    assert len({find(h) for h in heads}) == 1
    again = unifier.cut(fused, [1536, 768])
    assert not unifier.conflicts
    assert find(terms(again[0])[0]) is find(parts[0]) or digits(terms(again[0])[0])[0] is find(heads[0])


def test_cutting_a_product_cuts_its_outer_digit() -> None:
    unifier, axis = Unifier(), Axis(12)
    outer, inner = unifier.split(axis, [6, 2])
    first, second = unifier.cut(axis, [4, 8])
    assert not unifier.conflicts
    assert [d.size for d in terms(outer)] == [2, 4]
    assert digits(first)[1] is digits(second)[1] is find(inner)


def test_a_cut_inside_a_digit_keeps_all_whole() -> None:
    unifier, axis = Unifier(), Axis(12)
    parts = unifier.split(axis, [4, 3])
    unifier.cut(axis, [2, 10])
    assert unifier.conflicts
    fixed = {leaf for c in unifier.conflicts for x in c.axes for leaf in leaves(x)}
    assert {find(p) for p in parts} <= fixed


def test_incompatible_factorisations_conflict() -> None:
    unifier, axis = Unifier(), Axis(24)
    unifier.split(axis, [8, 3])
    unifier.split(axis, [3, 8])
    assert "incompatible" in unifier.conflicts[0].reason


def test_positions_tie_what_a_flip_ties() -> None:
    unifier, axis = Unifier(), Axis(6)
    units = unifier.positions(axis)
    assert units is not None
    unifier.unify(axis, concat(units[::-1]))
    assert not unifier.conflicts
    assert [find(u) is find(v) for u, v in zip(units, units[::-1], strict=True)] == [True] * 6
    assert len({find(u) for u in units}) == 3


def test_a_product_has_no_positions() -> None:
    unifier, axis = Unifier(), Axis(6)
    unifier.split(axis, [2, 3])
    assert unifier.positions(axis) is None


def test_a_position_used_alone_conflicts() -> None:
    unifier, axis = Unifier(), Axis(4)
    units = unifier.positions(axis)
    assert units is not None
    unifier.unify(units[0], Axis(1))
    assert unifier.conflicts


def test_sizes_that_differ_conflict() -> None:
    unifier = Unifier()
    unifier.unify(Axis(B), Axis(8))
    assert len(unifier.conflicts) == 1


def test_dynamic_digits_are_matched() -> None:
    unifier, flat = Unifier(), Axis(B * 12)
    batch, heads = unifier.split(flat, [B, 12])
    again = unifier.split(flat, [B, 4, 3])
    assert not unifier.conflicts
    assert find(again[0]) is find(batch)
    assert find(heads).kind is Kind.PROD


@given(st.lists(st.sampled_from([1, 2, 3, 4, 5, 6, 8]), min_size=1, max_size=4), st.data())
def test_regroup_finds_common_digits(before: list[int], data: st.DataObject) -> None:
    flat = math.prod(before)
    after, rest = [], flat
    while rest > 1 and len(after) < 4:
        factor = data.draw(st.sampled_from([d for d in range(1, rest + 1) if rest % d == 0]))
        after.append(factor)
        rest //= factor
    after.append(rest)
    left, right, sizes, complete = regroup(before, after)
    if complete:
        numbers = [n for axis in left for n in axis]
        assert numbers == [n for axis in right for n in axis]
        assert [math.prod(sizes[n] for n in axis) for axis in left] == before
        assert [math.prod(sizes[n] for n in axis) for axis in right] == after
    else:
        used = {n for axis in (*left, *right) for n in axis}
        assert {n for axis in left for n in axis} == {n for axis in right for n in axis} == used


def test_regroup_with_dynamic_sizes() -> None:
    left, right, sizes, complete = regroup([B, S, 768], [B * S, 12, 64])
    assert complete and [[sizes[n] for n in axis] for axis in left] == [[B], [S], [12, 64]]
    assert [[sizes[n] for n in axis] for axis in right] == [[B, S], [12], [64]]
    left, _, _, complete = regroup([B, S, 768], [B, symbol("other"), 768])
    assert not complete and [bool(axis) for axis in left] == [True, False, True]


def test_polynomials() -> None:
    assert B * 12 + 4 * B == 16 * B
    assert (B + S) - S == B
    assert B * 0 == 0 and B - B == 0
    assert divide(12 * B * S, 4 * B) == 3 * S
    assert divide(B + 1, 2) is None
    assert (B * 12) // 12 == B and (B * 12) % 12 == 0
    assert (B + 1) // 2 == (B + 1) // 2 != B // 2
    assert product([B, 2, S]) == 2 * (S * B)
    assert isinstance(B // S, Sym)
    assert repr(2 * B + 1) == "1+2*batch"
    assert 5 - B == -1 * B + 5


@pytest.mark.parametrize(
    ("indices", "size", "how"),
    [([0, 0, 1, 1], 2, "each"), ([0, 1, 0, 1], 2, "all"), ([0, 1, 1, 0], 2, ""), ([0, 1], 2, ""), ([0, 0], 1, "")],
)
def test_repetition(indices: list[int], size: int, how: str) -> None:
    assert repetition(np.array(indices), size) == how


class TestSelection:
    """Which indices survive, and what survives of a constant."""

    def test_product_is_an_outer_product(self) -> None:
        h, d = Axis(2), Axis(3)
        selection = Selection({h: np.array([True, False]), d: np.array([True, False, True])})
        assert selection.mask(prod([h, d])).tolist() == [True, False, True, False, False, False]
        assert selection.size(prod([h, d])) == 2

    def test_sum_is_a_concatenation(self) -> None:
        a, b = Axis(2), Axis(2)
        selection = Selection({a: np.array([True, False])})
        assert selection.mask(concat([a, b])).tolist() == [True, False, True, True]

    def test_ragged_on_one_axis(self) -> None:
        g, i = Axis(2), Axis(3)
        rows = np.array([[True, True, False], [False, True, True]])
        selection = Selection(ragged={i: ((g,), rows)})
        array = np.arange(6)
        assert selection.take([prod([g, i])], array).tolist() == [0, 1, 4, 5]
        assert selection.dead([prod([g, i])], array).tolist() == [0, 1, 0, 0, 4, 5]

    def test_ragged_across_axes_gathers_block_by_block(self) -> None:
        """The weight of a grouped convolution: its second axis is local to the groups of the first."""
        g, o, i = Axis(2), Axis(2), Axis(3)
        rows = np.array([[True, True, False], [False, True, True]])
        selection = Selection(ragged={i: ((g,), rows)})
        array = np.arange(12).reshape(4, 3)
        kept = selection.take([prod([g, o]), i], array)
        assert kept.tolist() == [[0, 1], [3, 4], [7, 8], [10, 11]]
        dead = selection.dead([prod([g, o]), i], array)
        assert dead.tolist() == [[0, 1, 0], [3, 4, 0], [0, 7, 8], [0, 10, 11]]

    def test_ragged_blocks_that_are_cut_themselves(self) -> None:
        g, i = Axis(3), Axis(2)
        rows = np.array([[True, False], [False, False], [False, True]])
        selection = Selection({g: np.array([True, False, True])}, {i: ((g,), rows)})
        assert selection.take([prod([g, i])], np.arange(6)).tolist() == [0, 5]
        assert selection.take([g, i], np.arange(6).reshape(3, 2)).tolist() == [[0], [5]]
