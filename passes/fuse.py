"""The pass ``fuse``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from graphc import edit
from graphc.contract import Context, Effect, Pass, PassResult, option
from graphc.rewrites import absorb, chains, clip, elementwise, gemm, layernorm, pad
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
    (*elementwise.RULES, *layernorm.RULES),
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
    """Compute the same with fewer operators: fold scales, shifts, padding and bounds into neighbours."""

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
            if done is not None:
                result.change(done)
                changed = True
                if node.graph is None:
                    break
    return changed
