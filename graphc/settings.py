"""The flags that hold for a whole run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from graphc.adapters import Adapters
from graphc.contract import Backend
from graphc.gate import Gate
from graphc.recipe import Recipe

if TYPE_CHECKING:
    from graphc.data import Origin
    from graphc.presets import Goal


@dataclass(frozen=True)
class Settings:
    """Everything that holds for a whole run; the flags of ``graphc optimize``.

    With a ``goal`` the recipe, and limits of its own, are chosen when the model is there, see ``graphc.presets``.
    """

    recipe: Recipe
    target: Backend
    recipe_given: bool = True
    goal: Goal | None = None
    adapters: Adapters = field(default_factory=Adapters)
    task: str = ""
    kv_cache: str = "merged"
    data: Origin | None = None
    calibrate: Origin | None = None
    gates: tuple[Gate, ...] = ()
    seed: int = 0
    strict: bool = False
    unchecked: bool = False
    verify: bool = True
    measure: bool = True
    cache: bool = True
    stop_after: str = ""
    resume: bool = False
    dry_run: bool = False
    timings: Path | None = None
