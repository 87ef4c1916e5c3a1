"""The pass ``lower``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.contract import Context, Effect, Needs, Pass, PassResult, Probe, option
from graphc.lowering.cached import counts, untie
from graphc.lowering.forms import FORMS, STANDARD
from graphc.lowering.site import Site, write
from graphc.lowering.timed import copied, copies, models
from graphc.recognition.graph import Graph
from graphc.rewrites.base import Refused
from graphc.shapes.symbolic import Expr
from graphc.timings import FASTER

FormName = Literal[
    "skip-rms-norm",
    "skip-layer-norm",
    "multi-head-attention",
    "group-query-attention",
    "quick-gelu",
    "bias-gelu",
    "moe",
    "qmoe",
    "sum-norm",
    "joint-product",
    "unpacked-product",
    "decoded-weight",
]


@dataclass(frozen=True)
class Lower(Pass):
    """Write operators in the form that is measured to be the fastest on this machine.

    Each form is timed once for each size (``sum-norm``: once for all) against what the session makes of the model by
    itself; ``--timings FILE`` keeps and pins what was measured. A decoder with a cache is timed with a prompt of
    ``length`` tokens and as many single ones after it: what all of them take together decides. The last four forms
    write standard operators; the others those that only ONNX Runtime has, which the target must allow:
    ``-t 'onnxruntime{portable=false}'``. Forms, as ``only`` and ``skip`` name them:

    - ``skip-rms-norm``: Add and RMSNormalization become SkipSimplifiedLayerNormalization.
    - ``skip-layer-norm``: Add and LayerNormalization become SkipLayerNormalization.
    - ``multi-head-attention``: Attention becomes MultiHeadAttention.
    - ``group-query-attention``: Attention of one token with its cache becomes GroupQueryAttention.
    - ``quick-gelu``: A product with a Sigmoid of the same becomes QuickGelu.
    - ``bias-gelu``: Add of a vector and Gelu become BiasGelu.
    - ``moe``: A router, the experts that it picks, or that are applied one by one, and their sum become MoE.
    - ``qmoe``: The same, with weights of 4 or 8 bits, become QMoE, which reads them packed and rounds nothing more.
    - ``sum-norm``: Add before LayerNormalization becomes Sum, which the session does not fuse with it: its
      SkipLayerNormalization may be slower than the two.
    - ``joint-product``: Up to four MatMul of one input become one, and a Split.
    - ``unpacked-product``: The MatMul of one row, or of a decoder's tokens, with a large weight reads it as it is
      stored: the session does not repack what a view hides from it.
    - ``decoded-weight``: The codes that DequantizeLinear reads are turned into numbers when the session starts, by Cast
      and Mul: for convolutions with float inputs, for which it would do so in each run, and where products of many rows
      are faster so. The file stays as small, and the session takes float32's memory; not above 128 MB of that.
    """

    effect: ClassVar[Effect] = Effect.EXACT

    only: tuple[FormName, ...] = option((), "Try these forms alone.")
    skip: tuple[FormName, ...] = option((), "Do not try these forms.")
    in_place: bool = option(
        False, "Whoever runs the model gives each cache and what it becomes one and the same buffer."
    )
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
        if ctx.time is None and not all(site.known for site in sites):
            result.refuse(name, "nothing can be timed here")
            return result
        cases = _cases(graph, self.length)
        signed = [(site, self._signature(site, graph, cases)) for site in sites]
        ratios: Mapping[str, float] = {}
        if ctx.time is not None:
            ratios = ctx.time(
                [
                    self._probe(site, graph, name, cases)
                    for name, site in {n: s for s, n in signed if not s.known}.items()
                ]
            )
        for site, signature in signed:
            if not site.known and signature not in ratios:
                result.refuse(site.nodes[0], "it is not in the timing table")
            elif not site.known and ratios[signature] > FASTER:
                if site.form not in STANDARD:
                    result.refuse(site.nodes[0], f"{site.operator} is not faster than what the session makes by itself")
            elif all(node.graph is not None for node in site.nodes):
                write(site, graph)
                if site.domain:
                    model.graph.opset_imports.setdefault(site.domain, 1)
                result.change(_words(site))
        if self.in_place:
            for cache in untie(graph):
                result.refuse(cache, "the model reads the length of the past off this cache, whose buffer must have it")
        return result

    def _sites(self, model: ir.Model, graph: Graph, enabled: Sequence[str], result: PassResult) -> list[Site]:
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
                found.append(site)
        return found

    def _signature(self, site: Site, graph: Graph, cases: Sequence[Case]) -> str:
        """A form, its attributes, and the dtypes and sizes that it is timed with."""
        dtypes = [(graph.dtype(v) or ir.DataType.FLOAT).name.lower() if v is not None else "-" for v in site.inputs]
        operands = []
        for case in cases:
            shapes = ["" if v is None else str(_shape(v, site, graph, case)) for v in site.inputs]
            operands.append(", ".join(dtype + shape for dtype, shape in zip(dtypes, shapes, strict=True)))
        sizes = operands[0] if len(cases) == 1 else f"{self.length} x {operands[0]}; {operands[1]}"
        attributes = " ".join(f"{k}={v:g}" for k, v in sorted(site.attributes.items()))
        given = sum(v is not None for v in site.outputs)
        place = " in place" if self._shared(site) else ""
        place += f", {copies(site)} together" if site.common else ""
        return f"{site.form}({sizes}) {attributes} -> {given} {graph.providers[0]}{place}"

    def _shared(self, site: Site) -> dict[str, str]:
        """Which outputs of a form are written in place, and over which inputs."""
        if not self.in_place or site.form != "group-query-attention":
            return {}
        return {
            copied(out.name, number): copied(past.name, number)
            for number in range(copies(site))
            for out, past in zip(site.outputs[1:], site.inputs[4:6], strict=True)
            if out and past
        }

    def _probe(self, site: Site, graph: Graph, signature: str, cases: Sequence[Case]) -> Probe:
        before, after, shapes = models(
            site, graph, [partial(_shape, site=site, graph=graph, case=case) for case in cases]
        )
        rng = np.random.default_rng(0)
        feeds = []
        for own in shapes:
            dtypes = {str(v.name): v.dtype.numpy() for v in before.graph.inputs if v.dtype is not None}
            feeds.append({name: rng.standard_normal(size).astype(dtypes[name]) for name, size in own.items()})
        beside = feeds[1] if len(feeds) > 1 else None
        return Probe(signature, before, after, feeds[0], self._shared(site), beside, self.length)


Case = Mapping[str, int]
"""Numbers for named sizes; the name "" is that of all others."""


def _cases(graph: Graph, length: int) -> list[Case]:
    """The sizes to time with: 1 for the first axis of an input, else ``length``; with a cache, first one token."""
    batch = {str(v.shape[0]): 1 for v in graph.model.graph.inputs if v.shape is not None and len(v.shape)}
    several: Case = {"": length, **batch}
    tokens = counts(graph)
    return [{**several, **dict.fromkeys(tokens, 1)}, several] if tokens else [several]


def _shape(value: ir.Value, site: Site, graph: Graph, case: Case) -> list[int]:
    dims = graph.dims(value) or ()
    if len(dims) <= len(site.typical):
        return list(site.typical[len(site.typical) - len(dims) :])
    return [_size(dim, case) for dim in dims]


def _size(dim: Any, case: Case) -> int:
    if not isinstance(dim, Expr):
        return int(dim)
    total = 0
    for atoms, factor in dim.terms:
        for atom in atoms:
            factor *= case.get(atom, case[""])
        total += factor
    return max(1, total)


def _words(site: Site) -> str:
    """What was done, in words."""
    if site.form == "joint-product":
        return f"{len(site.nodes)} MatMul of one input joined"
    if site.form == "unpacked-product":
        return "MatMul reads its weight unpacked"
    if site.form == "decoded-weight":
        return f"weight of {site.reader.op_type if site.reader is not None else 'a product'} decoded at the start"
    return f"{site.operator} written" + (f" before {site.reader.op_type}" if site.reader is not None else "")
