"""Experts that were applied one by one, as stacks of weights of which each token picks those that it chose.

Products that all read the tokens become one, with a Split behind it. Weights are ``(experts, in, out)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes.rules.elementwise import BINARY, UNARY
from graphc.recognition.graph import Graph
from graphc.recognition.loops import Loop
from graphc.rewrites.base import Refused
from graphc.shapes.symbolic import Dim, mul

_ELEMENTWISE = frozenset((*UNARY.split(), *BINARY.split()))

Placed = tuple[ir.TensorProtocol, int | None]
"""A constant, or the part of one along its first axis."""


@dataclass(frozen=True)
class Stack:
    """A constant of each expert: a matrix, or a vector as a matrix of one row.

    Attributes:
        parts: For each expert: the constants that stand beside one another, along the last axis.
        turned: Whether the matrices are transposed where they lie.
    """

    parts: tuple[tuple[Placed, ...], ...]
    turned: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        """The sizes of what stands beside one another."""
        return tuple(self._shape(held)[1] for held in self.parts[0])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the stack."""
        return len(self.parts), self._shape(self.parts[0][0])[0], sum(self.widths)

    def _shape(self, placed: Placed) -> tuple[int, int]:
        held, index = placed
        own = [int(size) for size in held.shape.numpy()][0 if index is None else 1 :]
        rows, columns = (*(1,) * (2 - len(own)), *own)[-2:]
        return (columns, rows) if self.turned else (rows, columns)

    def tensor(self, name: str, swapped: bool = False) -> ir.TensorProtocol:
        """The stack as one constant, computed when it is read; ``swapped``: with its last two axes swapped."""
        experts, rows, columns = self.shape
        shape = (experts, columns, rows) if swapped else (experts, rows, columns)
        compute = partial(self._numbers, name, swapped)
        dtype = self.parts[0][0][0].dtype
        return ir.LazyTensor(compute, dtype=dtype, shape=ir.Shape(shape), name=name, cache=False)

    def _numbers(self, name: str, swapped: bool) -> ir.TensorProtocol:
        experts = []
        for parts in self.parts:
            arrays = []
            for held, index in parts:
                array = held.numpy() if index is None else held.numpy()[index]
                array = array.reshape((1,) * (2 - array.ndim) + array.shape)
                arrays.append(array.T if self.turned else array)
            joined = np.concatenate(arrays, axis=1)
            experts.append(joined.T if swapped else joined)
        stacked = np.stack(experts)
        for parts in self.parts:
            for held, _ in parts:
                edit.release(held)
        return ir.Tensor(np.ascontiguousarray(stacked), dtype=self.parts[0][0][0].dtype, name=name)


def beside(stacks: Sequence[Stack]) -> Stack:
    """Stacks of as many rows as one.

    Raises:
        Refused: Their matrices lie in different ways.
    """
    if len({stack.turned for stack in stacks}) > 1:
        raise Refused("the weights of an expert are transposed in part")
    together = zip(*(stack.parts for stack in stacks), strict=True)
    return Stack(tuple(tuple(held for part in parts for held in part) for parts in together), stacks[0].turned)


@dataclass(frozen=True)
class Product:
    """A product of tokens, or of what was made of them, with a matrix of each expert.

    Attributes:
        node: MatMul or Gemm of expert 0.
        weights: ``(experts, in, out)``.
        bias: ``(experts, 1, out)``.
    """

    node: ir.Node
    weights: Stack
    bias: Stack | None


def product(node: ir.Node, loop: Loop) -> Product | None:
    """What a node of expert 0 is, if it is a product with weights of the experts' own.

    Raises:
        Refused: It is, and is not written for all experts.
    """
    if not edit.is_op(node, "MatMul", "Gemm"):
        return None
    weights = stack(node.inputs[1], loop)
    if weights is None:
        raise Refused("an expert multiplies by something besides its own weights")
    if node.op_type == "MatMul":
        return Product(node, weights, None)
    scaled = [edit.attribute(node, name, 1.0) != 1.0 for name in ("alpha", "beta")]
    if any(scaled) or edit.attribute(node, "transA", 0):
        raise Refused("an expert has a Gemm with factors")
    if edit.attribute(node, "transB", 0):
        weights = Stack(weights.parts, not weights.turned)
    bias = stack(node.inputs[2], loop) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    if bias is not None and bias.shape[1] != 1:
        raise Refused("an expert's bias is no vector")
    return Product(node, weights, bias)


def stack(value: ir.Value | None, loop: Loop) -> Stack | None:
    """What expert 0 reads there, of all experts; None if it is no constant of up to two axes."""
    if value is None:
        return None
    if value in loop.constants:
        found = [edit.tensor(each) for each in loop.constants[value]]
        if any(held is None or len(held.shape) > 2 for held in found):
            return None
        return Stack(tuple(((held, None),) for held in found if held is not None))
    node = value.producer()
    if node is None or node not in loop.nodes:
        return None
    inner = node.inputs[0]
    if edit.is_op(node, "Transpose") and (edit.attribute(node, "perm") or (1, 0)) == (1, 0):
        found_inner = stack(inner, loop)
        return None if found_inner is None else Stack(found_inner.parts, not found_inner.turned)
    if edit.is_op(node, "Gather") and edit.attribute(node, "axis", 0) == 0 and inner in loop.constants:
        held = [edit.tensor(each) for each in loop.constants[inner]]
        index = [edit.scalar(each) for each in loop.constants.get(node.inputs[1], ())]  # type: ignore[arg-type]
        if index and None not in index and all(each is not None and 1 < len(each.shape) < 4 for each in held):
            return Stack(tuple(((h, int(i)),) for h, i in zip(held, index, strict=True)))  # type: ignore[misc, arg-type]
    return None


def write(loop: Loop, graph: Graph) -> None:
    """Put stacks in the place of a loop.

    Raises:
        Refused: An expert has an operator that is not written for all experts at once.
    """
    written = _Written(loop, graph)
    written.check()
    written.write()


class _Written:
    """The form with stacks; values are ``(places, 1, size)``."""

    def __init__(self, loop: Loop, graph: Graph) -> None:
        self.loop, self.graph = loop, graph
        end = loop.output.producer()
        assert end is not None
        self.end = end
        count, self.slots = graph.dims(loop.indices) or ()
        self.tokens, self.places = count, mul(count, self.slots)
        self.products = {p.node: p for node in loop.nodes if (p := product(node, loop)) is not None}
        self.first = [p for p in self.products.values() if p.node.inputs[0] is loop.rows]
        self.made: dict[ir.Value, ir.Value] = {}

    def check(self) -> None:
        """See that everything can be written, before anything is."""
        if len(self.first) > 1:
            beside([p.weights for p in self.first])
        size = self._size(self.loop.result)
        if not isinstance(size, int):
            raise Refused("the width of what the experts give is not known")
        self.size = size
        for node in self.loop.nodes:
            if node in self.products:
                continue
            if node.domain == "" and node.op_type in _ELEMENTWISE:
                for value in node.inputs:
                    if value in self.loop.constants or stack(value, self.loop) is not None:
                        held = stack(value, self.loop)
                        if held is None or held.shape[1] != 1:
                            raise Refused("an expert has a constant that is no vector")
            elif edit.is_op(node, "Slice", "Split") and stack(node.outputs[0], self.loop) is None:
                if not self._along_last(node):
                    raise Refused("an expert takes its tokens apart")
            elif stack(node.outputs[0], self.loop) is None:
                raise Refused(f"an expert has {node.op_type}, which is not written for all experts at once")

    def _along_last(self, node: ir.Node) -> bool:
        rest = node.inputs[1:]
        shared = all(v is None or len(set(self.loop.constants.get(v, (None, v)))) == 1 for v in rest)
        if node.op_type == "Split":
            return shared and edit.attribute(node, "axis", 0) in (-1, 1)
        return shared and len(node.inputs) > 3 and edit.scalar(node.inputs[3]) in (-1, 1)

    def write(self) -> None:
        loop, graph, end = self.loop, self.graph, self.end
        assert isinstance(self.slots, int)
        picked = graph.make(end, "Reshape", [loop.indices, self._ints(-1)], like=loop.indices, shape=(self.places,))
        rows = self._make("Reshape", [loop.tokens, self._ints(-1, 1, loop.width)], (self.tokens, 1, loop.width))
        rows = self._make("Expand", [rows, self._ints(1, self.slots, 1)], (self.tokens, self.slots, loop.width))
        self.made[loop.rows] = self._make("Reshape", [rows, self._ints(-1, 1, loop.width)], self._sizes(loop.width))
        self.picked = picked
        if len(self.first) > 1:
            self._joined()
        for node in loop.nodes:
            self._write(node)
        size = self.size
        result = self._make(
            "Reshape", [self.made[loop.result], self._ints(-1, self.slots, size)], (self.tokens, self.slots, size)
        )
        weights = graph.make(
            end, "Unsqueeze", [loop.weights, self._ints(2)], like=loop.weights, shape=(self.tokens, self.slots, 1)
        )
        weighted = self._make("Mul", [result, weights], (self.tokens, self.slots, size))
        old = [v for v in end.inputs if v is not None]
        if loop.base is None:
            graph.supersede(end, "ReduceSum", [weighted, self._ints(1)], {"keepdims": 0})
        else:
            total = graph.make(
                end,
                "ReduceSum",
                [weighted, self._ints(1)],
                {"keepdims": 0},
                like=loop.result,
                shape=(self.tokens, size),
            )
            graph.supersede(end, "Add", [loop.base, total], None)
        graph.sweep(old)

    def _joined(self) -> None:
        """One product for all that read the tokens."""
        joined = beside([p.weights for p in self.first])
        name = self.first[0].node.inputs[1].name if self.first[0].node.inputs[1] is not None else None
        whole = self._product(self.made[self.loop.rows], joined, name or "experts")
        sizes = self._ints(*(p.weights.shape[2] for p in self.first))
        parts = ir.node(
            "Split", [whole, sizes], {"axis": -1}, num_outputs=len(self.first), name=self.graph.fresh("graphc.split")
        )
        self.end.prepend(parts)
        for part, each in zip(parts.outputs, self.first, strict=True):
            part.name = self.graph.fresh(f"{each.node.outputs[0].name}.part")
            self.graph.note(part, whole, self._sizes(each.weights.shape[2]))
            self.made[each.node.outputs[0]] = self._biased(part, each)

    def _write(self, node: ir.Node) -> None:
        if node.outputs[0] in self.made or stack(node.outputs[0], self.loop) is not None:
            return
        found = self.products.get(node)
        if found is not None:
            name = node.inputs[1].name if node.inputs[1] is not None else None
            given = self.made[node.inputs[0]]  # type: ignore[index]
            self.made[node.outputs[0]] = self._biased(self._product(given, found.weights, name or "experts"), found)
            return
        attributes = {name: edit.attribute(node, name) for name in node.attributes}
        inputs: list[ir.Value | None] = []
        for position, value in enumerate(node.inputs):
            if edit.is_op(node, "Slice") and position == 3:
                inputs.append(self._ints(-1))
            elif edit.is_op(node, "Slice", "Split") and position:
                inputs.append(value)
            else:
                inputs.append(self._operand(value))
        if node.op_type == "Split":
            attributes["axis"] = -1
        made = ir.node(
            node.op_type, inputs, attributes, num_outputs=len(node.outputs), name=self.graph.fresh(f"{node.name}.all")
        )
        self.end.prepend(made)
        for new, old in zip(made.outputs, node.outputs, strict=True):
            new.name = self.graph.fresh(f"{old.name}.all")
            self.made[old] = self.graph.note(new, old, self._sizes(self._size(old)))

    def _operand(self, value: ir.Value | None) -> ir.Value | None:
        """What all experts read where expert 0 reads this."""
        if value is None or value in self.made:
            return self.made.get(value) if value is not None else None
        if len(set(self.loop.constants.get(value, ()))) == 1:
            return value
        held = stack(value, self.loop)
        assert held is not None
        return self._pick(held, value.name or "experts")

    def _pick(self, held: Stack, name: str) -> ir.Value:
        """Of each place, the matrix of its expert."""
        whole = self.graph.constant(self.end, held.tensor(f"{name}.experts"), f"{name}.experts")
        like = next(iter(self.made.values()))
        return self.graph.make(
            self.end, "Gather", [whole, self.picked], {"axis": 0}, like=like, shape=(self.places, *held.shape[1:])
        )

    def _product(self, given: ir.Value, weights: Stack, name: str) -> ir.Value:
        return self._make("MatMul", [given, self._pick(weights, name)], self._sizes(weights.shape[2]))

    def _biased(self, value: ir.Value, found: Product) -> ir.Value:
        if found.bias is None:
            return value
        name = (found.node.inputs[2].name if found.node.inputs[2] is not None else None) or "experts"
        return self._make("Add", [value, self._pick(found.bias, name)], self._sizes(found.weights.shape[2]))

    def _make(self, operator: str, inputs: Sequence[ir.Value | None], shape: Sequence[Dim]) -> ir.Value:
        return self.graph.make(self.end, operator, inputs, like=self.loop.result, shape=shape)

    def _ints(self, *numbers: int) -> ir.Value:
        return self.graph.ints(self.end, numbers)

    def _sizes(self, size: Dim) -> tuple[Dim, Dim, Dim]:
        return self.places, 1, size

    def _size(self, value: ir.Value) -> Dim:
        dims = self.graph.dims(value)
        assert dims is not None
        return dims[-1]
