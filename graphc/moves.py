"""Operators that only move elements: those of their first input, which come out as they are. Each is named once."""

from __future__ import annotations

RESHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
"""All elements in their order, in another shape."""

VIEWS = ("Identity", *RESHAPES)
"""All elements in their order."""

TURNS = ("DepthToSpace", "ReverseSequence", "SpaceToDepth", "Transpose")
"""All elements in another order."""

PICKS = ("Compress", "Gather", "GatherElements", "GatherND", "Slice", "Split")
"""Some elements, chosen by their places."""

REPEATS = ("Expand", "Tile")
"""All elements, several times."""

MOVES = (*VIEWS, *TURNS, *PICKS, *REPEATS)
"""All of them. Concat, which moves the elements of all its inputs, is none."""
