"""One attention on its way to the operator: where its operands can be read, and in which layout it is cheapest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from graphc import edit
from graphc.recognition import cache
from graphc.recognition.cache import Cache
from graphc.recognition.graph import Graph
from graphc.recognition.layout import (
    Axes,
    Axis,
    Leaf,
    Place,
    arrange,
    moved,
    reachable,
    resolve,
    settled,
    size,
    sizes,
)
from graphc.rewrites.base import Refused, sole_reader

_NEW = 2
"""What a transpose that the model does not have counts for, in those that it has."""

End = tuple[int, ir.Value, Axes]
"""What it costs to let others read the result as this value, and the value's axes."""


@dataclass(frozen=True)
class Heads:
    """Which leaves are batch, heads, positions and channels.

    Attributes:
        batch, heads: Of queries; ``heads`` are the ``shared`` ones of keys and values, then how often each is repeated.
        shared: Heads of keys and values.
        queries, keys: Positions.
        inner, outer: Channels of queries and keys, and of values.
    """

    batch: Axis
    heads: Axis
    shared: Axis
    queries: Axis
    keys: Axis
    inner: Axis
    outer: Axis

    def flat(self) -> dict[str, Axes]:
        """The axes of each role with heads in the last axis: ``b s (h d)``."""
        return {
            "q": (self.batch, self.queries, self.heads + self.inner),
            "k": (self.batch, self.keys, self.shared + self.inner),
            "v": (self.batch, self.keys, self.shared + self.outer),
            "y": (self.batch, self.queries, self.heads + self.outer),
        }

    def deep(self) -> dict[str, Axes]:
        """The axes of each role with heads as an axis: ``b h s d``."""
        return {
            "q": (self.batch, self.heads, self.queries, self.inner),
            "k": (self.batch, self.shared, self.keys, self.inner),
            "v": (self.batch, self.shared, self.keys, self.outer),
            "y": (self.batch, self.heads, self.queries, self.outer),
        }


@dataclass(frozen=True)
class Plan:
    """How the operator is written.

    Attributes:
        flat: Whether heads are digits of the last axis.
        wanted: The axes of each operand and of the result.
        places: What each operand is read from.
        end: What the result takes the place of.
        cache: The past, where the operator appends to it.
        factor: What queries times keys are multiplied by on the way from the places.
        cost: What its transposes count for.
    """

    flat: bool
    wanted: Mapping[str, Axes]
    places: Mapping[str, Place]
    end: End
    cache: Cache | None
    factor: float
    cost: int


class Operands:
    """Queries, keys and values of one attention as the places where they can be read, and its result.

    Args:
        graph: The graph.
        node: The node that computes the result.
        places: Of ``q``, ``k`` and ``v``: the value that the attention reads, then what it is made of, on and on.
        out: The result and the views of it that alone are read, with their axes.
        heads: Which leaves of theirs are what.
    """

    def __init__(
        self,
        graph: Graph,
        node: ir.Node,
        places: Mapping[str, Sequence[Place]],
        out: Sequence[tuple[ir.Value, Axes]],
        heads: Heads,
    ) -> None:
        self.graph, self.node, self.places, self.out, self.heads = graph, node, places, out, heads

    def plan(self, others: Sequence[ir.Value], *, cached: bool = True) -> Plan:
        """The layout with the fewest transposes, and with the cache if there is one.

        Args:
            others: What else the operator will read, or something made of it.
            cached: Whether it may append to a cache.

        Raises:
            Refused: There is no layout that the operator has.
        """
        found, why = cache.find(self.places, self.heads.deep(), self.heads.keys, self.graph)
        if found is not None and not cached:
            found, why = None, "which keys a causal mask hides is another question with a past"
        if found is not None:
            read = [*others, self.places["q"][0].value, *(found.places[role][0].value for role in "kv")]
            if not all(edit.is_op(node, "Shape") for node in _circular(found, read)):
                found, why = None, "what the attention reads depends on the present keys or values"
        if why:
            self.graph.near(self.node, why)
        best = self._cheapest(found)
        if best is None:
            raise Refused("the layout of queries, keys and values cannot be written with constant shapes")
        return best

    def cost(self) -> int:
        """What the transposes around the attention count for as it is."""
        after = sum(edit.is_op(value.producer(), "Transpose") for value, _ in self.out[1:])
        return after + sum(_turns(places, places[0]) for places in self.places.values())

    def _cheapest(self, found: Cache | None) -> Plan | None:
        places, heads = self.places, self.heads
        if found is not None:
            places = {**places, **found.places}
            heads = replace(heads, keys=found.axis)
        plans = []
        for flat in (True, False):
            wanted = heads.flat() if flat else heads.deep()
            roles = {role: self._best(places[role], wanted[role], self._copies(role)) for role in "qkv"}
            end = self._end(wanted["y"])
            if None in roles.values() or end is None:
                continue
            chosen = {role: best for role, best in roles.items() if best is not None}
            factor = chosen["q"][1].factor * chosen["k"][1].factor
            if found is not None:
                factor *= found.factors["k"]
            if chosen["v"][1].factor * (found.factors["v"] if found is not None else 1.0) != 1.0:
                raise Refused("the values are scaled")
            cost = sum(best[0] for best in chosen.values()) + end[0]
            sources = {role: best[1] for role, best in chosen.items()}
            plans.append(Plan(flat, wanted, sources, end, found, factor, cost))
        return min(plans, key=lambda each: each.cost) if plans else None

    def write(self, plan: Plan, mask: ir.Value | None, attributes: Mapping[str, float | int]) -> str:
        """Put the operator in the place of what it replaces.

        Args:
            plan: Of :meth:`plan`.
            mask: The mask, as the operator reads it.
            attributes: Beside the numbers of heads.

        Returns:
            What was done.
        """
        graph, node = self.graph, self.node
        inputs: list[ir.Value | None] = [arrange(plan.places[role], plan.wanted[role], node, graph) for role in "qkv"]
        if mask is not None or plan.cache is not None:
            inputs.append(mask)
        if plan.cache is not None:
            inputs += [plan.cache.past("k"), plan.cache.past("v")]
        given = dict(attributes)
        if plan.flat:
            given |= {"q_num_heads": _count(self.heads.heads), "kv_num_heads": _count(self.heads.shared)}
        stale = [v for n in {*[e.producer() for e, _ in self.out], node} if n is not None for v in n.inputs]
        _, value, axes = plan.end
        last = value.producer()
        assert last is not None
        if plan.cache is not None:
            for shape in _circular(plan.cache, inputs):
                graph.bypass(shape, _shape(shape, graph))
            stale += [join.outputs[0] for join in plan.cache.joins.values()]
        wanted = settled(plan.wanted["y"])
        if wanted == settled(axes):
            made = graph.supersede(last, "Attention", inputs, given)
        else:
            result = graph.make(last, "Attention", inputs, given, like=value, shape=sizes(wanted))
            made = result.producer()  # type: ignore[assignment]
            graph.bypass(last, arrange(Place(result, wanted), settled(axes), last, graph))
        if plan.cache is not None:
            self._present(plan.cache, made)
        graph.sweep(stale)
        return "Attention with its cache recognised" if plan.cache is not None else "Attention recognised"

    def _present(self, found: Cache, made: ir.Node) -> None:
        """Let the operator's present take the place of what was joined."""
        graph = self.graph
        made.resize_outputs(3)
        for role, present in zip("kv", made.outputs[1:], strict=True):
            old = found.joins[role].outputs[0]
            present.name = graph.fresh(f"{old.name}.present")
            graph.note(present, old, graph.dims(old))
            if old.is_graph_output():
                # What is declared of an output stays.
                present.type, present.shape = old.type, old.shape
            replaced = edit.replace(old, present)
            assert replaced, "the present is neither input, output nor initializer"
            graph.late = True

    def _best(self, places: Sequence[Place], wanted: Axes, copies: frozenset[Leaf]) -> tuple[int, Place] | None:
        """The cheapest place from which an operand has these axes, and what that costs."""
        best: tuple[int, Place] | None = None
        for place in places:
            if set(_flat(place.axes)) & copies:
                continue
            turns = reachable(place, wanted, self.graph)
            cost = None if turns is None else turns * _NEW + _turns(places, place)
            if cost is not None and (best is None or cost <= best[0]):
                best = cost, place
        return best

    def _end(self, wanted: Axes) -> End | None:
        """The value after the product from which on others may read the operator's result, and what that costs."""
        best: End | None = None
        left = sum(edit.is_op(v.producer(), "Transpose") for v, _ in self.out[1:])
        for value, axes in self.out:
            if value is not self.out[0][0] and edit.is_op(value.producer(), "Transpose"):
                left -= 1
            turns = reachable(Place(value, wanted), settled(axes), self.graph)
            if turns is not None and (best is None or turns * _NEW + left <= best[0]):
                best = turns * _NEW + left, value, axes
        return best

    def _copies(self, role: str) -> frozenset[Leaf]:
        return copies(self.places[role])


def copies(places: Sequence[Place]) -> frozenset[Leaf]:
    """The leaves along which an operand is repeated."""
    return frozenset(leaf for place in places for leaf in place.copies())


def onwards(node: ir.Node, axes: Axes, graph: Graph) -> list[tuple[ir.Value, Axes]]:
    """The first result of a node, and the views of it that alone are read."""
    found = [(node.outputs[0], axes)]
    while True:
        value, current = found[-1]
        try:
            following = sole_reader(value)
        except Refused:
            return found
        after = moved(following, current, graph)
        if after is None or edit.is_op(following, "Identity"):
            return found
        found.append((following.outputs[0], after))


def _circular(found: Cache, read: Sequence[ir.Value | None]) -> list[ir.Node]:
    """The nodes that read the present, and that the operator which gives it depends on."""
    joins = list(found.joins.values())
    before = cache.ancestors(read, joins)
    return [n for join in joins for n in dict.fromkeys(join.outputs[0].consumers()) if n in before]


def _shape(node: ir.Node, graph: Graph) -> ir.Value:
    """What a Shape gives of a Concat along axis 2, computed of the parts."""
    join = node.inputs[0].producer() if node.inputs[0] is not None else None
    assert join is not None
    past, new = join.inputs
    assert past is not None and new is not None
    like = graph.ints(node, [1])

    def part(value: ir.Value, start: int, end: int) -> ir.Value:
        bounds = {"start": start, "end": end}
        return graph.make(node, "Shape", [value], bounds, like=like, shape=(end - start,))

    total = graph.make(node, "Add", [part(past, 2, 3), part(new, 2, 3)], like=like, shape=(1,))
    whole = [part(past, 0, 2), total, part(past, 3, 4)]
    made = graph.make(node, "Concat", whole, {"axis": 0}, like=like, shape=(4,))
    ends = [edit.attribute(node, "start", 0), edit.attribute(node, "end", 4)]
    start, end = (min(4, max(0, at + 4 if at < 0 else at)) for at in ends)
    if (start, end) == (0, 4):
        return made
    cut = [graph.ints(node, [at]) for at in (start, end)]
    return graph.make(node, "Slice", [made, *cut], like=like, shape=(end - start,))


def _count(axis: Axis) -> int:
    found = size(axis)
    assert isinstance(found, int)
    return found


def _turns(places: Sequence[Place], place: Place) -> int:
    """How many of the model's transposes lie behind a place, and stay when it is read."""
    return places[-1].turns - place.turns


def _flat(axes: Axes) -> Axis:
    return tuple(leaf for axis in axes for leaf in resolve(axis))
