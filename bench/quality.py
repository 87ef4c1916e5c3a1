"""What compression costs and what it brings: quality on held-out data beside the latency under ONNX Runtime.

    python bench/quality.py [NAME...] [--text FOLDER] [--only VARIANT]

An experiment is a model, its data and a list of variants, each a recipe; another is added as a function in
``EXPERIMENTS``. Calibration reads calibration data only, and quality is read on held-out data. Language models read
``text_calib.txt`` and ``text_heldout.txt`` of the folder given with ``--text``. Results are kept in
``bench/results/quality.json``, a row for each variant; ``bench/results/quality.md`` is made from it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cache
import numpy as np
import process
import tables

from graphc import data, pipeline, runtime
from graphc.frontends import load
from graphc.runtime import timing

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "quality.json"
Array = np.ndarray[Any, np.dtype[Any]]
Row = dict[str, Any]

WINDOWS = 6
"""Windows of the held-out text that perplexity is read on."""
CALIBRATION = 8
"""Windows of the calibration text."""


@dataclass(frozen=True)
class Variant:
    """One way to compress a model.

    Attributes:
        name: What it is called in the results.
        ratio: The part that is removed, of what the experiment counts.
        recipe: The passes, as recipe text.
    """

    name: str
    ratio: float
    recipe: str


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
    """

    model: Path
    prepare: str
    calibration: Sequence[Any]
    quality: Callable[[Path], float]
    metric: str
    sample: Mapping[str, Array]
    variants: Sequence[Variant]


def _methods(
    of: str, kinds: str, scale: float, ratios: Sequence[float], more: Mapping[str, str], then: str = "shrink"
) -> list[Variant]:
    """The same budgets for every method; ``scale`` turns a ratio into that of the whole model."""
    found = []
    for ratio in ratios:
        for name, options in more.items():
            text = f"prune{{ratio={ratio * scale:.4f} of={of} kinds=[{kinds}] {options}}},{then}"
            found.append(Variant(name, ratio, text))
    return found


IMAGES = {
    "random": "criterion=random",
    "magnitude": "criterion=l2",
    "magnitude, global": "criterion=l2 allocate=global",
    "taylor": "criterion=taylor allocate=global",
    "flap": "criterion=flap allocate=global compensate=mean",
    "flap + ls": "criterion=flap allocate=global compensate=ls",
    "wanda + ls": "criterion=wanda compensate=ls",
    "obs + ls": "criterion=obs compensate=ls",
    "obs, per cost + ls": "criterion=obs allocate=per-cost compensate=ls",
    "obs, knapsack + ls": "criterion=obs allocate=knapsack compensate=ls",
    "obs, evolution + ls": "criterion=obs allocate=evolution compensate=ls",
    "obs + ls, sequential": "criterion=obs compensate=ls sequential=true",
}


HEALED = {
    "magnitude, healed": "criterion=l2",
    "flap + ls, healed": "criterion=flap allocate=global compensate=ls",
    "obs, per cost + ls, healed": "criterion=obs allocate=per-cost compensate=ls",
}
"""What is healed afterwards: 200 steps on the calibration images, with their labels."""


def _fashion(name: str, kinds: str) -> Experiment:
    """A model of Fashion-MNIST: accuracy on 1000 test images, at parts of the FLOPs."""
    with np.load(ROOT / "tests" / "data" / "fashion_mnist_2k.npz") as stored:
        arrays = {key: stored[key] for key in stored.files}

    def images(key: str) -> Array:
        return ((arrays[key].astype(np.float32) / 255 - 0.286) / 0.353)[:, None]

    calibration = [
        ({"image": images("calib_x")[i : i + 50]}, arrays["calib_y"][i : i + 50].astype(np.int64))
        for i in range(0, 1000, 50)
    ]
    test, labels = images("test_x"), arrays["test_y"]

    def accuracy(path: Path) -> float:
        session = runtime.session(path, optimise=True, threads=1)
        found = [session.run({"image": test[i : i + 100]})["logits"].argmax(axis=1) for i in range(0, 1000, 100)]
        return float((np.concatenate(found) == labels).mean())

    variants = _methods("flops", kinds, 1.0, (0.3, 0.5), IMAGES)
    variants += _methods("flops", kinds, 1.0, (0.3, 0.5), HEALED, "shrink,heal")
    sample = {"image": test[:32]}
    model = ROOT / "tests" / "data" / f"{name}.onnx"
    return Experiment(model, "simplify,fuse", calibration, accuracy, "accuracy", sample, variants)


TEXT = {
    "random": "criterion=random",
    "magnitude": "criterion=l2",
    "taylor": "criterion=taylor",
    "flap": "criterion=flap allocate=global compensate=mean",
    "flap + ls": "criterion=flap allocate=global compensate=ls",
    "wanda + ls": "criterion=wanda compensate=ls",
    "obs + ls": "criterion=obs compensate=ls",
    "obs, per cost + ls": "criterion=obs allocate=per-cost compensate=ls",
}


DEPTH = {
    "ShortGPT: influence, any blocks": "criterion=influence",
    "angular, consecutive blocks": "criterion=angular",
    "ReplaceMe: angular, linear map": "criterion=angular replace=linear",
}

EXPERTS = {
    "random experts": "prune{kinds=[expert] ratio=0.25 criterion=random},shrink",
    "STUN: router rows": "prune{kinds=[expert] ratio=0.25 criterion=stun},shrink",
    "whole experts by frequency": "prune{kinds=[expert] ratio=0.25 criterion=frequency},shrink",
    "UNCURL: whole experts by mass": "prune{kinds=[expert] ratio=0.25 criterion=mass},shrink",
    "HEAPr: atomic experts": "sort-experts{criterion=heapr},"
    "prune{kinds=[neuron] ratio=0.25 criterion=heapr allocate=global},shrink",
}
"""A quarter of the experts, or of the neurons inside of them: the same number of parameters."""


def _mixtral(text: Path) -> Experiment:
    """A Mixtral of bytes: bits for each byte of the held-out text."""

    def rows(file: str, count: int) -> Array:
        found = np.frombuffer((text / file).read_bytes(), np.uint8).astype(np.int64)
        return found[: count * 256].reshape(count, 256)

    held_out = rows("text_heldout.txt", 64)

    def bits(path: Path) -> float:
        session = runtime.session(path, optimise=True, threads=1)
        total = 0.0
        for row in held_out:
            scores = session.run({"input_ids": row[None]})["logits"][0].astype(np.float64)[:-1]
            scores -= scores.max(axis=-1, keepdims=True)
            total += float((np.log(np.exp(scores).sum(axis=-1)) - scores[np.arange(255), row[1:]]).sum())
        return total / (255 * len(held_out)) / math.log(2)

    variants = [Variant(name, 0.25, recipe) for name, recipe in EXPERTS.items()]
    model = ROOT / "tests" / "data" / "tiny_mixtral_bytes.onnx"
    calibration = [{"input_ids": part} for part in np.split(rows("text_calib.txt", 64), 8)]
    return Experiment(model, "simplify", calibration, bits, "bits per byte", {"input_ids": held_out[:1]}, variants)


def _smollm2(text: Path, depth: bool = False) -> Experiment:
    """SmolLM2-135M: perplexity on the first windows of the held-out text, at parts of the blocks' parameters; or
    without a part of its blocks."""
    model = cache.model("smollm2-dynamo")
    source = load(model).model
    tokenizer = cache.root() / "smollm2-hf"

    def windows(file: str, count: int) -> data.Samples:
        spec = data.Spec(str(text / file), tokenizer=tokenizer, window=512, samples=count)
        return data.load(spec, source)

    held_out = list(windows("text_heldout.txt", WINDOWS))

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

    blocks = 106.2 / 134.5
    variants = _methods("params", "head,neuron", blocks, (0.1, 0.2, 0.3), TEXT)
    if depth:
        variants = [Variant(n, 0.1, f"drop-blocks{{ratio=0.1 {options}}},shrink") for n, options in DEPTH.items()]
    sample = {name: array[:, :128] for name, array in held_out[0].items()}
    calibration = list(windows("text_calib.txt", CALIBRATION))
    return Experiment(model, "simplify,fuse", calibration, perplexity, "perplexity", sample, variants)


EXPERIMENTS: dict[str, Callable[[Path], Experiment]] = {
    "fmnist_resnet": lambda text: _fashion("fmnist_resnet", "channel"),
    "fmnist_vit_tiny": lambda text: _fashion("fmnist_vit_tiny", "head,neuron"),
    "tiny_mixtral": _mixtral,
    "smollm2": _smollm2,
    "smollm2_depth": lambda text: _smollm2(text, depth=True),
}


def prepared(experiment: Experiment, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The model after its exact passes, and what it is: what every variant is compared with."""
    path = folder / "dense.onnx"
    report = pipeline.optimize(experiment.model, path, recipe=experiment.prepare, measure=False)
    return path, {"parameters": report.output["parameters"], "quality": experiment.quality(path)}


def measure(experiment: Experiment, dense: Path, variant: Variant, folder: Path, seconds: float) -> Row:
    """One row of the results."""
    path = folder / "variant.onnx"
    start = time.perf_counter()
    report = pipeline.optimize(
        dense, path, recipe=variant.recipe, calibrate=experiment.calibration, measure=False, verify=False
    )
    took = time.perf_counter() - start
    for each in report.passes:
        for refusal in each.refusals:
            print(f"    {each.name}: {refusal.reason} (x{refusal.count})")
    models = {
        name: runtime.session(file, optimise=True, threads=1) for name, file in (("dense", dense), ("variant", path))
    }
    times = timing.measure(models, experiment.sample, seconds=seconds)
    return {
        "variant": variant.name,
        "ratio": variant.ratio,
        "recipe": variant.recipe,
        "quality": experiment.quality(path),
        "parameters": report.output["parameters"],
        "latency": times["variant"].median / times["dense"].median,
        "load": round(os.getloadavg()[0], 1),
        "seconds": round(took, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"experiments: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="text_calib.txt and text_heldout.txt")
    parser.add_argument("--only", action="append", default=[], metavar="VARIANT", help="only these variants")
    parser.add_argument("--ratio", action="append", type=float, default=[], help="only these ratios")
    parser.add_argument("--seconds", type=float, default=3, help="time for each latency comparison (3)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    document: dict[str, Any] = json.loads(a.out.read_text()) if a.out.exists() else {"schema": 1, "experiments": {}}
    for name in a.names or EXPERIMENTS:
        if name.startswith("smollm2") and not cache.model("smollm2-dynamo").exists():
            print(f"skipping {name}: it needs bench/torch_models.py smollm2-dynamo")
            continue
        if a.text is None and not name.startswith("fmnist"):
            print(f"skipping {name}: it needs --text")
            continue
        experiment = EXPERIMENTS[name](a.text)
        with tempfile.TemporaryDirectory() as folder:
            dense, reference = prepared(experiment, Path(folder))
            print(f"{name}: {experiment.metric} {reference['quality']:.4g}", flush=True)
            found = document["experiments"].setdefault(name, {"rows": []})
            found |= {"metric": experiment.metric, "dense": reference, "machine": process.machine()}
            for variant in experiment.variants:
                if (a.only and variant.name not in a.only) or (a.ratio and variant.ratio not in a.ratio):
                    continue
                row = measure(experiment, dense, variant, Path(folder), a.seconds)
                print(f"  {row['ratio']:.2f} {row['variant']:24} {row['quality']:9.4f}  latency {row['latency']:.2f}"
                      f"  parameters {row['parameters']:,}  {row['seconds']} s", flush=True)  # fmt: skip
                rows = [r for r in found["rows"] if (r["variant"], r["ratio"]) != (row["variant"], row["ratio"])]
                order = {(v.ratio, v.name): i for i, v in enumerate(experiment.variants)}
                found["rows"] = sorted([*rows, row], key=lambda r: order.get((r["ratio"], r["variant"]), len(order)))
                a.out.parent.mkdir(exist_ok=True)
                a.out.write_text(json.dumps(document, indent=1) + "\n")
                a.out.with_suffix(".md").write_text(tables.quality_page(document))


if __name__ == "__main__":
    main()
