"""What quantizing one layer alone costs: measured at the model's outputs, or estimated at the layer's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import cache, edit
from graphc.collection.hashing import data_hash, value_hashes
from graphc.contract import Arrays, Context
from graphc.edit import Array
from graphc.errors import BadInput
from graphc.quantization.granularity import Granularity
from graphc.quantization.grid import Grid
from graphc.quantization.rounding import nearest
from graphc.quantization.sites import Site
from graphc.stats import GuidedGramOf

SAMPLES = 4
"""Calibration samples that losses are measured on."""

FILE = "losses.json"


def remembered(
    model: ir.Model, ctx: Context, what: str, measure: Callable[[], Sequence[Sequence[float]]]
) -> list[list[float]]:
    """Losses, measured once for a model, its data and a way of quantizing, and kept in the context's store."""
    if ctx.store is None:
        return [list(row) for row in measure()]
    hashes = value_hashes(model, model.graph.outputs)
    outputs = [hashes[value] for value in model.graph.outputs]
    name = cache.key(kind="quantize losses", model=outputs, data=data_hash(ctx.calibration[:SAMPLES]), what=what)
    entry = ctx.store.get(name)
    if entry is not None:
        found: list[list[float]] = json.loads((entry / FILE).read_text())
        return found
    losses = [list(row) for row in measure()]

    def fill(folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(losses))

    ctx.store.put(name, fill)
    return losses


class Outputs:
    """Measures how far a model's outputs are from those of the model as it came.

    Args:
        model: The model as it came.
        samples: What it is run on; some of them.
    """

    def __init__(self, model: ir.Model, samples: Sequence[Arrays]) -> None:
        self._samples = samples[:SAMPLES]
        self._wanted = self._run(model)

    def _run(self, model: ir.Model) -> list[dict[str, Any]]:
        from graphc import runtime

        # Without optimisation: fused kernels would round activations of their own accord.
        session = runtime.session(model, optimise=False, frugal=runtime.constants_nbytes(model) > runtime.BIG)
        found = [session.run(sample) for sample in self._samples]
        session.close()
        return found

    def loss(self, model: ir.Model) -> float:
        """The squared error of the floating-point outputs in relation to their squares, the mean over outputs."""
        errors: dict[str, float] = {}
        sizes: dict[str, float] = {}
        for want, got in zip(self._wanted, self._run(model), strict=True):
            for name, array in want.items():
                if array.dtype.kind == "f":
                    wide = array.astype(np.float64)
                    errors[name] = errors.get(name, 0.0) + float(np.square(got[name] - wide).sum())
                    sizes[name] = sizes.get(name, 0.0) + float(np.square(wide).sum())
        parts = [error / max(sizes[name], 1e-300) for name, error in errors.items()]
        return float(np.mean(parts)) if parts else 0.0


def importance(site: Site, statistics: Mapping[Any, Any]) -> Array | None:
    """The mean square of what each element of a weight is multiplied with, of the weight's rank; None if unknown."""
    found: Array | None = None
    for use in site.uses:
        if use.moments not in statistics or use.parts[0] or use.grouped > 1 or use.node.op_type == "Conv":
            return None
        squares = np.square(statistics[use.moments].rms)
        found = squares if found is None else found + squares
    if found is None:
        return None
    shape = [1] * len(site.shape)
    shape[site.axis] = -1
    return np.asarray(found.reshape(shape), dtype=np.float32)


def own(site: Site, grids: Sequence[tuple[Grid, Granularity] | None], statistics: Mapping[Any, Any]) -> list[float]:
    """The squared error of a layer's own output in relation to its squares, for channels that vary independently.

    Args:
        site: The layer.
        grids: Ways to quantize its weight; None for not at all.
        statistics: Moments of its input, where there are some; else all channels count the same.
    """
    weight = np.asarray(site.held.numpy(), dtype=np.float32)
    weights = importance(site, statistics)
    factor: Any = 1.0 if weights is None else weights
    whole = max(float((np.square(weight) * factor).sum(dtype=np.float64)), 1e-300)
    found = []
    for each in grids:
        if each is None:
            found.append(0.0)
            continue
        error = nearest(site.held, *each).values() - weight
        found.append(float((np.square(error) * factor).sum(dtype=np.float64)) / whole)
    return found


def guided(
    model: ir.Model, found: Sequence[Site], each: Sequence[Sequence[tuple[Grid, Granularity] | None]], ctx: Context
) -> list[list[float]]:
    """What each way to quantize each layer alone adds to the loss, up to a factor that all share; 0 for embeddings.

    An error ``E`` of a weight adds ``tr(E H ET)`` to second order, with the Gram matrix ``H`` of its inputs by the
    squared gradients of the loss (:class:`graphc.stats.GuidedGramOf`).

    Raises:
        BadInput: A layer is no product of matrices.
    """
    wanted: list[list[GuidedGramOf]] = []
    for site, ways in zip(found, each, strict=True):
        asked = [use.guided_gram for use in site.uses if site.calibrated and any(ways)]
        if None in asked:
            raise BadInput(
                "sensitivity=loss compares products of matrices only",
                where="quantize",
                hint="kinds=[MatMul,Gemm,Gather], or another sensitivity",
            )
        wanted.append([request for request in asked if request is not None])
    statistics = ctx.collect(model, {request for requests in wanted for request in requests})
    rows = []
    for i, (site, ways, requests) in enumerate(zip(found, each, wanted, strict=True)):
        ctx.progress("estimating layers", i, len(found))
        if not requests:
            rows.append([0.0 for _ in ways])
            continue
        gram = np.sum([statistics[request].products for request in requests], axis=0)
        weight = site.uses[0].matrices(np.asarray(site.held.numpy(), dtype=np.float32))
        errors = [None if way is None else site.uses[0].matrices(nearest(site.held, *way).values()) for way in ways]
        edit.release(site.held)
        rows.append([0.0 if e is None else float((((e - weight) @ gram) * (e - weight)).sum()) for e in errors])
    return rows
