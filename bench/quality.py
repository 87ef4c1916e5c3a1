"""What compression costs and what it brings: quality on held-out data beside the latency under ONNX Runtime.

    python bench/quality.py [NAME...] [--text FOLDER] [--torch PYTHON] [--only VARIANT] [--ratio R] [--keep FOLDER]
    python bench/quality.py [NAME...] [--text FOLDER] --keep FOLDER --latency

An experiment is a model, its data and a list of variants, each a recipe; another is added as a function in
``EXPERIMENTS``. Calibration reads calibration data only, and quality is read on held-out data. Language models read
``text_calib.txt`` and ``text_heldout.txt`` of the folder given with ``--text``. Results are kept in
``bench/results/quality.json``, a row for each variant; ``bench/results/quality.md`` is made from it. Rows of
Torch-Pruning are made by the interpreter given with ``--torch``, which has it, torch and onnxscript. With ``--latency``
the models that an earlier run kept are timed, which wants a quiet machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cache
import numpy as np
import process
import quality_encoder
import quality_images
import quality_lm
import tables
from experiment import Array, Experiment, Variant, timed

from graphc import flops, pipeline, runtime
from graphc.frontends import load
from graphc.passes.heal import Heal
from graphc.recipe import Recipe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "quality.json"
Row = dict[str, Any]

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


EXPERIMENTS: dict[str, Callable[[Path], Experiment]] = {
    "fmnist_resnet": quality_images.resnet,
    "fmnist_vit_tiny": quality_images.vit,
    "minilm": quality_encoder.reverse_dictionary,
    "tiny_mixtral": _mixtral,
    "smollm2": quality_lm.width,
    "smollm2_all_windows": quality_lm.everything,
    "smollm2_depth": quality_lm.depth,
}


def prepared(experiment: Experiment, path: Path, known: Row) -> Row:
    """Write the model after its exact passes, and say what it is, as far as the entry ``known`` does not."""
    report = pipeline.optimize(experiment.model, path, recipe=experiment.prepare, measure=False)
    counted = {"parameters": report.output["parameters"], "flops": operations(path)}
    if experiment.about and experiment.about == known.get("about") and "dense" in known:
        return known["dense"] | counted  # type: ignore[no-any-return]
    return counted | {"quality": experiment.quality(path)}


def operations(path: Path) -> int:
    """FLOPs of a file, as ``graphc inspect`` counts them: every dynamic dimension 1."""
    return sum(flops.node_flops(node) for node in flops.bind(load(path).model).graph)


def measure(experiment: Experiment, dense: Path, variant: Variant, path: Path, torch: str) -> Row:
    """One row of the results, but for the latency; the model is written to ``path``."""
    start = time.perf_counter()
    if variant.peer:
        exported = path.with_suffix(".exported.onnx")
        if not exported.exists():
            subprocess.run([torch, ROOT / "bench" / "torch_fashion.py", *variant.peer, exported], check=True)
        pipeline.optimize(exported, path, recipe=experiment.prepare, measure=False)
    elif variant.start and not variant.recipe:
        path.unlink(missing_ok=True)
        path.symlink_to(_started(variant, path))
    else:
        compressed(experiment, dense, variant, path)
    took = time.perf_counter() - start
    return {
        "variant": variant.name,
        "ratio": variant.ratio,
        "recipe": variant.recipe or " ".join(("bench/torch_fashion.py", *variant.peer)),
        "quality": experiment.quality(path),
        "parameters": sum(v.const_value.size for v in load(path).model.graph.initializers.values() if v.const_value),
        "flops": operations(path),
        "latency": None,
        "seconds": None if variant.peer else round(took, 1),
    }


def compressed(experiment: Experiment, dense: Path, variant: Variant, path: Path) -> None:
    """Write the model of a variant, and say what was refused."""
    source, passes = dense, Recipe.parse(variant.recipe).passes
    if variant.start:
        source = _started(variant, path)
        passes = tuple(dataclasses.replace(p, teacher=dense) if isinstance(p, Heal) else p for p in passes)
    report = pipeline.optimize(
        source,
        path,
        recipe=Recipe(passes),
        data=[dict(experiment.sample)],  # what lossy passes cost is read here, and below on held-out data
        calibrate=variant.calibration or experiment.calibration,
        measure=False,
        verify=False,
        cache=not variant.start,
    )
    for each in report.passes:
        for line in (*each.changes, *(f"{r.reason} (x{r.count})" for r in each.refusals)):
            print(f"    {each.name}: {line}")


def _started(variant: Variant, path: Path) -> Path:
    """The kept model that a variant goes on from."""
    source = path.parents[1] / variant.start
    if not source.exists():
        sys.exit(f"{variant.name} goes on from {variant.start}, which was not kept")
    return source.resolve()


def written(row: Row, experiment: Experiment, name: str, found: Row, out: Path) -> None:
    """Put a row into the results, which another run may have changed meanwhile."""
    document: Row = json.loads(out.read_text()) if out.exists() else {"schema": 1, "experiments": {}}
    entry = document["experiments"].setdefault(name, {"rows": []})
    entry |= found
    rows = [r for r in entry["rows"] if (r["variant"], r["ratio"]) != (row["variant"], row["ratio"])]
    order = {(v.ratio, v.name): i for i, v in enumerate(experiment.variants)}
    entry["rows"] = sorted([*rows, row], key=lambda r: order.get((r["ratio"], r["variant"]), len(order)))
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    out.with_suffix(".md").write_text(tables.quality_page(document))


def known(name: str, out: Path) -> Row:
    """What the results have of an experiment."""
    document = json.loads(out.read_text()) if out.exists() else {"experiments": {}}
    entry: Row = document["experiments"].get(name, {"rows": []})
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"experiments: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="text_calib.txt and text_heldout.txt")
    parser.add_argument("--torch", default="", metavar="PYTHON", help="interpreter with Torch-Pruning")
    parser.add_argument("--only", action="append", default=[], metavar="VARIANT", help="only these variants")
    parser.add_argument("--ratio", action="append", type=float, default=[], help="only these ratios")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the models there")
    parser.add_argument("--latency", action="store_true", help="only time the models that --keep kept")
    parser.add_argument("--seconds", type=float, default=3, help="time for each latency comparison; 0 for none (3)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    if a.latency and (a.keep is None or not a.seconds):
        parser.error("--latency needs --keep, and some --seconds")
    for name in a.names or EXPERIMENTS:
        if name.startswith("smollm2") and not cache.model("smollm2-dynamo").exists():
            print(f"skipping {name}: it needs bench/torch_models.py smollm2-dynamo")
            continue
        if name == "minilm" and not cache.model("minilm-dynamo").exists():
            print(f"skipping {name}: it needs bench/torch_models.py minilm-dynamo")
            continue
        if a.text is None and name not in ("fmnist_resnet", "fmnist_vit_tiny", "minilm"):
            print(f"skipping {name}: it needs --text")
            continue
        experiment = EXPERIMENTS[name](a.text)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) if a.keep is None else a.keep / name
            folder.mkdir(parents=True, exist_ok=True)
            dense = folder / "dense.onnx"
            found: Row = {"metric": experiment.metric, "machine": process.machine()}
            found |= {"about": experiment.about, "note": experiment.note}
            entry = known(name, a.out)
            if not a.latency:
                found["dense"] = prepared(experiment, dense, entry)
                print(f"{name}: {experiment.metric} {found['dense']['quality']:.4g}", flush=True)
            rows = {(row["variant"], row["ratio"]): row for row in entry["rows"]}
            for variant in experiment.variants:
                if (a.only and variant.name not in a.only) or (a.ratio and variant.ratio not in a.ratio):
                    continue
                if variant.peer and not (a.torch or a.latency):
                    print(f"  {variant.ratio:.2f} {variant.name:32} needs --torch")
                    continue
                path = folder / variant.file
                row = rows.get((variant.name, variant.ratio))
                if not a.latency:
                    row = measure(experiment, dense, variant, path, a.torch)
                elif row is None or not path.exists():
                    print(f"  {variant.ratio:.2f} {variant.name:32} was not kept")
                    continue
                if a.seconds:
                    row |= timed(experiment.sample, dense, path, a.seconds)
                latency = "" if row["latency"] is None else f"  latency {row['latency']:.2f}"
                print(f"  {row['ratio']:.2f} {row['variant']:32} {row['quality']:9.4f}{latency}"
                      f"  parameters {row['parameters']:,}  {row['seconds']} s", flush=True)  # fmt: skip
                written(row, experiment, name, found, a.out)
                if a.keep is None:
                    for file in folder.glob(path.name + "*"):
                        file.unlink()


if __name__ == "__main__":
    main()
