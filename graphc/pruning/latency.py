"""Latency as a cost: what a unit of each group takes, measured here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphc.axes import cut
from graphc.axes.groups import Group, analyse
from graphc.contract import Context
from graphc.errors import BadInput

SECONDS = 0.4
"""Time for each comparison."""


class Latency:
    """Seconds of a run as a linear function of the units that are kept.

    Every group is cut alone, to half, and timed against the whole model in one interleaved run. What measures faster
    than it can be is noise and counts as no gain.

    Args:
        model: The model; it is not changed.
        groups: The groups that may be cut.
        context: The sample to run, the provider, and progress.
        interface: How the model was analysed.
    """

    def __init__(self, model: ir.Model, groups: Sequence[Group], context: Context, *, interface: bool = False) -> None:
        from graphc import runtime
        from graphc.runtime import timing

        if not context.calibration:
            raise BadInput("latency needs inputs to run", hint="give some with --calibrate")
        sample = context.calibration[0]
        provider = next(iter(context.target.providers), runtime.CPU)
        whole = runtime.session(model, optimise=True, provider=provider)
        found = timing.measure({"whole": whole}, sample, seconds=SECONDS)
        self.whole = found["whole"].median
        self.slopes: dict[str, float] = {}
        for i, group in enumerate(groups):
            context.progress("measuring what groups cost", i, len(groups))
            gone = _half(group)
            if not gone:
                self.slopes[group.name] = 0.0
                continue
            copy = model.clone()
            keep = np.arange(group.size) >= gone
            cut.cut(copy, analyse(copy, interface=interface), {group.name: keep})
            less = runtime.session(copy, optimise=True, provider=provider)
            found = timing.measure({"whole": whole, "less": less}, sample, seconds=SECONDS)
            less.close()
            part = max(0.0, 1 - found["less"].median / found["whole"].median)
            self.slopes[group.name] = part * self.whole / gone

    def __call__(self, removed: Mapping[str, int]) -> float:
        """Seconds once each group lost so many of its units."""
        return max(0.0, self.whole - sum(self.slopes.get(name, 0.0) * count for name, count in removed.items()))


def _half(group: Group) -> int:
    kept = max(group.size - group.size // 2, group.min_keep)
    kept = -(-kept // group.multiple_of) * group.multiple_of
    return max(0, group.size - kept)
