"""Scales that move from activations to weights, which changes nothing by itself: what is hard to round is made even.

A normalisation divides channel ``j`` of its output by ``s_j`` and the products that read it multiply by ``s_j``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes import cut
from graphc.contract import Context, PassResult
from graphc.edit import Array, is_op
from graphc.quantization.granularity import Granularity
from graphc.quantization.grid import Grid
from graphc.quantization.rounding import nearest
from graphc.quantization.sites import Site
from graphc.sparsity.layers import Layer

Method = Literal["none", "smooth", "awq"]
Way = tuple[Grid, Granularity]

POWERS = np.linspace(0, 1, 11)
"""Powers of the activation's size that AWQ tries."""

NORMS = ("LayerNormalization", "RMSNormalization", "Mul")


def groups(chosen: Sequence[tuple[Site, Way]]) -> list[list[tuple[Site, Way]]]:
    """Weights by the activation that they are multiplied with, where a scale can be moved to all of its readers."""
    by_input: dict[ir.Value, list[tuple[Site, Way]]] = {}
    for site, way in chosen:
        if site.calibrated and len(site.value.uses()) == 1 and len(site.shape) == 2 and _plain(site):
            by_input.setdefault(site.uses[0].activation, []).append((site, way))
    found = []
    for value, members in by_input.items():
        readers = {use.node for use in value.uses()}
        if readers == {site.uses[0].node for site, _ in members} and not value.is_graph_output() and _factors(value):
            found.append(members)
    return found


def _plain(site: Site) -> bool:
    node = site.uses[0].node
    return is_op(node, "MatMul", "Gemm") and node.inputs[1] is site.value and not edit.attribute(node, "transA", 0)


def _factors(value: ir.Value) -> list[tuple[ir.Node, ir.Value]]:
    """The constants of the normalisation that makes a value, one element a channel; [] if it is made otherwise."""
    node = value.producer()
    if node is None or not is_op(node, *NORMS) or len(node.outputs) > 1:
        return []
    if not is_op(node, "Mul") and edit.attribute(node, "axis", -1) != -1:
        rank = len(value.shape) if value.shape is not None else None
        if rank is None or edit.attribute(node, "axis", -1) != rank - 1:
            return []
    operands = node.inputs if is_op(node, "Mul") else node.inputs[1:]
    found = [(node, v) for v in operands if v is not None and edit.tensor(v) is not None]
    wanted = 1 if is_op(node, "Mul") else len([v for v in operands if v is not None])
    if len(found) != wanted or any(len(_held(v).shape) != 1 or _held(v).size < 2 for _, v in found):
        return []
    return found


def _held(value: ir.Value) -> ir.TensorProtocol:
    held = edit.tensor(value)
    assert held is not None
    return held


def apply(
    model: ir.Model,
    chosen: Sequence[tuple[Site, Way]],
    method: Method,
    alpha: float,
    ctx: Context,
    result: PassResult,
) -> None:
    """Move scales from activations to all weights that can take them; see :func:`move`."""
    found = groups(chosen)
    if not found:
        result.refuse("", "no normalisation could take the scales of what reads it")
        return
    names = edit.Names(model)
    statistics = ctx.collect(model, {members[0][0].uses[0].moments for members in found})
    for i, members in enumerate(found):
        ctx.progress("scaling", i, len(found))
        moved = move(members, statistics, method, alpha, names)
        result.change("activation's scales moved to its weights", int(moved))


def move(
    members: Sequence[tuple[Site, Way]],
    statistics: Mapping[Any, Any],
    method: Method,
    alpha: float,
    names: edit.Names,
) -> bool:
    """Move scales from an activation to the weights that it is multiplied with; returns whether there were some.

    - ``smooth`` (SmoothQuant, 2023): ``s = max|x|^alpha / max|w|^(1 - alpha)``, so that both have a part of the range;
    - ``awq`` (AWQ, 2024): ``s = mean|x|^p``, normed, with the ``p`` that leaves the products nearest once the weights
      are rounded, channels taken as independent.
    """
    first = members[0][0].uses[0]
    moments = statistics[first.moments]
    weights = [site.uses[0].matrices(np.asarray(site.held.numpy(), dtype=np.float32)) for site, _ in members]
    if method == "smooth":
        largest = np.max([np.abs(w).max(axis=(0, 1)) for w in weights], axis=0).astype(np.float64)
        scale = _bounded(moments.largest, alpha) / _bounded(largest, 1 - alpha)
    else:
        scale = _searched(members, weights, moments)
    scale = np.where((moments.largest > 0) & np.isfinite(scale) & (scale > 0), scale, 1.0)
    if np.allclose(scale, 1.0):
        return False
    for node, value in _factors(first.activation):
        held = _held(value)
        array = (held.numpy().astype(np.float64) / scale).astype(held.dtype.numpy())
        cut.write(value, ir.Tensor(array, dtype=held.dtype, name=held.name), reader=node, names=names)
    for (site, _), w in zip(members, weights, strict=True):
        layer = Layer(site.value, tuple(site.uses), w.shape[0], (w.shape[1], w.shape[2]))
        cut.write(site.value, layer.tensor((w * scale).astype(np.float32)))
    return True


def _bounded(values: Array, power: float) -> Array:
    """A power of sizes, those far below the largest counted as some."""
    return np.asarray(np.maximum(values, max(float(values.max()) * 1e-5, 1e-30)) ** power)


def _searched(members: Sequence[tuple[Site, Way]], weights: Sequence[Array], moments: Any) -> Array:
    mean = moments.absolute / np.maximum(moments.count, 1)
    squares = np.square(moments.rms)
    best, chosen = np.inf, np.ones_like(mean)
    for power in POWERS:
        scale = _bounded(mean, float(power))
        scale = scale / np.sqrt(scale.max() * scale.min())
        loss = 0.0
        for (site, (grid, granularity)), w in zip(members, weights, strict=True):
            scaled = site.uses[0].restored((w * scale).astype(np.float32))
            rounded = nearest(ir.Tensor(scaled), grid, granularity).values()
            error = (site.uses[0].matrices(rounded) / scale - w).astype(np.float64)
            loss += float((np.square(error) * squares).sum())
        if loss < best:
            best, chosen = loss, scale
    return np.asarray(chosen)
