"""Keys and values that are appended to those of the past: what Attention calls past and present.

Any Concat of two tensors ``b h t d`` along the positions is one. The first part becomes the past where it comes from
outside of the graph; what is computed in the graph stays a Concat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphc import edit
from graphc.moves import PICKS, VIEWS
from graphc.recognition.graph import Graph
from graphc.recognition.layout import Axes, Axis, Place, fresh, resolve, settled, trace

_CARRIED = ("Cast", "Transpose", *VIEWS, *PICKS)
"""What may lie between an input of the graph and the past."""


@dataclass(frozen=True)
class Cache:
    """The keys and values of one attention.

    Attributes:
        joins: The Concat of keys, ``k``, and of values, ``v``.
        factors: What the present keys or values are multiplied by afterwards.
        axis: The positions that are new.
        places: Where the new keys and values can be read, nearest first.
    """

    joins: Mapping[str, ir.Node]
    factors: Mapping[str, float]
    axis: Axis
    places: Mapping[str, Sequence[Place]]

    def past(self, role: str) -> ir.Value:
        """The keys or values of the past, ``b h p d``."""
        value = self.joins[role].inputs[0]
        assert value is not None
        return value


def find(
    places: Mapping[str, Sequence[Place]], deep: Mapping[str, Axes], keys: Axis, graph: Graph
) -> tuple[Cache | None, str]:
    """The cache of an attention; or None, and why what is joined is none, "" if nothing is joined.

    Args:
        places: Of keys, ``k``, and values, ``v``, nearest first.
        deep: Their axes as ``b h t d``.
        keys: The positions.
        graph: The graph.
    """
    joined = {role: _joined(places[role], keys) for role in "kv"}
    if None in joined.values():
        one = next((place for place in joined.values() if place is not None), None)
        return None, "keys are joined to a past and values are not, or the reverse" if one is not None else ""
    nodes, factors = {}, {}
    for role, place in joined.items():
        assert place is not None
        node = place.value.producer()
        assert node is not None
        nodes[role], factors[role] = node, place.factor
        if not _is_outer(node.inputs[0]):
            return None, ""
        if len(node.inputs) != 2:
            return None, "the cache is joined of more than two parts"
        if settled(place.axes) != settled(deep[role]):
            return None, "the cache is not laid out as batch, heads, positions, channels"
    shapes = {role: [graph.dims(value) for value in node.inputs] for role, node in nodes.items()}
    lengths = [[shape[2] if shape is not None else None for shape in each] for each in shapes.values()]
    new = lengths[0][1]
    if lengths[0] != lengths[1] or new is None or lengths[0][0] is None:
        return None, "the cache of the keys is not known to be as long as that of the values"
    axis = fresh(new)
    found = {}
    for role, node in nodes.items():
        axes = settled(deep[role])
        source = node.inputs[1]
        assert source is not None
        found[role] = _plain(source, (axes[0], axes[1], axis, axes[3]), graph)
    return Cache(nodes, factors, axis, found), ""


def _joined(places: Sequence[Place], keys: Axis) -> Place | None:
    """The place that is a Concat along the positions."""
    for place in places:
        node = place.value.producer()
        if not edit.is_op(node, "Concat") or node is None or place.picks():
            continue
        if resolve(settled(place.axes)[edit.attribute(node, "axis", 0)]) == resolve(keys):
            return place
    return None


def _plain(value: ir.Value, axes: Axes, graph: Graph) -> list[Place]:
    """The places of a value up to where it is scaled: what is cached is cached as it is."""
    found = []
    for place in trace(value, axes, graph):
        if place.factor != 1.0 or place.copied:
            break
        found.append(place)
    return found


def _is_outer(value: ir.Value | None) -> bool:
    """Whether a value is a part or a view of an input of the graph or of a constant."""
    while value is not None and (node := value.producer()) is not None:
        if not edit.is_op(node, *_CARRIED):
            return False
        value = node.inputs[0]
    return value is not None


def ancestors(values: Sequence[ir.Value | None], until: Sequence[ir.Node]) -> set[ir.Node]:
    """Nodes that values depend on; it does not look behind ``until``."""
    stop = set(until)
    found: set[ir.Node] = set()
    queue = [v.producer() for v in values if v is not None]
    while queue:
        node = queue.pop()
        if node is None or node in found:
            continue
        found.add(node)
        if node not in stop:
            queue.extend(v.producer() for v in node.inputs if v is not None)
            queue.extend(v.producer() for body in edit.subgraphs(node) for v in _captured(body))
    return found


def _captured(body: ir.Graph) -> Sequence[ir.Value]:
    """Values of outer graphs that a body reads."""
    inner = set(body.inputs) | {v for node in body for v in node.outputs}
    return [
        v
        for each in (body, *edit.bodies(body))
        for node in each
        for v in node.inputs
        if v is not None and v not in inner and v.graph is not each
    ]
