"""The pass ``fold-lora``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphc import lora
from graphc.contract import Context, Effect, Pass, PassResult


@dataclass(frozen=True)
class FoldLora(Pass):
    """Fold low-rank adapters into the weights that they adapt: ``x W + s (x A) B`` becomes ``x (W + s A B)``.

    Found by structure alone, in any spelling: MatMul, Gemm, Conv or Gather; scales anywhere, as Mul or Div; several
    adapters of one weight; adapters of some channels only, by Concat with zeros or Pad; adapters with a bias of their
    own; DoRA, whose norms the graph may compute; rows behind a Reshape. The new weight is computed in float64, rounded
    once, and keeps its name. Adapters that must stay apart are refused with the reason: their weights or scale can be
    set by the caller, the weight is shared or quantized, or the branch is not linear.
    """

    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Fold every adapter of the graph, its subgraphs and local functions."""
        result = PassResult()
        lora.fold(model, result)
        return result
