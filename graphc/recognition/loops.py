"""Experts that are applied one after the other, each to the tokens that chose it, and added up by token.

Whatever lists the places where an expert was chosen, picks tokens and weights by them and adds the results up, is
brought to one form: the sum over experts of ``weight * expert(token)`` at these places (``picks`` follows the numbers).
A token chooses an expert once at most, so that adding and writing what was read and added to are the same. All experts
must be one computation with constants of their own: what they compute of a token alone is then the same for those
places that are listed by slot. Only the order of the sum changes, hence also where it overflows; an expert that no
token chose has no part in either form, and infinite or undefined tokens reach their own rows alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.moves import VIEWS
from graphc.recognition import picks
from graphc.recognition.alike import Alike
from graphc.recognition.graph import Graph
from graphc.recognition.picks import Pick, Places
from graphc.rewrites.base import Refused
from graphc.shapes.symbolic import Dim, minimum, product

"""Operators that leave the elements in their order."""


@dataclass(frozen=True)
class Part:
    """What one expert adds.

    Attributes:
        expert: Its number.
        tokens: What its rows are picked from, before all views.
        weights: ``(tokens, slots)``: what its results are multiplied by.
        rows: ``(places, width)``: the tokens that chose it.
        result: ``(places, width)``: what it makes of them.
    """

    expert: int
    tokens: ir.Value
    weights: ir.Value
    rows: ir.Value
    result: ir.Value


@dataclass(frozen=True)
class Loop:
    """Experts in a row.

    Attributes:
        tokens: Read by all of them: ``(tokens, width)``, or with several axes in the place of the first.
        width: Of the tokens.
        indices: ``(tokens, slots)``: the experts that each token chose.
        weights: ``(tokens, slots)``.
        rows: What expert 0 reads.
        result: What expert 0 gives.
        nodes: What lies between them, in order.
        constants: Of each constant that expert 0 reads, those of all experts.
        base: What their sum is added to; None for zeros.
        output: The sum, ``(tokens, width)``.
    """

    tokens: ir.Value
    width: int
    indices: ir.Value
    weights: ir.Value
    rows: ir.Value
    result: ir.Value
    nodes: tuple[ir.Node, ...]
    constants: dict[ir.Value, tuple[ir.Value, ...]]
    base: ir.Value | None
    output: ir.Value

    @property
    def experts(self) -> int:
        return len(next(iter(self.constants.values())))


def find(router: ir.Node, experts: int, graph: Graph) -> Loop:
    """The experts that are applied one by one to what a TopK chose.

    Args:
        router: The TopK.
        experts: How many there are to choose from.
        graph: The graph.

    Raises:
        Refused: The first condition that failed.
    """
    indices = router.outputs[1]
    shape = graph.dims(indices)
    if shape is None or len(shape) != 2 or not isinstance(shape[1], int):
        raise Refused("the router's choice is no matrix of tokens and slots")
    known = picks.follow(indices, graph)
    if not any(isinstance(pick, Places) for pick in known.values()):
        raise Refused(_other(indices, known))
    reader = _Reader(known, (shape[0], shape[1]), graph)
    output, parts, base = _sum(reader, experts, router)
    if len({part.tokens for part in parts}) != 1 or len({part.weights for part in parts}) != 1:
        raise Refused("experts read different tokens, or have weights of different origin")
    first, *others = sorted(parts, key=lambda part: part.expert)
    same = Alike(first.rows)
    for part in others:
        same.compare(first.result, part.result, part.rows)
    constants = {leaf: (leaf, *(each[leaf] for each in same.found)) for leaf in same.leaves}
    if not any(len(set(values)) > 1 for values in constants.values()):
        raise Refused("the experts have no weights of their own")
    order = edit.in_order(same.nodes, {first.rows})
    if order is None:
        raise Refused("an expert reads something besides its tokens and constants")
    width = (graph.dims(first.rows) or (None,))[-1]
    if not isinstance(width, int):
        raise Refused("the width of the tokens is not known")
    return Loop(
        first.tokens, width, indices, first.weights, first.rows, first.result, tuple(order), constants, base, output
    )


def _other(indices: ir.Value, known: dict[ir.Value, Pick]) -> str:
    """What is done with a router's choice where no places are listed for each expert, in words."""
    seen, queue = {indices}, [indices, *known]
    while queue:
        value = queue.pop()
        for reader in value.consumers():
            if edit.is_op(reader, "TopK"):
                return "tokens are sorted by expert, and each expert is applied to its part of them"
            if edit.is_op(reader, "Gather") and reader.inputs[0] is value and edit.tensor(reader.inputs[1]) is None:
                return "which experts are applied depends on the tokens, and how many on the example of the export"
            if edit.is_op(reader, *VIEWS) and reader.outputs[0] not in seen:
                seen.add(reader.outputs[0])
                queue.append(reader.outputs[0])
    return "experts compute tokens that did not choose them, and count as zero times what they give"


class _Reader:
    """What stands at the places where an expert was chosen."""

    def __init__(self, known: dict[ir.Value, Pick], shape: tuple[Dim, int], graph: Graph) -> None:
        self.known, self.shape, self.graph = known, shape, graph

    def picked(self, value: ir.Value | None) -> tuple[ir.Value, Places] | None:
        """What a value is picked from, and where, if it is ``(places, size)``."""
        dims = self.graph.dims(value)
        node = _before_views(value)
        if dims is None or len(dims) != 2 or not edit.is_op(node, "Gather", "GatherND") or node is None:
            return None
        data, places = node.inputs[0], self.known.get(node.inputs[1]) if node.inputs[1] is not None else None
        shape = self.graph.dims(data)
        if not isinstance(places, Places) or data is None or shape is None:
            return None
        if node.op_type == "GatherND":
            depth = len(places.parts)
            if edit.attribute(node, "batch_dims", 0) or places.axes not in ("n1", "nc"):
                return None
            axes = list(range(depth))
        else:
            depth, axes = 1, [edit.attribute(node, "axis", 0) % len(shape)]
            if "c" in places.axes:
                return None
        size = product(tuple(dim for i, dim in enumerate(shape) if i not in axes))
        # With all other axes before the picked one of size 1, what is picked is row by row.
        if dims[1] != size or any(shape[i] != 1 for i in range(axes[0])):
            return None
        return data, places

    def tokens(self, value: ir.Value | None) -> tuple[ir.Value, Places] | None:
        """The tokens whose rows a value is, before all views."""
        found = self.picked(value)
        if found is None or not found[1].tokens:
            return None
        data, places = found
        width = self.graph.dims(value)[1]  # type: ignore[index]
        if product(self.graph.dims(data) or ()) != product((self.shape[0], width)):
            return None
        return root(data, width, self.graph), places

    def weight(self, value: ir.Value | None) -> tuple[ir.Value, Places] | None:
        """The weights ``(tokens, slots)`` of which a value, ``(places, 1)``, has one for each place."""
        found = self.picked(value)
        if found is None or self.graph.dims(value)[1] != 1:  # type: ignore[index]
            return None
        data, places = found
        shape, slots = self.graph.dims(data) or (), self.shape[1]
        paired = places.parts == ((1, 0), (0, 1)) and shape[:2] == self.shape
        flat = places.parts == ((slots, 1),) or (places.tokens and slots == 1)
        if not paired and not (flat and product(shape) == product(self.shape)):
            return None
        origin: ir.Value | None = data
        while origin is not None and self.graph.dims(origin) != self.shape:
            node = origin.producer()
            origin = node.inputs[0] if node is not None and edit.is_op(node, *VIEWS) else None
        return None if origin is None else (origin, places)

    def part(self, update: ir.Value | None, source: ir.Value) -> Part:
        """What is added at the places that ``source`` lists."""
        update = self._same(update)
        node = update.producer() if update is not None else None
        if node is None or not edit.is_op(node, "Mul"):
            raise Refused("what an expert gives is not multiplied by the token's weight for it")
        for mine, other in (node.inputs, node.inputs[::-1]):
            weight = self.weight(self._same(other))
            if weight is None or mine is None:
                continue
            weights, places = weight
            if places.source is not source:
                raise Refused("an expert's weights are of other places than its tokens")
            rows = self._rows(mine, source)
            tokens = self.tokens(rows)
            assert tokens is not None
            return Part(places.expert, tokens[0], weights, rows, mine)
        raise Refused("what an expert gives is not multiplied by the token's weight for it")

    def _rows(self, result: ir.Value, source: ir.Value) -> ir.Value:
        """The rows of tokens that a result is made of."""
        queue, seen = [result], {result}
        found: set[ir.Value] = set()
        while queue:
            value = queue.pop()
            tokens = self.tokens(value)
            if tokens is not None and tokens[1].source is source:
                found.add(value)
                continue
            node = value.producer()
            if node is None or len(seen) > _LONGEST:
                raise Refused("an expert reads something besides its tokens and constants")
            fresh = [v for v in node.inputs if v is not None and v not in seen and edit.tensor(v) is None]
            seen.update(fresh)
            queue += fresh
        if len(found) != 1:
            raise Refused("an expert reads something besides its tokens and constants")
        return found.pop()

    def _same(self, value: ir.Value | None) -> ir.Value | None:
        """What an Expand that repeats nothing is taken of.

        A size that is 1, or 0 where there are no tokens at all, repeats no places: there are none then.
        """
        node = value.producer() if value is not None else None
        while node is not None and edit.is_op(node, "Expand") and node.inputs[0] is not None:
            dims, sizes = self.graph.dims(node.inputs[0]), self.graph.fact(node.inputs[1]).items
            if dims is None or sizes is None or len(dims) != len(sizes):
                break
            if any(size not in (1, dim, minimum(1, self.shape[0])) for size, dim in zip(sizes, dims, strict=True)):
                break
            value = node.inputs[0]
            node = value.producer()
        return value

    def step(self, node: ir.Node) -> tuple[ir.Value | None, Part] | None:
        """What a node adds to the rows of tokens, and to what: None for zeros. None for other nodes."""
        if not edit.is_op(node, "ScatterND", "ScatterElements") or node.inputs[1] is None:
            return None
        places = self.known.get(node.inputs[1])
        if not isinstance(places, Places):
            return None
        rows = places.axes == ("n1" if node.op_type == "ScatterND" else "n*")
        if not places.tokens or not rows or edit.attribute(node, "axis", 0) not in (0, -2):
            raise Refused("what an expert gives is not added to the rows of its tokens")
        # The numbers of ScatterElements are as many as what is written: those of places are not repeated, either.
        total, update = node.inputs[0], node.inputs[2]
        base = None if _is_zero(total) else total
        reduction = edit.attribute(node, "reduction", "none")
        if reduction == "none" and (adding := self._added(update, total, places)) is not None:
            update = adding
        elif reduction != "add" and base is not None:
            raise Refused("what an expert gives takes the place of what was added before")
        return base, self.part(update, places.source)

    def _added(self, update: ir.Value | None, total: ir.Value | None, places: Places) -> ir.Value | None:
        """What is added to the rows of a sum, if these are read at the same places."""
        node = update.producer() if update is not None else None
        if node is None or not edit.is_op(node, "Add"):
            return None
        for one, other in (node.inputs, node.inputs[::-1]):
            found = self.picked(one)
            if found is not None and found[0] is total and found[1].tokens and found[1].source is places.source:
                return other
        return None


_LONGEST = 64
"""Values between the tokens of an expert and what it gives, at most."""


def _sum(reader: _Reader, experts: int, router: ir.Node) -> tuple[ir.Value, list[Part], ir.Value | None]:
    """The first value to which all experts were added, their parts, and what else is in it."""
    sums: dict[ir.Value, tuple[tuple[Part, ...], tuple[ir.Value, ...]]] = {}

    def of(value: ir.Value | None) -> tuple[tuple[Part, ...], tuple[ir.Value, ...]]:
        if value is None or _is_zero(value):
            return (), ()
        return sums.get(value, ((), (value,)))

    for node in after(router):
        found = reader.step(node)
        if found is not None:
            parts, bases = of(found[0])
            sums[node.outputs[0]] = (*parts, found[1]), bases
        elif edit.is_op(node, "Add") and any(v in sums for v in node.inputs):
            (parts, bases), (more, others) = (of(v) for v in node.inputs)
            sums[node.outputs[0]] = (*parts, *more), (*bases, *others)
        else:
            continue
        output = node.outputs[0]
        parts, bases = sums[output]
        width = (reader.graph.dims(parts[0].result) or (None, None))[1]
        if reader.graph.dims(output) != (reader.shape[0], width):
            raise Refused("what the experts give is not added up by token")
        if len(parts) == experts:
            break
    else:
        if not sums:
            raise Refused("what the experts give is not added up by token")
        raise Refused("not every expert that can be chosen is applied")
    if sorted(part.expert for part in parts) != list(range(experts)):
        raise Refused("not every expert that can be chosen is applied, or one is applied twice")
    if len(bases) > 1 or any(reader.graph.dims(base) != reader.graph.dims(output) for base in bases):
        raise Refused("what the experts give is not added up by token")
    return output, list(parts), bases[0] if bases else None


def chosen_from(router: ir.Node) -> ir.Node | None:
    """The Softmax of what a router chooses from, if there is one."""
    node = router.inputs[0].producer() if router.inputs[0] is not None else None
    return node if edit.is_op(node, "Softmax") else None


def after(router: ir.Node) -> Iterator[ir.Node]:
    """The nodes behind another one, in the order of their graph."""
    graph = router.graph
    assert isinstance(graph, ir.Graph)
    passed = False
    for node in graph:
        passed = passed or node is router
        if passed:
            yield node


def _before_views(value: ir.Value | None) -> ir.Node | None:
    """What makes the elements of a value, in their order."""
    node = value.producer() if value is not None else None
    while node is not None and edit.is_op(node, *VIEWS):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node


def root(value: ir.Value, width: Dim, graph: Graph) -> ir.Value:
    """What a value is a view of, with rows of the same width."""
    found, rows = value, product(graph.dims(value) or ())
    node = value.producer()
    while node is not None and edit.is_op(node, *VIEWS) and node.inputs[0] is not None:
        value = node.inputs[0]
        shape = graph.dims(value)
        if shape is not None and len(shape) > 1 and shape[-1] == width and product(shape) == rows:
            found = value
        node = value.producer()
    return found


def _is_zero(value: ir.Value | None) -> bool:
    """Whether all elements are the constant zero."""
    node = value.producer() if value is not None else None
    if node is not None and edit.is_op(node, "Expand", *VIEWS):
        return _is_zero(node.inputs[0])
    if node is not None and edit.is_op(node, "ConstantOfShape"):
        held = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1)
        return not held.any()
    array = edit.constant(value)
    return array is not None and array.dtype.kind == "f" and not array.any()
