"""Presets for people: a goal in one word, and the recipe that a model, its data and its target call for.

What a model is, is read off its structure; no name is looked at. Only ``balanced`` sets a limit of its own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from graphc import edit, registry
from graphc.contract import Capabilities
from graphc.errors import BadInput, nearest
from graphc.gate import Gate
from graphc.recipe import DEFAULT, Recipe

if TYPE_CHECKING:
    from graphc.settings import Settings

Goal = Literal["small", "balanced", "fast"]
Kind = Literal["language model", "text encoder", "vision model", "other"]

GOALS: dict[Goal, str] = {
    "small": "Lossy. The smallest file: language models in 4 bits, others in 8; with data, vision models also lose "
    "30 % of their parameters to pruning.",
    "balanced": "Every exact pass, and 8 bits, which hardly change anything; what changes outputs by more than 5 % "
    "(--max-drop error=0.05, unless you give limits) is backed off or left out.",
    "fast": "Lossy. The lowest latency: products in 8-bit integers on CPUs, float16 on GPUs; with data, vision models "
    "also lose 30 % of their FLOPs to pruning.",
}
"""What each goal does, for people."""

HARMLESS = "error=0.05"
"""What lossy passes may cost under ``balanced``: 8-bit weights of transformers cost 0.01 to 0.04."""

UNCALIBRATED = (
    "preset {goal}: there is no calibration data, so only what needs none was chosen; "
    "with --calibrate more can be done, and what is lost is measured on real inputs"
)

_CPU = "CPUExecutionProvider"
_GUIDED = {True: "guided-int4", False: "gptq-int4"}
_PRUNE = "prune{{ratio=0.3 of={of} criterion=obs{more} compensate=ls}}"


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        goal: What for.
        kind: What the model was taken for.
        recipe: The passes.
        why: Why these, in a sentence.
        gates: Limits that go with them, unless the user gave some.
        warning: What the user should know; "" for nothing.
    """

    goal: Goal
    kind: Kind
    recipe: Recipe
    why: str
    gates: tuple[Gate, ...] = ()
    warning: str = ""

    def to_json(self) -> dict[str, str]:
        """What the report says of it, beside the recipe."""
        return {"name": self.goal, "kind": self.kind, "why": self.why}

    def applied(self, settings: Settings) -> Settings:
        """The flags with the recipe, and with its limits where the user gave none on what may be lost."""
        limited = any(gate.kind == "drop" for gate in settings.gates)
        return replace(
            settings, recipe=self.recipe, gates=settings.gates if limited else (*settings.gates, *self.gates)
        )


def parse(name: str) -> tuple[Goal | None, Recipe]:
    """A goal, whose recipe is chosen when the model is there, or a shipped recipe by name.

    Raises:
        BadInput: There is neither; the message has the nearest name.
    """
    for goal in GOALS:
        if name == goal:
            return goal, Recipe.named(DEFAULT)
    shipped = registry.recipe_files()
    if name not in shipped and not name.endswith(".toml"):
        raise BadInput(f"there is no preset '{name}'", hint=nearest(name, [*GOALS, *shipped]))
    return None, Recipe.named(name)


def choose(goal: Goal, model: ir.Model, target: Capabilities, *, calibrated: bool) -> Choice:
    """The recipe for a goal.

    Args:
        goal: What is wanted.
        model: The model; it is not changed.
        target: What it is for.
        calibrated: Whether the user gave data; without, nothing is chosen that must see some.
    """
    kind, convolves = kind_of(model), convolutional(model)
    name, why = _numbers(goal, kind, convolves, target, calibrated)
    recipe = Recipe.named(name) if name in registry.recipe_files() else _then(Recipe.named(DEFAULT), name)
    if goal != "balanced" and kind == "vision model" and calibrated:
        of, what = ("params", "parameters") if goal == "small" else ("flops", "FLOPs")
        recipe = _pruned(recipe, _PRUNE.format(of=of, more="" if convolves else " allocate=per-cost"))
        pruned = f"30 % of the {what} go by optimal brain surgery, and the rest is refitted"
        why = f"{pruned}; {why}" if name != DEFAULT else pruned
    gates = (Gate.drop(HARMLESS),) if goal == "balanced" and name != DEFAULT else ()
    missing = not calibrated and (
        (kind == "vision model" and (convolves or goal != "balanced")) or (goal, kind) == ("small", "language model")
    )
    warning = UNCALIBRATED.format(goal=goal) if missing else ""
    return Choice(goal, kind, replace(recipe, description=""), why, gates, warning)


def _numbers(goal: Goal, kind: Kind, convolves: bool, target: Capabilities, calibrated: bool) -> tuple[str, str]:
    """How numbers are made short: a shipped recipe or a pass to add to the exact ones, and why."""
    text = kind in ("language model", "text encoder")
    if target.providers and target.providers[0] != _CPU:
        if goal == "small" and kind == "language model":
            return _GUIDED[
                _differentiates()
            ] if calibrated else "int4-weights", "its weights are nearly all of its size"
        found = "cast" if calibrated else "cast{ranges=false}"
        return found, "GPUs compute in float16 at least twice as fast, and the file is half as large"
    if not target.has_kernel("com.microsoft", "MatMulNBits"):
        return DEFAULT, "exact passes only, as the target computes with short weights no faster and stores them whole"
    if goal == "small" and kind == "language model":
        found, how = (_GUIDED[_differentiates()], " by GPTQ") if calibrated else ("int4-weights", "")
        return found, f"weights in 4 bits{how}: they are nearly all of its size"
    if convolves:
        if calibrated:
            return "int8-static", "convolutions in 8-bit integers, which a CPU computes faster"
        if goal == "small":
            return "int8-weights", "weights in 8 bits: a quarter of the size, without data"
        return DEFAULT, "exact passes only, as fast integer convolutions must be calibrated"
    if goal == "fast":
        return "int8-dynamic", "products in 8-bit integers, their inputs rounded as they come"
    return "int8-weights", "weights in 8 bits: a quarter of the size" + (", hardly any error" if text else "")


def _differentiates() -> bool:
    """Whether gradients can be had: without, GPTQ takes all rows of inputs for equally important."""
    return bool(find_spec("torch"))


def _then(recipe: Recipe, text: str) -> Recipe:
    return Recipe((*recipe.passes, *Recipe.parse(text).passes))


def _pruned(recipe: Recipe, text: str) -> Recipe:
    """Pruning after ``fuse``: what norms have become part of is ranked and refitted with them."""
    at = [each.name for each in recipe.passes].index("fuse") + 1
    return Recipe((*recipe.passes[:at], *Recipe.parse(text).passes, *recipe.passes[at:]))


def kind_of(model: ir.Model) -> Kind:
    """What a model is for, by its interface and operators.

    Language models take integers that index a table, and give an output with an entry for each row of it. Text encoders
    take such integers, too. Vision models take pictures (floats or bytes of four dimensions) and convolve or multiply.
    """
    from graphc.checking.roles import role

    vocabulary: set[int | str] = set()
    for value in model.graph.inputs:
        if not value.is_initializer() and value.dtype is not None and value.dtype.is_integer():
            vocabulary.update(role(model, value).bounds if value.shape is None or len(value.shape) == 2 else ())
    sizes = {bound for bound in vocabulary if isinstance(bound, int) and bound > 1}
    if sizes:
        return "language model" if sizes & set(_last_sizes(model)) else "text encoder"
    kinds = Counter(node.op_type for node in edit.nodes(model))
    pictures = any(
        value.shape is not None and len(value.shape) == 4 and value.dtype is not None and value.dtype in _PIXELS
        for value in model.graph.inputs
        if not value.is_initializer()
    )
    return "vision model" if pictures and (kinds["Conv"] or kinds["MatMul"] or kinds["Gemm"]) else "other"


_PIXELS = (
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.DOUBLE,
    ir.DataType.UINT8,
)


def convolutional(model: ir.Model) -> bool:
    """Whether most products are convolutions: one that cuts a picture into patches does not count for much."""
    kinds = Counter(node.op_type for node in edit.nodes(model))
    return kinds["Conv"] + kinds["ConvTranspose"] > kinds["MatMul"] + kinds["Gemm"]


def _last_sizes(model: ir.Model) -> list[int]:
    """The sizes of the last axes of outputs that have others, as far as they are known."""
    from graphc.shapes import Facts

    facts = Facts(model)
    facts.visit_graph(model.graph)
    shapes = [facts(value).shape for value in model.graph.outputs]
    return [shape[-1] for shape in shapes if shape and len(shape) > 1 and isinstance(shape[-1], int)]
