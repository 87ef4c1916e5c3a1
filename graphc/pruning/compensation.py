"""Making up for removed units in the weights that remain, so that consumers give nearly what they gave.

For a consumer ``y = W x`` with kept channels ``K`` and removed ones ``P``, mean ``mu`` and covariance ``C`` of ``x``:

- mean: the bias gets ``W_P mu_P`` (FLAP);
- least squares: ``W_K`` gets ``D = W_P C_PK (C_KK + ridge)^-1`` as well, and the bias ``W_P mu_P - D mu_K``. The ridge
  draws ``D`` to 0, which is the mean solution, so that the error on the calibration data never exceeds that one's;
- merge: each removed channel goes to the kept one that it varies with most, by its regression on that one.

On batches where padding or a router decides which rows there are, no bias can be added; least squares is then
without an intercept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes import cut
from graphc.axes.algebra import Axis
from graphc.axes.groups import Group, Groups
from graphc.axes.selection import Selection
from graphc.contract import Needs, PassResult
from graphc.edit import Array
from graphc.pruning import curvature
from graphc.pruning.biases import add_bias
from graphc.pruning.consumers import Consumer, consumers, obstacle
from graphc.stats import Gram, Moments, Statistics

Method = Literal["none", "mean", "ls", "obs", "merge"]


@dataclass(frozen=True)
class Seen:
    """What is known of the channels that one matrix reads.

    Attributes:
        mean: ``(channels,)``.
        centred: ``sum of (x - mean)(x - mean)T``, ``(channels, channels)``; empty where only the mean is needed.
    """

    mean: Array
    centred: Array


Fit = Callable[[Array, Seen, Array], tuple[Array, Array]]
"""``fit(W, seen, gone)``: the matrix with zeros where ``gone``, and what the bias gets; ``W`` is ``(m, n)``."""


def mean_bias(weight: Array, seen: Seen, gone: Array) -> tuple[Array, Array]:
    """The mean of what is removed, as a bias."""
    return _without(weight, gone), np.asarray(weight[:, gone] @ seen.mean[gone])


def least_squares(weight: Array, seen: Seen, gone: Array) -> tuple[Array, Array]:
    """The matrix and the bias that come closest; see the module."""
    kept = ~gone
    system = curvature.damped(seen.centred)[np.ix_(kept, kept)]
    change = np.linalg.solve(system, seen.centred[np.ix_(kept, gone)] @ weight[:, gone].T).T
    result = _without(weight, gone)
    result[:, kept] += change
    return result, np.asarray(weight[:, gone] @ seen.mean[gone] - change @ seen.mean[kept])


def sweep(weight: Array, seen: Seen, gone: Array) -> tuple[Array, Array]:
    """The same by optimal brain surgery: one channel after the other is removed, and the rest makes up for it."""
    kept = ~gone
    inverse = np.linalg.inv(curvature.damped(seen.centred))
    result = weight.copy()
    for column in np.flatnonzero(gone):
        curvature.remove(result, inverse, np.array([column]))
        # What is removed stays out: its row of the inverse is that of nothing.
        inverse[column, column] = 1.0
    result[:, gone] = 0
    change = result[:, kept] - weight[:, kept]
    return result, np.asarray(weight[:, gone] @ seen.mean[gone] - change @ seen.mean[kept])


def merge_similar(weight: Array, seen: Seen, gone: Array) -> tuple[Array, Array]:
    """Every removed channel is replaced by its regression on the kept one that it varies with most."""
    kept = np.flatnonzero(~gone)
    removed = np.flatnonzero(gone)
    shared = seen.centred[np.ix_(removed, kept)]
    own = np.diagonal(seen.centred)[kept]
    # The part of a channel's variance that another explains is shared^2 / own, up to its own variance.
    explained = np.divide(np.square(shared), own, out=np.zeros_like(shared), where=own > 0)
    best = explained.argmax(axis=1)
    slope = np.divide(shared[np.arange(len(removed)), best], own[best], out=np.zeros(len(removed)), where=own[best] > 0)
    result = _without(weight, gone)
    np.add.at(result.T, kept[best], (weight[:, removed] * slope).T)
    bias = weight[:, removed] @ (seen.mean[removed] - slope * seen.mean[kept[best]])
    return result, np.asarray(bias)


FITS: dict[str, Fit] = {"mean": mean_bias, "ls": least_squares, "obs": sweep, "merge": merge_similar}


def _without(weight: Array, gone: Array) -> Array:
    result = weight.copy()
    result[:, gone] = 0
    return result


def needs(groups: Groups, chosen: Iterable[Group], method: Method) -> Needs:
    """What must be known to make up for units of the chosen groups."""
    if method == "none":
        return Needs()
    found = (each.contraction for group in chosen for each in consumers(group))
    return Needs(frozenset(each.patches if method == "mean" else each.gram for each in found))


@dataclass(frozen=True)
class Repair:
    """What is to be written once the units are dead.

    Attributes:
        consumer: Whose weight it is.
        weight: In the weight's shape and dtype.
        bias: What the output gets, broadcasting to it; None for nothing.
    """

    consumer: Consumer
    weight: Array
    bias: Array | None


def repairs(
    groups: Groups, keep: Mapping[str, Array], method: Method, statistics: Statistics, result: PassResult
) -> list[Repair]:
    """How the consumers of units that go can make up for them; must be found before the units are written dead.

    Args:
        groups: The analysis of the model.
        keep: By group name: true for the units that stay.
        method: How.
        statistics: What ``needs`` asked for.
        result: Gets a refusal for each group and consumer that cannot.
    """
    if method == "none" or not keep:
        return []
    selection = Selection.of(groups, keep)
    by_node: dict[ir.Node, Consumer] = {}
    for name in keep:
        found = consumers(groups[name])
        if not found:
            result.refuse(name, f"nothing can make up for its units: {obstacle(groups[name])}")
        for each in found:
            by_node.setdefault(each.contraction.node, each)
    made, few = [], 0
    for node, consumer in by_node.items():
        if method == "mean" and consumer.contraction.rows.by:
            result.refuse(node, "nothing can make up for its units: a bias would have to follow the router's pick")
            continue
        repair = _repair(groups, selection, consumer, method, statistics)
        if repair is not None:
            made.append(repair)
            few += method != "mean" and _few_rows(statistics[consumer.contraction.gram])
    if few:
        result.note(
            f"{few} of {len(made)} weights were refitted on fewer rows of calibration data than they read channels: "
            "more data will keep more of the quality"
        )
    return made


def _few_rows(gram: Gram) -> bool:
    return bool(np.min(gram.count) < gram.centred.shape[-1])


def _repair(
    groups: Groups, selection: Selection, consumer: Consumer, method: Method, statistics: Statistics
) -> Repair | None:
    contraction, place = consumer.contraction, consumer.place
    shared = None if place.reader is None else groups.trace.at(place.value, place.reader)
    axes = shared or groups.trace.axes[place.value] or ()
    ones = np.ones(contraction.shape, dtype=bool)
    read = contraction.matrices(selection.dead(axes, ones, [axes[contraction.axis]]))
    gone: Array = np.logical_not(read.any(axis=1))
    if not gone.any():
        return None
    alive = contraction.matrices(selection.dead(axes, ones, _written(groups, consumer)))
    weight = consumer.weight
    matrices = contraction.matrices(weight).astype(np.float64)
    known = statistics[contraction.patches] if method == "mean" else statistics[contraction.gram]
    seen = _seen(known, len(matrices), intercept=not contraction.rows.by)
    bias = np.zeros(matrices.shape[:2])
    for g in range(len(matrices)):
        if gone[g].any() and not gone[g].all():
            matrices[g], bias[g] = FITS[method](matrices[g], seen[g], gone[g])
        elif gone[g].any():
            matrices[g], bias[g] = mean_bias(matrices[g], seen[g], gone[g])
    matrices *= alive
    bias *= alive.any(axis=2)
    return Repair(
        consumer,
        contraction.restored(matrices).astype(weight.dtype),
        None if contraction.rows.by else contraction.as_output(bias * contraction.scale),
    )


def _written(groups: Groups, consumer: Consumer) -> list[Axis]:
    """The axes of a weight along which dead units are written as zeros."""
    found = []
    for _, place in groups.of(consumer.place.value):
        if place.role != "carries" and place.reader is consumer.place.reader:
            found.append(place.tree)
    return found


def _seen(statistic: Moments | Gram, count: int, *, intercept: bool) -> list[Seen]:
    """What each of so many matrices reads; without an intercept, moments are those around 0."""
    mean = np.atleast_2d(statistic.mean)
    centred = np.zeros((0, 0))
    if isinstance(statistic, Gram):
        centred = statistic.centred if intercept else statistic.products
    if not intercept:
        mean = np.zeros_like(mean)
    centred = centred if centred.ndim == 3 else centred[None]
    return [Seen(mean[g if len(mean) > 1 else 0], centred[g if len(centred) > 1 else 0]) for g in range(count)]


def in_order(model: ir.Model, groups: Groups, keep: Mapping[str, Array]) -> list[list[str]]:
    """The groups that go, in the order in which the model first reads them; those of one consumer together."""
    place = {node: i for i, node in enumerate(model.graph)}
    first: dict[int, list[str]] = {}
    for name in keep:
        nodes = [place[each.contraction.node] for each in consumers(groups[name]) if each.contraction.node in place]
        first.setdefault(min(nodes, default=-1), []).append(name)
    return [first[at] for at in sorted(first)]


def apply(model: ir.Model, made: Iterable[Repair], result: PassResult) -> None:
    """Write repairs into a model in which the units are dead already."""
    names = edit.Names(model)
    for repair in made:
        contraction, place = repair.consumer.contraction, repair.consumer.place
        tensor = ir.Tensor(repair.weight, name=place.value.name)
        picked = edit.is_op(_reader(contraction.node, place.value), "Gather", "GatherND")
        cut.write(place.value, tensor, reader=None if picked else contraction.node, names=names)
        if repair.bias is not None and repair.bias.any():
            add_bias(contraction.node, repair.bias, names)
        result.change("consumer refitted" if repair.bias is not None else "consumer refitted without a bias")


def _reader(node: ir.Node, weight: ir.Value) -> ir.Node:
    """The node that reads a weight on its way to a contraction."""
    return node if any(v is weight for v in node.inputs) else next(use.node for use in weight.uses())
