"""What ``bench/quantize.py`` knows of a model that it quantizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Samples = Sequence[Any]


@dataclass(frozen=True)
class Experiment:
    """A model with its data.

    Attributes:
        model: The file.
        calibration: Samples.
        quality: The quality of a model file on held-out data, given that of the prepared one.
        metric: What that is.
        sample: The inputs that latency is measured with.
        variants: Their names.
        recipe: The exact passes that come first, once for all variants; if there are none, graphc's variants have all
            of them.
        about: What else a reader has to know.
    """

    model: Path
    calibration: Callable[[], Samples]
    quality: Callable[[Path, Path], float]
    metric: str
    sample: Mapping[str, Array]
    variants: Sequence[str]
    recipe: str = "simplify,fuse"
    about: str = ""
