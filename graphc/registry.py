"""Finds passes, backends and recipes by name: the file's name, or an entry point of a third party.

A module ``graphc/passes/fold_lora.py`` holds the pass ``fold-lora``: the class ``FoldLora``.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal

from graphc.contract import Backend, Pass
from graphc.errors import BadInput, nearest

Kind = Literal["passes", "backends"]


@cache
def _modules(kind: Kind) -> dict[str, str]:
    """Module path by name; modules are not imported."""
    package = importlib.import_module(f"graphc.{kind}")
    found = {
        info.name.replace("_", "-"): f"graphc.{kind}.{info.name}"
        for info in pkgutil.iter_modules(package.__path__)
        if not info.name.startswith("_")
    }
    for point in entry_points(group=f"graphc.{kind}"):
        found.setdefault(point.name, point.value)
    return found


def names(kind: Kind) -> list[str]:
    """All names of a kind, sorted."""
    return sorted(_modules(kind))


def _load(kind: Kind, name: str, base: type) -> type:
    what = {"passes": "pass", "backends": "backend"}[kind]
    modules = _modules(kind)
    if name not in modules:
        raise BadInput(f"there is no {what} '{name}'", hint=nearest(name, modules))
    path, _, attribute = modules[name].partition(":")
    module = importlib.import_module(path)
    wanted = attribute or "".join(part.capitalize() for part in name.split("-"))
    for key, cls in vars(module).items():
        if key.lower() == wanted.lower() and inspect.isclass(cls) and issubclass(cls, base):
            return cls
    raise BadInput(f"module '{path}' has no {what} class '{wanted}'", hint=f"derive it from {base.__name__}")


def pass_class(name: str) -> type[Pass]:
    """The class of a pass.

    Raises:
        BadInput: No pass has this name; the message has the nearest one.
    """
    return _load("passes", name, Pass)


def backend_class(name: str) -> type[Backend]:
    """The class of a backend.

    Raises:
        BadInput: No backend has this name; the message has the nearest one.
    """
    return _load("backends", name, Backend)


def recipe_files() -> dict[str, Path]:
    """The shipped recipes by name."""
    folder = Path(__file__).parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}
