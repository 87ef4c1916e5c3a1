"""Which node depends on which: ancestors and descendants of every node of a graph, as bit sets."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from graphc import edit


class Order:
    """Reachability in a graph, from one sweep forward and one backward.

    A Python integer holds a bit for each node, so that a question about all nodes is one operation on integers.

    Args:
        graph: A graph in topological order; what its bodies read from outside counts as an input of their node.

    Attributes:
        nodes: The nodes in order.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.nodes = list(graph)
        self._bit = {node: 1 << i for i, node in enumerate(self.nodes)}
        # The node of this graph that holds a node of a body, and what each of them reads there.
        self._holder: dict[ir.Node, ir.Node] = {}
        self._inside: dict[ir.Node, list[ir.Value]] = {}
        for node in self.nodes:
            for body in _bodies(node):
                for inner in body:
                    self._holder[inner] = node
                    self._inside.setdefault(node, []).extend(v for v in inner.inputs if v is not None)
        self._before: dict[ir.Node, int] = {}
        for node in self.nodes:
            bits = 0
            for value in self.inputs(node):
                producer = value.producer()
                if producer in self._bit:
                    assert producer is not None
                    bits |= self._bit[producer] | self._before[producer]
            self._before[node] = bits
        self._after: dict[ir.Node, int] = {}
        for node in reversed(self.nodes):
            bits = 0
            for out in node.outputs:
                for reader in self.readers(out):
                    bits |= self._bit[reader] | self._after[reader]
            self._after[node] = bits

        self._fed = 0
        for value in graph.inputs:
            self._fed |= 0 if value.is_initializer() else self._from(value)

    def inputs(self, node: ir.Node) -> Iterator[ir.Value]:
        """What a node reads, also in its bodies."""
        yield from (value for value in node.inputs if value is not None)
        yield from self._inside.get(node, ())

    def readers(self, value: ir.Value) -> Iterator[ir.Node]:
        """The nodes of this graph that read a value; of a node in a body, the one that holds the body."""
        for use in value.uses():
            node = self._holder.get(use.node, use.node)
            if node in self._bit:
                yield node

    def depends(self, value: ir.Value, on: ir.Value) -> bool:
        """Whether ``value`` is computed from ``on``."""
        producer = value.producer()
        if producer not in self._bit:
            return False
        assert producer is not None
        return bool(self._from(on) & self._bit[producer])

    def fed(self, value: ir.Value) -> bool:
        """Whether a value depends on an input of the graph."""
        producer = value.producer()
        if producer not in self._bit:
            return value.is_graph_input()
        assert producer is not None
        return bool(self._fed & self._bit[producer])

    def between(self, start: ir.Value, end: ir.Value) -> list[ir.Node]:
        """The nodes on the paths from ``start`` to ``end``, in order, with the one that makes ``end``."""
        producer = end.producer()
        if producer not in self._bit:
            return []
        assert producer is not None
        bits = self._from(start) & (self._before[producer] | self._bit[producer])
        return self.members(bits)

    def behind(self, start: ir.Value) -> list[ir.Node]:
        """All nodes that depend on a value, in order."""
        return self.members(self._from(start))

    def members(self, bits: int) -> list[ir.Node]:
        """The nodes of a bit set, in order."""
        found = []
        while bits:
            lowest = bits & -bits
            found.append(self.nodes[lowest.bit_length() - 1])
            bits ^= lowest
        return found

    def _from(self, value: ir.Value) -> int:
        bits = 0
        for reader in self.readers(value):
            bits |= self._bit[reader] | self._after[reader]
        return bits


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for body in edit.subgraphs(node):
        yield body
        yield from edit.bodies(body)
