"""The calibration of a run: which data statistics and losses are taken from, and what collects them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graphc.collection import Collector
from graphc.contract import Arrays
from graphc.settings import Settings
from graphc.stats import Request, Statistics

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphc.data import Samples
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
        model: ir.Model,
        given: Samples | None,
        settings: Settings,
        providers: Sequence[str],
        progress: Callable[[str, int, int], None],
    ) -> Calibration:
        """The calibration of a run on the data given, or on inputs made to fit.

        Args:
            model: The model as it came.
            given: The data, if there is some.
            settings: The flags.
            providers: The execution providers that start here; the first one runs the model.
            progress: ``progress(what, done, total)``.
        """
        from graphc import cache, measure, runtime
        from graphc.data import Samples

        notes = []
        if given is None:
            given = Samples(measure.samples(model, settings.seed))
            notes.append(MADE)
        elif settings.calibrate is None or settings.data is None:
            notes.append(SAME)
        store = cache.Store() if settings.cache else None
        provider = next(iter(providers), runtime.CPU)
        return Calibration(Collector(given, given.labels, provider, store, progress=progress), notes)

    @property
    def samples(self) -> Sequence[Arrays]:
        return self.collector.samples

    @property
    def labels(self) -> Sequence[Array]:
        return self.collector.labels

    def collect(self, model: ir.Model, requests: Iterable[Request[Any]]) -> Statistics:
        """See :meth:`graphc.collection.Collector.collect`."""
        return self.collector.collect(model, requests)
