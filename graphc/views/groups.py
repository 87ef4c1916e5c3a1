"""The coupled groups of a model as plain data, as a table, and as pictures (DOT and SVG)."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from graphc.views.units import count

if TYPE_CHECKING:
    from graphc.axes.groups import Group, Groups, Place

COLOURS = {
    "channel": "#2f6feb",
    "neuron": "#0a7a2f",
    "head": "#b3261e",
    "head_dim": "#c77700",
    "width": "#6f42c1",
    "expert": "#00838f",
    "rank": "#8a6d3b",
}

_LANE, _ROW, _TOP = 16, 20, 40


def document(groups: Groups) -> dict[str, Any]:
    """Everything as plain data, schema ``graphc-groups/1``."""
    return {
        "schema": "graphc-groups/1",
        "groups": [_group(g) for g in groups],
        "fixed": [
            {"weight": f.value.name, "axis": f.axis, "size": f.size, "reason": f.reason, "node": f.node}
            for f in groups.fixed
        ],
    }


def _group(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "size": group.size,
        "kind": group.kind,
        "params": group.params,
        "bytes": group.bytes,
        "exact": group.exact,
        "constraints": list(group.constraints),
        "min_keep": group.min_keep,
        "multiple_of": group.multiple_of,
        "blocks": list(group.blocks),
        "places": [_place(group, p) for p in group.places],
    }


def _place(group: Group, place: Place) -> dict[str, Any]:
    """A place; ``units``, the unit of every position, is there only where offset, stride and repeat do not say it."""
    found = {
        "weight": place.value.name,
        "axis": place.axis,
        "role": place.role,
        "offset": place.offset,
        "stride": place.stride,
        "repeat": place.outer,
    }
    units = place.units
    regular = np.full(len(units), -1)
    block = np.tile(np.repeat(np.arange(group.size), place.stride), place.outer)
    if place.offset + len(block) <= len(units):
        regular[place.offset : place.offset + len(block)] = block
    return found if np.array_equal(units, regular) else found | {"units": units.tolist()}


def dot(groups: Groups) -> str:
    """The group graph in Graphviz's language: weights as boxes, groups as ellipses, an edge for every place."""
    lines = ["graph groups {", "  rankdir=LR; node [fontname=sans-serif fontsize=10];"]
    weights: dict[str, str] = {}
    edges = []
    for i, group in enumerate(groups):
        label = f"{group.name}\\n{group.size} x {group.kind}"
        colour = COLOURS.get(group.kind, "#555555")
        lines.append(f'  g{i} [label="{_quoted(label)}" color="{colour}" fontcolor="{colour}"];')
        for place in group.places:
            weight = place.value.name or ""
            identifier = weights.setdefault(weight, f"w{len(weights)}")
            style = "" if place.role == "produces" else f" style={'dashed' if place.role == 'consumes' else 'dotted'}"
            edges.append(f'  g{i} -- {identifier} [label="axis {place.axis}" color="{colour}"{style}];')
    lines += [f'  {identifier} [shape=box label="{_quoted(name)}"];' for name, identifier in weights.items()]
    return "\n".join([*lines, *edges, "}"]) + "\n"


def _quoted(text: str) -> str:
    return text.replace('"', '\\"')


def svg(groups: Groups) -> str:
    """A picture: a row per weight in the order of their use, a vertical rail per group, a dot where it goes through.

    Filled dots produce the group's units, rings consume them, small dots are only cut along.
    """
    rows: dict[str, int] = {}
    shapes: dict[str, str] = {}
    for value in groups.trace.order:
        if any(p.value is value for g in groups for p in g.places):
            rows.setdefault(value.name or "", len(rows))
            shapes[value.name or ""] = "" if value.shape is None else str([*value.shape])
    rails = _rails(groups, rows)
    left = _LANE * (1 + max((lane for lane, *_ in rails), default=0)) + 12
    height = _TOP + _ROW * len(rows) + 10
    drawn = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{left + 620}' height='{height}' font-family='sans-serif' "
        f"font-size='11'><rect width='100%' height='100%' fill='white'/>",
        _legend(),
    ]
    for name, row in rows.items():
        y = _TOP + _ROW * row
        drawn.append(
            f"<line x1='4' x2='{left - 6}' y1='{y}' y2='{y}' stroke='#eeeeee'/>"
            f"<text x='{left}' y='{y + 4}'>{escape(name)} <tspan fill='#888888'>{escape(shapes[name])}</tspan></text>"
        )
    for lane, first, last, group in rails:
        x, colour = 10 + _LANE * lane, COLOURS.get(group.kind, "#555555")
        title = f"{group.name}: {group.size} x {group.kind}, {group.params} parameters each"
        drawn.append(
            f"<g><title>{escape(title)}</title><line x1='{x}' x2='{x}' y1='{_TOP + _ROW * first}' "
            f"y2='{_TOP + _ROW * last}' stroke='{colour}' stroke-width='3'/>"
        )
        for place in group.places:
            y = _TOP + _ROW * rows[place.value.name or ""]
            fill = colour if place.role == "produces" else "white"
            radius = 3 if place.role == "carries" else 5
            drawn.append(f"<circle cx='{x}' cy='{y}' r='{radius}' fill='{fill}' stroke='{colour}' stroke-width='2'/>")
        drawn.append("</g>")
    return "".join([*drawn, "</svg>\n"])


def _rails(groups: Groups, rows: dict[str, int]) -> list[tuple[int, int, int, Group]]:
    """``(lane, first row, last row, group)``: groups that overlap stand in different lanes, long ones to the left."""
    spans = []
    for group in groups:
        at = [rows[p.value.name or ""] for p in group.places]
        if at:
            spans.append((min(at), max(at), group))
    taken: list[list[tuple[int, int]]] = []
    rails = []
    for first, last, group in sorted(spans, key=lambda s: (s[0] - s[1], s[0])):
        lane = 0
        while lane < len(taken) and any(a <= last and first <= b for a, b in taken[lane]):
            lane += 1
        if lane == len(taken):
            taken.append([])
        taken[lane].append((first, last))
        rails.append((lane, first, last, group))
    return rails


def _legend() -> str:
    parts = []
    for i, (kind, colour) in enumerate(COLOURS.items()):
        parts.append(f"<rect x='{10 + 80 * i}' y='8' width='10' height='10' fill='{colour}'/>")
        parts.append(f"<text x='{24 + 80 * i}' y='17'>{kind}</text>")
    return "".join(parts)


def rows(groups: Groups) -> list[tuple[str, str, str, str, str, str]]:
    """``name, kind, size, parameters of a unit, exact, places`` as text, for the terminal."""
    return [
        (g.name, g.kind, "x".join(map(str, (*g.blocks, g.size))), count(g.params), "yes" if g.exact else "no",
         str(len(g.places)))
        for g in groups
    ]  # fmt: skip
