"""Applies the rule of one node: binds the names of its line to axes, refines them, and builds the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from graphc.axes.algebra import Axis, concat, find, prod
from graphc.axes.notation import Ellipsis_, Name, Number, Pattern, Product, Rule, Star, Sum, Term
from graphc.axes.rules.registry import Line, NoRule
from graphc.axes.size import Size, divide, product
from graphc.axes.words import words

if TYPE_CHECKING:
    from graphc.axes.trace import Trace

CARRIES = {
    "Div": (1,),
    "Pow": (1,),
    "Mod": (1,),
    "PRelu": (1,),
    "BatchNormalization": (3, 4),
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (1, 2),
    "MatMulNBits": (1, 3),
    "RotaryEmbedding": (1, 2, 3),
    "Clip": (1, 2),
}
"""Inputs that are cut along with an axis but whose zeros mean nothing (or do harm), by operator."""

SPATIAL = words(
    "Conv ConvTranspose FusedConv NhwcConv NhwcFusedConv ConvInteger QLinearConv DeformConv MaxPool "
    "AveragePool LpPool GlobalAveragePool GlobalMaxPool GridSample"
)
SIDES = frozenset({"dir"})
"""Names that stand for independent sides when they are kept whole: the directions of a recurrent layer."""
WHY = {
    "side": "{op} has a fixed number of these",
    "": "{op} mixes, moves or looks up indices along this axis",
    "spatial": "{op} mixes neighbouring positions along this kernel or spatial axis",
    "number": "{op} has an axis of fixed size here",
    "whole": "{op} needs this tensor whole",
}

Bound = tuple[Term, Axis, ir.Value, int]
"""A term, the axis it stands for, the operand it is of, and which axis of the operand it belongs to."""


class Application:
    """One use of a rule.

    Attributes:
        held: What each name stands for in each operand and result.
        consumed: Inputs whose indices the rule looked up along an axis that it knows.
    """

    def __init__(self, trace: Trace, node: ir.Node, rule: Rule, line: Line) -> None:
        self.trace, self.node, self.rule, self.line = trace, node, rule, line
        self.names: dict[str, Axis] = {}
        self.stars: dict[str, list[Axis]] = {}
        self.leading: list[tuple[list[Axis], ir.Value]] = []
        self.batch: list[Axis] = []
        self.operands: dict[str, list[tuple[Axis, ir.Value]]] = {}
        self.consumed: list[ir.Value] = []
        self.held: list[tuple[ir.Value, str, Axis]] = []
        self.fixed: list[tuple[Axis, ir.Value | None, str]] = []

    def run(self) -> None:
        pending: list[Bound] = []
        if any(v is not None for v in self.node.inputs[len(self.rule.inputs) :]):
            raise NoRule(f"the rule of {self.node.op_type} has fewer inputs")
        for value, pattern in zip(self.node.inputs, self.rule.inputs, strict=False):
            if value is not None:
                self._input(value, pattern, pending)
        self._factor(pending)
        self._broadcast()
        for axis, operand, why in self.fixed:
            self.trace.fix([axis], self._why(why), self.node, operand)
            if not why:
                self.trace.mixed.append(axis)
        for i, out in enumerate(self.node.outputs):
            if i < len(self.rule.outputs):
                self._output(i, out, self.rule.outputs[i])
            elif out.uses() or out.is_graph_output():
                raise NoRule(f"the rule of {self.node.op_type} has fewer outputs")
        for name, count in self.line.multiples.items():
            if name in self.names:
                self.trace.multiple(self.names[name], count, self.node)
        self._summed()
        self._roots()

    def _why(self, why: str) -> str:
        if not why and self.node.op_type in SPATIAL:
            why = "spatial"
        return WHY[why].format(op=self.node.op_type)

    # Inputs

    def _input(self, value: ir.Value, pattern: Pattern, pending: list[Bound]) -> None:
        trace = self.trace
        if pattern.indexes and (axis := trace.indexes.get(value)) is not None:
            self._bind(pattern.indexes, axis, value)
            self.consumed.append(value)
        if pattern.whole:
            for axis in trace.axes_of(value, self.node) or ():
                self.fixed.append((axis, value, "whole"))
            return
        if pattern.free:
            return
        if not pattern.terms:
            trace.whole.setdefault(value, self.node)
            return
        axes = trace.axes_of(value, self.node)
        if axes is None:
            raise NoRule(f"the rank of '{value.name}' is unknown")
        terms = pattern.terms
        at = next((i for i, t in enumerate(terms) if isinstance(t, Star | Ellipsis_)), -1)
        extra = len(axes) - len(terms) + 1
        if (at < 0 and len(axes) != len(terms)) or (at >= 0 and extra < 0):
            raise NoRule(f"the rule of {self.node.op_type} does not fit rank {len(axes)}")
        after = len(axes) if at < 0 else at
        for i, (term, axis) in enumerate(zip(terms[:after], axes[:after], strict=True)):
            self._term(term, axis, value, i, pending)
        if at < 0:
            return
        self._many(terms[at], list(axes[at : at + extra]), value, at)
        for i, (term, axis) in enumerate(zip(terms[at + 1 :], axes[at + extra :], strict=True), at + extra):
            self._term(term, axis, value, i, pending)

    def _many(self, term: Term, axes: list[Axis], value: ir.Value, at: int) -> None:
        if isinstance(term, Ellipsis_):
            self.leading.append((axes, value))
            return
        assert isinstance(term, Star)
        if term.fixed:
            self.fixed += [(axis, value, "") for axis in axes]
        if term.mark:
            for i, axis in enumerate(axes, at):
                self.trace.mark(axis, term.mark, self.node, value, i)
        for i, axis in enumerate(axes):
            self.held.append((value, f"*{term.name}{i}", axis))
        known = self.stars.setdefault(term.name, axes)
        if len(known) != len(axes):
            raise NoRule(f"ranks differ in {self.node.op_type}")
        if known is not axes:
            for a, b in zip(known, axes, strict=True):
                self.trace.unifier.unify(a, b)
        self.operands.setdefault(f"*{term.name}", []).extend((axis, value) for axis in axes)

    def _term(self, term: Term, axis: Axis, value: ir.Value, at: int, pending: list[Bound]) -> None:
        if isinstance(term, Name):
            self._bind(term.name, axis, value)
            self.held.append((value, term.name, axis))
            self.operands.setdefault(term.name, []).append((axis, value))
            if term.fixed:
                self.fixed.append((axis, value, "side" if term.name in SIDES else ""))
            if term.mark:
                self.trace.mark(axis, term.mark, self.node, value, at)
        elif isinstance(term, Number):
            if axis.size != term.size and isinstance(axis.size, int):
                raise NoRule(f"{self.node.op_type} has size {axis.size} where {term.size} is expected")
            if term.size != 1:
                self.fixed.append((axis, value, "number"))
        else:
            pending.append((term, axis, value, at))

    def _bind(self, name: str, axis: Axis, value: ir.Value) -> None:
        known = self.names.setdefault(name, axis)
        if known is not axis:
            self.trace.unifier.unify(known, axis)

    def _factor(self, pending: list[Bound]) -> None:
        """Refine products and sums, those first whose sizes are known; sizes found make others known."""
        while pending:
            later: list[Bound] = []
            progress = False
            for bound in pending:
                term, axis, value, at = bound
                assert isinstance(term, Product | Sum)
                sizes = self._part_sizes(term, axis.size)
                if sizes is None:
                    later.append(bound)
                    continue
                progress = True
                unifier = self.trace.unifier
                parts = unifier.split(axis, sizes) if isinstance(term, Product) else unifier.cut(axis, sizes)
                for part, sub in zip(parts, term.parts, strict=True):
                    self._term(sub, part, value, at, later)
            if not progress:
                raise NoRule(f"the sizes in {pending[0][0]} of {self.node.op_type} do not follow")
            pending = later

    def _part_sizes(self, term: Product | Sum, total: Size) -> list[Size] | None:
        sizes = [self._size(part) for part in term.parts]
        known = [s for s in sizes if s is not None]
        missing = len(sizes) - len(known)
        if missing > 1:
            return None
        if isinstance(term, Product):
            rest = divide(total, product(known))
        else:
            rest = total
            for size in known:
                rest = rest - size
            if isinstance(rest, int) and rest < 0:
                rest = None
        if rest is None or (not missing and rest != (1 if isinstance(term, Product) else 0)):
            raise NoRule(f"{self.node.op_type} cannot divide {total} as {term}")
        return [rest if s is None else s for s in sizes]

    def _size(self, term: Term) -> Size | None:
        if isinstance(term, Number):
            return term.size
        if isinstance(term, Name):
            axis = self.names.get(term.name)
            if axis is not None:
                return axis.size
            given = self.line.sizes.get(term.name)
            return None if isinstance(given, tuple) else given
        if isinstance(term, Product | Sum):
            sizes = [self._size(part) for part in term.parts]
            known = [s for s in sizes if s is not None]
            if len(known) < len(sizes):
                return None
            if isinstance(term, Product):
                return product(known)
            total: Size = 0
            for size in known:
                total = total + size
            return total
        return None

    def _broadcast(self) -> None:
        if not self.leading:
            return
        rank = max(len(axes) for axes, _ in self.leading)
        result: list[Axis | None] = [None] * rank
        unify = self.trace.unifier.unify
        for axes, value in self.leading:
            for i, axis in enumerate(axes, rank - len(axes)):
                known = result[i]
                self.held.append((value, f"...{i}", axis))
                if known is None:
                    result[i] = axis
                elif axis.size == 1 or known.size == 1:
                    lone, other = (axis, known) if axis.size == 1 else (known, axis)
                    if find(lone).origin is not None:
                        self.fixed.append((lone, value, ""))
                    result[i] = other
                elif known is not axis:
                    unify(known, axis)
                    if not isinstance(known.size, int) and isinstance(axis.size, int):
                        result[i] = axis
        self.batch = [axis for axis in result if axis is not None]

    # Outputs

    def _output(self, i: int, out: ir.Value, pattern: Pattern) -> None:
        if pattern.indexes:
            self.trace.indexes[out] = self.names[pattern.indexes]
        declared = None if out.shape is None else [d if isinstance(d, int) else None for d in out.shape]
        if pattern.whole:
            axes = self.trace.declared(out)
            self.trace.axes[out] = axes
            self.trace.fix(axes or (), self._why("whole"), self.node, out)
            return
        made: list[Axis] = []
        for term in pattern.terms:
            if isinstance(term, Ellipsis_ | Star):
                many = self._star(term, pattern, declared, len(made), out) if isinstance(term, Star) else self.batch
                label = f"*{term.name}" if isinstance(term, Star) else "..."
                self.held += [(out, f"{label}{i}", axis) for i, axis in enumerate(many)]
                made += many
            else:
                hint = declared[len(made)] if declared and len(made) < len(declared) else None
                made.append(self._build(term, hint, out))
        self.trace.axes[out] = tuple(made)

    def _star(
        self, term: Star, pattern: Pattern, declared: Sequence[int | None] | None, at: int, out: ir.Value
    ) -> list[Axis]:
        axes = self.stars.get(term.name)
        if axes is None:
            given = self.line.sizes.get(term.name)
            if isinstance(given, tuple):
                axes = [Axis(size) for size in given]
            else:
                others = len(pattern.terms) - 1
                if declared is not None:
                    count = len(declared) - others
                elif self.stars:
                    count = len(next(iter(self.stars.values())))
                else:
                    raise NoRule(f"the rank of '{out.name}' is unknown")
                hints = declared[at : at + count] if declared is not None else [None] * count
                axes = [Axis(self.trace.fresh(out.name or "") if h is None else h) for h in hints]
            self.stars[term.name] = axes
        if term.fixed:
            self.trace.fix(axes, self._why(""), self.node, out)
        return axes

    def _build(self, term: Term, hint: int | None, out: ir.Value) -> Axis:
        if isinstance(term, Number):
            axis = Axis(term.size)
            if term.size != 1:
                self.trace.fix([axis], self._why("number"), self.node, out)
            return axis
        if isinstance(term, Product):
            return prod([self._build(part, None, out) for part in term.parts])
        if isinstance(term, Sum):
            return concat([self._build(part, None, out) for part in term.parts])
        assert isinstance(term, Name)
        known = self.names.get(term.name)
        if known is None:
            size = self.line.sizes.get(term.name)
            if size is None or isinstance(size, tuple):
                size = hint if hint is not None else self.trace.fresh(out.name or "")
            known = self.names[term.name] = Axis(size)
        self.held.append((out, term.name, known))
        if term.pick:
            known = self._picked(known, self.line.picks[term.pick].tolist(), out)
        if term.fixed:
            self.trace.fix([known], self._why(""), self.node, out)
        return known

    def _picked(self, axis: Axis, indices: list[int], out: ir.Value) -> Axis:
        units = self.trace.unifier.positions(axis)
        if units is None or len(indices) == 1:
            result = Axis(len(indices))
            reason = f"{self.node.op_type} reorders or picks indices of this axis"
            self.trace.fix([axis, result], reason, self.node, out)
            return result
        return concat([units[i] for i in indices])

    # Facts

    def _summed(self) -> None:
        """Names that only inputs have are summed over; constants along them are consumed there."""
        kept = set(self.names_in(self.rule.outputs))
        carried = CARRIES.get(self.node.op_type, ())
        inputs = list(self.node.inputs)
        constant_output = self._constant_only()
        looked_up = {p.indexes for p in self.rule.inputs if p.indexes}
        for name, operands in self.operands.items():
            if name in looked_up and name not in kept:
                for axis, value in operands:
                    self._role(value, axis, "carries", carried, inputs, constant_output)
                continue
            role = "produces" if name in kept else "consumes"
            for axis, value in operands:
                if role == "consumes" and axis.size != 1:
                    self.trace.summed(axis, self.node, value)
                self._role(value, axis, role, carried, inputs, constant_output)
        for axes, value in self.leading:
            for axis in axes:
                self._role(value, axis, "produces", carried, inputs, constant_output)

    def _role(
        self,
        value: ir.Value,
        axis: Axis,
        role: str,
        carried: tuple[int, ...],
        inputs: list[ir.Value | None],
        constant_output: bool,
    ) -> None:
        roots = self.trace.roots.get(value)
        if not roots:
            return
        if inputs.index(value) in carried:
            role = "carries"
        elif constant_output:
            return
        for root in roots:
            self.trace.roles.append((root, axis, role))

    def _constant_only(self) -> bool:
        used = [
            v
            for v, p in zip(self.node.inputs, self.rule.inputs, strict=False)
            if v is not None and (p.terms or p.whole)
        ]
        return bool(used) and all(v in self.trace.roots for v in used)

    def _roots(self) -> None:
        if self._constant_only():
            roots = tuple({r: None for v in self.node.inputs if v is not None for r in self.trace.roots.get(v, ())})
            for out in self.node.outputs:
                self.trace.roots[out] = roots

    @staticmethod
    def names_in(patterns: Sequence[Pattern]) -> list[str]:
        found: list[str] = []
        todo: list[Term] = [t for p in patterns for t in p.terms]
        while todo:
            term = todo.pop()
            if isinstance(term, Name):
                found.append(term.name)
            elif isinstance(term, Star):
                found.append(f"*{term.name}")
            elif isinstance(term, Product | Sum):
                todo += term.parts
        return found
