"""What each layer alone would cost if it were quantized, as bars: in a terminal of 80 columns, and in HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

DECADES = 4
"""Orders of magnitude between no bar and a whole one."""

NAME, BAR, MOST = 40, 28, 20
"""Columns of a name and of a whole bar, and how many layers a terminal shows."""


def share(loss: float, largest: float) -> float:
    """The part of a whole bar, 0 to 1, that a loss gets; bars are logarithmic."""
    ratio = loss / largest if largest > 0 else 0.0
    return max(0.0, 1 + math.log10(ratio) / DECADES) if ratio > 0 else 0.0


def text(losses: Mapping[str, float]) -> list[str]:
    """Lines of at most 80 columns, the largest loss first."""
    ranked = sorted(losses.items(), key=lambda item: -item[1])
    largest = ranked[0][1] if ranked else 0.0
    lines = []
    for name, loss in ranked[:MOST]:
        short = name if len(name) <= NAME else "…" + name[1 - NAME :]
        lines.append(f"{short:<{NAME}} {'█' * round(BAR * share(loss, largest)):<{BAR}} {loss:8.1e}")
    if len(ranked) > MOST:
        lines.append(f"and {len(ranked) - MOST} layers below {ranked[MOST - 1][1]:.1e}")
    return lines


def table(losses: Mapping[str, float]) -> str:
    """All of them as an HTML table."""
    ranked = sorted(losses.items(), key=lambda item: -item[1])
    largest = ranked[0][1] if ranked else 0.0
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td class='n'>{loss:.1e}</td><td style='width:40%'>"
        f"<div style='background:#b3261e;height:.7em;width:{100 * share(loss, largest):.1f}%'></div></td></tr>"
        for name, loss in ranked
    )
    return f"<table><tr><th>layer</th><th class='n'>relative error</th><th>bars are logarithmic</th></tr>{rows}</table>"
