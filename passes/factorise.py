"""Weights become products of two thin ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.contract import Context, Effect, Needs, Pass, PassResult, option
from graphc.errors import BadInput
from graphc.factorisation import ranks, sites
from graphc.factorisation.sites import Site
from graphc.factorisation.spectrum import Spectrum, spectrum

BACKOFF = (0.75, 0.5, 0.35, 0.2, 0.1)
"""Parts of the ratio that the gate tries when the full one costs too much."""

GRAMS = 1 << 29
"""Bytes of statistics that are collected together."""


@dataclass(frozen=True)
class Factorise(Pass):
    """Write weights as products of two thin ones: y = W x becomes y = B (A x) with a small inner dimension, the rank.

    Of MatMul, Gemm, convolutions without groups (a convolution to few channels, then one of single positions) and
    tables of embeddings. All dimensions that other operators see stay, so that it works where no group can be cut.
    With 'gram' the loss of each layer's output is the least that any weight of this rank can have.
    """

    effect: ClassVar[Effect] = Effect.LOSSY

    ratio: float = option(
        0.2, "The part of the parameters of the weights looked at that goes, from 0 to below 1.", least=0, below=1
    )
    whitening: Literal["gram", "inputs", "fisher", "none"] = option(
        "gram",
        "Which errors count: those on inputs as calibration has them, by their Gram matrix or each one's size alone; "
        "by squared gradients (needs torch); those of the weight itself.",
    )
    allocation: Literal["energy", "uniform"] = option(
        "energy", "The ranks with the least sum of relative losses of outputs, or the same part of each weight."
    )
    alpha: float = option(0.5, "For whitening=inputs: the power of the inputs' mean size.", least=0)
    multiple_of: int = option(8, "What ranks are multiples of.", least=1)
    kinds: tuple[str, ...] = option(sites.KINDS, "The operators whose weights are looked at.")
    include: tuple[str, ...] = option((), "Patterns of weight or node names to look at; all if none is given.")
    exclude: tuple[str, ...] = option((), "Patterns of weight or node names to leave alone.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in self.kinds:
            if kind not in sites.KINDS:
                raise BadInput(f"weights of '{kind}' are not looked at", where="factorise", hint=", ".join(sites.KINDS))

    def needs(self, model: ir.Model) -> Needs:
        return Needs(calibration=self.whitening != "none")

    def levels(self, model: ir.Model) -> Sequence[Pass]:
        return (self, *(dataclasses.replace(self, ratio=round(self.ratio * part, 6)) for part in BACKOFF))

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        result = PassResult()
        found = sites.find(model, self.kinds, self.include, self.exclude, result)
        if not found or not self.ratio:
            result.refuse("", "the ratio is 0" if found else "no weight can become two")
            return result
        factors = self._factors(model, found, ctx)
        chosen = self._ranks(found, factors)
        names, before, after = edit.Names(model), 0, 0
        for site, both, rank in zip(found, factors, chosen, strict=True):
            before += site.size
            rank = min(rank, len(both.energy))
            cost = rank * sum(site.shape)
            if not rank or cost >= site.size:
                after += site.size
                result.refuse(site.name, "two factors that lose little enough are not smaller")
                continue
            after += cost
            result.losses[site.name] = both.lost(rank)
            site.write(both, rank, names)
            result.change("weight factorised")
        result.note(
            f"factorise took {1 - after / before:.1%} of the parameters of {len(found)} weights; "
            f"{len(result.losses)} became two"
        )
        return result

    def _factors(self, model: ir.Model, found: Sequence[Site], ctx: Context) -> list[Spectrum]:
        factors: list[Spectrum] = []
        for batch in self._batches(found):
            requests = dict.fromkeys(r for site in batch for r in site.requests(self.whitening))
            statistics = ctx.collect(model, requests) if requests else {}
            for site in batch:
                ctx.progress("factorise", len(factors), len(found))
                weight = site.matrix()
                if not np.isfinite(weight).all():
                    raise BadInput("a weight holds NaN or infinity", where=site.name, hint="exclude it")
                inputs = site.inputs(self.whitening, self.alpha, statistics)
                factors.append(sites.kept(spectrum(weight, inputs, ranks.even(site.shape))))
        return factors

    def _batches(self, found: Sequence[Site]) -> Iterator[list[Site]]:
        """Sites whose statistics fit into memory together; those that read the same are neighbours."""
        batch: list[Site] = []
        held = 0
        for site in found:
            size = 0 if site.picks or self.whitening != "gram" else 8 * site.shape[1] ** 2
            if batch and held + size > GRAMS:
                yield batch
                batch, held = [], 0
            batch.append(site)
            held += size
        yield batch

    def _ranks(self, found: Sequence[Site], factors: Sequence[Spectrum]) -> list[int]:
        shapes = [site.shape for site in found]
        if self.allocation == "uniform":
            return ranks.uniform(shapes, self.ratio, self.multiple_of)
        energies, totals = [each.energy for each in factors], [each.total for each in factors]
        return ranks.by_energy(shapes, energies, totals, self.ratio, self.multiple_of)
