"""The fragments' claims hold: the smaller graph, built and sliced by hand, computes what the zeroed one does."""

from __future__ import annotations

import dataclasses

import pytest
from fragments import ALL
from fragments.core import Tensor

CLAIMS = [(name, group) for name, each in ALL.items() for group in each.groups]


@pytest.mark.parametrize(("name", "group"), CLAIMS, ids=[f"{n}-{g}" for n, g in CLAIMS])
def test_smaller_graph_computes_the_same(name: str, group: str) -> None:
    for gone in ALL[name].removals(group):
        # A few hundred float32 additions at most, relative to the largest output.
        assert ALL[name].check(group, gone) < 1e-5, sorted(gone)


@pytest.mark.parametrize("name", [name for name, each in ALL.items() if not each.groups])
def test_fragments_without_groups_are_valid(name: str) -> None:
    assert ALL[name].build().graph.node
    assert ALL[name].fixed


def test_the_check_notices_a_wrong_order_of_digits() -> None:
    right = ALL["attention_fused_h3d"]
    swapped = {**right.tensors, "w": Tensor((8, ("sum", ("prod", "d", "h"), ("prod", "d", "h"), ("prod", "e", "h"))))}
    wrong = dataclasses.replace(right, tensors=swapped)
    assert max(wrong.check("h", gone) for gone in wrong.removals("h")) > 1e-3


def test_the_check_notices_a_missing_place() -> None:
    right = ALL["residual"]
    wrong = dataclasses.replace(right, tensors={**right.tensors, "w5": Tensor((5, 6))})
    with pytest.raises(Exception, match=r"(?i)dim|shape|gemm"):
        wrong.check("c", {(0,)})
