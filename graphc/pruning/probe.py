"""Measured losses: what a model's outputs lose when some units go, on a few calibration samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc.axes import cut
from graphc.axes.groups import Group, Groups, analyse
from graphc.contract import Arrays, Context
from graphc.edit import Array
from graphc.errors import BadInput

SAMPLES = 4
"""Calibration samples that a loss is measured on."""

Write = Callable[[ir.Model, Groups, Mapping[str, Array]], None]
"""Writes units dead in a model, and lets the rest make up for them."""


class Probe:
    """Measures losses of a model without some of its units.

    The loss is the mean divergence ``KL(p || p')`` of the softmax of the first output for a model that predicts one of
    several, known by integer labels or by being a language model; the squared relative error of all outputs else.

    Args:
        model: The model; it is not changed.
        context: The samples.
        write: What is done to units that go; by default they are written dead.
        interface: How the model was analysed.
    """

    def __init__(self, model: ir.Model, context: Context, write: Write = cut.zero, *, interface: bool = False) -> None:  # type: ignore[assignment]
        if not context.calibration:
            raise BadInput("there is no calibration data", hint="give some with --calibrate")
        self._model, self._interface = model, interface
        self._write: Any = cut.zero if write is None else write
        self._samples = [context.calibration[i] for i in range(min(SAMPLES, len(context.calibration)))]
        self._labelled = bool(context.labels) and np.asarray(context.labels[0]).dtype.kind in "iu"
        self._wanted = self._outputs(model)
        self._known: dict[str, float] = {}

    def loss(self, keep: Mapping[str, Array]) -> float:
        """What is lost with these units only; by group name, true for those that stay."""
        gone = {name: mask for name, mask in keep.items() if not np.all(mask)}
        if not gone:
            return 0.0
        key = repr([(name, np.packbits(gone[name]).tobytes()) for name in sorted(gone)])
        if key not in self._known:
            copy = self._model.clone()
            self._write(copy, analyse(copy, interface=self._interface), gone)
            self._known[key] = self._distance(self._outputs(copy))
        return self._known[key]

    def _outputs(self, model: ir.Model) -> list[dict[str, Array]]:
        from graphc import runtime

        big = runtime.constants_nbytes(model) > runtime.BIG
        session = runtime.session(model, optimise=not big, frugal=big)
        try:
            return [session.run(sample) for sample in self._samples]
        finally:
            session.close()

    def _distance(self, found: Sequence[Mapping[str, Array]]) -> float:
        from graphc.checking import metrics

        samples: Sequence[Arrays] = self._samples
        if self._labelled or metrics.language(self._wanted[0], samples[0]) is not None:
            return metrics.kl(self._wanted, found, samples)
        return metrics.error(self._wanted, found, samples) ** 2


def loss(groups: Groups, group: Group, context: Context) -> Array | str:
    """What the outputs lose when one unit alone goes, measured."""
    probe = Probe(groups.model, context)
    shape = (*group.blocks, group.size)
    if group.blocks:
        # A unit of a balanced group cannot go from one block alone: its place in all of them is tried.
        shape = (group.size,)
    scores = np.zeros(group.size)
    for unit in range(group.size):
        context.progress(f"measuring losses of {group.name}", unit, group.size)
        keep: Any = np.ones(shape, dtype=bool)
        keep[unit] = False
        scores[unit] = probe.loss({group.name: keep})
    return np.broadcast_to(scores, (*group.blocks, group.size)).copy()
