"""The language model of ``bench/quality.py``: SmolLM2-135M, perplexity on held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import cache
import numpy as np
from experiment import Experiment, Variant, methods

from graphc import data, runtime
from graphc.frontends import load

HELD_OUT, EVERYTHING = 16, 88
"""Windows of 512 tokens of the held-out text that perplexity is read on: for most rows, and all there are."""
CALIBRATION = 32
"""Windows of the calibration text, of about 88."""

BLOCKS = 106.2 / 134.5
"""The part of the parameters that is in the blocks: ratios are parts of these."""

WIDTH = {
    "random": "criterion=random",
    "magnitude": "criterion=l2",
    "LLM-Pruner (taylor)": "criterion=taylor",
    "flap": "criterion=flap allocate=global compensate=mean",
    "flap + ls": "criterion=flap allocate=global compensate=ls",
    "wanda + ls": "criterion=wanda compensate=ls",
    "obs + ls": "criterion=obs compensate=ls",
    "obs, per cost + ls": "criterion=obs allocate=per-cost compensate=ls",
    "surgeon, per cost + ls": "criterion=surgeon allocate=per-cost compensate=ls",
}
"""All have the same calibration data."""

DEPTH = {
    "ShortGPT: influence, any blocks": "criterion=influence",
    "angular, consecutive blocks": "criterion=angular",
    "ReplaceMe: angular, linear map": "criterion=angular replace=linear",
}


def width(text: Path) -> Experiment:
    """Heads and neurons go, for parts of the blocks' parameters."""
    return _smollm2(text, methods("params", "head,neuron", BLOCKS, (0.1, 0.2, 0.3), WIDTH), HELD_OUT)


def depth(text: Path) -> Experiment:
    """Whole blocks go."""
    variants = [Variant(n, 0.1, f"drop-blocks{{ratio=0.1 {options}}},shrink") for n, options in DEPTH.items()]
    return _smollm2(text, variants, HELD_OUT)


def _smollm2(text: Path, variants: Sequence[Variant], held: int) -> Experiment:
    model = cache.model("smollm2-dynamo")
    source = load(model).model
    tokenizer = cache.root() / "smollm2-hf"

    def windows(file: str, count: int) -> data.Samples:
        spec = data.Spec(str(text / file), tokenizer=tokenizer, window=512, samples=count)
        return data.load(spec, source)

    held_out = list(windows("text_heldout.txt", held))

    def perplexity(path: Path) -> float:
        session = runtime.session(path, optimise=True)
        total, count = 0.0, 0
        for sample in held_out:
            scores = session.run(sample)["output"][0].astype(np.float64)[:-1]
            targets = sample["input_ids"][0, 1:]
            scores -= scores.max(axis=-1, keepdims=True)
            total -= float((scores[np.arange(len(targets)), targets] - np.log(np.exp(scores).sum(axis=-1))).sum())
            count += len(targets)
        return math.exp(min(total / count, 700))

    sample = {name: array[:, :128] for name, array in held_out[0].items()}
    calibration = list(windows("text_calib.txt", CALIBRATION))
    about = (
        f"Perplexity is read on the first {len(held_out)} windows of 512 tokens of the held-out text; statistics and "
        f"gradients come from {len(calibration)} windows of the calibration text, for every method."
    )
    return Experiment(model, "simplify,fuse", calibration, perplexity, "perplexity", sample, variants, about)
