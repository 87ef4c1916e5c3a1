"""Neurons inside of experts in the order of their worth, so that the least of every expert share places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes.groups import Group, Groups, analyse
from graphc.contract import Context, Effect, Needs, Pass, PassResult, option
from graphc.edit import Array
from graphc.pruning import activations, taylor
from graphc.pruning.consumers import Consumer, consumers
from graphc.pruning.experts import Nested


@dataclass(frozen=True)
class SortExperts(Pass):
    """Reorder the neurons inside of each expert by what they are worth, each expert by itself.

    The order of neurons means nothing, so the model computes the same. But stacked experts are cut at the same places:
    'prune{kinds=neuron}' after it takes the least important neurons of each expert, which need not be the same ones.
    """

    effect: ClassVar[Effect] = Effect.EXACT

    criterion: Literal["heapr", "energy", "l2"] = option(
        "heapr",
        "What a neuron is worth: E[x^2] wT G w with the gradients' Gram matrix G (needs torch); the same without the "
        "gradients; or the norm of its weights.",
    )

    def needs(self, model: ir.Model) -> Needs:
        if self.criterion == "l2":
            return Needs()
        groups = analyse(model)
        found = [nested.group for group in groups if not isinstance(nested := Nested.of(groups, group), str)]
        return (taylor.heapr_needs if self.criterion == "heapr" else activations.needs)(groups, found)

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        result = PassResult()
        groups = analyse(model)
        orders: list[tuple[Nested, Array]] = []
        for i, group in enumerate(groups):
            nested = Nested.of(groups, group)
            if isinstance(nested, str):
                continue
            ctx.progress("ranking neurons of experts", i, len(groups))
            scores = self._scores(groups, nested, ctx)
            if isinstance(scores, str):
                result.refuse(group.name, scores)
            else:
                orders.append((nested, np.argsort(-scores, axis=1, kind="stable")))
        if not orders:
            result.refuse("", "there are no stacked experts with neurons of their own")
        names = edit.Names(model)
        for nested, order in orders:
            if (order != np.arange(order.shape[1])).any():
                nested.reorder(order, names)
                result.change("expert's neurons sorted", nested.experts)
        return result

    def _scores(self, groups: Groups, nested: Nested, ctx: Context) -> Array | str:
        """What every neuron of every expert is worth, ``(experts, neurons)``."""
        total: Array = np.zeros((nested.experts, nested.group.size))
        if self.criterion == "l2":
            for place, axis in nested.places:
                held = edit.tensor(place.value)
                assert held is not None
                total += nested.sums(np.square(held.numpy().astype(np.float32)), place, axis)
                edit.release(held)
            return total
        found = [c for c in consumers(nested.group) if c.contraction.rows.by]
        if not found:
            return "no weight that a router picks reads its neurons"
        for each in found:
            axis = next(axis for place, axis in nested.places if place is each.place)
            elements = each.contraction.restored(self._elements(nested.group, each, ctx))
            total += nested.sums(elements, each.place, axis)
        return total

    def _elements(self, group: Group, consumer: Consumer, ctx: Context) -> Array:
        if self.criterion == "heapr":
            return taylor.heapr_elements(consumer, ctx)
        weight = consumer.matrices
        seen = activations.moments(consumer, ctx, weight.shape)
        return np.asarray(np.square(seen.rms)[:, None, :] * np.square(weight))
