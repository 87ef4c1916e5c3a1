"""The layers of the package: what may import what, wherever in a module it does so."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import graphc

ROOT = Path(graphc.__file__).parent
OUTER = {"passes", "backends"}
"""What the core finds by name."""


def imports(path: Path) -> Iterator[str]:
    """The modules of graphc that a file imports, inside of functions as well, but for what types alone need."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            # Of ``from graphc import runtime`` the name is the module.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from (name for name in visit(ast.parse(path.read_text(encoding="utf-8"))) if name.startswith("graphc."))


def room(path: Path) -> str:
    """The package or module right under ``graphc`` that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """What each of them imports."""
    # What is linked into the package is not looked into unless it is named.
    everywhere = {path for folder in (ROOT, *(ROOT / name for name in OUTER)) for path in folder.rglob("*.py")}
    files = everywhere - {ROOT / "__init__.py", ROOT / "__main__.py"}
    found: dict[str, set[str]] = {room(path): set() for path in files}
    for path in files:
        found[room(path)] |= {name.split(".")[1] for name in imports(path)} & found.keys() - {room(path)}
    return found


def test_imports_go_one_way(graph: dict[str, set[str]]) -> None:
    assert "runtime" in graph["checking"] and "contract" in graph["runtime"]
    list(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_the_core_knows_no_pass_and_no_backend(graph: dict[str, set[str]]) -> None:
    assert graph.keys() >= OUTER
    core = {name: used for name, used in graph.items() if name not in OUTER}
    assert {name: used & OUTER for name, used in core.items() if used & OUTER} == {}
    assert not graph["passes"] & {"backends"} and not graph["backends"] & {"passes"}
