"""The pass ``cast``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import onnx_ir as ir

from graphc import edit, shapes
from graphc.contract import Context, Effect, Needs, Pass, PassResult, option
from graphc.rewrites import precision
from graphc.rewrites.precision import Decision, Retyper
from graphc.stats import RangeOf

SENSITIVE = ("*Normalization", "*Softmax", "Reduce*", "CumSum", "Pow", "Exp", "Softplus")
"""Operators that sum or grow many numbers, where a short type loses most."""

_SHARES = (0.75, 0.5, 0.25, 0.0)

_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum")

_ROOM = 2.0
"""How many times as large as on the calibration data a value may become."""

_TOO_LARGE = "its values come near the largest number of float16 on the calibration data"

_CPU_ONLY = "ONNX Runtime's CPU provider computes these in float32 through casts: smaller, not faster"

_CAVEAT = (
    "cast to {to}: ONNX Runtime's CPU provider has no products in it and computes them in float32 through casts: the "
    "file is smaller, the model is not faster"
)


@dataclass(frozen=True)
class Cast(Pass):
    """Compute in another floating-point type; float16 and bfloat16 halve the file."""

    effect: ClassVar[Effect] = Effect.LOSSY

    to: Literal["float16", "bfloat16", "float32"] = option("float16", "The type to compute in.")
    io: bool = option(False, "Give the inputs and outputs of the model this type, too.")
    keep: tuple[str, ...] = option((), "Operators or nodes that keep their type, by name or pattern.")
    ranges: bool = option(True, "Let values keep their type that measure too large for float16.")
    share: float = option(1.0, "The share of the operators, from the first on, that gets the type.", least=0, most=1)

    def caveats(self, model: ir.Model, ctx: Context) -> Iterable[str]:
        if self.to != "float32" and ctx.target.providers and _only_cpu(ctx):
            yield _CAVEAT.format(to=self.to)

    def levels(self, model: ir.Model) -> Sequence[Pass]:
        """Everything; all but sensitive operators; of those the first three quarters, half, quarter; nothing."""
        kept = dataclasses.replace(self, keep=tuple(dict.fromkeys((*self.keep, *SENSITIVE))))
        shares = [share for share in _SHARES if share < self.share]
        return (self, kept, *(dataclasses.replace(kept, share=share) for share in shares))

    def needs(self, model: ir.Model) -> Needs:
        return Needs(calibration=self.to == "float16" and self.ranges and self.share > 0)

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Decide for every operator, then change types and put Casts where they differ."""
        result = PassResult()
        if self.share == 0:
            return result
        to = ir.DataType[{"float32": "FLOAT"}.get(self.to, self.to.upper())]
        shapes.infer(model)
        version = model.graph.opset_imports.get("", 1)
        nodes = [node for graph in (model.graph, *model.graph.subgraphs()) for node in graph]
        large = self._too_large(model, ctx) if self.needs(model).calibration and ctx.calibration else set()
        decisions: dict[ir.Node, Decision] = {}
        for i, node in enumerate(nodes):
            ctx.progress("deciding types", i, len(nodes))
            decision = precision.decide(node, to, version)
            if decision.inputs or decision.outputs:
                if any(fnmatchcase(name, p) for p in self.keep for name in (node.op_type, node.name or "")):
                    decision = Decision(reason="it is to be kept")
                elif i >= self.share * len(nodes):
                    decision = Decision(reason="it is beyond the share that gets the type")
                elif not large.isdisjoint((*node.inputs, *node.outputs)):
                    decision = Decision(reason=_TOO_LARGE)
            decisions[node] = decision
            if decision.reason:
                result.refuse(node, decision.reason)
            elif decision.inputs or decision.outputs:
                result.change(f"{node.op_type} {'computes in' if decision.outputs else 'reads'} {self.to}")
                if to != ir.DataType.FLOAT and node.op_type in _PRODUCTS and _only_cpu(ctx):
                    result.refuse(node, _CPU_ONLY)
        if result.changed or self.io:
            Retyper(model, to, interface=self.io).run(decisions)
            precision.drop_originals(model)
        return result

    def _too_large(self, model: ir.Model, ctx: Context) -> set[ir.Value | None]:
        """The values outside of bodies that come near the largest float16 on the calibration data."""
        values = [value for node in model.graph for value in node.outputs if value.name]
        read = [v for v in (*model.graph.inputs, *values) if v.dtype == ir.DataType.FLOAT and edit.tensor(v) is None]
        requests = {value: RangeOf(value.name or "") for value in read}
        found = ctx.collect(model, requests.values())
        limit = 65504 / _ROOM
        return {v for v, wanted in requests.items() if max(-found[wanted].low, found[wanted].high) > limit}


def _only_cpu(ctx: Context) -> bool:
    return all(provider == "CPUExecutionProvider" for provider in ctx.target.providers)
