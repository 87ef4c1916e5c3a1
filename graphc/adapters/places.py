"""Which constant of a model each target of an adapter means."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphc.adapters.changes import Change, Replaced, Scaled, Stacked
from graphc.adapters.combine import Combine, combined
from graphc.adapters.merged import part_of
from graphc.adapters.sites import Index, Site, Use, by_module, locate, prefix, stored_shape, uses
from graphc.adapters.targets import Target
from graphc.errors import BadInput, nearest

_SHOWN = 5
"""Names that an error lists."""


@dataclass(frozen=True, eq=False)
class Wish:
    """What all adapters together want of one parameter.

    Attributes:
        targets: What each of them wants; the first one speaks for all.
        changes: Weights and changes.
    """

    targets: tuple[Target, ...]
    changes: tuple[tuple[float, Change], ...]

    @property
    def first(self) -> Target:
        return self.targets[0]


@dataclass(frozen=True)
class Placed:
    """A wish and where it is granted.

    Attributes:
        name: The parameter.
        site: Where it is.
        changes: Weights and changes, as the site stores them.
        targets: Who wants it.
    """

    name: str
    site: Site
    changes: tuple[tuple[float, Change], ...]
    targets: tuple[Target, ...]


def wishes(targets: Sequence[Target], how: Combine, seed: int) -> list[Wish]:
    """What adapters want, one wish for each parameter.

    Raises:
        BadInput: The adapters cannot be combined so.
    """
    by_name: dict[tuple[str, int], list[Target]] = {}
    for target in targets:
        by_name.setdefault((target.name, target.slot), []).append(target)
    ranks = [t.folder.config.get("r", 0) for t in targets if t.folder.kind == "LORA"]
    rank = max((r for r in ranks if isinstance(r, int)), default=0)
    return [Wish(tuple(own), combined(own, how, seed, rank)) for own in by_name.values()]


def place(models: Sequence[ir.Model], wanted: Sequence[Wish]) -> list[list[Placed]]:
    """Find the constants that each wish means, in each of the graphs that a model consists of.

    Raises:
        BadInput: No graph has such a parameter, or it has another shape; the message names module and shapes.
    """
    indices = [Index.of(model) for model in models]
    front = prefix(indices, [wish.first.name for wish in wanted])
    searches = [_Search(index, front, wanted) for index in indices]
    found = [search.run() for search in searches]
    lost = [wish for wish in wanted if all(wish in search.missing for search in searches)]
    for search, own in zip(searches, found, strict=True):
        own += search.tied_to_others(lost)
    lost = [wish for wish in lost if all(wish in search.missing for search in searches)]
    if lost:
        raise searches[0].unknown(lost, none=not any(found))
    return found


class _Search:
    def __init__(self, index: Index, front: tuple[str, str], wanted: Sequence[Wish]) -> None:
        self.index = index
        self.wanted = wanted
        self.strip, self.add = front
        self.readers: dict[ir.Value, dict[str, list[Use]]] = {}
        self.missing: list[Wish] = []

    def run(self) -> list[Placed]:
        found: list[Placed] = []
        missing: list[Wish] = []
        for wish in self.wanted:
            placed = self._named(wish) or self._in_merged(wish)
            if placed is not None:
                found.append(placed)
            elif not wish.first.optional:
                missing.append(wish)
        for wish in missing:
            tied = self._tied(wish)
            if tied is None:
                self.missing.append(wish)
            else:
                found.append(tied)
        return self._once(found)

    def tied_to_others(self, lost: Sequence[Wish]) -> list[Placed]:
        """Parameters that only other modules read: a shared table of an encoder and a decoder, which each have as their
        own. All of them get what the adapter says, as when PEFT merges it."""
        found = []
        for wish in lost:
            value = self.index.names.get(self.name(wish.first.module, wish.first.leaves[0]))
            if value is None:
                continue
            placed = self._at(wish, value, whole=True)
            if placed is not None:
                found.append(placed)
                self.missing.remove(wish)
        return found

    def name(self, module: str, leaf: str) -> str:
        """A parameter's name in the model."""
        full = f"{module}.{leaf}" if module else leaf
        return self.add + full.removeprefix(self.strip)

    def _named(self, wish: Wish) -> Placed | None:
        target = wish.first
        present = [value for leaf in target.leaves if (value := self.index.names.get(self.name(target.module, leaf)))]
        if not present:
            return None
        if target.kind == "stack":
            return self._stacked(wish, present)
        return self._at(wish, present[0])

    def _at(self, wish: Wish, value: ir.Value, *, whole: bool = False) -> Placed | None:
        """Where a wish is granted, if it is at this constant; None if the module is not in this graph.

        Args:
            wish: What is wanted.
            value: The constant.
            whole: Whether all readers are meant, of whatever module they are.
        """
        target = wish.first
        readers = self._readers(value)
        shape = getattr(target.change, "shape", None)
        changes = wish.changes
        placed = locate(value, target.kind, shape, readers, columns_first=_columns_first(target))
        if isinstance(placed, str) and target.kind == "plain" and shape is not None:
            # Saved by a module that has its weight the other way round (Conv1D).
            placed = locate(value, target.kind, shape[::-1], readers)
            changes = tuple((w, Replaced(c.values.T) if isinstance(c, Replaced) else c) for w, c in changes)
        if isinstance(placed, str):
            raise target.folder.bad(
                f"the adapter does not fit '{target.name}'", placed, "is it an adapter of another model?"
            )
        flipped, canonical, own = placed
        for _, change in changes:
            problem = _misfit(change, canonical)
            if problem:
                raise target.folder.bad(f"the adapter does not fit '{target.name}'", problem)
        in_module = None if whole else by_module(value, self.name(target.module, "")[:-1])
        if in_module is not None:
            if not in_module:
                return None
            own = None if len(in_module) == len(value.uses()) else in_module
        if own is not None and target.folder.config.get("ensure_weight_tying"):
            own = None
        note = ""
        if whole:
            own = None
            note = f"'{target.name}' is read by modules that are tied to it only; they all get what the adapter says"
        elif own is not None:
            note = f"'{value.name}' is read by another layer as well, which keeps it as it was"
        return Placed(target.name, Site(value, own, flipped, canonical, 0, canonical[0], note), changes, wish.targets)

    def _readers(self, value: ir.Value) -> dict[str, list[Use]]:
        if value not in self.readers:
            by_kind: dict[str, list[Use]] = {}
            for use in uses(value):
                by_kind.setdefault(use.kind, []).append(use)
            self.readers[value] = by_kind
        return self.readers[value]

    def _stacked(self, wish: Wish, present: Sequence[ir.Value]) -> Placed:
        """A LoRA of a parameter: which one, where several fit by name, and which way round, its shape tells."""
        target = wish.first
        ways = []
        for value in present:
            shape = stored_shape(value)
            for swapped in (False, True):
                changes = tuple((w, _oriented(change, swapped)) for w, change in wish.changes)
                fits = all(
                    isinstance(c, Stacked)
                    and shape == ((len(c.left),) * (len(shape) == 3) + (c.left.shape[1], c.right.shape[2]))
                    for _, c in changes
                )
                if fits:
                    ways.append((value, changes))
        if len(ways) > 1 and len({id(value) for value, _ in ways}) == 1:  # square: whether the graph transposes it
            layouts = {(use.kind, use.flipped) for use in uses(ways[0][0])}
            ways = [ways[flipped] for flipped in (False, True) if layouts == {("rows", flipped)}]
        if len(ways) != 1:
            shapes = ", ".join(f"{value.name} {list(stored_shape(value))}" for value in present)
            what = "does not fit" if not ways else "fits in several ways"
            raise target.folder.bad(f"the adapter of '{target.module}' {what}", f"its parameters are {shapes}")
        value, changes = ways[0]
        shape = stored_shape(value)
        rows = shape[0] * shape[1] if len(shape) == 3 else shape[0]
        name = f"{target.module}.{(value.name or '').rpartition('.')[2]}"
        return Placed(name, Site(value, None, False, (rows, shape[-1]), 0, rows), changes, wish.targets)

    def _in_merged(self, wish: Wish) -> Placed | None:
        """A parameter that is a part of a larger one, such as q of a merged q, k and v."""
        target = wish.first
        siblings = {
            other.first.module: other.first.change.shape[0]
            for other in self.wanted
            if hasattr(other.first.change, "shape") and other.first.leaves[0] == target.leaves[0]
        }
        translated = {self.name(module, "")[:-1]: rows for module, rows in siblings.items()}
        found = part_of(self.name(target.module, "")[:-1], target.leaves[0], self.index.names, translated)
        if found is None:
            return None
        value, start, stop = found
        columns_first = _columns_first(target)
        placed = locate(value, target.kind, None, self._readers(value), columns_first=columns_first)
        if isinstance(placed, str):
            raise target.folder.bad(f"the adapter does not fit '{target.name}'", f"in '{value.name}': {placed}")
        flipped, canonical, own = placed
        for _, change in wish.changes:
            problem = _misfit(change, (stop - start, canonical[1]))
            if problem or stop > canonical[0]:
                raise target.folder.bad(
                    f"the adapter does not fit '{target.name}'",
                    problem or f"'{value.name}' has {canonical[0]} rows, fewer than its parts",
                )
        return Placed(target.name, Site(value, own, flipped, canonical, start, stop), wish.changes, wish.targets)

    def _tied(self, wish: Wish) -> Placed | None:
        """A parameter that is the same as another one: a table that is also the weight of the last product."""
        target = wish.first
        shape = getattr(target.change, "shape", None)
        if target.kind not in ("linear", "table", "plain") or shape is None or target.leaves[0] != "weight":
            return None
        found = []
        for value in {id(value): value for value in self.index.names.values()}.values():
            readers = self._readers(value)
            if "table" not in readers or "rows" not in readers:
                continue
            kind = "linear" if target.kind == "plain" else target.kind
            placed = locate(value, kind, shape, readers)
            if not isinstance(placed, str):
                found.append((value, placed))
        if len(found) != 1:
            return None
        value, (flipped, canonical, own) = found[0]
        if target.folder.config.get("ensure_weight_tying"):
            own = None
        note = f"'{target.name}' is taken to be tied to '{value.name}'; each gets what its adapter says"
        site = Site(value, own, flipped, canonical, 0, canonical[0], note)
        return Placed(target.name, site, wish.changes, wish.targets)

    def _once(self, found: list[Placed]) -> list[Placed]:
        """Without second copies of adapters that are tied."""
        seen: set[int] = set()
        kept = []
        for each in found:
            if each.targets[0].folder.config.get("ensure_weight_tying") and len(each.site.value.uses()) > 1:
                if id(each.site.value) in seen:
                    continue
                seen.add(id(each.site.value))
            kept.append(each)
        return kept

    def unknown(self, lost: Sequence[Wish], *, none: bool) -> BadInput:
        first = lost[0].first
        names = [wish.first.name for wish in lost]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        weights = [name for name in self.index.names if "." in name]
        close = nearest(self.name(first.module, first.leaves[0]), weights) if weights else ""
        if close.startswith("there is:"):
            close = f"it has: {', '.join(sorted(weights)[:_SHOWN])}, ..."
        if not weights:
            close = "export the model with its parameter names"
        what = "the adapter fits nothing in the model" if none else "the adapter wants parameters that the model lacks"
        return first.folder.bad(what, f"not found: {', '.join(names[:_SHOWN])}{more}", close)


def _oriented(change: Change, swapped: bool) -> Change:
    """A LoRA of stacked experts as the base stores them: (out, in), or swapped (in, out)."""
    if not isinstance(change, Stacked) or not swapped:
        return change
    return dataclasses.replace(change, left=change.right.transpose(0, 2, 1), right=change.left.transpose(0, 2, 1))


def _columns_first(target: Target) -> bool:
    """Whether the torch layer has its weight as (in, out), as GPT-2's Conv1D."""
    return bool(target.folder.config.get("fan_in_fan_out"))


def _misfit(change: Change, canonical: tuple[int, int]) -> str:
    """Why a change does not fit a matrix; empty if it does."""
    if isinstance(change, Scaled):
        size = canonical[change.axis]
        fits = size == len(change.factors) if change.axis == 0 else size % len(change.factors) == 0
        return "" if fits else f"it scales {len(change.factors)} channels, the weight has {size}"
    shape = getattr(change, "shape", None)
    if shape is not None and tuple(shape) != canonical:
        return f"the weight has shape {list(canonical)}, the adapter is for {list(shape)}"
    indices = getattr(change, "indices", ())
    if indices and (max(indices) >= canonical[0] or change.values.shape[1] != canonical[1]):  # type: ignore[attr-defined]
        return f"the weight has shape {list(canonical)}, the adapter is for row {max(indices)}"
    return ""
