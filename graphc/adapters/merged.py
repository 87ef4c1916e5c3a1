"""Parameters that an exporter or an optimiser merged into one: q, k and v, or gate and up.

Only names can tell what is inside: ``qkv_proj`` beside an adapter of ``q_proj``, ``gate_up_proj`` beside ``up_proj``.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir


def part_of(
    module: str, leaf: str, names: Mapping[str, ir.Value], rows: Mapping[str, int]
) -> tuple[ir.Value, int, int] | None:
    """The merged constant that a parameter is a part of.

    Args:
        module: The module that is looked for, e.g. ``layers.0.attn.k_proj``.
        leaf: The parameter, e.g. ``weight``.
        names: Constants by name.
        rows: The rows of all modules whose adapters tell them.

    Returns:
        The constant, its first row that belongs to the module and the one after the last; None if there is none, or if
        the sizes of the other parts cannot be told.
    """
    parent, _, own = module.rpartition(".")
    stem, suffix = _split(own)
    front = f"{parent}." if parent else ""
    for name, value in names.items():
        if not name.startswith(front) or not name.endswith(f".{leaf}"):
            continue
        merged = name[len(front) : -len(leaf) - 1]
        if "." in merged or merged == own:
            continue
        parts = _parts(merged, suffix)
        if stem not in parts or len(parts) < 2:
            continue
        sizes = _sizes([f"{front}{part}{suffix}" for part in parts], rows, value)
        if sizes is not None:
            at = parts.index(stem)
            return value, sum(sizes[:at]), sum(sizes[: at + 1])
    return None


def _split(name: str) -> tuple[str, str]:
    """``q_proj`` as ``q`` and ``_proj``."""
    stem, line, rest = name.partition("_")
    return stem, line + rest


def _parts(merged: str, suffix: str) -> list[str]:
    """``qkv_proj`` as q, k, v; ``gate_up_proj`` as gate, up."""
    if suffix and not merged.endswith(suffix):
        return []
    stem = merged.removesuffix(suffix) if suffix else merged
    pieces = stem.split("_")
    return list(stem) if len(pieces) == 1 and stem.isalpha() and len(stem) <= 4 else pieces


def _sizes(parts: list[str], rows: Mapping[str, int], value: ir.Value) -> list[int] | None:
    """The rows of each part: as their adapters say; one that has none gets the rest."""
    from graphc.adapters.sites import locate, stored_shape, uses

    stored = stored_shape(value)
    by_kind: dict[str, list[object]] = {}
    for use in uses(value):
        by_kind.setdefault(use.kind, []).append(use)
    placed = locate(value, "linear" if len(stored) == 2 else "plain", None, by_kind)  # type: ignore[arg-type]
    if isinstance(placed, str):
        return None
    total = placed[1][0]
    known = [rows.get(part, 0) for part in parts]
    rest = total - sum(known)
    unknown = [i for i, size in enumerate(known) if not size]
    if rest < 0 or len(unknown) > 1 or (not unknown and rest):
        return None
    for i in unknown:
        known[i] = rest
    return known
