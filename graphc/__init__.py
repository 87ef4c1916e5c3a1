"""graphc: a compiler that makes trained neural networks smaller and faster, and proves what it did.

import graphc

report = graphc.optimize("model.onnx", "model.opt.onnx")
print(report.output["nodes"], report.rewrite["worst"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphc.axes import coupled_groups as groups
    from graphc.frontends import load as load
    from graphc.pipeline import optimize as optimize
    from graphc.pipeline import verify as verify
    from graphc.recipe import Recipe as Recipe
    from graphc.report import Report as Report

__version__ = "0.1.0"

__all__ = ["Recipe", "Report", "__version__", "groups", "load", "optimize", "verify"]

_HOMES = {
    "Recipe": ("graphc.recipe", "Recipe"),
    "Report": ("graphc.report", "Report"),
    "groups": ("graphc.axes", "coupled_groups"),
    "load": ("graphc.frontends", "load"),
    "optimize": ("graphc.pipeline", "optimize"),
    "verify": ("graphc.pipeline", "verify"),
}


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import graphc` and `graphc --help` cost nothing.
    if name in _HOMES:
        from importlib import import_module

        module, attribute = _HOMES[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'graphc' has no attribute '{name}'")
