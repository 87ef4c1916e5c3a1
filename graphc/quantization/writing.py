"""Weights, and activations that are quantized, are written into the graph in their ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.contract import Context, PassResult
from graphc.contraction import Contraction
from graphc.edit import Array
from graphc.quantization import activations, correction, dynamic, guard, rounding, saturation, static, store
from graphc.quantization.allocation import Way
from graphc.quantization.grid import Grid
from graphc.quantization.layers import Layers
from graphc.quantization.options import Options
from graphc.quantization.rounding import Codes
from graphc.quantization.sites import Site
from graphc.quantization.ways import integers
from graphc.runtime import pairs
from graphc.stats import Gram, RangeOf, Request

SHORT = 4
"""Inputs of an output from which the later ones can make up for what GPTQ does to the earlier."""

STEPS = 100
"""Steps of projected descent."""


def write(layers: Layers, ctx: Context, result: PassResult) -> tuple[int, int]:
    """Quantize the weights that have a way; returns bytes and elements."""
    options, model, chosen = layers.options, layers.model, layers.chosen
    names = edit.Names(model)
    whole = {id(site): integers(options, site) for site, _ in chosen}
    scales: static.Scales = {}
    planned: static.Plan | None = None
    if options.scheme == "static":
        planned = static.plan(model, [site for site, _ in chosen if whole[id(site)]])
        scales = _scales(options, model, planned, ctx)
    writer = dynamic.Writer(model, names)
    nbytes = size = done = 0
    later: list[tuple[Site, Codes]] = []
    for stage in _stages(options, chosen):
        statistics = _statistics(options, model, stage, ctx)
        for site, way in stage:
            ctx.progress("quantize", done, len(chosen))
            done += 1
            least = _least(options, site, scales) if whole[id(site)] else None
            codes = _codes(options, site, way, statistics, least, result)
            if whole[id(site)] and not options.full_range:
                codes = _summable(codes, site)
            nbytes, size = nbytes + codes.nbytes, size + site.held.size
            if options.correct and correction.possible(site):
                sums = correction.correct(site, codes, statistics, names)
                result.change("bias corrected", len(sums))
                if planned is not None:
                    for use, total in zip(site.uses, sums, strict=True):
                        planned.move(use.node.outputs[0], total)
                        if use.output_name in scales:
                            scales[total.name or ""] = scales[use.output_name]
            what = f"weight stored in {codes.grid.dtype.name.lower()}"
            if not whole[id(site)] and planned is not None:
                later.append((site, codes))  # this replaces values that may be planned
            elif not whole[id(site)]:
                store.dequantized(site, codes, names)
            elif options.scheme == "dynamic":
                writer.write(site, codes)
                what += ", multiplied in integers"
            else:
                static.products(site, codes, scales, names)
                what += ", multiplied in integers"
            result.change(what)
    if planned is not None:
        kept = guard.keep(model, planned, [site.value for site, _ in later], names)
        result.change("weight kept in 16 bits, since ONNX Runtime would round it", kept)
        result.change("activation quantized", static.quantize(model, planned, scales, names))
        for site, codes in later:
            store.dequantized(site, codes, names)
    if options.scheme == "weights":
        result.change("Relu written as Max, before which products are with codes", store.spare_relus(model, names))
    return nbytes, size


def _scales(options: Options, model: ir.Model, planned: static.Plan, ctx: Context) -> static.Scales:
    """The scales of the activations of a plan, by calibration."""
    method = options.activations
    assert method != "auto"
    requests = {value: RangeOf(value.name or "") for value in planned.calibrated}
    seen = ctx.collect(model, requests.values())
    scales = {
        value.name or "": activations.scale_of(
            saturation.within(seen[request], *saturation.limits(value)), method, options.percentile
        )
        for value, request in requests.items()
    }
    for value in planned.values:
        source = value
        while source in planned.same:
            source = planned.same[source]
        scales[value.name or ""] = scales[source.name or ""]
    return scales


def _stages(options: Options, chosen: Sequence[tuple[Site, Way]]) -> list[list[tuple[Site, Way]]]:
    """Layers whose statistics one run of the data gives."""
    if not (options.sequential and options.rounding != "nearest"):
        return [list(chosen)]
    rows: list[list[tuple[Site, Way]]] = []
    for each in chosen:
        mine = {use.activation for use in each[0].uses}
        if rows and mine == {use.activation for use in rows[-1][0][0].uses}:
            rows[-1].append(each)
        else:
            rows.append([each])
    return rows


def _statistics(
    options: Options, model: ir.Model, stage: Sequence[tuple[Site, Way]], ctx: Context
) -> Mapping[Any, Any]:
    swept = [use for site, _ in stage if _swept(options, site) for use in site.uses]
    wanted: set[Request[Any]] = {_gram(options, use) for use in swept}
    wanted |= {use.output_gradients for use in swept if _curved(options, use)}
    if options.correct:
        wanted |= {use.patches for site, _ in stage if correction.possible(site) for use in site.uses}
    return ctx.collect(model, wanted) if wanted else {}


def _gram(options: Options, use: Contraction) -> Request[Gram]:
    """The Gram matrix by which a layer is rounded."""
    return (use.guided_gram if options.guide != "inputs" else None) or use.gram


def _curved(options: Options, use: Contraction) -> bool:
    """Whether errors of a product's outputs make up for each other."""
    return options.guide == "curvature" and options.rounding == "gptq" and use.guided_gram is not None


def _swept(options: Options, site: Site) -> bool:
    """Whether a weight is rounded by GPTQ: not where its rows are too short to make up for anything."""
    if options.rounding == "nearest" or not site.calibrated or len({(u.order, u.grouped) for u in site.uses}) > 1:
        return False
    return site.depth * site.uses[0].window >= SHORT


def _least(options: Options, site: Site, scales: static.Scales) -> Array | None:
    """Scales of the outputs below which biases would leave 32 bits, or sums of two products 16; None: any will do."""
    found = [static.least_scales(site, scales)] if scales else []
    if not options.full_range:
        array = site.held.numpy()
        ordered = (pairs.rows(use.node, array, flipped=use.axis == 1) for use in site.uses)
        found += [pairs.largest(each) / Grid().most for each in ordered if each is not None]
        edit.release(site.held)
    known = [each for each in found if each is not None]
    return np.max(known, axis=0) if known else None


def _summable(codes: Codes, site: Site) -> Codes:
    """Codes with which no sum of two products leaves 16 bits: GPTQ may have moved some."""
    array = codes.codes.numpy()
    for use in site.uses:
        array = pairs.summable(use.node, array, flipped=use.axis == 1)
    tensor = ir.Tensor(np.ascontiguousarray(array), dtype=codes.codes.dtype, name=codes.codes.name)
    return dataclasses.replace(codes, codes=tensor)


def _codes(
    options: Options,
    site: Site,
    way: Way,
    statistics: Mapping[Any, Any],
    least: Array | None,
    result: PassResult,
) -> Codes:
    grid, granularity = way
    clip = options.clip == "mse"
    if not _swept(options, site):
        return rounding.nearest(site.held, grid, granularity, clip=clip, least=least)
    gram = np.asarray(sum(_matrices(statistics[_gram(options, use)].products) for use in site.uses))
    if not np.isfinite(gram).all():
        result.refuse(site.name, "squares of what its product reads are too large: rounded to nearest")
        return rounding.nearest(site.held, grid, granularity, clip=clip, least=least)
    how: dict[str, Any] = {"clip": clip, "order": options.order, "damp": options.damp, "least": least}
    how["rounds"] = options.refine
    if all(_curved(options, use) for use in site.uses):
        how["slopes"] = np.sum([statistics[use.output_gradients].products for use in site.uses], axis=0)
    how["steps"] = STEPS if options.rounding == "awp" else 0
    return rounding.gptq(site.held, site.uses[0], gram, grid, granularity, **how)


def _matrices(products: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return products.reshape(-1, *products.shape[-2:])
