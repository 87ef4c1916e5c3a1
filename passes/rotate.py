"""Residual streams turned by random rotations that weights take up: what is hard to round is spread out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphc import edit
from graphc.axes.groups import analyse
from graphc.contract import Context, Effect, Pass, PassResult, option
from graphc.rotation.orthogonal import Orthogonal
from graphc.rotation.streams import Refused, Stream, meetings, stream
from graphc.rotation.turning import Constants, as_matrix


@dataclass(frozen=True)
class Rotate(Pass):
    """Turn residual streams by random Hadamard matrices, folded into all weights along them, embeddings too.

    Large weights and activations of single channels are spread over all, so that few bits lose less (QuaRot): for
    ``quantize``, which comes after it. The axes are those that nothing but products, sums and RMS normalisation meets;
    gains of normalisations go into the weights behind them first. A head that is tied to an embedding stays tied: the
    last gain becomes a small matrix, ``*.turned``, which ``quantize`` leaves as it is. Zeros are filled: prune and
    ``shrink`` before. It does not help every model: one whose gains already hold large channels down loses by it.
    """

    effect: ClassVar[Effect] = Effect.EXACT

    kinds: tuple[str, ...] = option(("width", "head_dim"), "The kinds of axes that are turned, as explain calls them.")
    least: int = option(16, "Channels that an axis has at least.", least=2)

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        result = PassResult()
        groups = analyse(model)
        nodes = meetings(groups)
        found: list[Stream] = []
        for group in groups:
            if group.kind not in self.kinds or group.size < self.least:
                continue
            try:
                found.append(stream(groups, group, nodes.get(group.leaf, [])))
            except Refused as refusal:
                result.refuse(group.name, str(refusal))
        names, constants = edit.Names(model), Constants()
        for i, each in enumerate(found):
            q = Orthogonal(each.group.size, ctx.seed + i)
            for gain in each.gains:
                constants.ones(gain.place)
                if gain.shared:
                    result.change("gain before a shared weight became a matrix", int(as_matrix(gain, q, names)))
                    continue
                result.change("gain folded into weights")
                for place in gain.readers:
                    constants.scale(place, gain.factors)
            for place in each.places:
                constants.turn(place, q)
            result.change(f"{each.group.kind} of {each.group.size} turned")
        constants.write(names)
        if not found and not result.refusals:
            result.refuse("", "there is no residual stream with RMS normalisation")
        return result
