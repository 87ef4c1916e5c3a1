"""What ``bench/quality.py`` compares: a model with its data, and ways to compress it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphc import runtime
from graphc.checking.interface import fitting
from graphc.model import load
from graphc.runtime import timing

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Variant:
    """One way to compress a model.

    Attributes:
        name: What it is called in the results.
        ratio: The part that is removed, of what the experiment counts.
        recipe: The passes, as recipe text; "" for a peer.
        start: A kept model that it goes on from, ``EXPERIMENT/FILE.onnx``, see ``file``; the
            uncompressed one then is what ``heal`` learns from. Without a recipe its quality is read, and no more.
        calibration: Other data than the experiment's, if there is some.
        peer: The arguments of ``bench/torch_fashion.py``, but for the output, instead.
    """

    name: str
    ratio: float
    recipe: str
    start: str = ""
    calibration: Sequence[Any] = ()
    peer: Sequence[str] = ()

    @property
    def file(self) -> str:
        """The name of its model, where models are kept."""
        return f"{self.ratio:g}-{re.sub('[^a-z0-9]+', '-', self.name.lower())}.onnx"


@dataclass(frozen=True)
class Experiment:
    """A model with its data.

    Attributes:
        model: The file.
        prepare: The recipe of exact passes that comes first, once for all variants.
        calibration: What the statistics are taken from; labels, if there are some, make the loss.
        quality: Reads the quality of a model file on held-out data.
        metric: What ``quality`` gives, and whether higher is better.
        sample: The inputs that latency is measured with.
        variants: What is compared.
        about: What the table must say of the data.
        note: What was found, beside the numbers.
    """

    model: Path
    prepare: str
    calibration: Sequence[Any]
    quality: Callable[[Path], float]
    metric: str
    sample: Mapping[str, Array]
    variants: Sequence[Variant]
    about: str = ""
    note: str = ""


def twice(ratio: float, options: str) -> str:
    """The recipe that prunes half, looks again at what has become of the model, and prunes the other half."""
    parts = (ratio / 2, ratio / 2 / (1 - ratio / 2))
    return ",".join(f"prune{{ratio={part:.4f} {options}}},shrink" for part in parts)


def methods(
    of: str, kinds: str, scale: float, ratios: Sequence[float], more: Mapping[str, str], then: str = "shrink"
) -> list[Variant]:
    """The same budgets for every method; ``scale`` turns a ratio into that of the whole model."""
    found = []
    for ratio in ratios:
        for name, options in more.items():
            text = f"prune{{ratio={ratio * scale:.4f} of={of} kinds=[{kinds}] {options}}},{then}"
            found.append(Variant(name, ratio, text))
    return found


def timed(sample: Mapping[str, Array], dense: Path, path: Path, seconds: float) -> dict[str, Any]:
    """The latency of a model by that of the dense one, with its quartiles, and the load meanwhile."""
    models = {
        name: runtime.session(file, optimise=True, threads=1) for name, file in (("dense", dense), ("variant", path))
    }
    fed = {name: fitting(load(file), sample) for name, file in (("dense", dense), ("variant", path))}
    found = timing.measure(models, fed, seconds=seconds)["variant"]
    span = [round(found.ratio_low, 3), round(found.ratio_high, 3)]
    return {"latency": round(found.ratio, 3), "latency_span": span, "load": round(os.getloadavg()[0], 1)}
