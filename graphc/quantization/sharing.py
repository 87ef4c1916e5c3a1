"""Layers that get more bits than others: the most sensitive ones, or each what a budget allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graphc.contract import Context, PassResult
from graphc.errors import BadInput
from graphc.quantization import allocation, sensitivity, speed, writing
from graphc.quantization.allocation import Way
from graphc.quantization.layers import Layers
from graphc.quantization.ways import way_of

MEASURED = 64 << 20
"""Bytes of constants up to which sensitivities are measured at the model's outputs."""


def losses(layers: Layers, each: Sequence[Sequence[Way | None]], ctx: Context) -> list[list[float]]:
    """What each way to quantize each layer alone costs; 0 for none."""
    mode, model, found = layers.options.sensitivity, layers.model, layers.sites
    if mode == "auto":
        mode = "outputs" if sum(s.held.nbytes for s in found) <= MEASURED and ctx.calibration else "layers"
    if mode in ("outputs", "loss") and not ctx.calibration:
        raise BadInput(f"sensitivity={mode} needs calibration data", where="quantize", hint="--calibrate")
    quick = layers.quick.told(sensitivity=mode)

    def measure() -> list[list[float]]:
        if mode == "loss":
            return sensitivity.guided(model, found, each, ctx)
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
                alone = quick.copied().given([way if k == i else None for k in range(len(found))])
                writing.write(alone, ctx, PassResult())
                row.append(outputs.loss(alone.model))
            rows.append(row)
        return rows

    what = f"{quick.options.spec()} {[list(map(repr, ways)) for ways in each]}"
    return sensitivity.remembered(model, ctx, what, measure)


def ranked(layers: Layers, ctx: Context, result: PassResult) -> list[float]:
    """What each layer alone costs in its way, which the result then tells."""
    cost = [row[0] for row in losses(layers, [[way] for way in layers.ways], ctx)]
    named = zip(layers.sites, layers.ways, cost, strict=True)
    result.losses = {site.name: loss for site, way, loss in named if way}
    return cost


def kept(layers: Layers, ctx: Context, result: PassResult) -> Layers:
    """Layers of which the most sensitive ones have the fallback."""
    options, found, ways = layers.options, layers.sites, layers.ways
    cost = ranked(layers, ctx, result)
    order = sorted((i for i, way in enumerate(ways) if way), key=lambda i: -cost[i])
    bits = options.fallback or (8 if options.bits < 8 else 0)
    new = list(ways)
    for i in order[: options.keep]:
        new[i] = way_of(options, found[i], bits) if options.scheme == "weights" else None
    names = [f"{found[i].name} ({cost[i]:.1e})" for i in order[: options.keep]]
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    more_bytes = sum(
        allocation.nbytes(found[i], new[i]) - allocation.nbytes(found[i], ways[i]) for i in order[: options.keep]
    )
    held = f"{bits} bits" if bits and options.scheme == "weights" else "their own type"
    result.note(
        f"quantize: the {len(names)} most sensitive layers keep {held}, {more_bytes:,} bytes more: "
        f"{', '.join(names[:6])}{more}; in brackets the relative error that each alone would cause"
    )
    return layers.given(new)


def allocated(layers: Layers, ctx: Context, result: PassResult) -> Layers:
    """Layers with the bits that a knapsack over what their errors cost gives each."""
    options, found, ways = layers.options, layers.sites, layers.ways
    version = layers.model.graph.opset_imports.get("", 0)
    choices: list[list[Way | None]] = []
    for site, way in zip(found, ways, strict=True):
        # How long a convolution takes does not go by its elements.
        said = way and not site.gathers and not (options.time and len(site.shape) != 2)
        own = [way_of(options, site, bits) for bits in sorted(options.choices)] if said else []
        choices.append([each for each in own if each and each[0].opset <= version] + ([None] if own else []))
    costs = [[float(allocation.nbytes(site, way)) for way in row] for site, row in zip(found, choices, strict=True)]
    shared = [site for site, row in zip(found, choices, strict=True) if row]
    limit = options.budget * sum(site.held.size for site in shared) / 8
    if options.megabytes:
        fixed = zip(found, ways, choices, strict=True)
        limit = options.megabytes * 1e6 - sum(allocation.nbytes(site, way) for site, way, row in fixed if not row)
    elif options.time:
        costs = speed.costs(found, choices, lambda bits: options.plain(bits=bits), options.rows, ctx)
        limit = options.time * sum(site.held.size for site in shared)
    lost = losses(layers, choices, ctx)
    new, note = allocation.share(found, ways, choices, lost, costs, limit)
    spent = sum(c[row.index(way)] for c, row, way in zip(costs, choices, new, strict=True) if row)
    if spent > limit * 1.01:
        result.refuse("", "the budget cannot be met with these choices")
    result.note(f"quantize: {note}")
    return layers.given(new)
