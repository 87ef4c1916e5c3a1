"""The model in which operators are recognised: what rewrite rules need, and symbolic sizes of every value."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.contract import Capabilities
from graphc.rewrites.base import Rewriter
from graphc.shapes import Fact, Shape
from graphc.shapes.symbolic import Dim


class Graph(Rewriter):
    """A model, the facts of its values, kept up to date, and what the target can run.

    Args:
        model: Changed in place by the rules.
        enabled: The names of the rules that may run.
        target: What the operators are emitted for.

    Attributes:
        missed: What came near and was left, with the reason, by rules that did something else there.
        late: Whether something is now made after nodes that read it, so that nodes have to be sorted.
    """

    def __init__(self, model: ir.Model, enabled: frozenset[str], target: Capabilities) -> None:
        super().__init__(model, enabled)
        self.target = target
        self.missed: list[tuple[ir.Node, str]] = []
        self.late = False
        self.made: dict[tuple[object, ...], ir.Value] = {}
        self.constants: dict[tuple[ir.Graph | ir.Function | None, bytes], ir.Value] = {}

    def fact(self, value: ir.Value | None) -> Fact:
        """What is known about a value."""
        return self._infer()(value)

    def dims(self, value: ir.Value | None) -> Shape | None:
        """The symbolic sizes of a value."""
        return self.fact(value).shape

    def runs(self, operator: str, version: int) -> bool:
        """Whether the graph may have a standard operator of this opset, and the target computes it as one.

        A target that does not say what kernels it has is taken to have them.
        """
        known = self.target.kernels
        return self.version >= version and (not known or any((("", operator, p) in known) for p in self.providers))

    @property
    def providers(self) -> Sequence[str]:
        return self.target.providers or ("CPUExecutionProvider",)

    def near(self, node: ir.Node, reason: str) -> None:
        """Record that something did not apply at a node where something else does."""
        self.missed.append((node, reason))

    def note(self, value: ir.Value, like: ir.Value | None = None, shape: Shape | None = None) -> ir.Value:
        """Record the shape of a new value, and the dtype of another one."""
        facts = self._infer()
        fact = facts(like) if like is not None else Fact(value.dtype)
        facts[value] = replace(fact, shape=shape if shape is not None else fact.shape, items=None)
        if value.dtype is None and fact.dtype is not None:
            value.type = ir.TensorType(fact.dtype)
        from graphc.shapes import emitted

        value.shape = emitted(facts(value).shape)
        return value

    def make(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        *,
        like: ir.Value | None = None,
        shape: Sequence[Dim] | None = None,
    ) -> ir.Value:
        """Put a new node of one output in front of ``before``; its output has the dtype of ``like``."""
        stem = (like if like is not None else before.outputs[0]).name or op_type
        made = self.insert(before, op_type, inputs, attributes, name=self.fresh(f"{stem}.{op_type.lower()}"))
        return self.note(made, like, None if shape is None else tuple(shape))

    def ints(self, before: ir.Node, numbers: Sequence[int]) -> ir.Value:
        """The int64 vector of these numbers, for ``before`` to read."""
        return self.array(before, np.array(numbers, dtype=np.int64), "graphc." + "_".join(map(str, numbers)))

    def readable(self, dims: Shape, sources: Sequence[ir.Value] = ()) -> bool:
        """Whether each of these sizes is a number, or that of an axis of an input or of one of ``sources``."""
        return all(isinstance(dim, int) or self._read(dim, sources) is not None for dim in dims)

    def _read(self, dim: Dim, sources: Sequence[ir.Value]) -> tuple[ir.Value, int] | None:
        for value in (*self.model.graph.inputs, *sources):
            dims = self.dims(value) or ()
            if dim in dims:
                return value, dims.index(dim)
        return None

    def sizes(self, before: ir.Node, dims: Shape, sources: Sequence[ir.Value] = ()) -> ir.Value:
        """These sizes, for which ``readable`` holds, as an int64 vector for ``before`` to read."""
        parts = []
        like = self.ints(before, [1])
        for dim in dims:
            place = None if isinstance(dim, int) else self._read(dim, sources)
            if place is None:
                parts.append(self.ints(before, [int(dim)]))  # type: ignore[arg-type]
                continue
            value, axis = place
            bounds = {"start": axis, "end": axis + 1}
            parts.append(self.make(before, "Shape", [value], bounds, like=like, shape=(1,)))
        if len(parts) == 1:
            return parts[0]
        return self.make(before, "Concat", parts, {"axis": 0}, like=like, shape=(len(parts),))

    def array(self, before: ir.Node, data: edit.Array, hint: str) -> ir.Value:
        """A small constant, made once for all its readers in the same graph."""
        key = (before.graph, f"{data.dtype}{data.shape}".encode() + data.tobytes())
        known = self.constants.get(key)
        if known is None or not (known.is_initializer() or known.producer() is not None):
            known = self.constants[key] = self.constant(before, data, hint)
        return known

    def supersede(
        self, node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], attributes: dict[str, Any] | None = None
    ) -> ir.Node:
        fact = self._infer()(node.outputs[0])
        made = super().supersede(node, op_type, inputs, attributes)
        self._infer()[made.outputs[0]] = fact
        return made

    def sweep(self, values: Sequence[ir.Value | None]) -> None:
        """Remove the producers of values that nobody reads any more, and theirs."""
        queue = deque(v for v in values if v is not None)
        while queue:
            value = queue.popleft()
            node = value.producer()
            if node is None:
                self.drop_unread(value)
                continue
            if node.graph is None or any(v.uses() or v.is_graph_output() for v in node.outputs):
                continue
            inputs = [v for v in node.inputs if v is not None]
            if edit.is_op(node, "Constant"):
                edit.remove(node)
                continue
            self.drop(node)
            queue.extend(inputs)
