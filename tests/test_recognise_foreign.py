"""Models as tf2onnx, Paddle and Optimum write them: what can be recognised is, and the model computes the same."""

from __future__ import annotations

from collections import Counter

import pytest

from graphc import edit, frontends
from graphc.checking import Checker
from graphc.recipe import Recipe
from tests.fragments.foreign_export import EXPECTED, FOLDER
from tests.recognised_models import CONTEXT


@pytest.mark.parametrize("name", EXPECTED)
def test_what_other_exporters_write(name: str) -> None:
    model = frontends.load(FOLDER / f"{name}.onnx").model
    after = model.clone()
    refusals: list[object] = []
    for each in Recipe.parse("simplify,fuse,shrink,recognise,simplify").passes:
        refusals += each.run(after, CONTEXT).refusals
    found = Counter(node.op_type for node in edit.nodes(after))
    assert {operator: found[operator] for operator in EXPECTED[name]} == EXPECTED[name], refusals
    verdict = Checker(model).compare(after)
    assert verdict.ok, verdict.why
