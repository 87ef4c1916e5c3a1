"""Whether several parts of a graph are one computation with constants of their own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.rewrites.base import Refused


class Alike:
    """Compares computations with one of them.

    Args:
        start: What that one starts from.

    Attributes:
        nodes: Its nodes.
        leaves: Its constants.
        found: For each computation that it was compared with: what stands there for each of its values.
    """

    def __init__(self, start: ir.Value) -> None:
        self.start = start
        self.nodes: dict[ir.Node, None] = {}
        self.leaves: dict[ir.Value, None] = {}
        self.found: list[dict[ir.Value, ir.Value]] = []

    def compare(self, result: ir.Value, its_result: ir.Value, its_start: ir.Value) -> None:
        """Find for each value of the first computation that of another one.

        Raises:
            Refused: They are different computations.
        """
        pairs: dict[ir.Value, ir.Value] = {self.start: its_start}
        queue = [(result, its_result)]
        while queue:
            mine, other = queue.pop()
            if mine in pairs:
                if pairs[mine] is not other:
                    raise Refused(_DIFFERENT)
                continue
            pairs[mine] = other
            held, its = edit.tensor(mine), edit.tensor(other)
            if held is not None:
                if its is None or held.dtype != its.dtype or held.shape != its.shape:
                    raise Refused(_DIFFERENT)
                self.leaves[mine] = None
                continue
            a, b = mine.producer(), other.producer()
            if a is None or b is None or not _alike(a, b) or a.outputs.index(mine) != b.outputs.index(other):
                raise Refused(_DIFFERENT)
            self.nodes[a] = None
            for one, two in zip(a.inputs, b.inputs, strict=True):
                if (one is None) != (two is None):
                    raise Refused(_DIFFERENT)
                if one is not None and two is not None:
                    queue.append((one, two))
        self.found.append(pairs)


_DIFFERENT = "the experts do not all compute the same"


def _alike(a: ir.Node, b: ir.Node) -> bool:
    """Whether two nodes are the same operator with the same attributes."""
    same = (a.op_type, a.domain, len(a.inputs), len(a.outputs)) == (b.op_type, b.domain, len(b.inputs), len(b.outputs))
    if not same or a.attributes.keys() != b.attributes.keys():
        return False
    return all(_equal(a.attributes[name], b.attributes[name]) for name in a.attributes)


def _equal(a: ir.Attr, b: ir.Attr) -> bool:
    if a.type != b.type or a.is_ref() or b.is_ref() or a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return False
    if a.type == ir.AttributeType.TENSOR:
        return np.array_equal(a.as_tensor().numpy(), b.as_tensor().numpy())
    return bool(a.value == b.value)
