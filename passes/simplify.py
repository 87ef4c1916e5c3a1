"""Computes what is constant, shares what is equal, and removes what does nothing."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphc.contract import Context, Effect, Pass, PassResult, option
from graphc.simplification import notes, whole


@dataclass(frozen=True)
class Simplify(Pass):
    """Compute what is constant, share what is equal, remove what does nothing.

    Infers shapes anew, with symbolic dims; folds constants, and shape arithmetic whose result follows from the
    input's dims; shares common subexpressions and equal initializers; merges rows of layout operators; inlines
    functions and control flow whose path is known; removes dead code, and what torch's exporter and onnxscript note
    of nodes and values. A model that cannot be run here only loses notes, dead code and identities, and shares
    subexpressions.
    """

    effect = Effect.EXACT
    unchecked_ok = True

    growth: float = option(16.0, "Megabytes by which folded constants may make the model larger, all in all.", least=0)
    freeze_initializers: bool = option(
        False, "Treat initializers that are also inputs as constants, and drop them from the inputs."
    )
    keep_notes: bool = option(
        False, "Keep what exporters note of nodes and values: the module stack, source lines, documentation."
    )

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        result = PassResult()
        if not self.keep_notes:
            result.change("exporter's note removed", notes.remove(model))
        if self.freeze_initializers:
            result.change("initializer dropped from the inputs", _freeze(model))
        else:
            for value in model.graph.inputs:
                if value.is_initializer():
                    result.refuse(
                        value,
                        "an initializer that is also an input may be overridden: see freeze-initializers",
                    )
        whole.simplify(model, result, compute=ctx.checkable, growth=int(self.growth * 1e6), progress=ctx.progress)
        return result


def _freeze(model: ir.Model) -> int:
    """Drop the inputs that have a default from the graph's inputs; returns how many."""
    frozen = [value for value in model.graph.inputs if value.is_initializer()]
    for value in frozen:
        model.graph.inputs.remove(value)
    return len(frozen)
