"""The few operations on ``onnx_ir`` graphs that every pass needs: constants in, constants out, replace, iterate."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from typing import Any, cast

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, np.dtype[Any]]

SMALL = 4096
"""Elements up to which a constant counts as small: an index, a shape, a scale; never a weight matrix."""


def graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph, the bodies of local functions, and all subgraphs of both, outer before inner."""
    for root in (model.graph, *(f.graph for f in model.functions.values())):
        yield root
        yield from bodies(root)


def bodies(graph: ir.Graph) -> Iterator[ir.Graph]:
    """All subgraphs of a graph, outer before inner."""
    for node in graph:
        for body in subgraphs(node):
            yield body
            yield from bodies(body)


def nodes(model: ir.Model) -> Iterator[ir.Node]:
    """All nodes of all graphs of the model."""
    for graph in graphs(model):
        yield from graph


def in_order(region: Iterable[ir.Node], known: Collection[ir.Value]) -> list[ir.Node] | None:
    """Nodes so that each comes after those whose results it reads; None if one reads what is not to be had.

    Args:
        region: The nodes, in any order.
        known: Values that are there before; constants always are.
    """
    there, ordered, pending = set(known), [], list(region)
    while pending:
        ready = [n for n in pending if all(v is None or v in there or tensor(v) is not None for v in n.inputs)]
        if not ready:
            return None
        ordered += ready
        there.update(v for node in ready for v in node.outputs)
        pending = [node for node in pending if node not in ready]
    return ordered


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The bodies that a node holds (If, Loop, Scan), outermost only."""
    if not node.attributes:
        return
    for attr in node.attributes.values():
        if attr.type == ir.AttributeType.GRAPH and not attr.is_ref():
            yield attr.as_graph()
        elif attr.type == ir.AttributeType.GRAPHS and not attr.is_ref():
            yield from attr.as_graphs()


def tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The constant that a value always holds, unread: an initializer that cannot be overridden, or a Constant node.

    An initializer that is also a graph input is a default that callers may override, hence no constant.
    """
    if value is None:
        return None
    if value.is_initializer():
        return None if value.is_graph_input() else value.const_value
    producer = value.producer()
    if producer is None or producer.op_type != "Constant" or producer.domain not in ("", "ai.onnx"):
        return None
    for name, attr in producer.attributes.items():
        if attr.is_ref():
            return None
        match name:
            case "value":
                return cast("ir.TensorProtocol", attr.value)
            case "value_int" | "value_ints":
                return ir.tensor(np.array(attr.value, dtype=np.int64))
            case "value_float" | "value_floats":
                return ir.tensor(np.array(attr.value, dtype=np.float32))
            case "value_string":
                return ir.tensor([attr.as_string()])
            case "value_strings":
                return ir.tensor(list(attr.as_strings()))
    return None


def nbytes(held: ir.TensorProtocol) -> int:
    """Bytes that a tensor takes; strings count with their own length, for which they are read."""
    if held.dtype == ir.DataType.STRING:
        return sum(len(item) for item in held.numpy().reshape(-1))
    return held.nbytes


def constant(value: ir.Value | None, limit: int | None = None) -> Array | None:
    """The constant that a value holds, as a read-only array in the tensor's dtype.

    Args:
        value: Any value, or None for an omitted input.
        limit: Give None for constants with more elements than this (without reading them).
    """
    found = tensor(value)
    if found is None or (limit is not None and found.size > limit):
        return None
    return found.numpy()


def release(tensor: ir.TensorProtocol) -> None:
    """Let go of the file that was mapped to read a tensor, unless somebody still looks at it."""
    if isinstance(tensor, ir.ExternalTensor):
        with suppress(BufferError):
            tensor.release()


def scalar(value: ir.Value | None) -> Any | None:
    """The Python number of a constant with exactly one element, whatever its rank; else None."""
    array = constant(value, limit=1)
    return array.reshape(-1)[0].item() if array is not None and array.size == 1 else None


class BoundByCaller(ValueError):
    """An attribute in a local function is given by the function's caller."""


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute, or ``default`` where it is absent. Strings are ``str``, lists are tuples.

    Raises:
        BoundByCaller: It refers to an attribute of the function that the node is in.
    """
    attr = node.attributes.get(name)
    if attr is None:
        return default
    if attr.is_ref():
        raise BoundByCaller(f"attribute '{name}' of node '{node.name}' is bound by the function's caller")
    if attr.type == ir.AttributeType.STRING:
        return attr.as_string()
    return tuple(attr.value) if isinstance(attr.value, list | tuple) else attr.value


def is_op(node: ir.Node | None, *op_types: str, domain: str = "") -> bool:
    """Whether a node is one of these operators of the domain (the standard one by default)."""
    return node is not None and node.op_type in op_types and (node.domain or "").replace("ai.onnx", "", 1) == domain


class Names:
    """Hands out value names that nothing in the model carries; the same model gives the same names."""

    def __init__(self, model: ir.Model) -> None:
        self._taken: set[str] = set()
        self._next: dict[str, int] = {}
        for graph in graphs(model):
            self._taken.update(v.name for v in graph.inputs if v.name)
            self._taken.update(graph.initializers)
            self._taken.update(v.name for node in graph for v in node.outputs if v.name)

    def fresh(self, hint: str) -> str:
        """``hint``, or ``hint_1``, ``hint_2``, ... whichever is free first."""
        name, n = hint, self._next.get(hint, 0)
        while name in self._taken:
            n += 1
            name = f"{hint}_{n}"
        self._next[hint] = n
        self._taken.add(name)
        return name


def rename_duplicate_nodes(model: ir.Model) -> int:
    """Give nodes whose name another node of the model has a name of their own; returns how many."""
    taken = {node.name for node in nodes(model)}
    seen: set[str | None] = set()
    renamed = 0
    for node in nodes(model):
        if not node.name or node.name not in seen:
            seen.add(node.name)
            continue
        number = 1
        while f"{node.name}_{number}" in taken:
            number += 1
        node.name = f"{node.name}_{number}"
        taken.add(node.name)
        seen.add(node.name)
        renamed += 1
    return renamed


def initializer(graph: ir.Graph, data: Array | ir.TensorProtocol, name: str) -> ir.Value:
    """Add a constant to the graph under ``name``, which must be free; a tensor is kept as it is, unread."""
    held = ir.tensor(np.asarray(data, order="C"), name=name) if isinstance(data, np.ndarray) else data
    value = ir.Value(name=name, shape=ir.Shape(held.shape.numpy()), type=ir.TensorType(held.dtype), const_value=held)
    graph.register_initializer(value)
    return value


def drop_unused(value: ir.Value | None) -> None:
    """Take an initializer out of its graph if nothing reads it any more and it is no input or output."""
    if value is None or value.uses() or not value.is_initializer():
        return
    if value.graph is not None and not (value.is_graph_input() or value.is_graph_output()):
        value.graph.initializers.pop(value.name or "")


def replace(old: ir.Value, new: ir.Value) -> bool:
    """Let every reader of ``old`` read ``new``; graph outputs keep their names.

    Where ``old`` is a graph output and ``new`` cannot take its name (it is itself an input, an initializer or
    an output, or lives in another graph), nothing is changed.

    Returns:
        Whether it was replaced. The node that made ``old`` is left for dead-code removal.
    """
    if old.is_graph_output():
        if new.is_graph_input() or new.is_graph_output() or new.is_initializer() or new.graph is not old.graph:
            return False
        name = old.name
        if new.type is None:
            new.type = old.type
        if new.shape is None:
            new.shape = old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name = f"{name}.replaced"
        new.name = name
        return True
    old.replace_all_uses_with(new)
    return True


def remove(node: ir.Node) -> None:
    """Take a node that nobody reads out of its graph."""
    assert node.graph is not None
    node.graph.remove(node, safe=True)
