"""Constants that move into a bias: what a unit contributes to a sum, where that is the same for every input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes.groups import Group
from graphc.edit import Array, attribute
from graphc.known import Facets, Knowledge, collapse
from graphc.known.products import unpadded
from graphc.pruning.silence import Mask
from graphc.pruning.sites import Sites


@dataclass(frozen=True)
class Fold:
    """A site whose constant terms can move into a bias: an activation meets a constant weight, and nothing is padded.

    Attributes:
        node: MatMul, Gemm or Conv.
        activation: The operand that is no constant.
        facets: What is known of it.
        rank: Its rank.
        axis: Its summed axis.
    """

    node: ir.Node
    activation: ir.Value
    facets: Facets
    rank: int
    axis: int

    @staticmethod
    def at(node: ir.Node, operand: ir.Value, known: Knowledge) -> Fold | None:
        """The fold of a node's constant terms, if it has one and ``operand`` is its activation."""
        if edit.tensor(operand) is not None or operand is not node.inputs[0] or len(node.inputs) < 2:
            return None
        held, shape = edit.tensor(node.inputs[1]), known.shape(operand)
        if held is None or shape is None or not held.dtype.is_floating_point() or operand is node.inputs[1]:
            return None
        rank = len(shape)
        match node.op_type:
            case "MatMul" if len(held.shape) == 2 and rank >= 2:
                axis = rank - 1
            case "Gemm" if not attribute(node, "transA", 0):
                axis = 1
            case "Conv" if unpadded(node):
                axis = 1
            case _:
                return None
        return Fold(node, operand, known(operand), rank, axis)

    def values(self) -> Array:
        """The constant of each index along the summed axis, NaN where it is none; length 1 if nothing is known."""
        result = np.full(1, np.nan)
        for facet in self.facets:
            flat = collapse(facet, [a for a in range(self.rank) if a != self.axis]).reshape(-1)
            result = np.where(np.isnan(result), flat, result)
        return np.where(np.isfinite(result), result, np.nan)

    def constant(self) -> Mask | None:
        flat = ~np.isnan(self.values())
        return flat.reshape([-1 if a == self.axis else 1 for a in range(self.rank)]) if flat.any() else None

    def bias(self, gone: Array) -> Array:
        """What the terms of the marked indices add to every output channel, float64."""
        values = np.where(gone, np.nan_to_num(self.values()), 0.0)
        weight = edit.constant(self.node.inputs[1])
        assert weight is not None
        if self.node.op_type == "MatMul":
            return values @ weight.astype(np.float64)
        if self.node.op_type == "Gemm":
            matrix = weight.T if attribute(self.node, "transB", 0) else weight
            return float(attribute(self.node, "alpha", 1.0)) * (values @ matrix.astype(np.float64))
        group = attribute(self.node, "group", 1)
        taps = weight.reshape(*weight.shape[:2], -1).sum(axis=2, dtype=np.float64)
        rows = taps.reshape(group, -1, taps.shape[1])
        return np.asarray(np.einsum("goi,gi->go", rows, values.reshape(group, -1))).reshape(-1)


def folds(sites: Sites, group: Group, gone: Array, known: Knowledge) -> Iterator[tuple[Fold, Array]]:
    """The sites where units that go are constants other than zero, each with the indices of the summed axis.

    Args:
        sites: The sites of the model.
        group: The group.
        gone: The units that go, ``(size,)`` or ``(*blocks, size)``.
        known: What is known of the model's values.
    """
    for site in sites.of(group):
        fold = Fold.at(site.node, site.operand, known)
        if fold is None or site.axis != fold.axis:
            continue
        digits = sites.indices(site, group.leaf, group.numbers)[fold.axis]
        if digits is None:
            continue
        block = [sites.indices(site, outer)[fold.axis] for outer in group.outer]
        if any(b is None for b in block):
            everywhere = np.asarray(gone.all(axis=tuple(range(gone.ndim - 1))))
            marked = (digits >= 0) & everywhere[digits]
        else:
            marked = (digits >= 0) & gone[(*block, digits)]
        values = np.broadcast_to(fold.values(), digits.shape)
        marked &= ~np.isnan(values) & (values != 0)
        if marked.any():
            yield fold, marked
