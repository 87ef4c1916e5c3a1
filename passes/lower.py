"""The pass ``lower``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.contract import Context, Effect, Needs, Pass, PassResult, Probe, option
from graphc.lowering import forms
from graphc.lowering.forms import DOMAIN, FORMS, Site
from graphc.recognition.graph import Graph
from graphc.rewrites.base import Refused
from graphc.shapes.symbolic import Expr

FormName = Literal["skip-rms-norm", "skip-layer-norm", "multi-head-attention", "quick-gelu", "bias-gelu"]

FASTER = 0.95
"""The ratio of times from which on an operator counts as faster."""


@dataclass(frozen=True)
class Lower(Pass):
    """Use operators that only ONNX Runtime has, where they are measured to be faster on this machine.

    The target must allow them: ``-t 'onnxruntime{portable=false}'``. Each form is timed once for each size against
    what the session makes of the standard operators by itself; ``--timings FILE`` keeps and pins what was measured.
    Forms, as ``only`` and ``skip`` name them:

    - ``skip-rms-norm``: Add and RMSNormalization become SkipSimplifiedLayerNormalization.
    - ``skip-layer-norm``: Add and LayerNormalization become SkipLayerNormalization.
    - ``multi-head-attention``: Attention becomes MultiHeadAttention.
    - ``quick-gelu``: A product with a Sigmoid of the same becomes QuickGelu.
    - ``bias-gelu``: Add of a vector and Gelu become BiasGelu.
    """

    effect: ClassVar[Effect] = Effect.EXACT

    only: tuple[FormName, ...] = option((), "Try these forms alone.")
    skip: tuple[FormName, ...] = option((), "Do not try these forms.")
    length: int = option(64, "The size that dynamic axes other than the first have when forms are timed.")

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError("length is at least 1")

    def needs(self, model: ir.Model) -> Needs:
        return Needs(timings=True)

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Find the forms, have them timed, write those that are faster."""
        result = PassResult()
        name = model.graph.name or "the graph"
        if ctx.target.portable:
            result.refuse(name, "only standard operators may be written: see portable=false of the target")
            return result
        if ctx.time is None:
            result.refuse(name, "nothing can be timed here")
            return result
        graph = Graph(model, frozenset(), ctx.target)
        sites = self._sites(model, graph, result)
        probes = {signature: self._probe(site, graph, signature) for site, signature in sites}
        ratios = ctx.time(list(probes.values()))
        for site, signature in sites:
            ratio = ratios.get(signature)
            if ratio is None:
                result.refuse(site.nodes[0], "it is not in the timing table")
            elif ratio > FASTER:
                result.refuse(site.nodes[0], f"{site.operator} is not faster than what the session makes by itself")
            elif all(node.graph is not None for node in site.nodes):
                forms.write(site, graph)
                model.graph.opset_imports.setdefault(DOMAIN, 1)
                result.change(f"{site.operator} written")
        return result

    def _sites(self, model: ir.Model, graph: Graph, result: PassResult) -> list[tuple[Site, str]]:
        provider = graph.providers[0]
        found = []
        for node in list(edit.nodes(model)):
            if node.domain:
                continue
            for name, (operators, find) in FORMS.items():
                if node.op_type not in operators or name in self.skip or (self.only and name not in self.only):
                    continue
                try:
                    site = find(node, graph)
                except Refused as refusal:
                    result.refuse(node, refusal.reason)
                    continue
                if site is None:
                    continue
                if not graph.target.has_kernel(DOMAIN, site.operator, provider):
                    result.refuse(node, f"{provider} has no kernel for {site.operator}")
                    continue
                found.append((site, self._signature(site, graph)))
        return found

    def _signature(self, site: Site, graph: Graph) -> str:
        """A form, its attributes, and the dtypes and sizes that it is timed with."""
        operands = ", ".join(
            "-" if v is None else f"{(graph.dtype(v) or ir.DataType.FLOAT).name.lower()}{self._shape(v, graph)}"
            for v in site.inputs
        )
        attributes = " ".join(f"{k}={v:g}" for k, v in sorted(site.attributes.items()))
        given = sum(v is not None for v in site.outputs)
        return f"{site.form}({operands}) {attributes} -> {given} {graph.providers[0]}"

    def _shape(self, value: ir.Value, graph: Graph) -> list[int]:
        return [self._size(dim, graph) for dim in graph.dims(value) or ()]

    def _size(self, dim: Any, graph: Graph) -> int:
        """A number for a size: 1 for what is the first axis of an input, else ``length``."""
        if not isinstance(dim, Expr):
            return int(dim)
        first = {str(v.shape[0]) for v in graph.model.graph.inputs if v.shape is not None and len(v.shape)}
        total = 0
        for atoms, factor in dim.terms:
            for atom in atoms:
                factor *= 1 if atom in first else self.length
            total += factor
        return max(1, total)

    def _probe(self, site: Site, graph: Graph, signature: str) -> Probe:
        before, after = forms.models(site, graph, lambda dim: self._size(dim, graph))
        rng = np.random.default_rng(0)
        inputs = {}
        for value in before.graph.inputs:
            assert value.name is not None and value.shape is not None and value.dtype is not None
            inputs[value.name] = rng.standard_normal(tuple(value.shape)).astype(value.dtype.numpy())  # type: ignore[arg-type]
        return Probe(signature, before, after, inputs)
