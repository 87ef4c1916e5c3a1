"""The generated documentation is what the docstrings say, and every option is documented."""

from __future__ import annotations

from pathlib import Path

import pytest

import graphc
from graphc import catalogue, registry
from graphc.views.groups import svg

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("section", ["passes", "rules", "backends", "recipes"])
def test_generated_documentation_is_fresh(section: str) -> None:
    written = (DOCS / f"{section}.md").read_text(encoding="utf-8")
    assert written == catalogue.markdown(section), "run: python -m graphc.catalogue docs"


def test_the_picture_of_the_groups_is_fresh() -> None:
    groups = graphc.groups(DOCS.parent / "tests/data/fmnist_vit_tiny.onnx")
    hint = "run: graphc inspect tests/data/fmnist_vit_tiny.onnx --svg docs/groups.svg"
    assert (DOCS / "groups.svg").read_text(encoding="utf-8") == svg(groups), hint


@pytest.mark.parametrize("kind", ["passes", "backends"])
def test_everything_has_a_summary_and_every_option_a_sentence(kind: str) -> None:
    for name in registry.names(kind):  # type: ignore[arg-type]
        cls = registry.pass_class(name) if kind == "passes" else registry.backend_class(name)
        assert catalogue.describe(name)["documentation"], name
        for option in catalogue.options(cls):
            assert option["help"], f"{name}{{{option['name']}}}"
