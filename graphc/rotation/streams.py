"""Axes that can be turned: everything that meets one does the same to it, whichever basis it is in.

The rules of the axes say where an axis goes; here is what operators do along it. An operator that is linear in each
operand, that adds operands, or that takes the length of rows does not see a rotation: sums over the axis of a product
of two operands stay, and what passes comes out turned. Per-channel gains would see it, and are folded away first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes.algebra import Axis, leaves
from graphc.axes.group import Group, Place
from graphc.axes.groups import Groups
from graphc.axes.words import words
from graphc.edit import Array, attribute

MOVES = words(
    "Cast CastLike Concat Dropout Expand Flatten Gather GatherND Identity Neg Reshape Slice Split Squeeze Tile "
    "Transpose Unsqueeze"
)
"""Operators that hand on the data of their first input (Concat: of all), in another shape."""

SUMS = words("Add Sub Sum ScatterND Where")
"""Operators that are linear in all operands at once: one without the axis adds the same to all channels."""

PRODUCTS = words("Attention AveragePool Conv Div Einsum Gemm GlobalAveragePool MatMul Mul")
"""Operators that are linear in each operand."""

MEANS = words("ReduceMean ReduceSum")
"""Operators that sum up; along the axis itself, only squares may be."""

LENGTHS = words("ReduceL2 ReduceSumSquare")
"""Operators that sum up squares."""

NORMS = words("RMSNormalization SimplifiedLayerNormalization")
"""Operators that divide rows by their length, and scale channels."""

QUANTIZED = "a weight along it is quantized already"


class Refused(Exception):
    """An axis cannot be turned; the message is the reason."""


@dataclass
class Gain:
    """A factor for each channel.

    Attributes:
        node: What multiplies, or divides, with it.
        place: Where the factors are.
        factors: What channels are multiplied with in effect, ``(n,)``, float64.
        readers: The weights that are multiplied with the scaled channels, all of which can take the factors.
        shared: A weight among them has other readers, which may not see the factors.
    """

    node: ir.Node
    place: Place
    factors: Array
    readers: list[Place] = field(default_factory=list)
    shared: bool = False


@dataclass(frozen=True)
class Stream:
    """An axis that can be turned.

    Attributes:
        group: Its group.
        gains: What has to be folded first.
        places: The constants that are turned.
    """

    group: Group
    gains: tuple[Gain, ...]
    places: tuple[Place, ...]


def meetings(groups: Groups) -> dict[Axis, list[ir.Node]]:
    """The operators that meet each axis."""
    found: dict[Axis, dict[ir.Node, None]] = {}
    for node in groups.trace.bound:
        for value in (*node.inputs, *node.outputs):
            for axis in (() if value is None else groups.trace.at(value, node)) or ():
                for leaf in leaves(axis):
                    found.setdefault(leaf, {})[node] = None
    return {leaf: list(nodes) for leaf, nodes in found.items()}


def stream(groups: Groups, group: Group, nodes: Sequence[ir.Node]) -> Stream:
    """How the axis of a group can be turned, which some nodes meet.

    Raises:
        Refused: It cannot.
    """
    return _Search(groups, group).run(nodes)


class _Search:
    def __init__(self, groups: Groups, group: Group) -> None:
        self.groups, self.group, self.trace = groups, group, groups.trace

    def run(self, nodes: Sequence[ir.Node]) -> Stream:
        group = self.group
        if group.numbers is not None:
            raise Refused("single indices of it are read on their own")
        for place in group.places:
            tensor = edit.tensor(place.value)
            if tensor is not None and tensor.dtype.bitwidth <= 8 and tensor.dtype != ir.DataType.BOOL:
                raise Refused(QUANTIZED)
        gains = []
        for node in nodes:
            if (gain := self._judged(node)) is not None:
                gains.append(gain)
        held = {(gain.place.value, gain.place.reader) for gain in gains}
        for value, reader in held:
            if reader is None and any(use.node not in {gain.node for gain in gains} for use in value.uses()):
                raise Refused("factors of its channels are read as something else, too")
        rest = [place for place in group.places if (place.value, place.reader) not in held]
        places = tuple(place for place in rest if not _is_zero(place.value))
        for place in places:
            tensor = edit.tensor(place.value)
            if tensor is None or not tensor.dtype.is_floating_point():
                raise Refused("a constant lies along it that cannot be turned")
        uneven = [gain for gain in gains if np.ptp(gain.factors)]
        for gain in uneven:
            self._follow(gain)
        return Stream(group, tuple(uneven), places)

    def _count(self, value: ir.Value | None, node: ir.Node) -> int:
        """How often the axis occurs in a value, as a node reads it."""
        axes = None if value is None else self.trace.at(value, node)
        return sum(leaf is self.group.leaf for axis in axes or () for leaf in leaves(axis))

    def _judged(self, node: ir.Node) -> Gain | None:
        """None if a node does not see a rotation; a gain that has to go first."""
        op = node.op_type
        inside = [self._count(value, node) for value in node.inputs]
        out = max(self._count(value, node) for value in node.outputs)
        if op in NORMS and inside[0] == out == 1:
            return self._gain(node, 1)
        if op == "ConstantOfShape" and _is_zero(node.outputs[0]):
            return None
        if node.domain not in ("", "ai.onnx"):
            raise Refused(f"{op} may see the basis that it is in")
        if op in MOVES:
            if not inside[0] and op != "Concat" and not _is_zero(node.inputs[0]):
                raise Refused(f"{op} gives all of its channels the same value")
            return None
        if op in SUMS:
            self._sum(node, inside, out)
            return None
        if op in PRODUCTS:
            return self._product(node, inside, out)
        if op in LENGTHS and not out:
            return None
        if op in MEANS and (out or self._squared(node.inputs[0])):
            return None
        if op == "Pow" and edit.scalar(node.inputs[1]) == 2 and self._averaged(node.outputs[0]):
            return None
        if op in ("LayerNormalization", *MEANS):
            raise Refused("its mean is taken, which a rotation changes")
        raise Refused(f"{op} may see the basis that it is in")

    def _sum(self, node: ir.Node, inside: Sequence[int], out: int) -> None:
        terms = list(zip(node.inputs, inside, strict=True))
        if node.op_type == "Where":
            if inside[0]:
                raise Refused("some of its channels are masked")
            terms = terms[1:]
        if node.op_type == "ScatterND":
            terms = [terms[0], terms[2]]
            if attribute(node, "reduction", "none") not in ("none", "add"):
                raise Refused(f"{node.op_type} may see the basis that it is in")
        for value, count in terms:
            if count != out and not _is_zero(value):
                raise Refused("the same value is added to all of its channels")

    def _product(self, node: ir.Node, inside: Sequence[int], out: int) -> Gain | None:
        op = node.op_type
        if op == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            if inside[2] != out:
                raise Refused("the same value is added to all of its channels")
            inside = inside[:2]
        if op == "Conv" and len(node.inputs) > 2 and node.inputs[2] is not None:
            inside = inside[:2]
        if op == "Attention":
            # What queries meet keys along, or what values carry.
            if (*inside[:3], out) not in ((1, 1, 0, 0), (0, 0, 1, 1)):
                raise Refused("Attention takes its heads one by one")
            return None
        if op in ("Mul", "Div") and inside[0] == inside[1] == out == 1:
            if op == "Mul" and node.inputs[0] is node.inputs[1] and self._averaged(node.outputs[0]):
                return None
            for i in (1, 0)[: 1 if op == "Div" else 2]:
                if self._place(node.inputs[i], node) is not None:
                    return self._gain(node, i)
            raise Refused(f"two values are combined by {op} channel by channel")
        if op == "Div" and inside[1]:
            raise Refused("something is divided by it")
        if len(inside) > 2 or sum(inside) - out not in (0, 2):
            raise Refused(f"{op} takes its channels one by one")
        return None

    def _place(self, value: ir.Value | None, node: ir.Node) -> Place | None:
        """Where the group lies in a constant that a node reads; None of what is no constant of its own."""
        if value is None or edit.tensor(value) is None:
            return None
        return next((p for p in self.group.places if p.value is value and p.reader in (None, node)), None)

    def _gain(self, node: ir.Node, index: int) -> Gain | None:
        value = node.inputs[index] if len(node.inputs) > index else None
        place = self._place(value, node)
        held = edit.tensor(value)
        if value is not None and not self._count(value, node) and node.op_type in NORMS:
            return None
        if place is None or held is None or held.size != self.group.size:
            raise Refused("the factors of its channels are computed")
        array = held.numpy().astype(np.float64).reshape(-1)
        if not np.isfinite(array).all() or (node.op_type == "Div" and not array.all()):
            raise Refused("factors of its channels are infinite, or NaN")
        return Gain(node, place, 1 / array if node.op_type == "Div" else array)

    # Squares.

    def _squared(self, value: ir.Value | None) -> bool:
        node = value.producer() if value is not None else None
        while edit.is_op(node, "Cast") and node is not None and node.inputs[0] is not None:
            node = node.inputs[0].producer()
        if node is None:
            return False
        twice = edit.is_op(node, "Mul") and node.inputs[0] is node.inputs[1]
        return twice or (edit.is_op(node, "Pow") and edit.scalar(node.inputs[1]) == 2)

    def _averaged(self, value: ir.Value) -> bool:
        """Whether squares are summed up along the axis by all that read them."""
        uses = [use.node for use in value.uses()]
        if value.is_graph_output() or not uses:
            return False
        for node in uses:
            if edit.is_op(node, "Cast"):
                if not self._averaged(node.outputs[0]):
                    return False
            elif not edit.is_op(node, *MEANS) or self._count(node.outputs[0], node):
                return False
        return True

    # Gains.

    def _follow(self, gain: Gain) -> None:
        """Find the weights behind a gain.

        Raises:
            Refused: Something else reads what it scales.
        """
        waiting, products = [gain.node.outputs[0]], dict[ir.Node, ir.Value]()
        weights: dict[ir.Value, Place] = {}
        while waiting:
            value = waiting.pop()
            for use in value.uses():
                node, out = use.node, self._count(use.node.outputs[0], use.node)
                if out == 1 and self._passes(node, use.idx):
                    waiting += node.outputs
                elif node.op_type in ("Conv", "Einsum", "Gemm", "MatMul") and use.idx < 2:
                    other = node.inputs[1 - use.idx]
                    if out or other is None or (place := self._weight(other)) is None:
                        raise Refused("a gain is on the way to a product with what is no weight of its own")
                    products[node] = other
                    weights[place.value] = place
                else:
                    raise Refused(f"a gain is on the way to {node.op_type}")
            if value.is_graph_output():
                raise Refused("a gain is on the way to an output")
        if not products:
            raise Refused("nothing reads what a gain scales")
        gain.readers = list(weights.values())
        gain.shared = any(not set(_readers(value)) <= set(products) for value in weights)

    def _passes(self, node: ir.Node, index: int) -> bool:
        """Whether a node hands on what it reads, moved, or multiplied by one number or by other factors."""
        if node.op_type in MOVES:
            return node.op_type != "Concat" and not index
        if node.op_type not in ("Mul", "Div") or (node.op_type == "Div" and index):
            return False
        other = node.inputs[1 - index]
        return not self._count(other, node) or self._place(other, node) is not None

    def _weight(self, value: ir.Value | None) -> Place | None:
        """Where the group lies in the constant that a value is, moved: transposed, say, or of experts, picked."""
        while value is not None and edit.tensor(value) is None:
            node = value.producer()
            if node is None or node.op_type not in MOVES or node.op_type == "Concat":
                return None
            value = node.inputs[0]
        found = [place for place in self.group.places if place.value is value and place.reader is None]
        return found[0] if len(found) == 1 else None


def _is_zero(value: ir.Value | None) -> bool:
    held = edit.tensor(value)
    if held is not None:
        return held.size <= 1 and not held.numpy().any()
    node = value.producer() if value is not None else None
    if node is None or not edit.is_op(node, "ConstantOfShape"):
        return False
    filled = node.attributes.get("value")
    return filled is None or not filled.as_tensor().numpy().any()


def _readers(value: ir.Value) -> Iterable[ir.Node]:
    """What reads a constant, moved."""
    for use in value.uses():
        if use.node.op_type in MOVES and not use.idx:
            for out in use.node.outputs:
                yield from _readers(out)
        else:
            yield use.node
