"""What makes the command line start fast."""

from __future__ import annotations

import gc
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType

# onnx-ir imports sympy, a third of a second, for arithmetic on symbolic dimensions that graphc does not use.
_SELDOM_USED = frozenset({"sympy", "onnx_ir._symbolic_shapes"})


class _Deferred:
    """Finds the modules above and has them executed when an attribute of theirs is first read."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _SELDOM_USED:
            return None
        spec = PathFinder.find_spec(name, path, target)  # type: ignore[arg-type]
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


def prepare_process() -> None:
    """Postpone imports that are seldom needed, collect garbage seldom; for the process's entry point only."""
    sys.meta_path.insert(0, _Deferred)
    # Graphs are millions of small objects that live as long as the process: looking through them again and
    # again for garbage takes as long as building them.
    gc.set_threshold(200_000, 20, 100)
