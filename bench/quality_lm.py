"""The language model of ``bench/quality.py``: SmolLM2-135M, perplexity on held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cache
import numpy as np
from experiment import Experiment, Variant, methods, twice

from graphc import data, runtime
from graphc.frontends import load

FEW, HELD_OUT, EVERYTHING = 6, 16, 88
"""Windows of 512 tokens of the held-out text that perplexity is read on: the fewest, for most rows, and all."""
CALIBRATION = 32
"""Windows of the calibration text, of about 88."""

BLOCKS = 106.2 / 134.5
"""The part of the parameters that is in the blocks: ratios are parts of these."""

ENDS = [f"*.layers.{i}.*" for i in (0, 1, 2, 3, 28, 29)]
"""What LLM-Pruner leaves alone: the first four and the last two blocks."""

WIDTH = {
    "random": "criterion=random",
    "magnitude": "criterion=l2",
    "taylor": "criterion=taylor",
    "LLM-Pruner: taylor, ends kept": f"criterion=taylor exclude=[{' '.join(ENDS)}]",
    "taylor, per cost": "criterion=taylor allocate=per-cost",
    "flap": "criterion=flap allocate=global compensate=mean",
    "flap + ls": "criterion=flap allocate=global compensate=ls",
    "obs, per cost + ls": "criterion=obs allocate=per-cost compensate=ls",
    "surgeon, per cost + ls": "criterion=surgeon allocate=per-cost compensate=ls",
}
"""All have the same calibration data."""

DEPTH = {
    "ShortGPT: influence, any blocks": "criterion=influence",
    "angular, consecutive blocks": "criterion=angular",
    "ReplaceMe: angular, linear map": "criterion=angular replace=linear",
}


BEST = "surgeon, per cost + ls"
HEAL = "heal{minutes=20 batch=2 learning-rate=5e-5 hidden=0 held-out=0.05 patience=0 precision=bfloat16}"
"""Twenty minutes on one core, as much work as ten on two; the original teaches, all of the calibration text is read."""


WIDTH_NOTE = """\
As published: least squares loses less than the mean in a bias (FLAP), and what looks at the loss is best (`surgeon`:
group OBS under the Gram matrix of the loss's gradients, units of all layers by what they cost). It loses 32, 28 and
42 % of what FLAP loses, without healing. Its lead over FLAP with least squares is small at 30 %: one look at the
dense model says little about so large a step.

Not as published: magnitude is worse than random at every ratio, as the LLM-Pruner paper found for norms of whole
structures: neurons with small weights are not those that matter least. Taylor scores with the same part of every
layer (LLM-Pruner) beat FLAP at 10 %, where only neurons go, and collapse from 20 % on: this model has three groups of
three query heads a layer, so that an even ratio takes a third of a layer's heads or none, and most layers cannot
spare a third. FLAP compares the heads of all layers and is spared that. Least squares is damped by 1 % of each
channel's own variance, not of the mean one as in published code: the largest neuron of blocks 11 and 28 has 10^4 to
10^6 times the median variance, and would hide all others.

Healing for as long as ten minutes on two cores take (98 steps of two windows) brings back 36 % of what `surgeon` has
lost at 20 %: a step over a window takes seconds here, and it had not stopped improving."""

DEPTH_NOTE = """\
As published: the blocks that matter least stand in the upper middle, not at the ends (14, 17 and 25 of 0 to 29; 13 to
15 in a row), and a linear map in place of a run of blocks (ReplaceMe) beats leaving them out. As many parameters in
heads and neurons of all blocks, 10 % of `smollm2`, cost less still."""


def width(text: Path) -> Experiment:
    """Heads and neurons go, for parts of the blocks' parameters."""
    found = methods("params", "head,neuron", BLOCKS, (0.1, 0.2, 0.3), WIDTH)
    best = f"of=params kinds=[head,neuron] {WIDTH[BEST]}"
    found += [Variant(f"{BEST}, in two rounds", r, twice(r * BLOCKS, best)) for r in (0.2, 0.3)]
    whole = windows(text / "text_calib.txt", EVERYTHING)
    starts = {v.name: f"smollm2/{v.file}" for v in found if v.ratio == 0.2}
    found += [Variant(f"{n}, healed", 0.2, HEAL, starts[n], whole) for n in ("flap", BEST)]
    return _smollm2(text, found, HELD_OUT, WIDTH_NOTE)


def everything(text: Path) -> Experiment:
    """Some of the same models, read on all of the held-out text."""
    names = ("flap", "flap + ls", BEST, "flap, healed", f"{BEST}, healed")
    variants = [Variant(n, 0.2, "", f"smollm2/{Variant(n, 0.2, '').file}") for n in names]
    return _smollm2(text, variants, EVERYTHING)


def depth(text: Path) -> Experiment:
    """Whole blocks go."""
    variants = [Variant(n, 0.1, f"drop-blocks{{ratio=0.1 {options}}},shrink") for n, options in DEPTH.items()]
    return _smollm2(text, variants, HELD_OUT, DEPTH_NOTE)


def whole(text: Path) -> Experiment:
    """Without variants, on all of both texts."""
    return _smollm2(text, (), EVERYTHING, calibration=EVERYTHING)


def windows(file: Path, count: int) -> Sequence[Any]:
    """The first windows of a text, as the model takes them."""
    spec = data.Spec(str(file), tokenizer=cache.root() / "smollm2-hf", window=512, samples=count)
    return list(data.load(spec, load(cache.model("smollm2-dynamo")).model))


def _smollm2(
    text: Path, variants: Sequence[Variant], held: int, note: str = "", *, calibration: int = CALIBRATION
) -> Experiment:
    held_out = windows(text / "text_heldout.txt", held)

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
    known = windows(text / "text_calib.txt", calibration)
    about = (
        f"Perplexity is read on the first {len(held_out)} windows of 512 tokens of the held-out text; statistics and "
        f"gradients come from {len(known)} windows of the calibration text, for every method."
    )
    model = cache.model("smollm2-dynamo")
    return Experiment(model, "simplify,fuse", known, perplexity, "perplexity", sample, variants, about, note)
