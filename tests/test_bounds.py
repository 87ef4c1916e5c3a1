"""Options know what numbers they may be."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphc.bounds import Bounds
from graphc.errors import BadInput
from graphc.recipe import Recipe
from graphc.registry import names, pass_class


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        (Bounds(least=0), "0 or more"),
        (Bounds(above=0), "a number above 0"),
        (Bounds(least=0, below=1), "a number from 0 to below 1"),
        (Bounds(above=0, most=1), "a number above 0 up to 1"),
        (Bounds(most=1), "a number up to 1"),
    ],
)
def test_bounds_read_well(bounds: Bounds, text: str) -> None:
    assert str(bounds) == text


@given(st.floats())
def test_nothing_else_is_within(value: float) -> None:
    assert Bounds(least=0, below=1).hold(value) == (0 <= value < 1)
    assert Bounds(above=0, most=1).hold(value) == (0 < value <= 1)


def test_every_option_with_bounds_is_checked() -> None:
    """What is out of an option's bounds is an error that names it, in every pass; what is at them is not."""
    tried = 0
    for name in names("passes"):
        for field in dataclasses.fields(pass_class(name)):
            bounds = field.metadata.get("bounds")
            if bounds is None:
                continue
            wrong = (bounds.least if bounds.least is not None else bounds.above + 1) - 1
            option = field.name.replace("_", "-")
            with pytest.raises(BadInput, match=f"{option} cannot be") as caught:
                Recipe.parse(f"{name}{{{option}={wrong:g}}}")
            assert str(bounds) in str(caught.value)
            tried += 1
    assert tried > 20
