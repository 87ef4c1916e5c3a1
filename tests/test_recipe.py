"""Recipes as text, TOML and Python; errors before any work, with the nearest name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphc import registry
from graphc.contract import Context, Effect, Pass, PassResult, option
from graphc.errors import BadInput
from graphc.recipe import Recipe, parse_backend


@dataclass(frozen=True)
class Sample(Pass):
    """A pass with one option of every type."""

    effect: ClassVar[Effect] = Effect.EXACT
    ratio: float = option(0.5, "a number")
    steps: int = option(3, "a whole number")
    fast: bool = option(False, "a flag")
    of: Literal["units", "bytes"] = option("units", "one of several")
    include: tuple[str, ...] = option((), "patterns")
    limit: int | None = option(None, "an optional number")
    title: str = option("plain", "any text")

    @property
    def name(self) -> str:
        return "sample"

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        return PassResult()


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {**registry._modules("passes"), "sample": f"{__name__}:Sample"}
    original = registry._modules
    monkeypatch.setattr(registry, "_modules", lambda kind: modules if kind == "passes" else original(kind))


def test_text_sets_options_of_every_type() -> None:
    text = 'sample{ratio=0.3 steps=7 fast=true of=bytes include=["*.up", x-y] limit=none title="a b"},sample'
    first, second = Recipe.parse(text).passes
    assert first == Sample(0.3, 7, True, "bytes", ("*.up", "x-y"), None, "a b")
    assert second == Sample()


def test_commas_between_options_and_a_single_value_for_a_list() -> None:
    assert Recipe.parse("sample{ratio=1,include=a}").passes == (Sample(ratio=1.0, include=("a",)),)


texts = st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=8)


@given(
    st.builds(
        Sample,
        ratio=st.floats(allow_nan=False, allow_infinity=False),
        steps=st.integers(-(10**9), 10**9),
        fast=st.booleans(),
        of=st.sampled_from(["units", "bytes"]),
        include=st.lists(texts, max_size=3).map(tuple),
        limit=st.none() | st.integers(0, 99),
        title=texts,
    )
)
def test_text_round_trips(each: Sample) -> None:
    assert Recipe.parse(Recipe((each, Sample())).text()).passes == (each, Sample())


def test_toml_round_trips(tmp_path: Path) -> None:
    recipe = Recipe((Sample(ratio=0.25, include=("a.*", 'quo"te')), Sample(fast=True)), "what it does")
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.toml(), encoding="utf-8")
    assert Recipe.read(path) == recipe


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sampel", "did you mean 'sample'?"),
        ("sample{ratoi=1}", "did you mean 'ratio'?"),
        ("sample{of=byte}", "did you mean 'bytes'?"),
        ("sample{steps=many}", "whole number"),
        ("sample{steps=0.5}", "whole number"),
        ("sample{fast=1}", "true|false"),
        ("sample{ratio", "expected"),
        ("sample{ratio=}", "a value expected"),
        ('sample{title="x}', "closing quote"),
        ("sample sample", "',' expected"),
        ("", "names no pass"),
    ],
)
def test_a_bad_text_fails_with_what_was_probably_meant(text: str, says: str) -> None:
    with pytest.raises(BadInput) as error:
        Recipe.parse(text)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[[pass]]\nname = 'sampel'", "did you mean 'sample'?"),
        ("[[pass]]\nname = 'sample'\nratoi = 1", "did you mean 'ratio'?"),
        ("[[passes]]\nname = 'sample'", "no key 'passes'"),
        ("description = 'x'", "no [[pass]] tables"),
        ("[[pass]", "cannot read the recipe"),
    ],
)
def test_a_bad_toml_file_fails_and_names_the_file(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(BadInput) as error:
        Recipe.read(path)
    assert says in str(error.value)


def test_a_missing_recipe_names_the_nearest_shipped_one() -> None:
    with pytest.raises(BadInput, match="did you mean 'default'"):
        Recipe.named("defualt")


def test_every_shipped_recipe_reads() -> None:
    for name in registry.recipe_files():
        assert Recipe.named(name).passes


def test_a_target_is_parsed_like_a_pass() -> None:
    assert parse_backend("onnxruntime").name == "onnxruntime"
    with pytest.raises(BadInput, match="did you mean 'onnxruntime'"):
        parse_backend("onnxrutnime")
    with pytest.raises(BadInput, match="has no option"):
        parse_backend("onnxruntime{x=1}")
