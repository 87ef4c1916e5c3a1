"""Keys and values of the past in 8-bit codes: a quarter of what a decoder with a cache holds for each token."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import ClassVar, Literal

import onnx_ir as ir

from graphc import caches, shapes
from graphc.contract import Context, Effect, Needs, Pass, PassResult, option
from graphc.edit import Array
from graphc.errors import BadInput, nearest
from graphc.quantization import allocation, cached
from graphc.quantization.cached import Cache


@dataclass(frozen=True)
class QuantizeCache(Pass):
    """Let a decoder's inputs and outputs for keys and values be int8, with scales from calibration.

    New keys and values are rounded before they are joined to the past, in standard operators; whoever runs the model
    starts with an empty int8 cache and hands it on as it comes, as ``run.py`` of an artifact does. The runtime makes
    floats of the whole past for each token, which takes time; where ``lower`` may write ONNX Runtime's own operators,
    GroupQueryAttention reads the codes instead. It comes after ``recognise`` and before ``lower``. A graph that reads
    one token at a time is not calibrated well: let another graph be, and give what it became as ``like``, also where a
    prompt has a graph of its own (``--kv-cache split``): both get its scales.
    """

    effect: ClassVar[Effect] = Effect.LOSSY

    scales: Literal["channel", "head"] = option("channel", "What has a scale of its own.")
    keep: int = option(
        0, "How many layers keep their type, those that rounding changes most first; what the gate raises.", least=0
    )
    like: Path | None = option(  # noqa: RUF009
        None, "An .onnx file with such a cache, of the same weights: scales are read there, and nothing is calibrated."
    )
    include: tuple[str, ...] = option((), "Patterns of names of inputs or outputs to look at; all if none is given.")
    exclude: tuple[str, ...] = option((), "Patterns of names of inputs or outputs to leave alone.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.like is not None and self.keep:
            raise BadInput("layers are kept by calibration", where=self.name, hint="leave keep or like out")

    @property
    def alone(self) -> bool:
        return self.like is None

    def needs(self, model: ir.Model) -> Needs:
        return Needs(calibration=self.like is None)

    def caveats(self, model: ir.Model, ctx: Context) -> Iterable[str]:
        """What is known beforehand: that only ONNX Runtime's own operator reads codes."""
        if ctx.target.name == "onnxruntime" and ctx.target.portable and caches.pairs(model):
            yield (
                "quantize-cache: in standard operators the whole past becomes floats for each token: the cache is "
                "smaller, and slower; -t 'onnxruntime{portable=false}' lets lower write what reads codes"
            )

    def levels(self, model: ir.Model) -> Sequence[Pass]:
        """More and more layers kept."""
        if self.like is not None:
            return (self,)
        copy = model.clone()
        shapes.infer(copy)
        count = len(cached.units(self._named(cached.find(copy, PassResult()))))
        return [dataclasses.replace(self, keep=n) for n in allocation.steps(self.keep, count)]

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        result = PassResult()
        shapes.infer(model)
        found = self._named(cached.find(model, result))
        known = cached.read(self.like) if self.like else {}
        firsts = {value: cached.fitted(value, known[value.name or ""]) for value in cached.firsts(model, known)}
        if firsts:
            cached.round_firsts(model, firsts)
            result.change("first keys or values in 8-bit codes, which are outputs now", len(firsts))
        elif not caches.pairs(model):
            result.refuse("", "no input of the model is a cache that an output continues")
        if not found:
            return result
        scales = {cache: cached.fitted(cache.past, known[cache.name]) for cache in found if cache.name in known}
        if self.like is None:
            scales = self._calibrated(model, found, ctx, result)
        elif len(scales) < len(found):
            missing = next(cache for cache in found if cache not in scales)
            result.refuse(missing.past, "the model that scales are read from has no such cache in codes")
        if not scales:
            result.refuse("", "every cache stays as it is")
            return result
        cached.write(model, scales)
        result.change("cache in 8-bit codes, which are inputs and outputs now", len(scales))
        sizes = [cache.heads * cache.channels for cache in scales]
        left = [4 * cache.heads * cache.channels for cache in found if cache not in scales]
        before, after = 4 * sum(sizes) + sum(left), sum(sizes) + sum(left)
        result.note(
            f"quantize-cache: the cache takes {after:,} bytes a token instead of {before:,}; callers start with an "
            f"empty int8 cache: '{next(iter(scales)).name}' is int8 now, and so on"
        )
        return result

    def _calibrated(
        self, model: ir.Model, found: Sequence[Cache], ctx: Context, result: PassResult
    ) -> dict[Cache, Array]:
        """Scales of the caches that become codes."""
        seen = cached.moments(model, found, ctx, result)
        scales = {cache: cached.scale(cache, seen[cache], self.scales == "channel") for cache in found}
        losses = {cache: cached.loss(cache, seen[cache], scales[cache]) for cache in found}
        result.losses = {cache.name: value for cache, value in losses.items()}
        worst = sorted(cached.units(found), key=lambda unit: -max(losses[cache] for cache in unit))
        for cache in (cache for unit in worst[: self.keep] for cache in unit):
            result.refuse(cache.past, f"one of the {self.keep} layers whose cache rounding changes most stays as it is")
            del scales[cache]
        return scales

    def _named(self, found: Sequence[Cache]) -> list[Cache]:
        """Those that options name."""
        names = {cache: (cache.name, str(cache.present.name)) for cache in found}
        for which, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for each in names.values() for name in each):
                    raise BadInput(
                        f"no cache is called '{pattern}'",
                        where=f"quantize-cache{{{which}}}",
                        hint=nearest(pattern.strip("*"), [name for each in names.values() for name in each]),
                    )

        def any_of(cache: Cache, patterns: Sequence[str]) -> bool:
            return any(fnmatchcase(name, pattern) for pattern in patterns for name in names[cache])

        return [
            cache
            for cache in found
            if (not self.include or any_of(cache, self.include)) and not any_of(cache, self.exclude)
        ]
