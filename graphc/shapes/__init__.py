"""What is known about every value of a model before it runs: dtype, shape, and the contents of shape arithmetic.

The facts follow from the graph's inputs, its constants and the operators alone. Declared shapes of
intermediate values are hints that exporters get wrong; they are never read. Sizes that depend on the input are
:mod:`graphc.shapes.symbolic` polynomials in the input's named dims, and small integer tensors made of such sizes (what
``Shape -> Gather -> Mul -> Concat`` computes) are followed element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.shapes.symbolic import RESERVED, UNNAMED, Dim, Expr, add, plain_name, symbol

Shape = tuple[Dim, ...]
Items = tuple[Dim | None, ...]

MAX_ITEMS = 128
"""Elements up to which the contents of an integer tensor are followed."""
INTEGERS = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})
"""Dtypes whose contents are followed. Sizes are taken to fit into int32 where a model casts them to it."""

_ANONYMOUS = frozenset({"?", "*", "-1", "none", "unk", "unknown", "undefined"})
"""Names by which exporters mean a dim that they do not know: two dims with such a name need not be equal."""


@dataclass(frozen=True, slots=True)
class Fact:
    """What is known about one value.

    Attributes:
        dtype: Its element type; None if unknown or if it is no tensor.
        shape: Its dims; None if not even the rank is known.
        items: The elements in row-major order, None where one is unknown; None if they are not followed.
            Booleans are 0 and 1. Given only for a static shape.
        type: The type of a sequence, an optional or a sparse tensor.
    """

    dtype: ir.DataType | None = None
    shape: Shape | None = None
    items: Items | None = None
    type: ir.TypeProtocol | None = None

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)

    @property
    def known(self) -> tuple[int, ...] | None:
        """The elements, if every one is a number."""
        if self.items is None or any(not isinstance(item, int) for item in self.items):
            return None
        return self.items  # type: ignore[return-value]

    @property
    def static(self) -> tuple[int, ...] | None:
        """The shape, if every dim is a number."""
        if self.shape is None or any(not isinstance(dim, int) for dim in self.shape):
            return None
        return self.shape  # type: ignore[return-value]


UNKNOWN = Fact()

Rule = Callable[[ir.Node, Sequence[Fact], "Facts"], "Sequence[Fact] | None"]
"""Facts of the outputs of a node from those of its inputs (``UNKNOWN`` for omitted ones); None if it cannot tell."""


RULES: dict[str, Rule] = {}
"""Rules by operator of the standard domain; the modules of rules fill it."""


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a rule for these operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return register


class Facts:
    """The facts of a model's values, computed node by node in topological order.

    Args:
        model: The model; only its graph inputs, constants and opset imports are read here.
    """

    def __init__(self, model: ir.Model) -> None:
        self.opsets = model.opset_imports
        self.version = model.opset_imports.get("", 0) or model.opset_imports.get("ai.onnx", 0)
        self._known: dict[ir.Value, Fact] = {}
        self._arrays: dict[ir.Value, edit.Array | None] = {}
        self._count = 0
        self._graph = model.graph
        self._sizes: set[Dim] = set()
        self._names = {str(dim.value) for v in model.graph.inputs for dim in v.shape or () if not isinstance(dim, int)}
        for value in model.graph.inputs:
            self._known[value] = self._input(value)

    def __call__(self, value: ir.Value | None) -> Fact:
        """The fact of a value; ``UNKNOWN`` for an omitted input."""
        if value is None:
            return UNKNOWN
        fact = self._known.get(value)
        if fact is None:
            held = edit.tensor(value)
            fact = UNKNOWN if held is None else self._constant(value, held)
            self._known[value] = fact
        return fact

    def __setitem__(self, value: ir.Value, fact: Fact) -> None:
        self._known[value] = fact

    def array(self, value: ir.Value | None) -> edit.Array | None:
        """The constant that a value always holds, if it is numeric and small (``edit.SMALL``)."""
        if value is None:
            return None
        if value not in self._arrays:
            held = edit.tensor(value)
            small = held is not None and held.size <= edit.SMALL and held.dtype != ir.DataType.STRING
            self._arrays[value] = held.numpy() if small and held is not None else None
        return self._arrays[value]

    def scalar(self, value: ir.Value | None) -> Any | None:
        """The Python number of a constant with exactly one element."""
        array = self.array(value)
        return array.reshape(-1)[0].item() if array is not None and array.size == 1 else None

    def fresh(self) -> Expr:
        """A size about which nothing is known."""
        self._count += 1
        return symbol(f"{UNNAMED}{self._count}")

    def freshen(self, rank: int) -> Shape:
        """``rank`` unknown sizes."""
        return tuple(self.fresh() for _ in range(rank))

    def visit(self, node: ir.Node) -> None:
        """Compute the facts of a node's outputs; those of its inputs must have been computed.

        The bodies of control flow are visited with it.
        """
        from graphc.shapes import shape_rules

        facts = shape_rules.infer(node, [self(value) for value in node.inputs], self)
        for i, value in enumerate(node.outputs):
            fact = facts[i] if facts is not None and i < len(facts) else UNKNOWN
            if fact.dtype == ir.DataType.UNDEFINED:
                fact = UNKNOWN
            if fact.dtype is None and fact.type is None and value.type is not None:
                fact = _declared_type(value)
            self._known[value] = fact
            if node.graph is self._graph and fact.shape is not None:
                self._sizes.update(fact.shape)

    def exists(self, size: Dim) -> bool:
        """Whether a tensor that is always computed has an axis of this size, which is then >= 0."""
        return size in self._sizes

    def visit_graph(self, graph: ir.Graph) -> None:
        """Compute the facts of all nodes of a graph whose inputs are known."""
        for node in graph:
            self.visit(node)

    def _input(self, value: ir.Value) -> Fact:
        if value.dtype is None or not isinstance(value.type, ir.TensorType):
            return Fact(type=value.type)
        if value.shape is None:
            return Fact(value.dtype)
        dims: list[Dim] = []
        for dim in value.shape:
            if isinstance(dim, int):
                dims.append(dim if dim >= 0 else self.fresh())
            elif dim.value and dim.value.lower() not in _ANONYMOUS and dim.value[0] not in RESERVED:
                dims.append(self._named(dim.value))
            else:
                dims.append(self.fresh())
        return Fact(value.dtype, tuple(dims))

    def _named(self, name: str) -> Dim:
        """The size of a dim of an input by its name; ``past + new`` is a sum where inputs have dims of these names."""
        parts = [part.strip() for part in name.split("+")]
        if len(parts) < 2 or any(part not in self._names and not part.isdigit() for part in parts):
            return symbol(name)
        total: Dim = 0
        for part in parts:
            total = add(total, int(part) if part.isdigit() else symbol(part))
        return total

    def _constant(self, value: ir.Value, held: ir.TensorProtocol) -> Fact:
        shape = tuple(held.shape.numpy())
        items: Items | None = None
        if held.dtype in INTEGERS and held.size <= MAX_ITEMS:
            array = self.array(value)
            if array is not None:
                items = tuple(int(x) for x in array.reshape(-1).tolist())
        return Fact(held.dtype, shape, items)


def _declared_type(value: ir.Value) -> Fact:
    """The declared type of the output of an operator that nothing is known about; its shape is not believed."""
    if isinstance(value.type, ir.TensorType):
        return Fact(None if value.dtype == ir.DataType.UNDEFINED else value.dtype)
    return Fact(type=value.type)


def infer(model: ir.Model) -> None:
    """Replace the dtypes and shapes of all intermediate values by what follows from the inputs.

    Graph inputs and outputs keep what they declare; an output that declares nothing gets what was found. A value
    of which nothing is known (a custom operator's output) keeps its declaration.
    """
    facts = Facts(model)
    facts.visit_graph(model.graph)
    annotate(model, facts)


def annotate(model: ir.Model, facts: Facts) -> None:
    """Write facts into the values' ``type`` and ``shape``, as ``infer`` does."""
    for root in (model.graph, *edit.bodies(model.graph)):
        for value in root.inputs if root is not model.graph else ():
            _annotate(value, facts(value))
        for node in root:
            for value in node.outputs:
                if value.is_graph_output() and root is model.graph and value.type is not None:
                    if value.shape is None:
                        value.shape = emitted(facts(value).shape)
                else:
                    _annotate(value, facts(value))


def _annotate(value: ir.Value, fact: Fact) -> None:
    if fact.type is not None:
        value.type = fact.type
    if fact.dtype is None:
        return
    if value.dtype != fact.dtype:
        value.type = ir.TensorType(fact.dtype)
    producer = value.producer()
    opaque = producer is not None and producer.domain not in ("", "ai.onnx")
    if fact.shape is not None or not opaque:
        value.shape = emitted(fact.shape)


def emitted(shape: Shape | None) -> ir.Shape | None:
    """A shape as a file declares it: numbers, names of the input's dims, and unnamed dims for everything else."""
    if shape is None:
        return None
    return ir.Shape([dim if isinstance(dim, int) else plain_name(dim) for dim in shape])


def merge(facts: Facts, a: Fact, b: Fact) -> Fact:
    """What holds for a value that is one of two."""
    if a.dtype != b.dtype or a.dtype is None:
        return Fact(type=a.type) if a.type == b.type else UNKNOWN
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return Fact(a.dtype)
    shape = tuple(x if x == y else facts.fresh() for x, y in zip(a.shape, b.shape, strict=True))
    same = a.items is not None and a.items == b.items and None not in a.items
    return Fact(a.dtype, shape, a.items if same else None)


def number(value: Dim, dtype: ir.DataType | None) -> Dim | None:
    """A computed element, if it is in the dtype's range; sizes are."""
    if not isinstance(value, int):
        return value
    bits = 32 if dtype == ir.DataType.INT32 else 64
    return value if -(2 ** (bits - 1)) <= value < 2 ** (bits - 1) else None


def items_array(fact: Fact) -> np.ndarray[Any, np.dtype[np.object_]] | None:
    """The elements as an object array in the tensor's shape; None if they are not followed."""
    static = fact.static
    if fact.items is None or static is None:
        return None
    array = np.empty(len(fact.items), dtype=object)
    array[:] = fact.items
    return array.reshape(static)


def with_items(fact: Fact, array: np.ndarray[Any, np.dtype[np.object_]]) -> Fact:
    """The fact with these elements, and their shape."""
    if array.size > MAX_ITEMS:
        return replace(fact, shape=tuple(array.shape), items=None)
    return replace(fact, shape=tuple(array.shape), items=tuple(array.reshape(-1).tolist()))
