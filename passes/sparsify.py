"""Single weights become zero: any, N of every M, or tiles; the others may take over what they did."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from graphc.contract import Context, Effect, Needs, Pass, PassResult, option
from graphc.errors import BadInput
from graphc.sparsity import layers, ratios, weights
from graphc.sparsity.layers import Layer
from graphc.sparsity.pattern import Pattern

KINDS = ("MatMul", "Gemm", "Conv")
"""The operators whose weights are looked at."""

BACKOFF = (0.75, 0.5, 0.35, 0.2, 0.1)
"""Parts of the ratio that the gate tries when the full one costs too much."""


@dataclass(frozen=True)
class Sparsify(Pass):
    """Write the least important single weights to zero, in any place, in N:M patterns, or in tiles.

    No structure goes, so that ONNX Runtime is not faster for it: the file compresses better, other targets have kernels
    for 2:4 patterns, and quantization can build on it. Embeddings, and weights that are also read as such, stay.
    """

    effect: ClassVar[Effect] = Effect.LOSSY

    ratio: float = option(
        0.5, "The part of the weights that goes, from 0 to below 1; N:M says it itself.", least=0, below=1
    )
    pattern: str = option(
        "free", "free: any weight; N:M: N of M consecutive inputs of an output stay; RxC: tiles of R outputs, C inputs."
    )
    criterion: Literal["magnitude", "wanda", "sparsegpt", "gblm", "random"] = option(
        "magnitude",
        "How weights are ranked: by |w|, |w| * norm of its input, w^2 / [H^-1] in the sweep, or wanda with gradients.",
    )
    update: Literal["auto", "none", "obs"] = option(
        "auto", "Whether the weights that stay make up for those that go, in a sweep; auto: for sparsegpt."
    )
    compare: Literal["auto", "row", "layer"] = option(
        "auto", "What loses the same part: each output's row, or the layer; auto: rows for wanda and gblm."
    )
    allocation: Literal["uniform", "global", "lamp", "erk", "owl", "curves"] = option(
        "uniform",
        "The part that each layer loses: the same; what one threshold for all, on scores or on LAMP's, gives; more of "
        "large layers; less of layers with outliers; what measured errors of the outputs say.",
    )
    most: float = option(0.98, "The part that no layer loses more than, unless all do.", above=0, most=1)
    spread: float = option(
        0.08, "For allocation=owl: how far a layer's ratio may be from the whole's.", least=0, most=1
    )
    outlier: float = option(5.0, "For allocation=owl: from how many times the mean a score is an outlier.", above=0)
    levels_each: int = option(8, "For allocation=curves: how many ratios are measured of each layer.", least=2)
    alpha: float = option(
        1.0, "For gblm: the weight of the gradients, whose mean is brought to that of the inputs.", least=0
    )
    damp: float = option(0.01, "What the sweep adds to the Gram matrix's diagonal, as a part of its mean.", above=0)
    sequential: bool = option(False, "Collect each layer's statistics from the layers before as they have become.")
    kinds: tuple[str, ...] = option(KINDS, "The operators whose weights are looked at.")
    include: tuple[str, ...] = option((), "Patterns of weight or node names to look at; all if none is given.")
    exclude: tuple[str, ...] = option((), "Patterns of weight or node names to leave alone.")

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "sparsify"
        pattern = Pattern.parse(self.pattern)
        if pattern.group and self.allocation != "uniform":
            raise BadInput("N:M takes the same of every layer", where=where, hint=f"leave {self.allocation} out")
        if pattern.tile != (1, 1) and self.criterion == "sparsegpt":
            raise BadInput("sparsegpt chooses single weights", where=where, hint="criterion=wanda update=obs for tiles")
        if self.criterion == "sparsegpt" and self.update == "none":
            raise BadInput("sparsegpt is an update", where=where, hint="criterion=wanda for none")
        for kind in self.kinds:
            if kind not in KINDS:
                raise BadInput(f"weights of '{kind}' are not looked at", where=where, hint=", ".join(KINDS))

    @property
    def _updates(self) -> bool:
        return self.update == "obs" or self.criterion == "sparsegpt"

    def needs(self, model: ir.Model) -> Needs:
        free = self.criterion in ("magnitude", "random") and not self._updates
        return Needs(calibration=not free or self.allocation in ("owl", "curves"))

    def levels(self, model: ir.Model) -> Sequence[Pass]:
        pattern = Pattern.parse(self.pattern)
        if pattern.group:
            wider = (f"{n}:{pattern.group}" for n in range(pattern.kept + 1, pattern.group))
            return (self, *(dataclasses.replace(self, pattern=text) for text in wider))
        return (self, *(dataclasses.replace(self, ratio=round(self.ratio * part, 6)) for part in BACKOFF))

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        result = PassResult()
        pattern = Pattern.parse(self.pattern)
        found = layers.find(model, self.kinds, self.include, self.exclude, result)
        fitting = []
        for layer in found:
            why = pattern.problem(layer.shape)
            if why:
                result.refuse(layer.name, why)
            else:
                fitting.append(layer)
        if not fitting or (not self.ratio and not pattern.group):
            result.refuse("", "no weight can be written to zero" if not fitting else "the ratio is 0")
            return result
        how = weights.How(pattern, self.criterion, self._updates, self._by_row, self.alpha, self.damp, ctx.seed)
        shares = self._shares(model, fitting, how, ctx)
        gone = self._write(model, fitting, shares, how, ctx)
        result.change(f"weight of {len(fitting)} layers written to zero", gone)
        total = sum(layer.size for layer in fitting)
        result.note(
            f"sparsify wrote {gone / total:.1%} of the weights of {len(fitting)} layers to zero. ONNX Runtime computes "
            "with zeros as with other numbers: the model is not faster, and only smaller once it is compressed"
        )
        return result

    @property
    def _by_row(self) -> bool:
        return self.compare == "row" or (self.compare == "auto" and self.criterion in ("wanda", "gblm"))

    def _shares(self, model: ir.Model, found: Sequence[Layer], how: weights.How, ctx: Context) -> list[float]:
        """The part that each layer loses."""
        match self.allocation:
            case "erk":
                return ratios.by_shape(found, self.ratio)
            case "owl":
                return ratios.by_outliers(model, found, self.ratio, self.spread, self.outlier, ctx)
            case "curves":
                return ratios.by_curves(model, found, self.ratio, self.levels_each, self.most, how, ctx)
            case "global" | "lamp":
                lamp = self.allocation == "lamp"
                return ratios.by_threshold(model, found, self.ratio, self.most, how, ctx, lamp=lamp)
        return [self.ratio] * len(found)

    def _write(
        self, model: ir.Model, found: Sequence[Layer], shares: Sequence[float], how: weights.How, ctx: Context
    ) -> int:
        """Write the new weights; returns how many became zero."""
        share = {layer.name: part for layer, part in zip(found, shares, strict=True)}
        gone = done = 0
        for stage in layers.stages(found) if self.sequential else [list(found)]:
            # One run of the data for all that a stage needs; each layer's statistics are read when it is its turn.
            statistics = ctx.collect(model, weights.requests(stage, how)) if weights.requests(stage, how) else {}
            changed = []
            for layer in stage:
                ctx.progress("sparsify", done, len(found))
                done += 1
                new, zeros = weights.sparse(layer, share[layer.name], how, statistics)
                changed.append((layer, new))
                gone += zeros
            for layer, new in changed:
                layer.write(new)
        return gone
