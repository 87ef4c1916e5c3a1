"""The pass ``fuse``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from graphc import edit
from graphc.contract import Context, Effect, Pass, PassResult, option
from graphc.recognition import norms
from graphc.rewrites import absorb, chains, clip, elementwise, gemm, pad
from graphc.rewrites.base import Refused, Rewriter, Rule

RuleName = Literal[
    "conv-bn",
    "conv-affine",
    "matmul-bn",
    "matmul-affine",
    "bn-conv",
    "affine-conv",
    "bn-matmul",
    "affine-matmul",
    "pad",
    "affine-chain",
    "batchnorm-arithmetic",
    "matmul-add",
    "gemm-transpose",
    "elementwise",
    "layer-norm",
    "clip",
]

STAGES: tuple[tuple[Rule, ...], ...] = (
    (*elementwise.RULES, norms.LAYER_NORM),
    (*pad.RULES, *absorb.RULES),
    (*chains.RULES, *gemm.RULES, *clip.RULES),
)
"""All rules, in the order in which they are tried at a node. What has an operator of its own goes first, lest its
parts are folded elsewhere; chains go last, where nothing could take them."""

_OLDEST = 13
"""The lowest opset whose operators the rules know."""

_ROUNDS = 10
"""How often the graph is gone through at most; a round without a change ends it earlier."""


@dataclass(frozen=True)
class Fuse(Pass):
    """Compute the same with fewer operators: fold scales, shifts, padding and bounds into neighbours.

    New weights are computed in float64 and rounded once. What was tried and did not apply is refused with its
    reason. Rules, as ``only`` and ``skip`` name them:

    - ``elementwise``: Gelu, HardSwish, HardSigmoid and Mish written out become one operator.
    - ``layer-norm``: Layer normalisation written out becomes LayerNormalization.
    - ``pad``: Pad before Conv, AveragePool or MaxPool becomes its padding.
    - ``conv-bn``: BatchNormalization after Conv or ConvTranspose goes into it.
    - ``conv-affine``: Add, Sub, Mul, Div by constants after Conv or ConvTranspose go into it.
    - ``matmul-bn``: BatchNormalization after MatMul or Gemm goes into it.
    - ``matmul-affine``: Add, Sub, Mul, Div by constants after MatMul or Gemm go into it.
    - ``bn-conv``: BatchNormalization before an unpadded Conv goes into it.
    - ``affine-conv``: Add, Sub, Mul, Div by constants before Conv or ConvTranspose go into it.
    - ``bn-matmul``: BatchNormalization before MatMul or Gemm goes into it.
    - ``affine-matmul``: Add, Sub, Mul, Div by constants before MatMul or Gemm go into it.
    - ``affine-chain``: Add, Sub, Mul, Div by constants in a row become one Mul, one Add or both.
    - ``batchnorm-arithmetic``: A scale and a shift per channel in a row become one
      BatchNormalization.
    - ``matmul-add``: A two-dimensional MatMul, or a Gemm without bias, and an Add become one Gemm.
    - ``gemm-transpose``: Transpose before Gemm becomes its transA or transB.
    - ``clip``: Relu and Clip in a row become one of them.
    """

    effect: ClassVar[Effect] = Effect.EXACT

    only: tuple[RuleName, ...] = option((), "Apply these rules alone.")
    skip: tuple[RuleName, ...] = option((), "Do not apply these rules.")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Apply all rules, from the first node on, until none applies."""
        names = [name for stage in STAGES for rule in stage for name in rule.names]
        enabled = frozenset(n for n in names if (not self.only or n in self.only) and n not in self.skip)
        result = PassResult()
        rewriter = Rewriter(model, enabled)
        if rewriter.version < _OLDEST:
            why = f"opset {rewriter.version} is older than {_OLDEST}, from which fuse works"
            result.refuse(model.graph.name or "the graph", why)
            return result
        refusals: list[tuple[ir.Node, str]] = []
        for last in range(1, len(STAGES) + 1):
            rules = _by_operator(enabled, [rule for stage in STAGES[:last] for rule in stage])
            for _ in range(_ROUNDS):
                refusals.clear()
                if not _round(model, rewriter, rules, result, refusals):
                    break
        for node, reason in refusals:
            result.refuse(node, reason)
        return result


def _by_operator(enabled: frozenset[str], rules: Sequence[Rule]) -> dict[str, list[Rule]]:
    found: dict[str, list[Rule]] = {}
    for rule in rules:
        if not enabled.isdisjoint(rule.names):
            for operator in rule.operators:
                found.setdefault(operator, []).append(rule)
    return found


def _round(
    model: ir.Model,
    rewriter: Rewriter,
    rules: Mapping[str, Sequence[Rule]],
    result: PassResult,
    refusals: list[tuple[ir.Node, str]],
) -> bool:
    """Try the rules at every node once; whether one applied."""
    changed = False
    for node in edit.nodes(model):
        for rule in rules.get(node.op_type, ()) if not node.domain else ():
            try:
                done = rule.apply(node, rewriter)
            except Refused as refusal:
                refusals.append((refusal.node or node, refusal.reason))
                continue
            except edit.BoundByCaller:
                refusals.append((node, "an attribute is given by the caller of the function"))
                continue
            if done is not None:
                result.change(done)
                changed = True
                if node.graph is None:
                    break
    return changed
