"""What is known of a model's values before it runs, index by index: this channel is zero, that one always 0.3.

Zero times something unknown is taken to be zero: weights and activations are supposed to be finite.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes.trace import Trace
from graphc.edit import Array
from graphc.known.facets import NOTHING, Facets, Shape, tidy
from graphc.shapes import Fact, Facts
from graphc.shapes.symbolic import Dim, symbol

JOINT = 1 << 18
"""Elements up to which a constant is one facet; of larger ones, each axis is looked at alone, for zeros."""
CHUNK = 1 << 22
"""Elements of a large constant that are looked at together."""


class ConstantFacets:
    """The facets of constants, read once per tensor: zeros of large ones stay known while a model is rewritten."""

    def __init__(self) -> None:
        # The tensor is held beside its facets: an id is unique only as long as its object lives.
        self._large: dict[int, tuple[ir.TensorProtocol, Facets]] = {}
        self._bits: dict[int, tuple[ir.TensorProtocol, Array]] = {}

    def of(self, held: ir.TensorProtocol) -> Facets:
        """A small constant is a facet of its own, read each time; a large one leaves a vector for each axis."""
        if not numeric(held.dtype):
            return NOTHING
        if held.size <= JOINT:
            return (np.array(held.numpy(), dtype=np.float64),)
        found = self._large.get(id(held))
        if found is None:
            found = held, _zero_slices(held)
            self._large[id(held)] = found
        return found[1]

    def zeros(self, held: ir.TensorProtocol) -> Array | None:
        """Where a constant is zero, as ``Knowledge.zeros``; of small ones a bit per element is kept."""
        if not numeric(held.dtype):
            return None
        if held.size > JOINT:
            return where_zero(self.of(held))
        found = self._bits.get(id(held))
        if found is None:
            found = held, np.packbits(np.asarray(held.numpy() == 0))
            self._bits[id(held)] = found
        bits = found[1]
        if not bits.any():
            return None
        shape = tuple(held.shape.numpy())
        return np.unpackbits(bits, count=held.size).astype(bool).reshape(shape)


def where_zero(facets: Facets) -> Array | None:
    """Where facets say zero: booleans that broadcast to the value's shape; None if nowhere."""
    result: Array | None = None
    for facet in facets:
        here = facet == 0
        result = here if result is None else result | here
    return result


def numeric(dtype: ir.DataType) -> bool:
    """Whether the dtype is one whose elements convert to float64."""
    return dtype.is_floating_point() or dtype.is_integer() or dtype == ir.DataType.BOOL


def _zero_slices(held: ir.TensorProtocol) -> Facets:
    """For each axis of a constant, which of its slices are all zero; read in chunks and released."""
    array = held.numpy()
    shape = array.shape
    some = [np.zeros(n, dtype=bool) for n in shape]
    step = max(1, CHUNK * shape[0] // array.size)
    for start in range(0, shape[0], step):
        nonzero = array[start : start + step] != 0
        for axis in range(len(shape)):
            here = nonzero.any(axis=tuple(a for a in range(len(shape)) if a != axis))
            if axis == 0:
                some[0][start : start + step] = here
            else:
                some[axis] |= here
    del array
    edit.release(held)
    ones = (1,) * len(shape)
    return tidy(
        np.where(alive, np.nan, 0.0).reshape((*ones[:axis], -1, *ones[axis + 1 :])) for axis, alive in enumerate(some)
    )


class Knowledge:
    """The facets of all values of a model's main graph.

    Args:
        model: The model.
        trace: The trace of its axes, for the shapes of what shape inference does not cover (fused operators).
        constants: What is known of constants already.

    Attributes:
        facts: Dtypes and shapes.
        never: By integer tensor: for each index along the axis that it selects from, whether it is never chosen.
    """

    def __init__(self, model: ir.Model, trace: Trace | None = None, constants: ConstantFacets | None = None) -> None:
        from graphc.known import rules

        self.facts = Facts(model)
        self.never: dict[ir.Value, Array] = {}
        self._constants = constants or ConstantFacets()
        self._facets: dict[ir.Value, Facets] = {}
        for node in model.graph:
            self.facts.visit(node)
            if trace is not None:
                self._shapes_from(node, trace)
            rules.exclude(node, self)
            for value, facets in zip(node.outputs, rules.facets(node, self), strict=False):
                rank = self.facts(value).rank
                if facets and rank is not None:
                    self._facets[value] = tidy(f for f in facets if f.ndim == rank)

    def _shapes_from(self, node: ir.Node, trace: Trace) -> None:
        for value in node.outputs:
            axes = trace.axes.get(value)
            if axes is not None and self.facts(value).shape is None:
                dims: list[Dim] = [a.size if isinstance(a.size, int) else symbol(f"_{a.size}") for a in axes]
                dtype = self.facts(value).dtype or self.facts(node.inputs[0]).dtype
                self.facts[value] = Fact(dtype, tuple(dims))

    def __call__(self, value: ir.Value | None) -> Facets:
        """What is known of a value; empty where it is nothing."""
        if value is None:
            return NOTHING
        found = self._facets.get(value)
        if found is None:
            held = edit.tensor(value)
            found = NOTHING if held is None else self._constants.of(held)
        return found

    def zeros(self, value: ir.Value | None) -> Array | None:
        """Where a value is zero for every input: booleans that broadcast to its shape; None if nowhere."""
        held = edit.tensor(value)
        return where_zero(self(value)) if held is None else self._constants.zeros(held)

    def shape(self, value: ir.Value | None) -> Shape | None:
        """The dims of a value, numbers or polynomials; None if not even the rank is known."""
        return self.facts(value).shape
