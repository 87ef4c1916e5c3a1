"""How a weight is quantized, as the options have it: its grid, and what shares a scale."""

from __future__ import annotations

import onnx_ir as ir

from graphc.contract import PassResult
from graphc.quantization import allocation, dynamic, rounding, sites, static
from graphc.quantization.allocation import Way
from graphc.quantization.granularity import Granularity
from graphc.quantization.grid import Grid
from graphc.quantization.options import Options
from graphc.quantization.sites import Site
from graphc.rotation import gains

EMBEDDED = 32
"""Elements of a row of an embedding that share a scale, if it has fewer than 8 bits and nothing else is asked for."""


def sites_of(options: Options, model: ir.Model, result: PassResult) -> list[Site]:
    """The weights that are looked at; what cannot be quantized is refused."""
    least = 0 if options.scheme == "static" else options.least
    return sites.find(model, options.kinds, options.include, options.exclude, least, result)


def way_of(options: Options, site: Site, bits: int) -> Way | None:
    """How a weight is quantized with these bits; 0 leaves it."""
    if site.gathers:
        # Whole rows are looked up: a scale for each, or of few bits for each block.
        fewer = options.scheme == "weights" and options.embeddings < bits
        bits = options.embeddings if fewer or bits else 0
        return (Grid(bits), _rows(options, site, bits)) if bits else None
    if not bits:
        return None
    if integers(options, site):
        return Grid(), Granularity(site.channel)
    if bits < options.embeddings and site.embeds:  # hardly any weights, on which everything rests
        return Grid(options.embeddings), Granularity(site.channel)
    grid = Grid(bits, options.symmetric, options.form)
    if options.block == -1:
        return grid, Granularity()
    blocked = options.block > 0 and site.depth > options.block
    if blocked:
        return grid, Granularity(site.axis, options.block)
    if site.channel is None:
        return grid, Granularity(site.axis, site.depth)
    return grid, Granularity(site.channel)


def _rows(options: Options, site: Site, bits: int) -> Granularity:
    """What shares a scale in a table whose rows are looked up: of few bits, blocks that rows divide into."""
    block = options.block if options.block > 0 else EMBEDDED
    while block > 16 and site.depth % block:
        block //= 2
    return Granularity(0) if bits == 8 or site.depth % block else Granularity(site.axis, block)


def integers(options: Options, site: Site) -> bool:
    """Whether products with this weight are done in integers."""
    if options.scheme == "weights" or site.gathers or site.views:
        return False
    return not (dynamic.why_not(site) if options.scheme == "dynamic" else static.why_not(site))


def why_not(options: Options, site: Site, way: Way | None, version: int) -> str:
    """Why a weight cannot be quantized in a way, in a model of an opset version; "" if it can."""
    if way is None:
        return "embeddings=0 leaves embeddings as they are"
    grid, granularity = way
    if options.scheme != "weights" and not site.gathers and not integers(options, site):
        return dynamic.why_not(site) if options.scheme == "dynamic" else static.why_not(site)
    if options.scheme == "static" and not site.gathers and not site.calibrated:
        return "activations in the bodies of If and Loop are not calibrated"
    plain = grid.dtype.bitwidth == 8 and not granularity.block and grid.form == "int" and not site.gathers
    needed = 13 if plain else grid.opset
    if version < needed:
        return f"it needs opset {needed}, the model has {version}"
    if (options.scheme != "static" or site.gathers) and allocation.nbytes(site, way) >= site.held.nbytes:
        return "codes and scales would take as much as it does"
    if not rounding.finite(site.held):
        return "it holds NaN or infinity"
    if gains.turned(site.uses) and len(site.readers) == 1:
        return "it is the gain of a normalisation, turned by rotate: few weights, through which all that follows goes"
    return ""
