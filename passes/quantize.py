"""Weights, and on request activations, are rounded to a few bits and written as standard Q/DQ."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from graphc import edit, shapes
from graphc.contract import Context, Effect, Needs, Pass, PassResult, option
from graphc.errors import BadInput
from graphc.quantization import (
    activations,
    advice,
    allocation,
    correction,
    dynamic,
    equalisation,
    guard,
    rounding,
    scaling,
    sensitivity,
    sites,
    speed,
    static,
    store,
    streams,
)
from graphc.quantization.allocation import Way
from graphc.quantization.granularity import Granularity
from graphc.quantization.grid import Grid
from graphc.quantization.rounding import Codes
from graphc.quantization.sites import KINDS, Site
from graphc.stats import RangeOf, Request

MEASURED = 64 << 20
"""Bytes of constants up to which sensitivities are measured at the model's outputs."""

EMBEDDED = 32
"""Elements of a row of an embedding that share a scale, if it has fewer than 8 bits and nothing else is asked for."""

NO_LIMITS: dict[str, Any] = {"rank": False, "keep": 0, "budget": 0.0, "megabytes": 0.0, "time": 0.0}
"""Options with which all layers are quantized alike."""

SHORT = 4
"""Inputs of an output from which the later ones can make up for what GPTQ does to the earlier."""

STEPS = 100
"""Steps of projected descent."""


@dataclass(frozen=True)
class Quantize(Pass):
    """Round weights to 2 to 8 bits, and with scheme=dynamic or static compute with 8-bit activations.

    What is written is standard DequantizeLinear, QuantizeLinear and integer products, in the forms that ONNX Runtime
    has fast kernels for. Weights under its default options are kept to 7 bits where 8-bit products could overflow.
    """

    effect: ClassVar[Effect] = Effect.LOSSY

    scheme: Literal["weights", "dynamic", "static"] = option(
        "weights", "weights: they only; dynamic: activations too, as they come; static: activations by calibration."
    )
    bits: int = option(8, "Bits of a weight: 8, 4, 3 (stored in 4) or 2; dynamic and static take 8.")
    block: int = option(0, "Inputs of an output that share a scale: 16 to 256; 0: all of them; -1: the whole tensor.")
    symmetric: bool = option(True, "Codes with a sign around zero; false: unsigned, with zero points.")
    form: Literal["int", "float8e4m3fn", "float8e5m2"] = option("int", "Whether codes are integers or 8-bit floats.")
    rounding: Literal["nearest", "gptq", "awp"] = option(
        "nearest",
        "nearest: each weight for itself; gptq: so that the layer's output changes least, calibrated; awp: that by "
        "projected descent. With both, zeros stay.",
    )
    clip: Literal["none", "mse"] = option("none", "mse: narrow each range to where the squared error is least.")
    order: bool = option(True, "For rounding=gptq: columns with the largest inputs first.")
    damp: float = option(0.01, "For rounding=gptq: what is added to the Gram matrix's diagonal, as a part of its mean.")
    sequential: bool = option(False, "For rounding=gptq: collect each layer's inputs from quantized layers before it.")
    scaling: Literal["none", "smooth", "awq", "channels"] = option(
        "none",
        "Move scales from activations to weights first, which is exact: SmoothQuant, AWQ's search, or, for "
        "scheme=static, channels brought to like ranges through Relu, sums, pooling and depthwise convolutions; "
        "calibrated.",
    )
    alpha: float = option(0.5, "For scaling=smooth: how much of the activation's range moves, from 0 to 1.")
    correct: bool = option(
        False, "Add to biases what the rounding of weights takes from the outputs' means; calibrated."
    )
    activations: Literal["minmax", "percentile", "mse", "entropy"] = option(
        "minmax", "For scheme=static: how the range of an activation is chosen from what calibration saw."
    )
    percentile: float = option(99.999, "For activations=percentile: the part of the values that is in the range.")
    full_range: bool = option(
        False, "For dynamic and static: 8-bit weights; on CPUs without VNNI only right as an artifact, which is slower."
    )
    embeddings: int = option(8, "Bits of embeddings and of heads tied to them; 0 leaves them.")
    budget: float = option(
        0.0, "Bits per weight, scales included, that layers share by what their errors cost; 0: none."
    )
    megabytes: float = option(
        0.0, "Instead of budget: megabytes that all quantized weights may take together; 0: none."
    )
    time: float = option(
        0.0, "Instead of budget: the part of float32's time that products may take, as timed on the target; 0: none."
    )
    rows: int = option(1, "For time: the rows that products are timed with.")
    choices: tuple[int, ...] = option((2, 3, 4, 8), "For a budget: the bits that a layer may get; or its own type.")
    rank: bool = option(False, "Measure what each layer alone costs, for the report; its bars: -v, --report FILE.html.")
    keep: int = option(0, "How many layers, the most sensitive first, get the fallback; what the gate raises.")
    fallback: int = option(0, "Bits of layers that are kept; 0: 8 for fewer bits, else their own type.")
    sensitivity: Literal["auto", "outputs", "layers"] = option(
        "auto", "How layers are ranked: measured at the model's outputs, or estimated at their own; auto: by size."
    )
    least: int = option(1024, "Elements from which a weight is quantized; scheme=static takes all.")
    kinds: tuple[str, ...] = option(KINDS, "The operators whose weights are looked at; Gather for embeddings.")
    include: tuple[str, ...] = option((), "Patterns of weight or node names to look at; all if none is given.")
    exclude: tuple[str, ...] = option((), "Patterns of weight or node names to leave alone.")

    def __post_init__(self) -> None:
        where = "quantize"
        for name, bits in (("bits", self.bits), *(("choices", b) for b in self.choices)):
            if bits not in (2, 3, 4, 8):
                raise BadInput(f"{name} cannot be {bits}", where=where, hint="2, 3, 4 or 8")
        for name, bits in (("embeddings", self.embeddings), ("fallback", self.fallback)):
            if bits not in (0, 4, 8):
                raise BadInput(f"{name} cannot be {bits}", where=where, hint="0, 4 or 8")
        if self.block not in (-1, 0) and not 16 <= self.block <= 256:
            raise BadInput(
                f"block cannot be {self.block}", where=where, hint="0, -1, or 16 to 256; powers of two are fast"
            )
        if self.form != "int" and (self.bits != 8 or not self.symmetric or self.rounding != "nearest"):
            raise BadInput("floats have 8 bits, a sign, and no gptq", where=where, hint="leave the other options out")
        plain = self.bits == 8 and not self.block and self.symmetric and self.form == "int" and not self._limits
        if self.scheme != "weights" and not plain:
            raise BadInput(
                f"scheme={self.scheme} takes symmetric 8-bit integers with a scale for each output",
                where=where,
                hint="leave bits, block, symmetric, form and budget out",
            )
        if self.scaling == "channels" and self.scheme != "static":
            raise BadInput("scaling=channels is for scheme=static", where=where, hint="smooth or awq")
        if (
            self.damp <= 0
            or not 0 <= self.alpha <= 1
            or not 50 < self.percentile <= 100
            or self.keep < 0
            or min(self._limits, default=0) < 0
            or self.rows < 1
        ):
            raise BadInput(
                "an option is out of its range", where=where, hint="damp > 0, percentile 50 to 100, keep >= 0"
            )
        if len(self._limits) > 1:
            raise BadInput("budget, megabytes and time are three ways to limit the same", where=where, hint="give one")
        for kind in self.kinds:
            if kind not in KINDS:
                raise BadInput(f"weights of '{kind}' are not looked at", where=where, hint=", ".join(KINDS))

    @property
    def _limits(self) -> list[float]:
        """The limits that layers share; one at most."""
        return [limit for limit in (self.budget, self.megabytes, self.time) if limit]

    def needs(self, model: ir.Model) -> Needs:
        wanted = (
            self.scheme == "static"
            or self.rounding != "nearest"
            or self.scaling != "none"
            or self.correct
            or self.keep
            or self.rank
            or self._limits
        )
        return Needs(calibration=bool(wanted), timings=bool(self.time))

    def caveats(self, model: ir.Model, ctx: Context) -> Iterable[str]:
        """What makes this way of quantizing pointless on the target, as known or as measured there."""
        found = [*advice.notes(self, model, ctx.target)]
        if ctx.time is not None:
            found += speed.caveats(model, self._plain(), ctx)
        return [f"quantize: {text}" for text in found]

    def levels(self, model: ir.Model) -> Sequence[Pass]:
        """More and more layers kept, the most sensitive first; of few bits, then 8 bits for all and the same again."""
        count = len(self._sites(model, PassResult()))
        found: list[Pass] = [dataclasses.replace(self, keep=n) for n in allocation.steps(self.keep, count)]
        if self.scheme == "weights" and self.bits < 8 and self.form == "int":
            found += [dataclasses.replace(self, bits=8, keep=n) for n in allocation.steps(0, count)]
        return found

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        result = PassResult()
        if self.scheme == "static":
            shapes.infer(model)
            first = self._sites(model, PassResult())
            result.change("MatMul and Add became Gemm", static.as_gemm(model, first))
        found = self._sites(model, result)
        version = model.graph.opset_imports.get("", 0)
        ways: list[Way | None] = []
        for site in found:
            way = self._way(site, self.bits)
            why = self._why_not(site, way, version)
            if why:
                result.refuse(site.name, why)
            ways.append(None if why else way)
        if not any(ways):
            result.refuse("", "no weight can be quantized")
            return result
        for note in advice.notes(self, model, ctx.target):
            result.note(f"quantize: {note}")
        if self.scaling != "none":
            self._scale(model, [(site, way) for site, way in zip(found, ways, strict=True) if way], ctx, result)
        if self._limits:
            ways = self._allocated(model, found, ways, ctx, result)
        if self.rank and not self.keep:
            losses = self._losses(model, found, [[way] for way in ways], ctx)
            result.losses = {site.name: row[0] for site, way, row in zip(found, ways, losses, strict=True) if way}
        if self.keep:
            ways = self._kept(model, found, ways, ctx, result)
        if not any(ways):
            result.refuse("", "every layer stays as it is")
            return result
        before = sum(site.held.nbytes for site, way in zip(found, ways, strict=True) if way)
        after, size = self._write(model, found, ways, ctx, result)
        count = sum(way is not None for way in ways)
        result.note(
            f"quantize: {count} weights of {size:,} elements take {after:,} bytes instead of {before:,}, "
            f"{8 * after / max(size, 1):.2f} bits each"
        )
        return result

    # What is quantized, and how.

    def _sites(self, model: ir.Model, result: PassResult) -> list[Site]:
        least = 0 if self.scheme == "static" else self.least
        return sites.find(model, self.kinds, self.include, self.exclude, least, result)

    def _way(self, site: Site, bits: int) -> Way | None:
        """How a weight is quantized with these bits; 0 leaves it."""
        if site.gathers:
            # Whole rows are looked up: a scale for each, or of few bits for each block.
            bits = self.embeddings if self.scheme == "weights" and self.embeddings < bits else bits and self.embeddings
            return (Grid(bits), self._rows(site, bits)) if bits else None
        if not bits:
            return None
        if self._integers(site):
            return Grid(8 if self.full_range else 7), Granularity(site.channel)
        grid = Grid(bits, self.symmetric, self.form)
        if self.block == -1:
            return grid, Granularity()
        blocked = self.block > 0 and site.depth > self.block
        if blocked:
            return grid, Granularity(site.axis, self.block)
        if site.channel is None:
            return grid, Granularity(site.axis, site.depth)
        return grid, Granularity(site.channel)

    def _rows(self, site: Site, bits: int) -> Granularity:
        """What shares a scale in a table whose rows are looked up: of few bits, blocks that rows divide into."""
        block = self.block if self.block > 0 else EMBEDDED
        while block > 16 and site.depth % block:
            block //= 2
        return Granularity(0) if bits == 8 or site.depth % block else Granularity(site.axis, block)

    def _integers(self, site: Site) -> bool:
        """Whether products with this weight are done in integers."""
        if self.scheme == "weights" or site.gathers or site.views:
            return False
        return not (dynamic.why_not(site) if self.scheme == "dynamic" else static.why_not(site))

    def _why_not(self, site: Site, way: Way | None, version: int) -> str:
        if way is None:
            return "embeddings=0 leaves embeddings as they are"
        grid, granularity = way
        if self.scheme != "weights" and not site.gathers and not self._integers(site):
            return dynamic.why_not(site) if self.scheme == "dynamic" else static.why_not(site)
        if self.scheme == "static" and not site.gathers and not site.calibrated:
            return "activations in the bodies of If and Loop are not calibrated"
        plain = grid.dtype.bitwidth == 8 and not granularity.block and grid.form == "int" and not site.gathers
        needed = 13 if plain else grid.opset
        if version < needed:
            return f"it needs opset {needed}, the model has {version}"
        if not rounding.finite(site.held):
            return "it holds NaN or infinity"
        return ""

    def _scale(self, model: ir.Model, chosen: Sequence[tuple[Site, Way]], ctx: Context, result: PassResult) -> None:
        """Move scales from activations to the weights that read them."""
        if self.scaling == "channels":
            self._equalise(model, [site for site, _ in chosen if self._integers(site)], ctx, result)
            return
        found = scaling.groups(chosen)
        if not found or self.scaling == "none":
            result.refuse("", "no normalisation could take the scales of what reads it")
            return
        names = edit.Names(model)
        statistics = ctx.collect(model, {members[0][0].uses[0].moments for members in found})
        for i, members in enumerate(found):
            ctx.progress("scaling", i, len(found))
            moved = scaling.move(members, statistics, self.scaling, self.alpha, names)
            result.change("activation's scales moved to its weights", int(moved))

    def _equalise(self, model: ir.Model, chosen: Sequence[Site], ctx: Context, result: PassResult) -> None:
        """Bring the channels between products to like ranges."""
        found = streams.find(chosen)
        if not found:
            result.refuse("", "no channels are between products that let a factor through")
            return
        names = edit.Names(model)
        statistics = ctx.collect(model, {use.moments for stream in found for use in stream.readers})
        grid = Grid(8 if self.full_range else 7)
        for i, stream in enumerate(found):
            ctx.progress("scaling", i, len(found))
            factors = equalisation.factors(stream, statistics, grid)
            if factors is not None:
                streams.scale(stream, factors, names)
                result.change("channels brought to like ranges", stream.channels)

    # Layers that get more bits than others.

    def _losses(
        self, model: ir.Model, found: Sequence[Site], each: Sequence[Sequence[Way | None]], ctx: Context
    ) -> list[list[float]]:
        """What each way to quantize each layer alone costs; 0 for none."""
        mode = self.sensitivity
        if mode == "auto":
            mode = "outputs" if sum(s.held.nbytes for s in found) <= MEASURED and ctx.calibration else "layers"
        if mode == "outputs" and not ctx.calibration:
            raise BadInput("sensitivity=outputs needs calibration data", where="quantize", hint="--calibrate")
        plain = dataclasses.replace(self, **NO_LIMITS, rounding="nearest", sensitivity=mode)

        def measure() -> list[list[float]]:
            if mode == "layers":
                wanted = {use.moments for site in found if site.calibrated for use in site.uses}
                statistics: Mapping[Any, Any] = ctx.collect(model, wanted) if ctx.calibration else {}
                rows = []
                for i, (site, ways) in enumerate(zip(found, each, strict=True)):
                    ctx.progress("estimating layers", i, len(found))
                    rows.append(sensitivity.own(site, ways, statistics))
                return rows
            outputs = sensitivity.Outputs(model, ctx.calibration)
            rows = []
            for i, ways in enumerate(each):
                ctx.progress("measuring layers", i, len(found))
                row = []
                for way in ways:
                    if way is None:
                        row.append(0.0)
                        continue
                    copy = model.clone()
                    own = plain._sites(copy, PassResult())
                    alone: list[Way | None] = [way if k == i else None for k in range(len(own))]
                    plain._write(copy, own, alone, ctx, PassResult())
                    row.append(outputs.loss(copy))
                rows.append(row)
            return rows

        return sensitivity.remembered(model, ctx, f"{plain.spec()} {[list(map(repr, ways)) for ways in each]}", measure)

    def _kept(
        self, model: ir.Model, found: Sequence[Site], ways: Sequence[Way | None], ctx: Context, result: PassResult
    ) -> list[Way | None]:
        """The ways with the most sensitive layers at the fallback."""
        losses = [row[0] for row in self._losses(model, found, [[way] for way in ways], ctx)]
        result.losses = {site.name: loss for site, way, loss in zip(found, ways, losses, strict=True) if way}
        order = sorted((i for i, way in enumerate(ways) if way), key=lambda i: -losses[i])
        bits = self.fallback or (8 if self.bits < 8 else 0)
        kept = list(ways)
        for i in order[: self.keep]:
            kept[i] = self._way(found[i], bits) if self.scheme == "weights" else None
        names = [f"{found[i].name} ({losses[i]:.1e})" for i in order[: self.keep]]
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        cost = sum(
            allocation.nbytes(found[i], kept[i]) - allocation.nbytes(found[i], ways[i]) for i in order[: self.keep]
        )
        held = f"{bits} bits" if bits and self.scheme == "weights" else "their own type"
        result.note(
            f"quantize: the {len(names)} most sensitive layers keep {held}, {cost:,} bytes more: "
            f"{', '.join(names[:6])}{more}; in brackets the relative error that each alone would cause"
        )
        return kept

    def _allocated(
        self, model: ir.Model, found: Sequence[Site], ways: Sequence[Way | None], ctx: Context, result: PassResult
    ) -> list[Way | None]:
        """The bits of each layer by a knapsack over what its errors cost."""
        version = model.graph.opset_imports.get("", 0)
        choices: list[list[Way | None]] = []
        for site, way in zip(found, ways, strict=True):
            # How long a convolution takes does not go by its elements.
            said = way and not site.gathers and not (self.time and len(site.shape) != 2)
            own = [self._way(site, bits) for bits in sorted(self.choices)] if said else []
            choices.append([each for each in own if each and each[0].opset <= version] + ([None] if own else []))
        costs = [[float(allocation.nbytes(site, way)) for way in row] for site, row in zip(found, choices, strict=True)]
        shared = [site for site, row in zip(found, choices, strict=True) if row]
        limit = self.budget * sum(site.held.size for site in shared) / 8
        if self.megabytes:
            fixed = zip(found, ways, choices, strict=True)
            limit = self.megabytes * 1e6 - sum(allocation.nbytes(site, way) for site, way, row in fixed if not row)
        elif self.time:
            costs = speed.costs(found, choices, lambda bits: self._plain(bits=bits), self.rows, ctx)
            limit = self.time * sum(site.held.size for site in shared)
        losses = self._losses(model, found, choices, ctx)
        new, note = allocation.share(found, ways, choices, losses, costs, limit)
        spent = sum(c[row.index(way)] for c, row, way in zip(costs, choices, new, strict=True) if row)
        if spent > limit * 1.01:
            result.refuse("", "the budget cannot be met with these choices")
        result.note(f"quantize: {note}")
        return new

    def _plain(self, **options: Any) -> Quantize:
        """A way to quantize one product as this does it, without what takes long and changes no speed."""
        off = {"rounding": "nearest", "scaling": "none", "clip": "none", "correct": False, "least": 0}
        return dataclasses.replace(self, **{**NO_LIMITS, **off, "include": (), "exclude": (), **options})

    # The rewriting.

    def _write(
        self, model: ir.Model, found: Sequence[Site], ways: Sequence[Way | None], ctx: Context, result: PassResult
    ) -> tuple[int, int]:
        """Quantize the weights that have a way; returns bytes and elements."""
        names = edit.Names(model)
        chosen = [(site, way) for site, way in zip(found, ways, strict=True) if way]
        integers = {id(site): self._integers(site) for site, _ in chosen}
        scales: static.Scales = {}
        planned: static.Plan | None = None
        if self.scheme == "static":
            planned = static.plan(model, [site for site, _ in chosen if integers[id(site)]])
            requests: list[Request[Any]] = [RangeOf(value.name or "") for value in planned.calibrated]
            seen = ctx.collect(model, requests)
            scales = {
                value.name or "": activations.scale_of(
                    seen[RangeOf(value.name or "")], self.activations, self.percentile
                )
                for value in planned.calibrated
            }
            for value in planned.values:
                source = value
                while source in planned.same:
                    source = planned.same[source]
                scales = {**scales, value.name or "": scales[source.name or ""]}
        writer = dynamic.Writer(model, names)
        nbytes = size = done = 0
        for stage in self._stages(chosen):
            statistics = self._statistics(model, stage, ctx)
            for site, way in stage:
                ctx.progress("quantize", done, len(chosen))
                done += 1
                codes = self._codes(site, way, statistics, scales if integers[id(site)] else {})
                nbytes, size = nbytes + codes.nbytes, size + site.held.size
                if self.correct and correction.possible(site):
                    result.change("bias corrected", correction.correct(site, codes, statistics, names))
                what = f"weight stored in {codes.grid.dtype.name.lower()}"
                if not integers[id(site)]:
                    store.dequantized(site, codes, names)
                elif self.scheme == "dynamic":
                    writer.write(site, codes)
                    what += ", multiplied in integers"
                else:
                    static.products(site, codes, scales, names)
                    what += ", multiplied in integers"
                result.change(what)
        if planned is not None:
            result.change(
                "weight kept in 16 bits, since ONNX Runtime would round it", guard.keep(model, planned, names)
            )
            result.change("activation quantized", static.quantize(model, planned, scales, names))
        if self.scheme == "weights":
            result.change("Relu written as Max, before which products are with codes", store.spare_relus(model, names))
        return nbytes, size

    def _stages(self, chosen: Sequence[tuple[Site, Way]]) -> list[list[tuple[Site, Way]]]:
        """Layers whose statistics one run of the data gives."""
        if not (self.sequential and self.rounding != "nearest"):
            return [list(chosen)]
        rows: list[list[tuple[Site, Way]]] = []
        for each in chosen:
            mine = {use.activation for use in each[0].uses}
            if rows and mine == {use.activation for use in rows[-1][0][0].uses}:
                rows[-1].append(each)
            else:
                rows.append([each])
        return rows

    def _statistics(self, model: ir.Model, stage: Sequence[tuple[Site, Way]], ctx: Context) -> Mapping[Any, Any]:
        wanted: set[Request[Any]] = {use.gram for site, _ in stage if self._swept(site) for use in site.uses}
        if self.correct:
            wanted |= {use.patches for site, _ in stage if correction.possible(site) for use in site.uses}
        return ctx.collect(model, wanted) if wanted else {}

    def _swept(self, site: Site) -> bool:
        """Whether a weight is rounded by GPTQ: not where its rows are too short to make up for anything."""
        if self.rounding == "nearest" or not site.calibrated or len({(u.order, u.grouped) for u in site.uses}) > 1:
            return False
        return site.depth * site.uses[0].window >= SHORT

    def _codes(self, site: Site, way: Way, statistics: Mapping[Any, Any], scales: static.Scales) -> Codes:
        grid, granularity = way
        clip = self.clip == "mse"
        least = static.least_scales(site, scales) if scales else None
        if not self._swept(site):
            return rounding.nearest(site.held, grid, granularity, clip=clip, least=least)
        gram = np.asarray(sum(_matrices(statistics[use.gram].products) for use in site.uses))
        how: dict[str, Any] = {"clip": clip, "order": self.order, "damp": self.damp, "least": least}
        how["steps"] = STEPS if self.rounding == "awp" else 0
        return rounding.gptq(site.held, site.uses[0], gram, grid, granularity, **how)


def _matrices(products: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return products.reshape(-1, *products.shape[-2:])
