"""Sizes for the symbolic dimensions of a model's inputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from graphc.shapes.expressions import Sizes, symbols_in

if TYPE_CHECKING:
    from graphc.checking.inputs import Input

Plan = Callable[[int], Sizes]
"""Sizes by variant: 0 has ordinary ones, 1 has ones where it can, 2 has others again, 3 an empty cache."""

_MULTIPLES = (32, 64, 224, 256, 512, 8, 16, 128, 336, 384, 640, 1024, 1)
"""What dimensions may have to be a multiple of, or at least as large as, the most likely first."""


_PAST = re.compile("past|cache", re.IGNORECASE)
_LENGTH = re.compile("past|cache|seq|len|time|token", re.IGNORECASE)


@dataclass(frozen=True)
class Symbols:
    """The symbolic dimensions of the inputs, by what they seem to count.

    Attributes:
        batch: The batch: the first axis wherever it occurs.
        spatial: Height, width, depth of pictures.
        lengths: All others.
        masks: Those of ``lengths`` that only masks have, such as the length of past and present together.
        past: Those of ``lengths`` that count what a cache holds.
        fixed: What has only one size with which the model runs, in none of the others.
    """

    batch: tuple[str, ...]
    spatial: tuple[str, ...]
    lengths: tuple[str, ...]
    masks: tuple[str, ...]
    past: tuple[str, ...]
    fixed: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def of(inputs: Sequence[Input], fixed: Mapping[str, int] | None = None) -> Symbols:
        """Sort the symbols of some inputs, of which some may be known to have one size."""
        known = fixed or {}
        places: dict[str, list[tuple[Input, int]]] = {}
        for each in inputs:
            for axis, dim in enumerate(each.dims):
                for symbol in (s for s in symbols_in(dim) if s not in known) if isinstance(dim, str) else ():
                    places.setdefault(symbol, []).append((each, axis))
        batch = {s for s, at in places.items() if _is_batch(s, at)}
        spatial = {
            s
            for s, at in places.items()
            if s not in batch and not _LENGTH.search(s) and all(_is_spatial(*p) for p in at)
        }
        lengths = [s for s in places if s not in batch | spatial]
        return Symbols(
            batch=tuple(s for s in places if s in batch),
            spatial=tuple(s for s in places if s in spatial),
            lengths=tuple(lengths),
            masks=tuple(s for s in lengths if all(_is_mask(*p) for p in places[s])),
            past=tuple(s for s in lengths if _PAST.search(s)),
            fixed=known,
        )

    @property
    def variants(self) -> Sequence[int]:
        """The variants of a plan, the first included, that differ for these symbols."""
        if not (self.batch or self.spatial or self.lengths):
            return (0,)
        return (0, 1, 2, 3) if self.past else (0, 1, 2)

    def plans(self) -> Iterator[Plan]:
        """Ways to give sizes, the most likely first; a single empty one without symbols."""
        if not (self.batch or self.spatial or self.lengths):
            yield lambda variant: dict(self.fixed)
            return
        if self.masks:
            yield self._mask_covers_past
        yield self._different
        if len(self.lengths) > 1:
            yield lambda variant: self._sizes(variant, lambda v, i: (8, 1, 12, 8)[v], (64, 32, 96))
        for of in _MULTIPLES:
            yield self._multiple(of)
            if len(self.spatial) > 1:
                yield self._multiple(of, square=True)

    def steps(self, plan: Plan, variant: int) -> Iterator[Sizes]:
        """A variant of a plan, then milder changes of its variant 0, for models that take not all sizes."""
        base, wanted = plan(0), plan(variant)
        yield wanted
        for batch in (True, False):
            changed = {s for s in base if (s in self.batch) == batch}
            yield {s: wanted[s] if s in changed else n for s, n in base.items()}
            yield {s: 2 * n if s in changed and s not in self.fixed else n for s, n in base.items()}

    def _sizes(
        self, variant: int, length: Callable[[int, int], int], picture: tuple[int, int, int], wider: int = 32
    ) -> Sizes:
        return {
            **dict.fromkeys(self.batch, (2, 1, 3, 2)[variant]),
            **{s: (*picture, picture[0])[variant] + (variant != 1) * wider * i for i, s in enumerate(self.spatial)},
            **{s: 0 if variant == 3 and s in self.past else length(variant, i) for i, s in enumerate(self.lengths)},
            **self.fixed,
        }

    def _different(self, variant: int) -> Sizes:
        """Sizes that no two symbols share, so that no mix-up stays hidden."""
        return self._sizes(variant, lambda v, i: (7 + 2 * i, 1, 12 + i, 7 + 2 * i)[v], (64, 32, 96))

    def _mask_covers_past(self, variant: int) -> Sizes:
        sizes = self._different(variant)
        present = [s for s in self.lengths if s not in self.masks and s not in self.past]
        total = sum(sizes[s] for s in (*self.past[:1], *present[:1]))
        return sizes | dict.fromkeys(self.masks, total) if total else sizes

    def _multiple(self, of: int, *, square: bool = False) -> Plan:
        wider = 0 if square else 32
        return lambda variant: self._sizes(variant, lambda v, i: of * (1, 1, 2, 1)[v], (of, of, 2 * of), wider)


def _is_batch(symbol: str, places: Sequence[tuple[Input, int]]) -> bool:
    if "batch" in symbol.lower() or symbol in ("N", "n", "B", "b"):
        return True
    return all(axis == 0 for _, axis in places) and any(len(each.dims) > 1 for each, _ in places)


def _is_spatial(each: Input, axis: int) -> bool:
    """Whether an axis is one of a picture or a volume, in either layout, rather than that of a cache."""
    rank = len(each.dims)
    if rank not in (4, 5) or axis == 0 or not each.plain:
        return False
    if axis < rank - 1 and isinstance(each.dims[-1], int):  # channels last, or a cache [batch, heads, length, size]
        return each.dims[-1] in (1, 3, 4)
    return axis > 1


def _is_mask(each: Input, axis: int) -> bool:
    return axis > 0 and not each.index and (each.mask or "mask" in each.name.lower())
