"""The affine maps that stand next to a linear map, with nothing between them but views."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array
from graphc.rewrites import affine as affines
from graphc.rewrites import views
from graphc.rewrites.affine import Affine, affine
from graphc.rewrites.base import Refused, Rewriter, sole_reader
from graphc.rewrites.linear import Linear


@dataclass(frozen=True)
class Neighbours:
    """Affine maps in a row, from the first computed to the last, none of which anybody else reads.

    Attributes:
        maps: The maps; each varies along the channels of the linear map, or not at all.
        stopped: Where and why the row ends, if it ends at what might have been a part of it.
        no_shift: Why the linear map cannot take their shift; "" if it can. There is no view among them then.
    """

    maps: tuple[Affine, ...]
    stopped: tuple[ir.Node, str] | None = None
    no_shift: str = ""

    def together(self) -> tuple[Array, Array]:
        """All maps as one: scale and shift, float64, of shape () or (channels,)."""
        scale, shift = np.asarray(1.0), np.asarray(0.0)
        for part in self.maps:
            scale, shift = scale * part.scale, shift * part.scale + part.shift
        return scale, shift

    def operators(self) -> str:
        """The operators of the maps, each once, for people."""
        return ", ".join(dict.fromkeys(part.node.op_type for part in self.maps))


def rule_name(kind: Linear, part: Affine, *, before: bool) -> str:
    """The name of the rule that folds this affine map into this linear map."""
    what, into = "bn" if part.is_batchnorm else "affine", "conv" if kind.is_conv else "matmul"
    return f"{what}-{into}" if before else f"{into}-{what}"


def may_belong(node: ir.Node | None) -> bool:
    """Whether a node is a view or looks like an affine map."""
    return views.is_view(node) or edit.is_op(node, *affines.OPERATORS)


def after(kind: Linear, rewriter: Rewriter) -> Neighbours:
    """The affine maps that follow a linear map."""
    maps: list[Affine] = []
    value, place = kind.node.outputs[0], _Place(kind.rank, kind.axis, kind.channels, rewriter)
    while True:
        node = next((n for n in value.consumers() if may_belong(n)), None)
        if node is None:
            return Neighbours(tuple(maps))
        try:
            part = None if views.is_view(node) else affine(node)
            if part is None and not views.is_view(node):
                return Neighbours(tuple(maps))
            sole_reader(value)
            if part is None:
                if not place.move(node, value, forward=True):
                    return Neighbours(tuple(maps))
            elif rule_name(kind, part, before=False) in rewriter.enabled:
                place.check(part, value)
                maps.append(part)
            else:
                return Neighbours(tuple(maps))
        except Refused as refusal:
            return Neighbours(tuple(maps), None if views.is_view(node) else (node, refusal.reason))
        value = node.outputs[0]


def before(kind: Linear, rewriter: Rewriter) -> Neighbours:
    """The affine maps that lead to a linear map."""
    maps: list[Affine] = []
    value, place = kind.node.inputs[0], _Place(kind.rank, kind.axis_in, kind.channels_in, rewriter)
    no_shift, passed_view, stopped = "", False, None
    while value is not None:
        node = value.producer()
        if node is None or not may_belong(node) or (no_shift and views.is_view(node)):
            break
        try:
            part = None if views.is_view(node) else affine(node)
            if part is None and not views.is_view(node):
                break
            sole_reader(value)
            if part is None:
                passed_view = True
                if not place.move(node, value, forward=False):
                    break
                value = node.inputs[0]
            elif rule_name(kind, part, before=True) in rewriter.enabled:
                place.check(part, value)
                if _is_normalised(part.x):
                    raise Refused("the scale belongs to a normalisation, which runtimes compute as a whole")
                if part.shift.any():
                    no_shift = _no_shift(kind)
                    if no_shift and passed_view:
                        raise Refused(no_shift)
                maps.insert(0, part)
                value = part.x
            else:
                break
        except Refused as refusal:
            stopped = None if views.is_view(node) else (node, refusal.reason)
            break
    return Neighbours(tuple(maps), stopped, no_shift)


class _Place:
    """The axis of the channels on the way along views.

    Args:
        rank: The rank at the linear map; None if its operator does not say.
        axis: The axis there.
        channels: Its size.
        rewriter: Knows ranks.
    """

    def __init__(self, rank: int | None, axis: int, channels: int, rewriter: Rewriter) -> None:
        self._rank, self._axis, self._channels, self._rewriter = rank, axis, channels, rewriter

    def _settle(self, value: ir.Value) -> tuple[int, int]:
        if self._rank is None:
            # A product of unknown rank has at least the axis of its channels.
            self._rank = self._rewriter.rank(value) or 1
        self._axis %= self._rank
        return self._rank, self._axis

    def move(self, view: ir.Node, value: ir.Value, *, forward: bool) -> bool:
        """Go through a view; False if it is not known where the axis goes."""
        step = views.forward if forward else views.backward
        moved = step(view, *self._settle(value))
        if moved is not None:
            self._rank, self._axis = moved
        return moved is not None

    def check(self, part: Affine, value: ir.Value) -> None:
        """See that a map at ``value`` works along the channels.

        Raises:
            Refused: It works along another axis, or makes the tensor bigger.
        """
        rank, axis = self._settle(value)
        here = part.axis_in(rank)
        if here is not None and here != axis:
            raise Refused("the constant does not vary along the channels")
        if part.size not in (1, self._channels):
            raise Refused("the constant broadcasts the result to more channels")


def _no_shift(kind: Linear) -> str:
    """Why the linear map cannot take a shift of its input; "" if it can."""
    if kind.node.op_type == "ConvTranspose":
        return "a shift before a transposed convolution does not fold: the borders see less of it"
    if not kind.unpadded():
        return "a shift before a zero-padded convolution does not fold"
    if kind.takes_bias:
        return ""
    result = kind.node.outputs[0]
    if not result.is_graph_output() and len(result.uses()) == 1 and affine(result.consumers()[0]) is not None:
        return ""
    return "a shift before a product without bias would only move behind it"


def _is_normalised(value: ir.Value) -> bool:
    """Whether a value is a quotient by something computed, as in a layer or RMS normalisation written out."""
    node = value.producer()
    while edit.is_op(node, "Cast"):
        assert node is not None and node.inputs[0] is not None
        node = node.inputs[0].producer()
    if not edit.is_op(node, "Div", "Mul"):
        return False
    assert node is not None
    computed = [v.producer() for v in node.inputs if v is not None and edit.tensor(v) is None]
    if len(computed) < 2:
        return False
    return node.op_type == "Div" or any(edit.is_op(n, "Reciprocal", "Div", "Pow", "Sqrt") for n in computed)
