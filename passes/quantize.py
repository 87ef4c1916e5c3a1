"""Weights, and on request activations, are rounded to a few bits and written as standard Q/DQ."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphc import shapes
from graphc.contract import Context, Effect, Needs, Pass, PassResult
from graphc.quantization import (
    advice,
    allocation,
    equalisation,
    flattening,
    ranges,
    scaling,
    sensitivity,
    sharing,
    speed,
    static,
    writing,
)
from graphc.quantization.allocation import Way
from graphc.quantization.grid import Grid
from graphc.quantization.layers import Layers
from graphc.quantization.options import NO_LIMITS, Options
from graphc.quantization.sites import Site
from graphc.quantization.ways import integers, sites_of, way_of, why_not


@dataclass(frozen=True)
class Quantize(Options):
    """Round weights to 2 to 8 bits, and with scheme=dynamic or static compute with 8-bit activations.

    What is written is standard DequantizeLinear, QuantizeLinear and integer products, in the forms that ONNX Runtime
    has fast kernels for. Neighbouring weights are kept so small that sums of two 8-bit products never overflow.
    """

    effect: ClassVar[Effect] = Effect.LOSSY

    def needs(self, model: ir.Model) -> Needs:
        wanted = (
            self.scheme == "static"
            or self.rounding != "nearest"
            or self.scaling != "none"
            or self.correct
            or self.keep
            or self.rank
            or self.limits
        )
        return Needs(calibration=bool(wanted), timings=bool(self.time))

    def caveats(self, model: ir.Model, ctx: Context) -> Iterable[str]:
        """What makes this way of quantizing pointless on the target, as known or as measured there."""
        found = [*advice.notes(self, model, ctx.target)]
        if ctx.time is not None:
            found += speed.caveats(model, self.plain(), ctx)
        return [f"quantize: {text}" for text in found]

    def levels(self, model: ir.Model) -> Sequence[Pass]:
        """More and more layers kept, the most sensitive first; of few bits, then 8 bits for all and the same again."""
        count = len(sites_of(self, model, PassResult()))
        found: list[Pass] = [dataclasses.replace(self, keep=n) for n in allocation.steps(self.keep, count)]
        if self.scheme == "weights" and self.bits < 8 and self.form == "int":
            found += [dataclasses.replace(self, bits=8, keep=n) for n in allocation.steps(0, count)]
        return found

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        result = PassResult()
        version = model.graph.opset_imports.get("", 0)
        if self.scheme == "static":
            shapes.infer(model)
            first = [
                s for s in sites_of(self, model, PassResult()) if not why_not(self, s, way_of(self, s, 8), version)
            ]
            result.change("MatMul and Add became Gemm", static.as_gemm(model, first))
        if self.scaling == "flatten":
            self._flatten(model, ctx, result)
        found = sites_of(self, model, result)
        ways: list[Way | None] = []
        for site in found:
            way = way_of(self, site, self.bits)
            why = why_not(self, site, way, version)
            if why:
                result.refuse(site.name, why)
            ways.append(None if why else way)
        layers = Layers(self, model, found, ways)
        if not layers.chosen:
            result.refuse("", "no weight can be quantized")
            return result
        for note in advice.notes(self, model, ctx.target):
            result.note(f"quantize: {note}")
        if self.scaling == "channels":
            whole = [site for site, _ in layers.chosen if integers(self, site)]
            equalisation.apply(model, whole, Grid(8 if self.full_range else 7), ctx, result)
        elif self.scaling in ("smooth", "awq"):
            scaling.apply(model, layers.chosen, self.scaling, self.alpha, ctx, result)
        layers = ranges.chosen(layers, ctx, result)
        if self.limits:
            layers = sharing.allocated(layers, ctx, result)
        if self.rank and not self.keep:
            sharing.ranked(layers, ctx, result)
        if self.keep:
            layers = sharing.kept(layers, ctx, result)
        if not layers.chosen:
            result.refuse("", "every layer stays as it is")
            return result
        before = sum(site.held.nbytes for site, _ in layers.chosen)
        after, size = writing.write(layers, ctx, result)
        result.note(
            f"quantize: {len(layers.chosen)} weights of {size:,} elements take {after:,} bytes instead of {before:,}, "
            f"{8 * after / max(size, 1):.2f} bits each"
        )
        return result

    def _flatten(self, model: ir.Model, ctx: Context, result: PassResult) -> None:
        """Split channels that stand out, if the outputs then change less: copies of a weight are rounded alike."""
        tried, own = model.clone(), PassResult()
        flattening.apply(tried, self._whole(tried), self.extra, ctx, own)
        if own.changed and ctx.calibration:
            outputs = sensitivity.Outputs(model, ctx.calibration)
            off = {**NO_LIMITS, "scaling": "none", "rounding": "nearest", "correct": False}
            plain, losses = dataclasses.replace(self, **off), []
            for each in (model.clone(), tried):
                plain.run(each, ctx)
                losses.append(outputs.loss(each))
            said = f"the outputs' squared error is {losses[1]:.3g} with split channels and {losses[0]:.3g} without"
            if losses[1] >= losses[0]:
                result.refuse("", f"channels are not split: {said}")
                return
            result.note(f"quantize: {said}")
        flattening.apply(model, self._whole(model), self.extra, ctx, result)

    def _whole(self, model: ir.Model) -> list[Site]:
        """The weights whose products are done in integers."""
        return [site for site in sites_of(self, model, PassResult()) if integers(self, site)]
