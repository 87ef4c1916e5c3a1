"""The pass ``lower``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.contract import Context, Effect, Needs, Pass, PassResult, Probe, option
from graphc.lowering import forms
from graphc.lowering.forms import FORMS, STANDARD, Site
from graphc.recognition.graph import Graph
from graphc.rewrites.base import Refused
from graphc.shapes.symbolic import Expr
from graphc.timings import FASTER

FormName = Literal["skip-rms-norm", "skip-layer-norm", "multi-head-attention", "quick-gelu", "bias-gelu", "sum-norm"]


@dataclass(frozen=True)
class Lower(Pass):
    """Write operators in the form that is measured to be the fastest on this machine.

    Each form is timed once for each size (``sum-norm``: once for all) against what the session makes of the model by
    itself; ``--timings FILE`` keeps and pins what was measured. All but the last write operators that only ONNX Runtime
    has, which the target must allow: ``-t 'onnxruntime{portable=false}'``. Forms, as ``only`` and ``skip`` name them:

    - ``skip-rms-norm``: Add and RMSNormalization become SkipSimplifiedLayerNormalization.
    - ``skip-layer-norm``: Add and LayerNormalization become SkipLayerNormalization.
    - ``multi-head-attention``: Attention becomes MultiHeadAttention.
    - ``quick-gelu``: A product with a Sigmoid of the same becomes QuickGelu.
    - ``bias-gelu``: Add of a vector and Gelu become BiasGelu.
    - ``sum-norm``: Add before LayerNormalization becomes Sum, which the session does not fuse with it: its
      SkipLayerNormalization may be slower than the two.
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
        enabled = [form for form in FORMS if form not in self.skip and (not self.only or form in self.only)]
        if ctx.target.portable:
            if self.only and not STANDARD.issuperset(enabled):
                result.refuse(name, "only standard operators may be written: see portable=false of the target")
            enabled = [form for form in enabled if form in STANDARD]
        graph = Graph(model, frozenset(), ctx.target)
        sites = self._sites(model, graph, enabled, result)
        if sites and ctx.time is None:
            result.refuse(name, "nothing can be timed here")
            return result
        probes = {signature: self._probe(site, graph, signature) for site, signature in sites}
        ratios = ctx.time(list(probes.values())) if ctx.time is not None else {}
        for site, signature in sites:
            ratio = ratios.get(signature)
            if ratio is None:
                result.refuse(site.nodes[0], "it is not in the timing table")
            elif ratio > FASTER:
                if site.form not in STANDARD:
                    result.refuse(site.nodes[0], f"{site.operator} is not faster than what the session makes by itself")
            elif all(node.graph is not None for node in site.nodes):
                forms.write(site, graph)
                if site.domain:
                    model.graph.opset_imports.setdefault(site.domain, 1)
                before = f" before {site.reader.op_type}" if site.reader is not None else ""
                result.change(f"{site.operator} written{before}")
        return result

    def _sites(
        self, model: ir.Model, graph: Graph, enabled: Sequence[str], result: PassResult
    ) -> list[tuple[Site, str]]:
        provider = graph.providers[0]
        found = []
        for node in list(edit.nodes(model)):
            if node.domain:
                continue
            for operators, find in (FORMS[name] for name in enabled):
                if node.op_type not in operators:
                    continue
                try:
                    site = find(node, graph)
                except Refused as refusal:
                    result.refuse(node, refusal.reason)
                    continue
                if site is None:
                    continue
                if not graph.target.has_kernel(site.domain, site.operator, provider):
                    result.refuse(node, f"{provider} has no kernel for {site.operator}")
                    continue
                found.append((site, self._signature(site, graph)))
        return found

    def _signature(self, site: Site, graph: Graph) -> str:
        """A form, its attributes, and the dtypes and sizes that it is timed with."""
        operands = ", ".join(
            "-" if v is None else f"{(graph.dtype(v) or ir.DataType.FLOAT).name.lower()}{self._shape(v, site, graph)}"
            for v in site.inputs
        )
        attributes = " ".join(f"{k}={v:g}" for k, v in sorted(site.attributes.items()))
        given = sum(v is not None for v in site.outputs)
        return f"{site.form}({operands}) {attributes} -> {given} {graph.providers[0]}"

    def _shape(self, value: ir.Value, site: Site, graph: Graph) -> list[int]:
        dims = graph.dims(value) or ()
        if len(dims) <= len(site.typical):
            return list(site.typical[len(site.typical) - len(dims) :])
        return [self._size(dim, graph) for dim in dims]

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
        before, after = forms.models(site, graph, lambda value: self._shape(value, site, graph))
        rng = np.random.default_rng(0)
        inputs = {}
        for value in before.graph.inputs:
            assert value.name is not None and value.shape is not None and value.dtype is not None
            inputs[value.name] = rng.standard_normal(tuple(value.shape)).astype(value.dtype.numpy())  # type: ignore[arg-type]
        return Probe(signature, before, after, inputs)
