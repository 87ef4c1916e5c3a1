"""The calibration of a run: which data statistics and losses are taken from, and what collects them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graphc.contract import Arrays
from graphc.settings import Settings
from graphc.stats import Collector, Request, Statistics

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphc.stats.base import Array

MADE = "calibrated on generated inputs: do not trust the quality; give samples of real data with --calibrate"
SAME = "calibrated on the data that quality was read on: it looks better than it is; give other data with --calibrate"


@dataclass
class Calibration:
    """Samples, and a collector over them.

    Attributes:
        collector: Collects statistics.
        notes: What the user should know of the data.
    """

    collector: Collector
    notes: list[str] = field(default_factory=list)

    @staticmethod
    def of(
        model: ir.Model, settings: Settings, data: Sequence[Arrays], progress: Callable[[str, int, int], None]
    ) -> Calibration:
        """The calibration that flags ask for: ``--calibrate``, else ``--data``, else inputs made to fit.

        Args:
            model: The model as it came, which the data must fit.
            settings: The flags.
            data: What ``--data`` named.
            progress: ``progress(what, done, total)``.
        """
        from graphc import cache, measure
        from graphc import data as files

        notes = []
        samples: Sequence[Arrays] = data
        if settings.calibrate is not None:
            samples = files.load(settings.calibrate, model)
        elif data:
            notes.append(SAME)
        else:
            samples = measure.samples(model, settings.seed)
            notes.append(MADE)
        store = cache.Store() if settings.cache else None
        return Calibration(Collector(samples, store=store, progress=progress), notes)

    @property
    def samples(self) -> Sequence[Arrays]:
        return self.collector.samples

    @property
    def labels(self) -> Sequence[Array]:
        return self.collector.labels

    def collect(self, model: ir.Model, requests: Iterable[Request[Any]]) -> Statistics:
        """See :meth:`graphc.stats.Collector.collect`."""
        return self.collector.collect(model, requests)
