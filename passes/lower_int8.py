"""The pass ``lower-int8``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from graphc.contract import Context, Effect, Needs, Pass, PassResult, Probe, option
from graphc.lowering import nbits
from graphc.lowering.nbits import Weight
from graphc.lowering.site import DOMAIN
from graphc.recognition.graph import Graph
from graphc.timings import FASTER

LEVELS = {"int8": 4, "float": 1}


@dataclass(frozen=True)
class LowerInt8(Pass):
    """Multiply with packed codes by operators that only ONNX Runtime has, where it does not do so by itself.

    Products with dequantized weights of 2, 4 or 8 bits become MatMulNBits, which rounds activations to 8 bits in
    blocks, and lookups of rows GatherBlockQuantized, which is exact. ONNX Runtime does the first by itself for a
    weight that one product reads as it lies; what is left are weights that several read, heads tied to an embedding
    of 4 bits, and bodies of If and Loop. The target must allow it: ``-t 'onnxruntime{portable=false}'``. Each size is
    timed once against what the session makes of the standard operators; ``--timings FILE`` keeps what was measured.
    """

    effect: ClassVar[Effect] = Effect.LOSSY

    activations: Literal["int8", "float"] = option(
        "int8", "What products compute in: int8 is fast; float rounds nothing more, and is slow but for 4 bits."
    )
    rows: int = option(1, "The rows that are timed: 1 for decoding, more for prompts and batches.")
    always: bool = option(False, "Write the operators without timing them.")

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError("rows is at least 1")

    def needs(self, model: ir.Model) -> Needs:
        return Needs(timings=not self.always)

    def levels(self, model: ir.Model) -> Sequence[Pass]:
        """As it is; with activations that are not rounded."""
        return (self, dataclasses.replace(self, activations="float")) if self.activations == "int8" else (self,)

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Find the weights, have them timed, write those that are faster."""
        result = PassResult()
        name = model.graph.name or "the graph"
        if ctx.target.portable:
            result.refuse(name, "only standard operators may be written: see portable=false of the target")
            return result
        if ctx.time is None and not self.always:
            result.refuse(name, "nothing can be timed here")
            return result
        graph = Graph(model, frozenset(), ctx.target)
        provider = graph.providers[0]
        chosen: list[Weight] = []
        for found in nbits.weights(graph):
            if isinstance(found, Weight):
                needed = [op for op, reads in ((nbits.PRODUCT, found.products), (nbits.LOOKUP, found.lookups)) if reads]
                lacking = [op for op in needed if not ctx.target.has_kernel(DOMAIN, op, provider)]
                if not lacking:
                    chosen.append(found)
                    continue
                found = found.nodes[0], f"{provider} has no kernel for {lacking[0]}"
            result.refuse(*found)
        ratios = {} if self.always else self._timed(chosen, graph, ctx)
        for weight in chosen:
            ratio = 0.0 if self.always else ratios.get(weight.text())
            if ratio is None:
                result.refuse(weight.codes, "it is not in the timing table")
            elif ratio > FASTER:
                result.refuse(weight.codes, "packed codes are not faster than what the session makes by itself")
            else:
                nbits.write(weight, graph, LEVELS[self.activations])
                model.graph.opset_imports.setdefault(DOMAIN, 1)
                result.change(f"{nbits.PRODUCT} written", len(weight.products))
                result.change(f"{nbits.LOOKUP} written", len(weight.lookups))
        return result

    def _timed(self, chosen: Sequence[Weight], graph: Graph, ctx: Context) -> dict[str, float]:
        """The ratio of the times of each kind of weight."""
        assert ctx.time is not None
        probes = {}
        for weight in chosen:
            if weight.text() in probes:
                continue
            before, inputs = nbits.model(weight, self.rows, graph.version)
            after = before.clone()
            inner = Graph(after, frozenset(), ctx.target)
            for found in list(nbits.weights(inner)):
                if isinstance(found, Weight):
                    nbits.write(found, inner, LEVELS[self.activations])
            signature = f"lower-int8 {self.activations} {self.rows} rows: {weight.text()} {graph.providers[0]}"
            probes[weight.text()] = Probe(signature, before, after, inputs)
        ratios = ctx.time(list(probes.values()))
        return {text: ratios[probe.signature] for text, probe in probes.items() if probe.signature in ratios}
