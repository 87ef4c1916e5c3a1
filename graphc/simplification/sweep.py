"""One pass over a model from its inputs to its outputs, in which every node is computed, shared or simplified.

Nodes are visited in topological order, so that a node sees its inputs already simplified: one sweep does what
rule-by-rule passes need many for, and its cost grows with the number of nodes.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.contract import PassResult
from graphc.shapes import INTEGERS, Fact, Facts, fold
from graphc.shapes.kernels import CannotFold
from graphc.simplification.constants import Constants
from graphc.simplification.inlining import inline_if, inline_loop
from graphc.simplification.rules import Become, Forward, Refuse, Rules
from graphc.simplification.sizes import Sources

STANDARD = ("", "ai.onnx")
_MOST_REWRITES = 32
"""Rewrites of one node in one sweep; a bound against rules that undo each other."""
_COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Xor", "Equal", "BitwiseAnd", "BitwiseOr", "BitwiseXor"})
_LARGEST_KEY = 1024
"""Elements of a tensor attribute up to which nodes are compared by it."""


class Scope:
    """What has been computed so far in a graph and the graphs around it, by what it computes."""

    def __init__(self, graph: ir.Graph, outer: Scope | None) -> None:
        self.graph = graph
        self.outer = outer
        self._found: dict[Hashable, ir.Node] = {}

    def find(self, key: Hashable) -> ir.Node | None:
        scope: Scope | None = self
        while scope is not None:
            found = scope._found.get(key)
            if found is not None and found.graph is not None:
                return found
            scope = scope.outer
        return None

    def __setitem__(self, key: Hashable, node: ir.Node) -> None:
        self._found[key] = node


class Sweep:
    """A sweep over one model.

    Args:
        model: Changed in place by ``run``.
        result: Gets the changes.
        rules: The rules to apply, in order.
        compute: Whether constants are folded, sizes followed and control flow inlined.
        constants: Makes the constants, and keeps account of how much the model grows.
    """

    def __init__(
        self,
        model: ir.Model,
        result: PassResult,
        rules: Sequence[Rules],
        *,
        compute: bool,
        constants: Constants,
    ) -> None:
        self.model = model
        self.facts = Facts(model)
        self.sources = Sources()
        self.refusals: list[tuple[ir.Node, str]] = []
        self._result = result
        self._rules = rules
        self._compute = compute
        self._constants = constants
        self._changes = 0

    def run(self) -> bool:
        """Sweep over the main graph and all bodies in it; say whether anything changed."""
        self._constants.begin(self.facts)
        for value in self.model.graph.inputs:
            self.sources.add(value, self.facts(value).shape)
        self._graph(self.model.graph, None)
        return self._changes > 0

    def change(self, what: str) -> None:
        """Record one change."""
        self._changes += 1
        self._result.change(what)

    def _graph(self, graph: ir.Graph, outer: Scope | None) -> None:
        scope = Scope(graph, outer)
        for node in graph:
            self._node(node, scope)

    def _node(self, node: ir.Node, scope: Scope) -> None:
        constant = node.op_type == "Constant" and node.domain in STANDARD
        if constant and self._compute and self._constants.lift(node):
            self.change("Constant node made an initializer")
            return
        self.facts.visit(node)
        if node.domain in STANDARD and not self._standard(node):
            return
        if self._share(node, scope):
            return
        if node.op_type == "Shape" and scope.outer is None and node.inputs[0] is not None:
            self.sources.add(node.inputs[0], self.facts(node.inputs[0]).shape)
        for body in edit.subgraphs(node):
            self._graph(body, scope)

    def _standard(self, node: ir.Node) -> bool:
        """Simplify a node of the standard domain; False if it is gone."""
        for _ in range(_MOST_REWRITES):
            if self._compute and self._fold(node):
                return False
            if not self._rewrite(node):
                break
            if node.graph is None:
                return False
            self.facts.visit(node)
        if self._compute and node.op_type in ("If", "Loop"):
            inline = inline_if if node.op_type == "If" else inline_loop
            what = inline(node, self.facts, self._constants.names)
            if what is not None:
                # The body now stands behind this node: the sweep comes to it next.
                self.change(what)
                return False
        return True

    def _rewrite(self, node: ir.Node) -> bool:
        for table in self._rules:
            for rule in table[node.op_type]:
                try:
                    outcome = rule(node, self)
                except (IndexError, TypeError, ValueError):
                    # A node that does not fit its operator or its inputs is the runtime's to reject.
                    continue
                match outcome:
                    case Refuse(reason):
                        self.refusals.append((node, reason))
                    case Forward(value, what):
                        if self._forward(node, [value]):
                            self.change(what)
                            return True
                    case Become():
                        self._become(node, outcome)
                        self.change(outcome.what)
                        return True
        return False

    def _forward(self, node: ir.Node, values: Sequence[ir.Value]) -> bool:
        """Replace the outputs of a node and remove it; False if an output's name cannot be kept that way."""
        outputs = node.outputs
        if any(v.uses() or v.is_graph_output() for v in outputs[len(values) :]):
            return False
        named = [(old, new) for old, new in zip(outputs, values, strict=False) if old.is_graph_output()]
        if any(not _may_take_name(old, new) for old, new in named) or len({new for _, new in named}) < len(named):
            return False
        for old, new in zip(outputs, values, strict=False):
            take_over(old, new)
        edit.remove(node)
        return True

    def _become(self, node: ir.Node, outcome: Become) -> None:
        assert node.graph is not None
        inputs = [
            self._constants.small(node.graph, x, f"{node.outputs[0].name}_{i}") if isinstance(x, np.ndarray) else x
            for i, x in enumerate(outcome.inputs)
        ]
        attributes = ir.convenience.convert_attributes(dict(outcome.attributes))
        node.resize_inputs(len(inputs))
        for i, value in enumerate(inputs):
            node.replace_input_with(i, value)
        node.attributes.clear()
        for attr in attributes:
            node.attributes[attr.name] = attr
        if outcome.operator is not None:
            node.op_type = outcome.operator

    def _fold(self, node: ir.Node) -> bool:
        if any(value.is_graph_output() for value in node.outputs) or not node.outputs:
            return False
        used = [value for value in node.outputs if value.uses()]
        if used and all(self.facts(value).known is not None for value in used) and fold.deterministic(node):
            for value in used:
                self._constants.replace(value, _array(self.facts(value)), node)
            self.change(f"constant {node.op_type} computed" if self._all_constant(node) else "size computed")
        elif self._all_constant(node):
            try:
                self._constants.fold(node)
            except CannotFold as reason:
                self.refusals.append((node, str(reason)))
                return False
            self.change(f"constant {node.op_type} computed")
        else:
            return False
        edit.remove(node)
        return True

    def _all_constant(self, node: ir.Node) -> bool:
        present = [value for value in node.inputs if value is not None]
        return bool(present) and all(edit.tensor(value) is not None for value in present)

    def _share(self, node: ir.Node, scope: Scope) -> bool:
        """Replace a node by an earlier one that computes the same; True if it is gone."""
        keys = [key for key in (self._content_key(node), node_key(node)) if key is not None]
        for key in keys:
            twin = scope.find(key)
            if twin is None:
                continue
            if self._forward(node, twin.outputs):
                self.change("common subexpression shared" if key is keys[-1] else "equal size computations shared")
                return True
            if self._point_at(node, twin):
                self.change("common subexpression shared")
            return False
        for key in keys:
            scope[key] = node
        return False

    def _content_key(self, node: ir.Node) -> Hashable | None:
        if not self._compute or len(node.outputs) != 1 or not fold.deterministic(node):
            return None
        fact = self.facts(node.outputs[0])
        if fact.items is None or None in fact.items or fact.dtype not in INTEGERS:
            return None
        return ("sizes", fact.dtype, fact.shape, fact.items)

    def _point_at(self, node: ir.Node, twin: ir.Node) -> bool:
        """Turn a node whose one output must keep its name into an Identity of its twin's."""
        if node.op_type == "Identity" or len(node.outputs) != 1 or node.domain not in STANDARD:
            return False
        self._become(node, Become([twin.outputs[0]], {}, operator="Identity"))
        return True


def _may_take_name(old: ir.Value, new: ir.Value) -> bool:
    """Whether ``new`` can be the graph output that ``old`` is."""
    produced = new.producer() is not None and not new.is_graph_output()
    return produced and new.producer().graph is old.graph  # type: ignore[union-attr]


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of ``old`` read ``new``, which, for a graph output, takes its name and declaration."""
    if old.is_graph_output():
        new.type, new.shape = old.type, old.shape
        new.metadata_props.update(old.metadata_props)
    edit.replace(old, new)


def _array(fact: Fact) -> edit.Array:
    assert fact.dtype is not None and fact.known is not None and fact.static is not None
    return np.array(fact.known, dtype=fact.dtype.numpy()).reshape(fact.static)


def node_key(node: ir.Node) -> Hashable | None:
    """Equal for nodes that compute the same; None for a node that cannot be compared, or must not be shared."""
    if node.domain not in (*STANDARD, "ai.onnx.ml") or not node.outputs or not fold.deterministic(node):
        return None
    attributes = []
    for name, attr in node.attributes.items():
        key = _attribute_key(attr)
        if key is None:
            return None
        attributes.append((name, key))
    inputs = [0 if value is None else id(value) for value in node.inputs]
    if node.op_type in _COMMUTATIVE:
        inputs.sort()
    present = tuple(bool(value.name) for value in node.outputs)
    return (node.op_type, node.domain, node.overload, tuple(inputs), tuple(sorted(attributes)), present)


def _attribute_key(attr: ir.Attr) -> Any | None:
    if attr.is_ref():
        return None
    match attr.type:
        case ir.AttributeType.FLOAT:
            return ("f", struct.pack("<d", attr.as_float()))
        case ir.AttributeType.FLOATS:
            return ("f", struct.pack(f"<{len(attr.as_floats())}d", *attr.as_floats()))
        case ir.AttributeType.INT | ir.AttributeType.STRING:
            return (attr.type.name, attr.value)
        case ir.AttributeType.INTS | ir.AttributeType.STRINGS:
            return (attr.type.name, tuple(attr.value))
        case ir.AttributeType.TENSOR:
            tensor = attr.as_tensor()
            if tensor.size <= _LARGEST_KEY and tensor.dtype != ir.DataType.STRING:
                return (tensor.dtype.name, tuple(tensor.shape.numpy()), tensor.tobytes())
    return None
