"""Runs the rules over a graph: the axis trees of every value, and the facts about them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphc import edit
from graphc.axes import sequences, symbolic
from graphc.axes.algebra import Axis, Unifier
from graphc.axes.apply import Application
from graphc.axes.rules import NoRule, View, line_for, operator_name
from graphc.axes.size import Size, symbol
from graphc.axes.words import words

Axes = tuple[Axis, ...]

PASS_INDICES = words(
    "Cast CastLike Identity Reshape Squeeze Unsqueeze Transpose Flatten Slice Split Expand Tile Concat Gather "
    "GatherElements Dropout"
)
"""Operators that hand indices on unchanged, in another shape."""


INTEGERS = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})
"""Types of shapes, indices and conditions; other constants are data."""


VECTOR = 1 << 16
"""Elements up to which a vector that several nodes read may be copied for each of them."""


PARTIAL = words("Slice Split Gather SplitToSequence GatherND GatherElements If Loop Scan")
"""Operators that may read a part of a constant: several of them share it for another reason than equal values."""


@dataclass(frozen=True)
class Fact:
    """Something that a node says about an axis.

    Attributes:
        axis: The axis; resolve it to leaves when the trace is complete.
        what: ``"fixed"``, ``"~"`` (averaged), ``"^"`` (competing), ``"summed"`` (contracted), ``"multiple"``.
        reason: For fixed axes: why, in plain words.
        node: The node's name, or "" for the model's interface.
        source: The node, if there is one.
        operand: The value whose axis it is.
        at: Which axis of the operand it is, for marks.
        count: What the number of indices must be a multiple of.
    """

    axis: Axis
    what: str
    reason: str
    node: str
    source: ir.Node | None = None
    operand: ir.Value | None = None
    count: int = 1
    at: int = -1


def node_name(node: ir.Node) -> str:
    """The node's name, or what it makes if it has none."""
    if node.name:
        return node.name
    return f"{node.op_type} of {node.outputs[0].name}" if node.outputs else node.op_type


class Trace:
    """The axis trees of all values of the main graph.

    Attributes:
        axes: By value; None where not even the rank is known.
        copies: By small constant and reader, where every reader may have its own copy.
        known: What small integer tensors hold.
        facts: What nodes say about axes.
        indexes: By value: the axis that its elements are indices of.
        roots: By value: the constants that it is made of alone, by movement and casts.
        mixed: Axes along which some operator mixes or moves indices.
        roles: ``(constant, axis, role)``: how a constant is used along an axis.
        order: Constants in the order of their first use.
        bound: By node: how its rule was applied; nodes that were not understood are absent.
        sequences: By value: the axes of each tensor of a sequence.
        whole: Tensors that some node needs as they are (shapes, lengths, scalars), and that node.
    """

    def __init__(self, model: ir.Model, *, interface: bool = False) -> None:
        self.model = model
        self.graph = model.graph
        self.interface = interface
        self.axes: dict[ir.Value, Axes | None] = {}
        self.copies: dict[tuple[ir.Value, ir.Node], Axes] = {}
        self.known: dict[ir.Value, symbolic.Known] = {}
        self._constants: dict[ir.Value, ir.DataType] = {}
        self._unknown: set[ir.Value] = set()
        self._dims: dict[ir.Value, tuple[int, ...]] = {}
        self.facts: list[Fact] = []
        self.indexes: dict[ir.Value, Axis] = {}
        self.roots: dict[ir.Value, tuple[ir.Value, ...]] = {}
        self.mixed: list[Axis] = []
        self.roles: list[tuple[ir.Value, Axis, str]] = []
        self.order: dict[ir.Value, None] = {}
        self.unifier = Unifier()
        self._versions = {**model.graph.opset_imports}
        self.bound: dict[ir.Node, Application] = {}
        self.sequences: dict[ir.Value, list[Axes]] = {}
        self.whole: dict[ir.Value, ir.Node] = {}
        self._consumed: list[ir.Value] = []
        self._fresh = 0
        self._run()

    # Facts

    def fix(self, axes: Iterable[Axis], reason: str, node: ir.Node | None, operand: ir.Value | None = None) -> None:
        name = "" if node is None else node_name(node)
        self.facts.extend(Fact(axis, "fixed", reason, name, node, operand) for axis in axes)

    def mark(self, axis: Axis, mark: str, node: ir.Node, operand: ir.Value, at: int) -> None:
        self.facts.append(Fact(axis, mark, "", node_name(node), node, operand, at=at))

    def summed(self, axis: Axis, node: ir.Node, operand: ir.Value) -> None:
        self.facts.append(Fact(axis, "summed", "", node_name(node), node, operand))

    def multiple(self, axis: Axis, count: int, node: ir.Node) -> None:
        self.facts.append(Fact(axis, "multiple", "", node_name(node), node, None, count))

    def facts_of(self, node: ir.Node) -> list[Fact]:
        """What a node said."""
        return [fact for fact in self.facts if fact.source is node]

    # Values

    def axes_of(self, value: ir.Value, reader: ir.Node | None = None) -> Axes | None:
        """The axes of a value; those of constants, inputs and captured values are made when first asked for.

        A small vector that several nodes read (exporters store equal biases once) has axes of its own at each of
        them: a cut then gives each reader its own copy.
        """
        if value in self.axes:
            return self.axes[value]
        if reader is not None and (value, reader) in self.copies:
            return self.copies[value, reader]
        tensor = edit.tensor(value)
        if reader is not None and tensor is not None and self._is_shared(value, tensor):
            self.roots[value] = (value,)
            self.order.setdefault(value)
            copy = tuple(map(Axis, self.dims(value, tensor)))
            self.copies[value, reader] = copy
            return copy
        if tensor is not None:
            made: Axes | None = tuple(map(Axis, self.dims(value, tensor)))
            self.roots[value] = (value,)
            self.order[value] = None
        elif value.is_initializer() and value.const_value is not None:
            made = tuple(Axis(int(d)) for d in value.const_value.shape.numpy())
            self.fix(made, "the initializer is a graph input too: callers may override it", None, value)
        else:
            made = self.declared(value)
        self.axes[value] = made
        return made

    def dims(self, value: ir.Value, tensor: ir.TensorProtocol) -> tuple[int, ...]:
        """The shape of a constant, asked of its tensor once."""
        found = self._dims.get(value)
        if found is None:
            found = self._dims[value] = tuple(int(d) for d in tensor.shape.numpy())
        return found

    def _is_shared(self, value: ir.Value, tensor: ir.TensorProtocol) -> bool:
        """Whether a constant is cheaper copied than kept equal for all of its readers."""
        if len(value.uses()) < 2:
            return False
        dims = self.dims(value, tensor)
        if math.prod(dims) > VECTOR or tensor.dtype in INTEGERS or sum(1 for d in dims if d != 1) != 1:
            return False
        readers = {use.node for use in value.uses()}
        return len(readers) > 1 and not value.is_graph_output() and all(n.op_type not in PARTIAL for n in readers)

    def at(self, value: ir.Value, reader: ir.Node) -> Axes | None:
        """The axes of a value as a node reads it, if they were asked for."""
        found = self.copies.get((value, reader))
        return self.axes.get(value) if found is None else found

    def constants(self) -> Iterator[tuple[ir.Value, ir.Node | None, Axes]]:
        """All constants with their axes, in the order of their first use; with the reader of each copy."""
        copies: dict[ir.Value, list[tuple[ir.Node, Axes]]] = {}
        for (value, reader), axes in self.copies.items():
            copies.setdefault(value, []).append((reader, axes))
        for value in self.order:
            if whole := self.axes.get(value):
                yield value, None, whole
            for reader, axes in copies.get(value, ()):
                yield value, reader, axes

    def declared(self, value: ir.Value) -> Axes | None:
        """New axes of the sizes that the model declares for a value; dynamic ones are symbols."""
        if value.shape is None:
            return None
        sizes: list[Size] = []
        for i, dim in enumerate(value.shape):
            if isinstance(dim, int):
                sizes.append(dim)
            else:
                sizes.append(symbol(str(dim.value) if dim.value else f"{value.name}.{i}"))
        return tuple(Axis(size) for size in sizes)

    def value_of(self, value: ir.Value) -> symbolic.Known | None:
        """What a small tensor holds, where it is known."""
        if value in self.known:
            return self.known[value]
        if value in self._unknown:
            return None
        tensor = edit.tensor(value)
        large = tensor is not None and math.prod(self.dims(value, tensor)) > symbolic.LIMIT
        if tensor is None or large or tensor.dtype == ir.DataType.STRING:
            if tensor is not None:
                self._unknown.add(value)
            return None
        array = symbolic.known(tensor.numpy())
        self._constants[value] = tensor.dtype
        self.known[value] = array
        return array

    def fresh(self, hint: str) -> Size:
        """A symbol that nothing else has."""
        self._fresh += 1
        return symbol(f"{hint}#{self._fresh}")

    # The run

    def _run(self) -> None:
        for value in self.graph.inputs:
            axes = self.declared(value)
            self.axes[value] = axes
            if axes is not None and not self.interface:
                self.fix(axes, "an axis of a graph input", None, value)
        for node in self.graph:
            self._node(node)
        if not self.interface:
            for value in self.graph.outputs:
                self.fix(self.axes_of(value) or (), "an axis of a graph output", None, value)
        for value, node in self.whole.items():
            self.fix(self.axes.get(value) or (), f"{node.op_type} needs this tensor whole", node, value)

    def _node(self, node: ir.Node) -> None:
        if node.op_type == "Constant" and edit.tensor(node.outputs[0]) is not None:
            return
        standard = node.domain in ("", "ai.onnx")
        if standard and self._arithmetic(node):
            return
        before = len(self.unifier.conflicts)
        self._consumed = []
        try:
            self._apply(node)
        except NoRule as problem:
            self._keep_whole(node, str(problem))
        for conflict in self.unifier.conflicts[before:]:
            self.fix(conflict.axes, conflict.reason, node)
        del self.unifier.conflicts[before:]
        self._indices(node)

    def _arithmetic(self, node: ir.Node) -> bool:
        """Follow shape arithmetic; true if the node is nothing else."""
        if node.op_type in ("Shape", "Size"):
            source = node.inputs[0]
            axes = None if source is None else self.axes_of(source)
            if axes is not None:
                sizes = [axis.size for axis in axes]
                self._set_known(node, [symbolic.shape(node, sizes)])
            else:
                self.axes[node.outputs[0]] = self.declared(node.outputs[0])
            return True
        derived, integral = False, bool(node.inputs)
        inputs: list[symbolic.Known | None] = []
        for value in node.inputs:
            if value is None:
                inputs.append(None)
                continue
            found = self.known.get(value)
            if found is None and (found := self.value_of(value)) is None:
                return False
            if value not in self._constants:
                derived = True
            elif self._constants[value] not in INTEGERS:
                integral = False
                if node.op_type not in symbolic.ARITHMETIC:
                    return False
            inputs.append(found)
        if not (derived or integral):
            return False
        results = symbolic.evaluate(node, inputs)
        if results is None:
            return False
        for value in node.inputs:
            if value is not None and value in self._constants:
                self.whole.setdefault(value, node)
        self._set_known(node, results)
        return True

    def _set_known(self, node: ir.Node, results: Sequence[symbolic.Known]) -> None:
        for out, held in zip(node.outputs, results, strict=False):
            self.known[out] = held
            axes = tuple(Axis(n) for n in held.shape)
            self.axes[out] = axes
            self.fix(axes, "an axis of a shape computation", node, out)

    def _keep_whole(self, node: ir.Node, reason: str) -> None:
        for value in node.inputs:
            for axes in self.sequences.get(value, ()) if value is not None else ():
                self.fix(axes, reason, node, value)
            if value is not None:
                self.fix(self.axes_of(value, node) or (), reason, node, value)
        for graph in edit.subgraphs(node):
            for value in _captured(graph):
                self.fix(self.axes_of(value) or (), f"read in a body of {node.op_type}", node, value)
        for out in node.outputs:
            if out not in self.axes:
                self.axes[out] = self.declared(out)
            self.fix(self.axes[out] or (), reason, node, out)

    def _apply(self, node: ir.Node) -> None:
        if next(edit.subgraphs(node), None) is not None:
            raise NoRule(f"bodies of {node.op_type} are not analysed")
        domain = "" if node.domain == "ai.onnx" else node.domain
        if domain == "" and node.op_type in sequences.OPERATORS:
            sequences.follow(self, node)
            return
        view = View(node, self._sizes, self.value_of, self.indexes.get, node.version or self._versions.get(domain, 1))
        found = line_for(view)
        if found is None:
            raise NoRule(f"operator {operator_name(node)} has no rule")
        application = Application(self, node, *found)
        application.run()
        self._consumed = application.consumed
        self.bound[node] = application

    def _sizes(self, value: ir.Value) -> Sequence[Size] | None:
        if value in self.axes:
            axes = self.axes[value]
            return None if axes is None else [axis.size for axis in axes]
        if (tensor := edit.tensor(value)) is not None:
            return self.dims(value, tensor)
        axes = self.axes_of(value)
        return None if axes is None else [axis.size for axis in axes]

    def _indices(self, node: ir.Node) -> None:
        """Hand on which axis a tensor's values are indices of; whoever computes with them fixes the axis."""
        for i, value in enumerate(node.inputs):
            if value is None or value not in self.indexes:
                continue
            axis = self.indexes[value]
            passes = node.domain in ("", "ai.onnx") and node.op_type in PASS_INDICES
            if passes and (i == 0 or node.op_type == "Concat"):
                known = self.indexes.setdefault(node.outputs[0], axis)
                for out in node.outputs:
                    self.indexes[out] = known
                if known is not axis:
                    self.unifier.unify(known, axis)
            elif value not in self._consumed:
                self.fix([axis], f"{node.op_type} computes with indices along this axis", node)


def _captured(graph: ir.Graph) -> list[ir.Value]:
    """Values of outer graphs that a body reads, in it or in bodies within it."""
    inner = {graph, *graph.subgraphs()}
    found: dict[ir.Value, None] = {}
    for body in inner:
        for value in (*(v for node in body for v in node.inputs if v is not None), *body.outputs):
            if value.graph is not None and value.graph not in inner:
                found[value] = None
    return list(found)
