"""Shapes, slices, splits and pads after a cut: every size that a node is told follows from the axis trees.

The shape arithmetic of the graph is evaluated again with the new sizes, in topological order. Where a node is
told a size that it no longer has, its operand is replaced; constants are never edited in place, so that other
readers of them are not disturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.axes import symbolic
from graphc.axes.algebra import Axis
from graphc.axes.notation import Name, Product
from graphc.axes.size import Size, Sym, divide, product
from graphc.errors import BadInput

if TYPE_CHECKING:
    from graphc.axes.selection import Selection
    from graphc.axes.trace import Trace

Array = np.ndarray[Any, np.dtype[Any]]


class Operands:
    """Rewrites the size operands of a graph after a cut.

    Args:
        trace: The analysis of the graph before the cut.
        selection: What survives.
        names: For new constants.
    """

    def __init__(self, trace: Trace, selection: Selection, names: edit.Names) -> None:
        self.trace, self.selection, self.names = trace, selection, names
        self.graph = trace.graph
        self.now: dict[ir.Value, symbolic.Known] = {}
        self.plan: list[tuple[ir.Node, int, Any]] = []
        self.rewritten = 0

    def decide(self) -> None:
        """Find all operands to replace; changes nothing.

        Raises:
            BadInput: A number that depends on a cut axis and on a dynamic one is used as data.
        """
        for node in self.graph:
            if self._arithmetic(node):
                continue
            handled = self._handle(node)
            self._freeze_numbers(node, handled)

    def apply(self) -> int:
        """Replace the operands that ``decide`` found.

        Returns:
            How many there were.
        """
        for node, i, new in self.plan:
            value = new(node) if callable(new) else self._constant(node, i, np.asarray(new, dtype=np.int64))
            if i >= len(node.inputs):
                node.resize_inputs(i + 1)
            node.replace_input_with(i, value)
        return len(self.plan)

    # Following sizes

    def _size(self, axis: Axis) -> Size:
        return self.selection.size(axis)

    def _static(self, axis: Axis) -> int:
        size = self._size(axis)
        assert isinstance(size, int)
        return size

    def _sizes(self, value: ir.Value | None, reader: ir.Node | None = None) -> list[Size]:
        axes = None if value is None else self.trace.axes.get(value)
        if value is not None and reader is not None:
            axes = self.trace.at(value, reader)
        return [self._size(axis) for axis in axes or ()]

    def _current(self, value: ir.Value | None) -> symbolic.Known | None:
        if value is None:
            return None
        return self.now[value] if value in self.now else self.trace.value_of(value)

    def _arithmetic(self, node: ir.Node) -> bool:
        if not node.outputs or node.outputs[0] not in self.trace.known or node in self.trace.bound:
            return False
        if node.op_type == "Constant":
            return True
        if node.op_type in ("Shape", "Size"):
            self.now[node.outputs[0]] = symbolic.shape(node, self._sizes(node.inputs[0], node))
            return True
        if not any(v in self.now for v in node.inputs if v is not None):
            return True
        results = symbolic.evaluate(node, [self._current(v) for v in node.inputs])
        if results is not None:
            self.now.update(zip(node.outputs, results, strict=False))
        return True

    def _freeze_numbers(self, node: ir.Node, handled: Sequence[int]) -> None:
        """Numbers made of sizes that are used as data (an attention's scale) keep the value they had."""
        for i, value in enumerate(node.inputs):
            if value is None or i in handled or value not in self.now:
                continue
            before, after = self.trace.known[value], self.now[value]
            if np.array_equal(before, after):
                continue
            if any(isinstance(v, Sym) for v in before.reshape(-1).tolist()):
                raise BadInput(
                    "a number computed from a size that would be cut is used as data",
                    where=node.name or node.op_type,
                    hint="exclude the groups of this node",
                )
            held = np.array(before.tolist(), dtype=_dtype(value).numpy())
            self.plan.append((node, i, lambda n, h=held, i=i: self._constant(n, i, h)))

    def _constant(self, node: ir.Node, i: int, array: Array) -> ir.Value:
        hint = f"{node.outputs[0].name}.{'shape' if node.op_type in ('Reshape', 'Expand') else f'operand{i}'}"
        return edit.initializer(self.graph, array, self.names.fresh(hint))

    # Operators that are told sizes

    def _handle(self, node: ir.Node) -> Sequence[int]:
        """Plan what a node needs; returns the inputs that this covers."""
        if node.domain not in ("", "ai.onnx"):
            return ()
        if node.op_type == "SplitToSequence":
            return self._split_to_sequence(node)
        if node not in self.trace.bound:
            return ()
        if not self._changed(*node.inputs, *node.outputs) and all(map(self._told_the_same, node.inputs)):
            return range(len(node.inputs))
        handler: Callable[[ir.Node], Sequence[int]] | None = getattr(self, f"_{node.op_type.lower()}", None)
        return () if handler is None else handler(node)

    def _told_the_same(self, value: ir.Value | None) -> bool:
        return value not in self.now or np.array_equal(self.now[value], self.trace.known[value])

    def _changed(self, *values: ir.Value | None) -> bool:
        return any(
            self.selection.touches(axis)
            for value in values
            if value is not None
            for axis in self.trace.axes.get(value) or ()
        )

    def _reshape(self, node: ir.Node) -> Sequence[int]:
        wanted = self._sizes(node.outputs[0])
        held = self._current(node.inputs[1])
        if held is None or len(wanted) != held.size:
            return (1,)
        current = symbolic.sizes(held)
        before = self._sizes(node.inputs[0], node)
        resolved: list[Size | None] = []
        for i, size in enumerate(current):
            if isinstance(size, Sym) or size > 0 or (size == 0 and edit.attribute(node, "allowzero", 0)):
                resolved.append(size)
            elif size == 0:
                resolved.append(before[i] if i < len(before) else 0)
            else:
                resolved.append(None)
        if None in resolved:
            hole = resolved.index(None)
            rest = divide(product(before), product(s for s in resolved if s is not None))
            resolved[hole] = wanted[hole] if rest is None and isinstance(wanted[hole], Sym) else rest
        self._replace_shape(node, 1, current, resolved, wanted)
        return (1,)

    def _replace_shape(
        self,
        node: ir.Node,
        at: int,
        current: list[Size],
        resolved: Sequence[Size | None],
        wanted: list[Size],
        *,
        infer: bool = True,
    ) -> None:
        """Plan a new shape operand unless the present one already says ``wanted``."""
        if all(r == w for r, w in zip(resolved, wanted, strict=True)):
            return
        constant = edit.tensor(node.inputs[at]) is not None
        parts: list[tuple[str, Any]] = []
        for i, (have, is_, want) in enumerate(zip(current, resolved, wanted, strict=True)):
            if isinstance(want, int):
                literal = is_ == want and isinstance(have, int) and have <= 0
                parts.append(("literal", have if literal else want))
            elif is_ == want and isinstance(have, int):
                parts.append(("literal", have))
            elif is_ == want and not constant:
                parts.append(("element", (i, 1, 1)))
            else:
                ratio = self._ratio(want, is_)
                parts.append(("element", (i, *ratio)) if ratio else ("hole", None))
        dynamic = [k for k, (what, _) in enumerate(parts) if what != "literal"]
        inferred = sum(1 for what, held in parts if what == "literal" and held == -1)
        if infer and len(dynamic) == 1 and not inferred:
            parts[dynamic[0]] = ("literal", -1)
            dynamic = []
        if any(what == "hole" for what, _ in parts):
            raise BadInput(
                "the shape after the cut cannot be written",
                where=node.name or node.op_type,
                hint="exclude this group",
            )
        if not dynamic:
            self.plan.append((node, at, [held for _, held in parts]))
        else:
            self.plan.append((node, at, lambda n, p=parts: self._assemble(n, at, p)))

    @staticmethod
    def _ratio(want: Size, have: Size | None) -> tuple[int, int] | None:
        """``(a, b)`` with ``want = have * a / b``, where the sizes differ by a constant factor."""
        if not isinstance(want, Sym) or not isinstance(have, Sym) or set(want.terms) != set(have.terms):
            return None
        mono = next(iter(want.terms))
        a, b = want.terms[mono], have.terms[mono]
        return (a, b) if all(want.terms[m] * b == have.terms[m] * a for m in want.terms) else None

    def _assemble(self, node: ir.Node, at: int, parts: list[tuple[str, Any]]) -> ir.Value:
        """Nodes that put a shape together from literals and scaled elements of the old shape."""
        source = node.inputs[at]
        assert source is not None
        pieces: list[ir.Value] = []
        for what, held in parts:
            if what == "literal":
                pieces.append(self._constant(node, at, np.array([held], dtype=np.int64)))
                continue
            i, a, b = held
            piece = self._insert(node, "Gather", [source, self._constant(node, at, np.array([i], dtype=np.int64))])
            for op, factor in (("Mul", a), ("Div", b)) if a != b else ():
                piece = self._insert(node, op, [piece, self._constant(node, at, np.array([factor], dtype=np.int64))])
            pieces.append(piece)
        return self._insert(node, "Concat", pieces, [ir.AttrInt64("axis", 0)])

    def _insert(self, before: ir.Node, op: str, inputs: list[ir.Value], attributes: Sequence[ir.Attr] = ()) -> ir.Value:
        out = ir.Value(
            name=self.names.fresh(f"{before.outputs[0].name}.{op.lower()}"),
            type=ir.TensorType(ir.DataType.INT64),
        )
        node = ir.Node("", op, inputs, attributes, outputs=[out], name=out.name)
        assert before.graph is not None
        before.graph.insert_before(before, node)
        return out

    def _expand(self, node: ir.Node) -> Sequence[int]:
        held = self._current(node.inputs[1])
        wanted, before = self._sizes(node.outputs[0]), self._sizes(node.inputs[0], node)
        if held is None or held.size > len(wanted):
            return (1,)
        current = symbolic.sizes(held)
        wanted = wanted[len(wanted) - len(current) :]
        padding: list[Size] = [1] * max(0, len(current) - len(before))
        before = padding + before
        before = before[len(before) - len(current) :]
        resolved = [b if c == 1 else c for c, b in zip(current, before, strict=True)]
        self._replace_shape(node, 1, current, resolved, wanted, infer=False)
        return (1,)

    def _constantofshape(self, node: ir.Node) -> Sequence[int]:
        held = self._current(node.inputs[0])
        wanted = self._sizes(node.outputs[0])
        if held is not None and held.size == len(wanted):
            current = symbolic.sizes(held)
            self._replace_shape(node, 0, current, current, wanted, infer=False)
        return (0,)

    def _tile(self, node: ir.Node) -> Sequence[int]:
        held = self._current(node.inputs[1])
        if held is not None and self._changed(node.outputs[0]):
            after, before = self._sizes(node.outputs[0]), self._sizes(node.inputs[0], node)
            counts = [divide(a, b) for a, b in zip(after, before, strict=True)]
            if counts != symbolic.sizes(held) and all(isinstance(c, int) for c in counts):
                self.plan.append((node, 1, counts))
        return (1,)

    def _onehot(self, node: ir.Node) -> Sequence[int]:
        axis = self.trace.bound[node].names.get("e_")
        if axis is not None and self.selection.touches(axis):
            self.plan.append((node, 1, self._size(axis)))
        return (1,)

    def _split(self, node: ir.Node) -> Sequence[int]:
        axes = self.trace.axes.get(node.outputs[0])
        if not axes or not self._changed(*node.outputs):
            return (1,)
        axis = edit.attribute(node, "axis", 0) % len(axes)
        lengths = [self._sizes(out)[axis] for out in node.outputs]
        held = self._current(node.inputs[1]) if len(node.inputs) > 1 else None
        if held is None or symbolic.sizes(held) != lengths:
            equal = held is None and len(set(lengths)) == 1
            if not equal:
                self.plan.append((node, 1, self._with_lengths(lengths)))
        return (1,)

    def _with_lengths(self, lengths: list[Size]) -> Callable[[ir.Node], ir.Value]:
        def make(node: ir.Node) -> ir.Value:
            node.attributes.pop("num_outputs", None)
            return self._constant(node, 1, np.array(lengths, dtype=np.int64))

        return make

    def _split_to_sequence(self, node: ir.Node) -> Sequence[int]:
        parts = self.trace.sequences.get(node.outputs[0])
        if parts is None or len(node.inputs) < 2 or not any(self.selection.touches(a) for p in parts for a in p):
            return (1,)
        at = edit.attribute(node, "axis", 0) % len(parts[0])
        self.plan.append((node, 1, [self._size(part[at]) for part in parts]))
        return (1,)

    def _pad(self, node: ir.Node) -> Sequence[int]:
        held = self._current(node.inputs[1]) if len(node.inputs) > 1 else None
        outputs = self.trace.axes.get(node.outputs[0])
        if held is None or not outputs or not self._changed(node.outputs[0]):
            return (1, 3)
        names = self.trace.bound[node].names
        letters = [str(t) for t in self.trace.bound[node].rule.inputs[0].terms]
        axes = self._current(node.inputs[3]) if len(node.inputs) > 3 else None
        chosen = [int(a) % len(letters) for a in axes.reshape(-1)] if axes is not None else range(len(letters))
        pads = symbolic.sizes(held)
        new = list(pads)
        for k, axis in enumerate(chosen):
            for at, label in ((k, f"{letters[axis]}0_"), (k + len(chosen), f"{letters[axis]}2_")):
                if label in names:
                    new[at] = self._size(names[label])
        if new != pads:
            self.plan.append((node, 1, new))
        return (1, 3)

    def _resize(self, node: ir.Node) -> Sequence[int]:
        held = self._current(node.inputs[3]) if len(node.inputs) > 3 else None
        if held is not None and held.size and self._changed(node.outputs[0]):
            wanted = self._sizes(node.outputs[0])
            axes = edit.attribute(node, "axes", range(len(wanted)))
            current = symbolic.sizes(held)
            new = [wanted[a] if isinstance(wanted[a], int) else c for a, c in zip(axes, current, strict=True)]
            if new != current:
                if any(isinstance(v, Sym) for v in new):
                    raise BadInput("the sizes after the cut cannot be written", where=node.name or node.op_type)
                self.plan.append((node, 3, new))
        return (2, 3)

    def _slice(self, node: ir.Node) -> Sequence[int]:
        """New bounds for contiguous parts; strided and reversed slices of whole axes keep theirs."""
        handled = (1, 2, 3, 4)
        source = self.trace.at(node.inputs[0], node) if node.inputs[0] is not None else None
        if not source or len(node.inputs) < 3:
            return handled
        starts, ends = self._current(node.inputs[1]), self._current(node.inputs[2])
        if starts is None or ends is None:
            return handled
        application = self.trace.bound[node]
        axes = self._current(node.inputs[3]) if len(node.inputs) > 3 else None
        chosen = [int(a) % len(source) for a in axes.reshape(-1)] if axes is not None else range(starts.size)
        new_starts, new_ends = symbolic.sizes(starts), symbolic.sizes(ends)
        changed = False
        for k, axis in enumerate(chosen):
            name = str(application.rule.outputs[0].terms[axis])
            if not name.endswith("1_") or name not in application.names:
                continue
            first = application.names.get(f"{name[:-2]}0_")
            start = self._size(first) if first is not None else 0
            bounds = (start, start + self._size(application.names[name]))
            if (bounds != (new_starts[k], new_ends[k])) and self.selection.touches(source[axis]):
                new_starts[k], new_ends[k] = bounds
                changed = True
        if changed:
            if any(isinstance(v, Sym) for v in (*new_starts, *new_ends)):
                raise BadInput("the slice after the cut cannot be written", where=node.name or node.op_type)
            self.plan += [(node, 1, new_starts), (node, 2, new_ends)]
        return handled

    def _gather(self, node: ir.Node) -> Sequence[int]:
        """Constant indices along a cut axis point to the new positions."""
        data = node.inputs[0]
        axes = self.trace.at(data, node) if data is not None else None
        indices = edit.constant(node.inputs[1])
        if not axes or indices is None or indices.ndim != 1:
            return (1,)
        at = edit.attribute(node, "axis", 0) % len(axes)
        out = (self.trace.axes.get(node.outputs[0]) or ())[at]
        if not (self.selection.touches(axes[at]) or self.selection.touches(out)):
            return (1,)
        application = self.trace.bound[node]
        kind = application.rule.outputs[0].terms[at]
        names = application.names
        if isinstance(kind, Product):
            sizes = [self._static(names[part.name]) for part in kind.parts if isinstance(part, Name)]
            each = not str(kind.parts[0]).endswith("_")
            new = np.repeat(np.arange(sizes[0]), sizes[1]) if each else np.tile(np.arange(sizes[1]), sizes[0])
            self.plan.append((node, 1, new))
            return (1,)
        if isinstance(kind, Name) and kind.name.endswith("1_") and not kind.pick:
            first = names.get(f"{kind.name[:-2]}0_")
            start = 0 if first is None else self._static(first)
            self.plan.append((node, 1, np.arange(start, start + self._static(names[kind.name]))))
            return (1,)
        kept = self.selection.mask(axes[at])
        picked = indices[self.selection.mask(out)]
        picked = np.where(picked < 0, picked + len(kept), picked)
        self.plan.append((node, 1, (np.cumsum(kept) - 1)[picked]))
        return (1,)


def _dtype(value: ir.Value) -> ir.DataType:
    """The type of a shape computation's result, which models need not declare."""
    if value.dtype is not None:
        return value.dtype
    tensor, node = edit.tensor(value), value.producer()
    if tensor is not None or node is None:
        return ir.DataType.INT64 if tensor is None else tensor.dtype
    if node.op_type == "Cast":
        return ir.DataType(edit.attribute(node, "to"))
    if node.op_type in ("Shape", "Size"):
        return ir.DataType.INT64
    if node.op_type in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Not", "And", "Or"):
        return ir.DataType.BOOL
    source = node.inputs[1 if node.op_type in ("Where", "CastLike") else 0]
    return ir.DataType.INT64 if source is None else _dtype(source)
