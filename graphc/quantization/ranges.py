"""How the ranges of activations are chosen, where nothing is asked for: by what each way does to the outputs."""

from __future__ import annotations

from graphc.contract import Context, PassResult
from graphc.quantization import writing
from graphc.quantization.activations import Method
from graphc.quantization.layers import Layers
from graphc.quantization.sensitivity import Outputs, remembered

METHODS: tuple[Method, ...] = ("minmax", "percentile", "mse", "entropy")
"""What is tried; the first is taken unless another is better by far."""

FAR = 0.5
"""The part of the first one's error below which another one is taken: few samples tell no small differences."""


def chosen(layers: Layers, ctx: Context, result: PassResult) -> Layers:
    """Layers with a way to choose ranges, as each changes the outputs with every weight at its nearest code."""
    if layers.options.scheme != "static" or layers.options.activations != "auto":
        return layers
    if not ctx.calibration:
        return layers.told(activations="minmax")
    quick = layers.quick.told(correct=False)

    def measure() -> list[list[float]]:
        outputs = Outputs(layers.model, ctx.calibration)
        losses = []
        for i, method in enumerate(METHODS):
            ctx.progress("choosing ranges", i, len(METHODS))
            copy = quick.told(activations=method).copied()
            writing.write(copy, ctx, PassResult())
            losses.append(outputs.loss(copy.model))
        return [losses]

    ((*losses,),) = remembered(layers.model, ctx, f"{quick.options.spec()} {list(map(repr, layers.ways))}", measure)
    best = min(range(len(METHODS)), key=losses.__getitem__)
    best = best if losses[best] < FAR * losses[0] else 0
    said = ", ".join(f"{method} {loss:.1e}" for method, loss in zip(METHODS, losses, strict=True))
    result.note(f"quantize: activations={METHODS[best]}; the outputs' relative error with each: {said}")
    return layers.told(activations=METHODS[best])
