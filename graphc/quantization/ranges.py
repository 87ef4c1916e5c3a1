"""How the ranges of activations are chosen, where nothing is asked for: by what each way does to the outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from graphc.contract import Context, PassResult
from graphc.quantization import writing
from graphc.quantization.activations import Method
from graphc.quantization.allocation import Way
from graphc.quantization.options import NO_LIMITS, Options
from graphc.quantization.sensitivity import Outputs, remembered
from graphc.quantization.sites import Site
from graphc.quantization.ways import sites_of

METHODS: tuple[Method, ...] = ("minmax", "percentile", "mse", "entropy")
"""What is tried; the first is taken unless another is better by far."""

FAR = 0.5
"""The part of the first one's error below which another one is taken: few samples tell no small differences."""


def chosen(
    options: Options,
    model: ir.Model,
    found: Sequence[Site],
    ways: Sequence[Way | None],
    ctx: Context,
    result: PassResult,
) -> Options:
    """The options with a way to choose ranges, as each changes the outputs with every weight at its nearest code."""
    if options.scheme != "static" or options.activations != "auto":
        return options
    if not ctx.calibration:
        return dataclasses.replace(options, activations="minmax")
    plain = dataclasses.replace(options, **NO_LIMITS, rounding="nearest", correct=False)

    def measure() -> list[list[float]]:
        outputs = Outputs(model, ctx.calibration)
        losses = []
        for i, method in enumerate(METHODS):
            ctx.progress("choosing ranges", i, len(METHODS))
            copy = model.clone()
            tried = dataclasses.replace(plain, activations=method)
            writing.write(tried, copy, sites_of(tried, copy, PassResult()), ways, ctx, PassResult())
            losses.append(outputs.loss(copy))
        return [losses]

    ((*losses,),) = remembered(model, ctx, f"{plain.spec()} {list(map(repr, ways))}", measure)
    best = min(range(len(METHODS)), key=losses.__getitem__)
    best = best if losses[best] < FAR * losses[0] else 0
    said = ", ".join(f"{method} {loss:.1e}" for method, loss in zip(METHODS, losses, strict=True))
    result.note(f"quantize: activations={METHODS[best]}; the outputs' relative error with each: {said}")
    return dataclasses.replace(options, activations=METHODS[best])
