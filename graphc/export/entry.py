"""``package.module:name`` on the command line: the user's module, the example inputs it brings, and its files."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from graphc.errors import BadInput, nearest
from graphc.export import trouble

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class Entry:
    """What a name gave.

    Attributes:
        module: The torch module, or an exported program.
        example: Example inputs, or None if it brings none.
        files: The Python files of the user that were loaded for it.
        name: What the user called it.
        stored: The files that hold its weights.
    """

    module: torch.nn.Module | ExportedProgram
    example: Any
    files: tuple[Path, ...]
    name: str
    stored: tuple[Path, ...] = ()


def is_entry(text: str) -> bool:
    """Whether a text has the form ``package.module:name``."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", text) is not None and not Path(text).exists()


def find(text: str) -> Entry:
    """Import a module and get its torch module: an instance, or a class or function that gives one without arguments.

    The current folder can be imported from. A function may also return ``(module, example_inputs)``; else
    ``example_inputs`` of the torch module, or of the Python module, is used.

    Raises:
        BadInput: It cannot be imported, there is no such name, or it gives something else.
    """
    import torch

    path, _, attribute = text.partition(":")
    with _from_here():
        python = _imported(path, text)
        made = _attribute(python, attribute, text)
        example = None
        if not isinstance(made, torch.nn.Module):
            made = _called(made, text)
        if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], torch.nn.Module):
            made, example = made
        if not isinstance(made, torch.nn.Module):
            raise BadInput(
                f"'{attribute}' gives no torch module but {type(made).__name__}",
                where=text,
                hint="give a torch.nn.Module, a class of one, or a function that returns one",
            )
        if example is None:
            example = getattr(made, "example_inputs", getattr(python, "example_inputs", None))
            example = example() if callable(example) else example
    return Entry(made, example, tuple(_files(python)), text)


@contextmanager
def _from_here() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    # A folder that changed within a second would be taken from the finder's memory.
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)


def _imported(path: str, text: str) -> ModuleType:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is not None and (path == error.name or path.startswith(f"{error.name}.")):
            here = _modules_beside(error.name)
            raise BadInput(
                f"there is no Python module '{error.name}'",
                where=text,
                why="neither in the current folder nor installed",
                hint=nearest(error.name, here) if here else "run graphc in the folder that holds it",
            ) from None
        raise BadInput(
            f"'{path}' needs the package '{error.name}'", where=_at(error) or text, hint=f"pip install {error.name}"
        ) from None
    except Exception as error:  # whatever somebody's code may raise
        raise _raised(f"importing '{path}' failed", error, text) from error


def _modules_beside(name: str) -> list[str]:
    """The modules that a name may have meant: in the current folder, or in the package that it names."""
    package = name.rpartition(".")[0]
    folders = list(sys.modules[package].__path__) if package in sys.modules else [str(Path.cwd())]
    found = [
        path for folder in folders for path in (*Path(folder).glob("[!_]*.py"), *Path(folder).glob("*/__init__.py"))
    ]
    prefix = f"{package}." if package else ""
    return [prefix + (path.parent.name if path.name == "__init__.py" else path.stem) for path in found]


def _attribute(python: ModuleType, attribute: str, text: str) -> Any:
    import torch

    found: Any = python
    for word in attribute.split("."):
        if not hasattr(found, word):
            known = [
                name
                for name, held in vars(found).items()
                if not name.startswith("_") and (callable(held) or isinstance(held, torch.nn.Module))
            ]
            raise BadInput(f"'{python.__name__}' has no '{word}'", where=text, hint=nearest(word, known))
        found = getattr(found, word)
    return found


def _called(made: Any, text: str) -> Any:
    import inspect

    if not callable(made):
        return made
    try:
        required = [
            p.name
            for p in inspect.signature(made).parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
    except (TypeError, ValueError):
        required = []
    if required:
        raise BadInput(
            f"'{text.partition(':')[2]}' needs arguments: {', '.join(required)}",
            where=text,
            hint="write a function without arguments that returns the module, and name that",
        )
    try:
        return made()
    except Exception as error:  # whatever somebody's code may raise
        raise _raised(f"'{text.partition(':')[2]}' failed", error, text) from error


def _raised(what: str, error: Exception, text: str) -> BadInput:
    return BadInput(what, where=_at(error) or text, why=trouble.summary(error), hint="run it with python to see more")


def _at(error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    lines = [tb for tb, frame in trouble.frames(error) if trouble.is_users(frame.f_code.co_filename)]
    return trouble.line(lines[-1].tb_frame.f_code.co_filename, lines[-1].tb_lineno) if lines else ""


def _files(python: ModuleType) -> Iterator[Path]:
    """The Python files that the user wrote, of all that are loaded: those beside and below the module's package."""
    top = sys.modules[python.__name__.partition(".")[0]]
    file = getattr(top, "__file__", None) or getattr(python, "__file__", None)
    if file is None:
        return
    # A package: its folder and what lies beside it. One that is installed: its own folder.
    folder = Path(file).resolve().parent
    root = folder if "site-packages" in folder.parts or not hasattr(top, "__path__") else folder.parent
    for name in sorted(sys.modules):
        held = getattr(sys.modules[name], "__file__", None)
        if held is None or not held.endswith(".py"):
            continue
        path = Path(held)
        if not path.is_absolute() or not path.is_file():
            continue
        path = path.resolve()
        inside = path.is_relative_to(root) and path.relative_to(root).parts
        if inside and not {"site-packages", "dist-packages"} & set(inside) and not inside[0].startswith("."):
            yield path
