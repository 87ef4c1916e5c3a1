"""Looking behind the last operator: what a saturated output hides.

A softmax that has made up its mind, or a sigmoid far from zero, gives the same output whatever happened before. Where
the operator is injective (a softmax is up to a constant), two models that end in it are equal only if what they feed
it is; so that is compared, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.contract import Arrays, Runnable
from graphc.runtime import Session

Array = np.ndarray[Any, np.dtype[Any]]

_INJECTIVE = ("LogSoftmax", "Sigmoid", "Softmax", "Tanh")

_ONE_AXIS = 13
"""The opset from which a softmax runs along one axis; below it runs over all axes from one on."""


@dataclass(frozen=True)
class Tap:
    """A value that is looked at.

    Attributes:
        name: What it is called in the comparison, the same in all models with such a tap.
        value: The name of the value in the model.
        axis: For a softmax, the axis; None for other operators.
        all_after: Whether the axes after ``axis`` belong to the softmax as well.
    """

    name: str
    value: str
    axis: int | None
    all_after: bool = False

    def see(self, array: Array) -> Array:
        """The part of the value that the operator's result depends on."""
        if self.axis is None or not array.size:
            return array
        first = self.axis % array.ndim
        axes = tuple(range(first, array.ndim)) if self.all_after else (first,)
        with np.errstate(invalid="ignore"):
            return np.asarray(array - array.max(axis=axes, keepdims=True))


def tapped(model: ir.Model) -> tuple[ir.Model, list[Tap]]:
    """A copy of a model with more outputs: what the operators read that make its outputs, if they are injective.

    The copy shares the tensors of the original.
    """
    copy = model.clone()
    graph = copy.graph
    opset = copy.opset_imports.get("", 0)
    taps = []
    for output in list(graph.outputs):
        node = output.producer()
        if not edit.is_op(node, *_INJECTIVE):
            continue
        assert node is not None
        read = node.inputs[0]
        if read is None or read in graph.outputs or read.is_graph_input() or read.is_initializer():
            continue
        axis = None
        if node.op_type.endswith("Softmax"):
            axis = edit.attribute(node, "axis", -1 if opset >= _ONE_AXIS else 1)
        graph.outputs.append(read)
        taps.append(Tap(f"{output.name} before {node.op_type}", read.name or "", axis, opset < _ONE_AXIS))
    return copy, taps


class Tapped(Runnable):
    """Runs a model with taps, and gives what they see under the taps' names.

    Args:
        inner: The session of the model that :func:`tapped` made.
        taps: Its taps.

    Attributes:
        names: The names of the taps.
    """

    def __init__(self, inner: Session, taps: Sequence[Tap]) -> None:
        self._inner = inner
        self._taps = {tap.value: tap for tap in taps}
        self.names = frozenset(tap.name for tap in taps)
        self.provider = inner.provider

    def run(self, inputs: Arrays) -> dict[str, Array]:
        found = {}
        for name, array in self._inner.run(inputs).items():
            tap = self._taps.get(name)
            found[tap.name if tap else name] = tap.see(array) if tap else array
        return found

    def close(self) -> None:
        """Free the session."""
        self._inner.close()
