"""What each operator does to each axis: one line of text for one operator, grouped by theme."""

from graphc.axes.rules import (  # noqa: F401  (importing a theme registers its rules)
    attention,
    contraction,
    elementwise,
    movement,
    normalisation,
    parts,
    quantized,
    recurrent,
    reduction,
    routing,
    spatial,
)
from graphc.axes.rules.registry import Line, NoRule, View, line_for, operator_name, operators, text_of

__all__ = ["Line", "NoRule", "View", "line_for", "operator_name", "operators", "text_of"]
