"""Small graphs whose couplings are known and proved, one function each; ``ALL`` holds them by name."""

from . import attention, convolution, llm, misc, networks, recurrent, residual  # noqa: F401  (registers the fragments)
from .core import ALL, Fragment, Group, feeds, run

__all__ = ["ALL", "Fragment", "Group", "feeds", "run"]
