"""What a rewrite rule is, and the few graph operations that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from graphc import edit, shapes
from graphc.edit import Array

FLOATS = frozenset((ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE))


class Refused(Exception):
    """A rule was tried and does not apply.

    Args:
        reason: Why, in plain words and without names, so that equal reasons group.
        node: Where, if it is not the node at which the rule was tried.
    """

    def __init__(self, reason: str, node: ir.Node | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node


@dataclass(frozen=True)
class Rule:
    """One idea of how to compute the same with fewer nodes.

    Attributes:
        names: What ``only`` and ``skip`` call it, or its parts, and what each does, in a sentence.
        operators: The standard operators at which it is tried.
        apply: ``apply(node, rewriter)`` changes the graph and says what it did; None: the rule does not
            concern this node. It raises ``Refused`` before it changes anything. A rule of several names
            looks at ``rewriter.enabled``.
    """

    names: Mapping[str, str]
    operators: tuple[str, ...]
    apply: Callable[[ir.Node, Rewriter], str | None]


class Rewriter:
    """The model being rewritten: constants, shapes, readers, new nodes.

    Args:
        model: Changed in place by the rules.
        enabled: The names of the rules that may run.

    Attributes:
        version: The lowest opset of the standard domain that the graph or a local function imports.
    """

    def __init__(self, model: ir.Model, enabled: frozenset[str]) -> None:
        self.model = model
        self.enabled = enabled
        self.version = min(
            (
                imports[""]
                for imports in (model.graph.opset_imports, *(f.opset_imports for f in model.functions.values()))
                if "" in imports
            ),
            default=0,
        )
        self._names: edit.Names | None = None
        self._facts: shapes.Facts | None = None
        self._function_graphs = {graph for f in model.functions.values() for graph in (f.graph, *f.graph.subgraphs())}
        self._derived: dict[tuple[ir.Value, bytes], tuple[ir.Value, ir.TensorProtocol]] = {}

    def shape(self, value: ir.Value | None) -> ir.Shape | None:
        """The inferred shape of a value, None if nothing is known; inference runs when first asked."""
        facts = self._infer()
        if value is None or value.graph in self._function_graphs:
            return None
        # Declared shapes of outputs are hints, too, but stay in the interface.
        return shapes.emitted(facts(value).shape) if value.is_graph_output() else value.shape

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """The dtype of a value, None if it is not known; inference runs where nothing is declared."""
        if value is not None and value.dtype is None:
            self._infer()
        return value.dtype if value is not None else None

    def _infer(self) -> shapes.Facts:
        if self._facts is None:
            self._facts = shapes.Facts(self.model)
            self._facts.visit_graph(self.model.graph)
            shapes.annotate(self.model, self._facts)
        return self._facts

    def rank(self, value: ir.Value | None) -> int | None:
        """How many axes a value has, if known."""
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def fresh(self, hint: str) -> str:
        """A value name that nothing carries."""
        if self._names is None:
            self._names = edit.Names(self.model)
        return self._names.fresh(hint)

    def constant(self, node: ir.Node, data: Array | ir.TensorProtocol, hint: str) -> ir.Value:
        """A new constant that ``node`` can read: an initializer, or a Constant node in a local function."""
        graph = node.graph
        assert graph is not None
        name = self.fresh(hint)
        if graph not in self._function_graphs:
            return edit.initializer(graph, data, name)
        held = ir.tensor(data, name=name) if not isinstance(data, ir.TensorProtocol) else data
        made = self.insert(node, "Constant", [], {"value": held}, name=name)
        made.shape, made.type = ir.Shape(dims(held)), ir.TensorType(held.dtype)
        return made

    def derived(self, node: ir.Node, old: ir.Value, key: bytes, make: Callable[[str], ir.TensorProtocol]) -> ir.Value:
        """The constant that ``make(name)`` makes from the constant ``old``, for ``node`` to read.

        It takes the place and name of ``old`` where ``node`` is its only reader, and is made once for all
        readers that ask with the same key.
        """
        known, tensor = self._derived.get((old, key), (None, None))
        if known is not None and known.const_value is tensor and known.graph is node.graph and known.is_initializer():
            return known
        if len(old.uses()) == 1 and old.is_initializer() and not old.is_graph_output():
            assert old.name is not None
            old.const_value = make(old.name)
            old.shape = ir.Shape(dims(old.const_value))
            return old
        tensor = make(f"{old.name}")
        made = self.constant(node, tensor, f"{old.name}")
        self._derived[(old, key)] = made, tensor
        return made

    def insert(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        *,
        name: str,
        like: ir.Value | None = None,
    ) -> ir.Value:
        """Put a new node of one output in front of ``before``.

        Args:
            before: The node that it comes before.
            op_type: A standard operator.
            inputs: Its inputs.
            attributes: Its attributes.
            name: The free name of its output.
            like: A value of the same type and shape.
        """
        made = ir.node(op_type, inputs, attributes, name=name, metadata_props=dict(before.metadata_props))
        made.outputs[0].name = name
        if like is not None:
            made.outputs[0].type, made.outputs[0].shape = like.type, like.shape
        before.prepend(made)
        return made.outputs[0]

    def supersede(
        self, node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], attributes: dict[str, Any] | None = None
    ) -> ir.Node:
        """Replace a node by another one that computes its only output; name and metadata stay.

        Args:
            node: What is replaced and removed.
            op_type: A standard operator.
            inputs: Its inputs.
            attributes: Its attributes.
        """
        old = node.outputs[0]
        made = ir.node(op_type, inputs, attributes, name=node.name, metadata_props=dict(node.metadata_props))
        made.outputs[0].type, made.outputs[0].shape = old.type, old.shape
        name = old.name
        node.prepend(made)
        replaced = edit.replace(old, made.outputs[0])
        assert replaced, "the new value is neither input, output nor initializer"
        made.outputs[0].name = name
        self.drop(node)
        return made

    def follow(self, value: ir.Value, op_type: str, others: Sequence[ir.Value]) -> ir.Value:
        """Put ``op_type(value, *others)``, of the same type and shape, between a value and its readers."""
        producer = value.producer()
        assert producer is not None
        name = self.fresh(f"{value.name}.{op_type.lower()}")
        made = ir.node(op_type, [None, *others], name=name, metadata_props=dict(producer.metadata_props))
        made.outputs[0].name = name
        made.outputs[0].type, made.outputs[0].shape = value.type, value.shape
        producer.append(made)
        replaced = edit.replace(value, made.outputs[0])
        assert replaced, "the new value is neither input, output nor initializer"
        made.replace_input_with(0, value)
        return made.outputs[0]

    def bypass(self, node: ir.Node, source: ir.Value) -> None:
        """Let the readers of the node's only output read ``source`` instead, and remove the node."""
        replaced = edit.replace(node.outputs[0], source)
        assert replaced, "the caller checks that the output can be renamed"
        self.drop(node)

    def drop(self, node: ir.Node) -> None:
        """Remove a node that nobody reads, and the constants that only it read."""
        inputs = [value for value in node.inputs if value is not None]
        edit.remove(node)
        for value in inputs:
            self.drop_unread(value)

    def drop_unread(self, value: ir.Value) -> None:
        """Remove a constant that nobody reads."""
        if value.uses() or value.is_graph_output() or value.is_graph_input():
            return
        producer = value.producer()
        if value.is_initializer():
            assert value.graph is not None and value.name is not None
            value.graph.initializers.pop(value.name)
        elif edit.is_op(producer, "Constant"):
            assert producer is not None
            edit.remove(producer)


def dims(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape of a tensor."""
    return tuple(tensor.shape)  # type: ignore[arg-type]


def sole_reader(value: ir.Value) -> ir.Node:
    """The only reader of a value, in the same graph.

    Raises:
        Refused: It has other readers or none, is an output of the graph, or is read inside a subgraph.
    """
    if value.is_graph_output():
        raise Refused("the intermediate result is an output of the graph")
    uses = tuple(value.uses())
    if len(uses) != 1:
        others = len(uses) - 1
        raise Refused(f"the intermediate result has {others} other reader{'s' if others > 1 else ''}")
    reader = uses[0].node
    producer = value.producer()
    if producer is not None and reader.graph is not producer.graph:
        raise Refused("the intermediate result is read inside a subgraph")
    return reader


def chain(node: ir.Node, wanted: Callable[[ir.Node], bool], most: int) -> list[ir.Node]:
    """A node and up to ``most`` wanted ones behind it, each the sole reader of the one before."""
    found = [node]
    while len(found) <= most:
        try:
            following = sole_reader(found[-1].outputs[0])
        except Refused:
            break
        if not wanted(following):
            break
        found.append(following)
    return found
