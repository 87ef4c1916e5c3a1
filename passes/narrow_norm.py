"""Narrower layer and group normalisation: zeroed width is cut although the mean and variance change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphc.axes import cut
from graphc.axes.groups import analyse
from graphc.contract import Context, Effect, Pass, PassResult, option
from graphc.known import Knowledge
from graphc.pruning import deadness
from graphc.pruning.sites import Sites


@dataclass(frozen=True)
class NarrowNorm(Pass):
    """Cut dead width that LayerNorm or GroupNorm averages over, so that they average over what is left.

    ``shrink`` refuses this: the zeros count in the mean and the variance. A model that was trained to normalise
    over the remaining width alone (CoFi's masked LayerNorm) is repaired by it; any other one is changed.
    """

    effect: ClassVar[Effect] = Effect.LOSSY

    allow_interface: bool = option(False, "Whether graph inputs and outputs may get narrower.")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        result = PassResult()
        groups = analyse(model, interface=self.allow_interface)
        dead = deadness.find(Sites(groups), Knowledge(model, groups.trace))
        keep = {}
        for name, found in dead.items():
            if not groups[name].exact and (mask := deadness.keepable(groups[name], found.silent)) is not None:
                keep[name] = mask
        if keep:
            cut.cut(model, groups, keep)
        for name, mask in keep.items():
            result.change(f"{groups[name].kind} under a norm removed", int(mask.size - np.count_nonzero(mask)))
        return result
