"""The latency of things that run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphc.contract import Arrays, Runnable


@dataclass(frozen=True)
class Timing:
    """How long one run takes, measured in rounds that alternate with those of other runnables.

    Attributes:
        median: Seconds of a run.
        low, high: The quartiles of the rounds, in seconds.
        rounds: How often it ran, warm-up excluded.
        ratio: The median over the rounds of its time divided by that of the first runnable in the same round; below
            1 it is faster. Pairs of one round share the state of the machine, so that the ratio is steadier than
            the times.
        ratio_low, ratio_high: The quartiles of that ratio.
        provider: What ran it.
    """

    median: float
    low: float
    high: float
    rounds: int
    ratio: float
    ratio_low: float
    ratio_high: float
    provider: str = ""

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """What the median of the ratio is between, nine times in ten.

        They lie ``1.57 (ratio_high - ratio_low) / sqrt(rounds)`` around it (McGill, Tukey and Larsen, Variations of box
        plots, 1978), whatever the spread of single rounds.
        """
        half = 1.57 * (self.ratio_high - self.ratio_low) / math.sqrt(self.rounds)
        return self.ratio - half, self.ratio + half


def measure(
    runnables: Mapping[str, Runnable],
    inputs: Arrays | Mapping[str, Arrays],
    *,
    seconds: float = 3.0,
    rounds: int = 0,
    warmup: int = 2,
) -> dict[str, Timing]:
    """Time runnables against each other: one run of each a round, in alternating order.

    Args:
        runnables: What to time, by label; ratios are to the first.
        inputs: Arrays by input name for all of them, or a mapping from label to that.
        seconds: The time to spend after the warm-up, all runnables together; at least 5 rounds are run.
        rounds: The number of rounds, instead of ``seconds``.
        warmup: Runs of each before the first round.

    Raises:
        CannotRun: One of them does not run with the inputs.
    """
    feeds: dict[str, Any] = {
        label: own if isinstance(own := inputs.get(label), Mapping) else inputs for label in runnables
    }
    for _ in range(warmup):
        for label, runnable in runnables.items():
            runnable.run(feeds[label])
    times: dict[str, list[float]] = {label: [] for label in runnables}
    labels = list(runnables)
    start = time.perf_counter()
    done = 0
    while done < rounds if rounds else done < 5 or time.perf_counter() - start < seconds:
        # Forwards, then backwards: nobody always runs after the same neighbour.
        for label in labels if done % 2 == 0 else reversed(labels):
            begin = time.perf_counter()
            runnables[label].run(feeds[label])
            times[label].append(time.perf_counter() - begin)
        done += 1
    samples = {label: np.array(t) for label, t in times.items()}
    return {label: summary(array, samples[labels[0]], runnables[label].provider) for label, array in samples.items()}


def summary(times: np.ndarray[Any, Any], base: np.ndarray[Any, Any], provider: str = "") -> Timing:
    """The timing of a runnable that took ``times`` in the rounds in which the first took ``base``, in seconds."""
    low, median, high = (float(q) for q in np.percentile(times, (25, 50, 75)))
    ratio_low, ratio, ratio_high = (float(q) for q in np.percentile(times / base, (25, 50, 75)))
    return Timing(median, low, high, len(times), ratio, ratio_low, ratio_high, provider)
