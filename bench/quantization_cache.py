"""SmolLM2-135M with keys and values of the past in 8-bit codes: perplexity of texts that are read with an empty past.

New keys and values are rounded before they are attended to, so that a whole window costs what it would token by token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cache
import frontend_folders as folders
import numpy as np
import quality_lm
from quantization_experiment import Experiment

from graphc import model as models
from graphc import runtime
from graphc.checking.interface import fitting

Array = np.ndarray[Any, np.dtype[Any]]

CALIBRATION = 16
"""Windows of the calibration text."""

VARIANTS = ("graphc int8 cache", "graphc int8 cache, by head", "graphc int8 cache and weights")


def experiment(text: Path) -> Experiment:
    folder = cache.root() / "smollm2-hf"
    inputs = folders.interface(folder, "merged")["model"]
    empty = {name: array[:, :, :0] for name, array in folders.arrays(inputs, folders.TOKEN).items() if array.ndim == 4}

    def window(sample: Mapping[str, Array]) -> dict[str, Array]:
        ids = sample["input_ids"]
        return {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(ids.shape[1])[None],
            **empty,
        }

    held_out = [window(sample) for sample in quality_lm.windows(text / "text_heldout.txt", quality_lm.FEW)]

    def perplexity(path: Path, dense: Path) -> float:
        session = runtime.session(path, optimise=True, threads=1)
        model, total, count = models.load(path), 0.0, 0
        for sample in held_out:
            scores = session.run(fitting(model, sample))["logits"][0].astype(np.float64)[:-1]
            targets = sample["input_ids"][0, 1:]
            scores -= scores.max(axis=-1, keepdims=True)
            total -= float((scores[np.arange(len(targets)), targets] - np.log(np.exp(scores).sum(axis=-1))).sum())
            count += len(targets)
        return math.exp(total / count)

    return Experiment(
        cache.model("smollm2-decoder"),
        lambda: [window(sample) for sample in quality_lm.windows(text / "text_calib.txt", CALIBRATION)],
        perplexity,
        "perplexity",
        folders.arrays(inputs, {**folders.TOKEN, folders.PAST: 128}),
        VARIANTS,
        "simplify,fuse,shrink,recognise,simplify",
        "The cache takes 11,520 bytes a token in the place of 46,080; latency of one token after 128, in standard "
        "operators: lower's GroupQueryAttention, which reads codes, is ONNX Runtime's alone.",
    )
