"""Channels that stand out, split into pieces that do not, so that one grid for all of them has finer steps.

The grid of an activation reaches as far as its largest channel. A channel whose values reach beyond ``T`` becomes
``K = ceil(max / T)`` channels with what is within ``T``, what is between ``T`` and ``2 T``, and so on, which sum up to
it, and the weights that it meets are repeated ``K`` times (FlattenQuant, 2024). That changes nothing by itself, nor
where later values reach further: the last piece has all that is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.contract import Context, PassResult
from graphc.edit import Array, is_op
from graphc.quantization.sites import Site

WORTH = 0.5
"""Squared error of the activation's rounding, relative to what it was, up to which channels are split."""

FINEST = 64
"""Into how many pieces a channel goes at most."""


@dataclass(frozen=True)
class Split:
    """How the channels of an activation are split.

    Attributes:
        threshold: What a piece reaches up to.
        pieces: Pieces of each channel, ``(channels,)``.
        ratio: The squared error of rounding it, in what its readers make of it, relative to that without.
    """

    threshold: float
    pieces: Array
    ratio: float

    @property
    def source(self) -> Array:
        """The channel that each further piece is of: the second pieces of all channels, the third ones, ..."""
        return np.concatenate([np.flatnonzero(self.pieces > k) for k in range(1, int(self.pieces.max()) + 1)])

    @property
    def number(self) -> Array:
        """Which piece of its channel each further piece is, from 1 on."""
        counts = [np.count_nonzero(self.pieces > k) for k in range(1, int(self.pieces.max()) + 1)]
        return np.repeat(np.arange(1, len(counts) + 1), counts)


def apply(model: ir.Model, found: Sequence[Site], extra: float, ctx: Context, result: PassResult) -> None:
    """Split channels of what is multiplied with some weights, where that makes the error of rounding half as large.

    Sites must be looked for again then.

    Args:
        model: The model; its float weights get more rows.
        found: The weights, which are multiplied with integers afterwards.
        extra: The part of its channels that an activation may grow by.
        ctx: What collects the sizes of channels.
        result: What was done, and the numbers where it would not help.
    """
    groups = _groups(found)
    if not groups:
        result.refuse("", "no activation is read by products with weights of their own alone, as splitting wants it")
        return
    names, ratios = edit.Names(model), []
    statistics = ctx.collect(model, {members[0].uses[0].moments for members in groups})
    for i, members in enumerate(groups):
        ctx.progress("splitting channels", i, len(groups))
        activation = members[0].uses[0].activation
        split = best(statistics[members[0].uses[0].moments].largest, _energy(members), extra)
        ratios.append(split.ratio)
        if split.ratio > WORTH:
            result.refuse(activation, f"{extra:.0%} more channels would not halve the error of rounding the others")
            continue
        _write(members, split, names)
        result.change("channel split", int((split.pieces > 1).sum()))
    done = [ratio for ratio in ratios if ratio <= WORTH]
    result.note(
        f"scaling=flatten: splitting would bring the squared error of rounding activations to {min(ratios):.2f} to "
        f"{max(ratios):.2f} of what it is; done for {len(done)} of {len(ratios)}, up to {WORTH:g}"
    )


def _groups(found: Sequence[Site]) -> list[list[Site]]:
    """Weights by what they are multiplied with."""
    by_input: dict[tuple[ir.Value, Any], list[Site]] = {}
    for site in found:
        if not site.calibrated or len(site.value.uses()) != 1 or len(site.shape) != 2:
            continue
        node = site.uses[0].node
        if is_op(node, "MatMul", "Gemm") and node.inputs[1] is site.value and not edit.attribute(node, "transA", 0):
            by_input.setdefault((site.uses[0].activation, node.graph), []).append(site)
    return list(by_input.values())


def _energy(members: Sequence[Site]) -> Array:
    """For each channel, the sum of the squares of the weights that it meets."""
    total = np.zeros(members[0].depth)
    for site in members:
        total += np.square(site.uses[0].matrices(np.asarray(site.held.numpy(), np.float32)), dtype=np.float64).sum(
            (0, 1)
        )
        edit.release(site.held)
    return total


def best(largest: Array, energy: Array, extra: float) -> Split:
    """The split with the least error: steps are as long as the threshold, and each piece is rounded by itself.

    Args:
        largest: The largest absolute value of each channel, ``(channels,)``.
        energy: What the square of an error of a channel is multiplied with.
        extra: The part of the channels that may be added.
    """
    most = float(largest.max(initial=0.0))
    whole = np.ones(len(largest), np.int64)
    chosen = Split(most, whole, 1.0)
    if not most > 0 or not (total := float(energy.sum())) > 0:
        return chosen
    for threshold in most / np.geomspace(1, FINEST, 4 * FINEST)[1:]:
        pieces = np.maximum(np.ceil(largest / threshold * (1 - 1e-9)), 1).astype(np.int64)
        if pieces.sum() - len(pieces) > extra * len(pieces):
            break
        ratio = float((threshold / most) ** 2 * (pieces * energy).sum() / total)
        if ratio < chosen.ratio:
            chosen = Split(float(threshold), pieces, ratio)
    return chosen


def _write(members: Sequence[Site], split: Split, names: edit.Names) -> None:
    """Split an activation for the products that read it, and repeat rows of their weights."""
    first = members[0].uses[0]
    x, graph = first.activation, first.node.graph
    assert isinstance(graph, ir.Graph)
    like, rank = members[0].held.dtype, len(x.shape) if x.shape is not None else 2
    nodes: list[ir.Node] = []

    def add(kind: str, inputs: Sequence[ir.Value], hint: str, width: int, **attributes: Any) -> ir.Value:
        shape = None if x.shape is None else ir.Shape([*list(x.shape)[:-1], width])
        value = ir.Value(name=names.fresh(f"{x.name}.{hint}"), type=ir.TensorType(like), shape=shape)
        nodes.append(ir.node(kind, inputs, attributes, outputs=[value], name=value.name))
        return value

    def held(array: Array, hint: str) -> ir.Value:
        return edit.initializer(graph, array, names.fresh(f"{x.name}.{hint}"))

    def within(value: ir.Value, reach: Array, hint: str) -> ir.Value:
        limit = reach.astype(like.numpy())
        below = add("Min", [value, held(limit, f"{hint}.high")], f"{hint}.below", len(reach))
        return add("Max", [below, held(-limit, f"{hint}.low")], hint, len(reach))

    source, number, many = split.source, split.number, len(split.pieces)
    inner = within(x, np.where(split.pieces > 1, split.threshold, np.inf), "within")
    whole = add("Gather", [x, held(source, "channels")], "large", len(source), axis=rank - 1)
    over = add("Sub", [whole, within(whole, number * split.threshold, "covered")], "over", len(source))
    last = number == split.pieces[source] - 1
    further = within(over, np.where(last, np.inf, split.threshold), "pieces")
    joined = add("Concat", [inner, further], "split", many + len(source), axis=rank - 1)
    earliest = next(node for node in graph if any(node is site.uses[0].node for site in members))
    graph.insert_before(earliest, nodes)
    for site in members:
        held_weight, axis = site.held, site.axis
        array = np.asarray(held_weight.numpy())
        made = np.concatenate([array, np.take(array, source, axis)], axis)
        site.value.const_value = ir.Tensor(made, dtype=held_weight.dtype, name=held_weight.name)
        site.value.shape = ir.Shape(made.shape)
        edit.release(held_weight)
        site.uses[0].node.replace_input_with(0, joined)
