"""The pass ``recognise``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from graphc import edit
from graphc.contract import Context, Effect, Pass, PassResult, option
from graphc.opset.adapters import Unconvertible
from graphc.opset.upgrade import upgrade
from graphc.recognition import attention, experts, gains, gates, norms, rotary
from graphc.recognition.graph import Graph
from graphc.rewrites import elementwise
from graphc.rewrites.base import Refused, Rule

RuleName = Literal["elementwise", "swish", "layer-norm", "rms-norm", "rotary", "attention", "experts"]

STAGES: tuple[tuple[Rule, ...], ...] = (
    (*elementwise.RULES, gates.SWISH, norms.LAYER_NORM, norms.RMS_NORM),
    (rotary.ROTARY, gains.GAIN),
    (attention.ATTENTION,),
    (experts.EXPERTS,),
)
"""All rules. A stage is finished before the next one begins: attention looks through rotary embeddings."""

OPERATORS: dict[str, str] = {"rms-norm": "RMSNormalization", "rotary": "RotaryEmbedding", "attention": "Attention"}
"""What a rule writes, where not every runtime has it."""

ON_DEMAND = frozenset({"experts"})
"""Rules that are applied only if ``only`` names them."""

_NEWEST = 23
"""The opset that has the operators; the output keeps an older one where none of them was found."""


@dataclass(frozen=True)
class Recognise(Pass):
    """Find operators that the exporter took apart, and write them as the standard operators they are.

    Only operators that the target has kernels for are written, and only where every value can be shown to be the
    same; what came near is refused with the first condition that failed. Rules, as ``only`` and ``skip`` name them:

    - ``elementwise``: Gelu, HardSwish, HardSigmoid and Mish.
    - ``swish``: Swish, if the target computes it as one operator (opset 24).
    - ``layer-norm``: LayerNormalization.
    - ``rms-norm``: RMSNormalization (opset 23).
    - ``rotary``: RotaryEmbedding, by halves or pairs, of all channels or the first (opset 23).
    - ``attention``: Attention, with heads, scale, mask, repeated keys, and a cache of past keys (opset 23).
    - ``experts``: Experts that are applied one by one, each to the tokens that chose it, become stacks of weights that
      each token picks from, which ``prune`` can take experts from. Only if it is asked for (``only``): a stack's
      picked weights take memory by token. ``lower`` makes MoE of both forms.
    """

    effect: ClassVar[Effect] = Effect.EXACT

    only: tuple[RuleName, ...] = option((), "Apply these rules alone.")
    skip: tuple[RuleName, ...] = option((), "Do not apply these rules.")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Raise the opset where the target allows it, then apply all rules once, stage by stage."""
        result = PassResult()
        names = [name for stage in STAGES for rule in stage for name in rule.names]
        wanted = self.only or [n for n in names if n not in ON_DEMAND]
        enabled = frozenset(n for n in wanted if n not in self.skip)
        newest = gates.SINCE if "swish" in enabled and gates.wanted(model, ctx.target) else _NEWEST
        why = _raise_opset(model, ctx, newest)
        if why:
            result.refuse(model.graph.name or "the graph", why)
            enabled -= OPERATORS.keys()
        graph = Graph(model, enabled, ctx.target)
        for name, operator in OPERATORS.items():
            if name in enabled and not graph.runs(operator, _NEWEST):
                why = f"{ctx.target.name} has no kernel for {operator}"
                if graph.version < _NEWEST:
                    why = "a function of the model is of an older opset"
                result.refuse(model.graph.name or "the graph", why)
                enabled -= {name}
        for stage in STAGES:
            rules: dict[str, list[Rule]] = {}
            for rule in stage:
                if not enabled.isdisjoint(rule.names):
                    for operator in rule.operators:
                        rules.setdefault(operator, []).append(rule)
            _apply(model, graph, rules, result)
        for node, why in graph.missed:
            result.refuse(node, why)
        if graph.late:
            for each in (model.graph, *(f.graph for f in model.functions.values())):
                each.sort()
        return result


def _raise_opset(model: ir.Model, ctx: Context, newest: int) -> str:
    """Bring the model to the opset that has the operators; why not, if it stays at a lower one."""
    now = model.opset_imports.get("", 1)
    highest = ctx.target.max_opset.get("", now)
    if highest < _NEWEST:
        return f"{ctx.target.name} loads opsets up to {highest}; the operators are of opset {_NEWEST}"
    if now >= newest:
        return ""
    try:
        upgrade(model.clone(), newest)
    except Unconvertible as error:
        return f"the model cannot be brought to opset {newest}: {error.reason}"
    upgrade(model, newest)
    return ""


def _apply(model: ir.Model, graph: Graph, rules: Mapping[str, Sequence[Rule]], result: PassResult) -> None:
    for node in list(edit.nodes(model)):
        for rule in rules.get(node.op_type, ()) if not node.domain else ():
            if node.graph is None:
                break
            try:
                done = rule.apply(node, graph)
            except Refused as refusal:
                result.refuse(refusal.node or node, refusal.reason)
                continue
            except edit.BoundByCaller:
                result.refuse(node, "an attribute is given by the caller of the function")
                continue
            if done is not None:
                result.change(done)
