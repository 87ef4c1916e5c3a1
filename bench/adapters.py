"""Fold an adapter into a language model: time, memory, equality with PEFT's own merge, perplexity.

    python bench/adapters.py ADAPTER TEXT [--model MODEL.onnx] [--torch FOLDER] [--windows N]

``ADAPTER`` is a PEFT folder of SmolLM2, ``TEXT`` what perplexity is measured on. The model and the Hugging Face folder
are those of ``bench/torch_models.py``. Writes ``bench/results/adapters.json`` and ``adapters.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import cache
import numpy as np
import process

from graphc import __version__, runtime
from graphc.adapters.folder import read
from graphc.adapters.sites import Index, locate, prefix, uses
from graphc.adapters.targets import targets
from graphc.model import load

RESULTS = Path(__file__).parent / "results"
LENGTH = 512

MERGE = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
merged = PeftModel.from_pretrained(base, sys.argv[2]).merge_and_unload()
merged.save_pretrained(sys.argv[3])
"""
"""What PEFT needs to do the same."""


def windows(folder: Path, text: Path, count: int) -> np.ndarray:
    """The first windows of a text as token ids, (count, 512)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    return np.array(ids[: count * LENGTH]).reshape(count, LENGTH)


def perplexity(model: Path, tokens: np.ndarray) -> float:
    """Of a model on windows, 511 predictions each."""
    session = runtime.session(model, optimise=True, threads=1)
    total = 0.0
    for window in tokens:
        feeds = {"input_ids": window[None], "attention_mask": np.ones((1, LENGTH), np.int64)}
        (logits,) = session.run(feeds).values()
        scores = logits[0, :-1].astype(np.float64)
        top = scores.max(-1)
        norm = top + np.log(np.exp(scores - top[:, None]).sum(-1))
        total += float((norm - scores[np.arange(LENGTH - 1), window[1:]]).mean())
    return float(np.exp(total / len(tokens)))


def difference(model: Path, folder: Path, adapter: Path) -> dict[str, float]:
    """The largest difference to PEFT's merged weights, relative to the largest value of each weight."""
    from safetensors import safe_open

    index = Index.of(load(model))
    wanted = targets(read(adapter))
    _, add = prefix([index], [target.name for target in wanted])
    worst, count = 0.0, 0
    with safe_open(folder / "model.safetensors", "np") as merged:
        for target in wanted:
            value = index.names[add + target.name]
            by_kind: dict[str, Any] = {}
            for use in uses(value):
                by_kind.setdefault(use.kind, []).append(use)
            placed = locate(value, target.kind, None, by_kind)
            assert not isinstance(placed, str) and value.const_value is not None
            held = value.const_value.numpy()
            theirs = merged.get_tensor(target.name)
            ours = held.T if placed[0] else held
            worst = max(worst, float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
            count += 1
    return {"weights": count, "relative": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", type=Path, default=cache.root() / "models" / "smollm2-dynamo.onnx")
    parser.add_argument("--torch", type=Path, default=cache.root() / "smollm2-hf")
    parser.add_argument("--windows", type=int, default=6)
    a = parser.parse_args()
    found: dict[str, Any] = {"model": a.model.stem, "adapter": a.adapter.name, "version": __version__}
    found["machine"] = process.machine()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        graphc = [sys.executable, "-m", "graphc", "optimize", a.model]
        quick = ["--no-verify", "--no-measure", "--no-cache", "-q", "-p", "fold-lora"]
        commands = {
            "graphc, without the adapter": [*graphc, "-o", work / "base.onnx", *quick],
            "graphc --adapter": [*graphc, "-o", work / "folded.onnx", *quick, "--adapter", a.adapter],
            "PEFT: load, merge, save": [sys.executable, "-c", MERGE, a.torch, a.adapter, work / "merged"],
        }
        runs = []
        for command in (c for _ in range(2) for c in commands.items()):
            usage = process.run(command[1])
            if usage.failure:
                raise SystemExit(f"{command[0]}: {usage.failure}")
            runs.append((command[0], usage))
        found["runs"] = {
            what: vars(min((u for name, u in runs if name == what), key=lambda u: u.wall_s)) for what in commands
        }
        found["difference"] = difference(work / "folded.onnx", work / "merged", a.adapter)
        tokens = windows(a.torch, a.text, a.windows)
        found["perplexity"] = {
            "windows": len(tokens),
            "base": perplexity(a.model, tokens),
            "folded": perplexity(work / "folded.onnx", tokens),
        }
    RESULTS.joinpath("adapters.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    RESULTS.joinpath("adapters.md").write_text(table(found), encoding="utf-8")
    print(table(found))


def table(found: dict[str, Any]) -> str:
    """The results for people."""
    rows = [
        f"| {what} | {run['wall_s']:.1f} | {run['cpu_s']:.1f} | {run['anon_mb']:.0f} |"
        for what, run in found["runs"].items()
    ]
    ppl, far = found["perplexity"], found["difference"]
    return "\n".join(
        [
            "# Folding an adapter",
            "",
            "Written by `python bench/adapters.py ADAPTER TEXT`; do not edit. "
            f"{found['machine']}; graphc {found['version']}.",
            "",
            f"`{found['adapter']}` into `{found['model']}`, whole processes with start and import, the faster of two "
            "interleaved runs, without checks:",
            "",
            "| | wall s | CPU s | anonymous MB |",
            "| --- | ---: | ---: | ---: |",
            *rows,
            "",
            f"Largest difference of the {far['weights']} folded weights to those that PEFT merges, by the largest "
            f"value of the weight: {far['relative']:.1e}.",
            "",
            f"Perplexity on the first {ppl['windows']} windows of {LENGTH} tokens: {ppl['base']:.2f} without, "
            f"{ppl['folded']:.2f} with the adapter.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
