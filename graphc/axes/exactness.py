"""Where a dead unit is really zero: what a cut needs where no weight of the reader masks the unit.

A unit is dead when it is zero at all places that produce it. Walking forward from there, an activation is zero at
the unit as long as the operators keep zeros: a product is zero if one factor is, a sum if all terms are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import onnx_ir as ir

from graphc.axes.algebra import Axis, find, leaves
from graphc.axes.notation import Name
from graphc.axes.words import words

if TYPE_CHECKING:
    from graphc.axes.trace import Trace

FIRST = words(
    "Abs Asin Asinh Atan Celu Ceil Elu Erf Floor Gelu HardSwish Identity LeakyRelu Mish Neg Relu Round Selu "
    "Shrink Sign Sin Sinh Softsign Sqrt Swish Tan Tanh ThresholdedRelu Cast CastLike Dropout PRelu Div Pow "
    "QuickGelu QuantizeLinear DequantizeLinear Transpose Reshape Flatten Squeeze Unsqueeze Expand Tile Slice "
    "Split Pad Gather GatherND GatherElements DepthToSpace SpaceToDepth Resize Upsample MaxPool AveragePool "
    "LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool ReduceSum ReduceMean ReduceMax ReduceMin ReduceL1 "
    "ReduceL2 ReduceSumSquare ReduceProd Trilu CumSum RMSNormalization SimplifiedLayerNormalization "
    "RotaryEmbedding GridSample LpNormalization BiasSplitGelu NhwcMaxPool"
)
"""Operators whose result is zero where their first input is."""
COMPETITIONS = frozenset({"Softmax", "Hardmax", "QLinearSoftmax"})
"""Operators whose result is zero where -inf bars a unit that competes."""
FACTORS = words("Mul And MatMul Einsum MatMulInteger MatMulNBits FusedMatMul BitwiseAnd")
"""Operators whose result is zero where one input is."""
TERMS = words("Add Sub Sum Max Min Mean Or BiasGelu FastGelu BiasAdd Where")
"""Operators whose result is zero where all inputs are."""
AFFINE = words("Conv ConvTranspose FusedConv Gemm FusedGemm NhwcConv DeformConv")
"""Operators whose result is zero where one of the first two inputs and all later ones are."""
PARAMETERS = words("BatchNormalization InstanceNormalization GroupNormalization GroupNorm LayerNormalization")
"""Operators whose result is zero where the parameters after the first input are."""
STATES = words("LSTM GRU RNN")
"""Operators whose result is zero along hidden units whose weights are."""
VALUES = {"Attention": 2, "MultiHeadAttention": 2, "GroupQueryAttention": 2}
"""Operators whose first result is zero where this input is."""
JOINED = frozenset({"Concat", "SkipSimplifiedLayerNormalization"})
"""Operators whose result is zero where every input that has the unit at all is."""


def zeros(trace: Trace, key: Callable[[Axis], Axis]) -> dict[ir.Value, frozenset[Axis]]:
    """For each value the leaves at whose dead units it is zero."""
    held: dict[ir.Value, frozenset[Axis]] = {}
    within: dict[Axis, frozenset[Axis]] = {}
    along: dict[ir.Value, frozenset[Axis]] = {}

    def inside(axis: Axis) -> frozenset[Axis]:
        root = find(axis)
        if root not in within:
            within[root] = frozenset(key(leaf) for leaf in leaves(root))
        return within[root]

    def has(value: ir.Value) -> frozenset[Axis]:
        if value not in along:
            axes = trace.copies.get((value, node)) or trace.axes.get(value) or ()
            found = frozenset().union(*map(inside, axes))
            if (value, node) in trace.copies:
                return found
            along[value] = found
        return along[value]

    def zero(value: ir.Value | None) -> frozenset[Axis]:
        if value is None:
            return frozenset()
        if value not in held and value in trace.order:
            return has(value)
        return held.get(value, frozenset())

    def competing(node: ir.Node) -> frozenset[Axis]:
        application = trace.bound[node]
        marked = [t.name for t in application.rule.inputs[0].terms if isinstance(t, Name) and t.mark == "^"]
        return frozenset().union(*(inside(application.names[name]) for name in marked))

    for node in trace.graph:
        op, inputs = node.op_type, [v for v in node.inputs if v is not None]
        if not inputs or node not in trace.bound:
            continue
        first = zero(node.inputs[0])
        for i, out in enumerate(node.outputs):
            own = has(out)
            if op in FIRST:
                found = first
            elif op in COMPETITIONS:
                found = competing(node)
            elif op in FACTORS:
                found = frozenset().union(*map(zero, inputs))
            elif op in TERMS:
                terms = inputs[1:] if op == "Where" else inputs
                found = frozenset.intersection(*map(zero, terms))
            elif op in AFFINE:
                found = first | zero(inputs[1])
                for value in inputs[2:]:
                    found &= zero(value)
            elif op in PARAMETERS:
                found = frozenset.intersection(own, *map(zero, inputs[1:3])) if len(inputs) > 2 else frozenset()
            elif op in STATES:
                found = own & zero(inputs[2])
            elif op in VALUES:
                found = zero(node.inputs[VALUES[op]] if i == 0 and len(node.inputs) > VALUES[op] else None)
            elif op in JOINED:
                found = frozenset(leaf for leaf in own if all(leaf in zero(v) or leaf not in has(v) for v in inputs))
            else:
                found = frozenset()
            held[out] = found & own - _twice(trace, out, inside)
    return held


def _twice(trace: Trace, value: ir.Value, inside: Callable[[Axis], frozenset[Axis]]) -> frozenset[Axis]:
    """Leaves of several axes of a value: zero along one of them says nothing about the others."""
    seen: set[Axis] = set()
    twice: set[Axis] = set()
    for axis in trace.axes.get(value) or ():
        own = inside(axis)
        twice |= seen & own
        seen |= own
    return frozenset(twice)
