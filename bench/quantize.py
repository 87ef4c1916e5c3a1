"""What quantization costs and brings, beside ONNX Runtime's own quantizers: quality, size, latency, time, memory.

    python bench/quantize.py [NAME...] [--text FOLDER] [--only VARIANT] [--keep FOLDER]
    python bench/quantize.py [NAME...] [--text FOLDER] [--only VARIANT] --keep FOLDER --latency

Every model is prepared by graphc's exact passes once, and both sides quantize that. A variant is quantized in a process
of its own; calibration reads calibration data, quality is read on held-out data, in a session with default options.
``--text`` has ``text_calib.txt``, ``text_heldout.txt`` and ``wordnet_revdict.tsv``. Results are kept in
``bench/results/quantize.json``, a row for each variant; ``quantize.md`` is made from it. With ``--latency`` the models
that an earlier run kept are timed, each in alternating rounds with the dense one, which wants a quiet machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import process
from experiment import timed
from quantization_experiment import Experiment, Samples
from quantization_models import EXPERIMENTS

from graphc import pipeline

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "quantize.json"
Row = dict[str, Any]

UNMEASURED: Any = {"measure": False, "verify": False}

EXACT = "simplify,fuse,shrink,recognise,simplify,lower"

DECODED = "lower{only=[decoded-weight]}"
"""Where products of many rows are slower with codes, the session decodes them."""

GRAPHC = {
    "graphc int8 weights": f"quantize,{DECODED}",
    "graphc int8 dynamic": "quantize{scheme=dynamic}",
    "graphc int8 static": "quantize{scheme=static rounding=gptq damp=0.1 correct=true}",
    "graphc int8 static, 6 layers kept": "quantize{scheme=static rounding=gptq damp=0.1 correct=true keep=6}",
    "graphc int8 static, channels": "quantize{scheme=static rounding=gptq damp=0.1 correct=true scaling=channels}",
    "graphc int8 static, nearest": "quantize{scheme=static activations=mse correct=true}",
    "graphc int8 static, full range": "quantize{scheme=static rounding=gptq damp=0.1 correct=true full-range=true}",
    "graphc int4/32": f"quantize{{bits=4 block=32 clip=mse}},{DECODED}",
    "graphc int4/128": f"quantize{{bits=4 block=128}},{DECODED}",
    "graphc int4/128 asymmetric": "quantize{bits=4 block=128 symmetric=false clip=mse}",
    "graphc int4/128, packed head": "quantize{bits=4 block=128 embeddings=4},lower-int8",
    "graphc int4/32 gptq": f"quantize{{bits=4 block=32 rounding=gptq clip=mse}},{DECODED}",
    "graphc int4/128 gptq": "quantize{bits=4 block=128 rounding=gptq clip=mse}",
    "graphc int4/128 gptq, guided": "quantize{bits=4 block=128 rounding=gptq clip=mse guide=loss refine=2}",
    "graphc int4/128 asymmetric gptq, guided": "quantize{bits=4 block=128 symmetric=false rounding=gptq clip=mse "
    "guide=loss refine=2}",
    "graphc int4/128 asymmetric gptq, curvature": "quantize{bits=4 block=128 symmetric=false rounding=gptq clip=mse "
    "guide=curvature refine=2}",
    "graphc int4-8/128 asymmetric gptq, curvature, 4.75 bits": "quantize{bits=4 block=128 symmetric=false "
    "rounding=gptq clip=mse guide=curvature refine=2 budget=4.75 choices=[4 8] sensitivity=loss}",
    "graphc int8 cache": "quantize-cache",
    "graphc int8 cache, by head": "quantize-cache{scales=head}",
    "graphc int8 cache and weights": "quantize-cache,quantize",
    "graphc int4/128 asymmetric gptq": "quantize{bits=4 block=128 symmetric=false rounding=gptq clip=mse}",
}

HEALED = {
    "graphc int4/128 asymmetric gptq, curvature, healed": (
        "graphc int4/128 asymmetric gptq, curvature",
        "heal{steps=60 batch=2 learning-rate=3e-4 hidden=0 held-out=0.05 patience=0 precision=bfloat16}",
    ),
}
"""What another variant made is healed: its name, and how. The prepared model teaches."""


def ort_dynamic(source: Path, target: Path, samples: Samples) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    del model.graph.value_info[:]  # it transposes weights and would stumble over their old shapes
    quantize_dynamic(model, target, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8)


def ort_static(source: Path, target: Path, samples: Samples) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows = iter([sample[0] if isinstance(sample, tuple) else sample for sample in samples])

        def get_next(self) -> Any:
            return next(self._rows, None)

    source, target = source.absolute(), target.absolute()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # it leaves files where it runs
        prepared = Path(folder) / "prepared.onnx"
        try:
            quant_pre_process(source, prepared)
        except Exception:  # its symbolic shape inference does not know every operator
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
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


def ort_nbits(block: int, algorithm: str = "", *, symmetric: bool = True) -> Callable[[Path, Path, Samples], None]:
    """Weights of products in 4 bits; without an algorithm to the nearest codes."""

    def quantize(source: Path, target: Path, samples: Samples) -> None:
        import onnx
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits

        config: Any = None
        if algorithm == "hqq":
            config = nbits.HQQWeightOnlyQuantConfig(block_size=block, bits=4)
        quantizer = nbits.MatMulNBitsQuantizer(
            onnx.load(source), block_size=block, is_symmetric=symmetric, accuracy_level=4, bits=4, algo_config=config
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(target), use_external_data_format=False)

    return quantize


PEERS: dict[str, Callable[[Path, Path, Samples], None]] = {
    "ort dynamic": ort_dynamic,
    "ort static": ort_static,
    "ort int4/32": ort_nbits(32),
    "ort int4/32 hqq": ort_nbits(32, "hqq"),
    "ort int4/128": ort_nbits(128),
    "ort int4/128 asymmetric": ort_nbits(128, symmetric=False),
    "ort int4/128 hqq": ort_nbits(128, "hqq"),
}


def make(experiment: Experiment, variant: str, source: Path, target: Path) -> None:
    """Quantize; what the process of a variant does."""
    if variant in PEERS:
        needs = variant == "ort static"
        PEERS[variant](source, target, experiment.calibration() if needs else [])
        return
    if variant in HEALED:
        begun, recipe = HEALED[variant]
        start = target.with_name(file(begun))
        if not start.exists():
            make(experiment, begun, source, start)
        recipe = recipe.replace("{", f"{{teacher={source} ")
        report = pipeline.optimize(start, target, recipe=recipe, calibrate=experiment.calibration(), **UNMEASURED)
        print(f"    {report.passes[0].changes}")
        return
    recipe = GRAPHC[variant] if experiment.recipe else f"{EXACT},{GRAPHC[variant]}"
    calibrated = "static" in recipe or "gptq" in recipe or "cache" in recipe
    samples = experiment.calibration() if calibrated else None
    runtime_only = "onnxruntime{portable=false}" if "lower-int8" in recipe else "onnxruntime"
    report = pipeline.optimize(source, target, recipe=recipe, target=runtime_only, calibrate=samples, **UNMEASURED)
    for each in report.passes:
        for refusal in each.refusals:
            print(f"    {refusal.reason} (x{refusal.count})")


def file(variant: str) -> str:
    """The name of the file that a variant is kept in."""
    return f"{re.sub('[^a-z0-9]+', '-', variant.lower())}.onnx"


def page(document: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# Quantization", "", "Written by `bench/quantize.py` from `quantize.json`; do not edit.", ""]
    for name, found in document["experiments"].items():
        dense = found["dense"]
        lines += [
            f"## {name}",
            "",
            f"float32: {found['metric']} {dense['quality']:.4g}, {dense['bytes'] / 1e6:.1f} MB. "
            f"Machine: {found['machine']}. Latency: after / before, of ONNX Runtime with default options; in brackets "
            f"the load meanwhile. {found.get('about', '')}".rstrip(),
            "",
            f"| method | {found['metric']} | size | latency | CPU seconds | anonymous MB |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in found["rows"]:
            if row.get("failure"):
                lines.append(f"| {row['variant']} | failed: {row['failure'][:80]} | | | | |")
                continue
            latency = f"{row['latency']:.2f} ({row.get('load', 0):.0f})" if row.get("latency") else "-"
            lines.append(
                f"| {row['variant']} | {row['quality']:.4g} | {row['bytes'] / dense['bytes']:.3f} | {latency} "
                f"| {row.get('cpu_seconds', row['seconds']):.0f} | {row['anon_mb']:.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def measure(name: str, experiment: Experiment, variant: str, dense: Path, path: Path, text: Path) -> Row:
    """One row of the results, but for the latency; the model is written to ``path``."""
    command: list[str | Path] = [sys.executable, __file__, "--make", name, variant, dense, path, "--text", text]
    used = process.run(command, timeout_s=7200)
    row: Row = {"variant": variant, "seconds": used.wall_s, "cpu_seconds": used.cpu_s, "anon_mb": used.anon_mb}
    row |= {"rss_mb": used.rss_mb, "failure": used.failure}
    if not used.failure:
        row |= {"bytes": path.stat().st_size, "quality": experiment.quality(path, dense), "latency": None}
    return row


def written(row: Row, experiment: Experiment, name: str, found: Row, out: Path) -> None:
    """Put a row into the results, which another run may have changed meanwhile."""
    document: Row = json.loads(out.read_text()) if out.exists() else {"schema": 1, "experiments": {}}
    entry = document["experiments"].setdefault(name, {"rows": []})
    entry |= found
    rows = [r for r in entry["rows"] if r["variant"] != row["variant"]]
    order = {variant: i for i, variant in enumerate(experiment.variants)}
    entry["rows"] = sorted([*rows, row], key=lambda r: order.get(r["variant"], len(order)))
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    out.with_suffix(".md").write_text(page(document))


def prepared(experiment: Experiment, dense: Path) -> Row:
    """Write the model after its exact passes, and say what it is."""
    if not dense.exists() and experiment.recipe:
        pipeline.optimize(experiment.model, dense, recipe=experiment.recipe, measure=False, verify=False)
    elif not dense.exists():
        shutil.copy(experiment.model, dense)
    return {"quality": experiment.quality(dense, dense), "bytes": dense.stat().st_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"experiments: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--text", type=Path, default=Path(), metavar="FOLDER", help="where the texts are")
    parser.add_argument("--only", action="append", default=[], metavar="VARIANT", help="only these variants")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the models there")
    parser.add_argument("--latency", action="store_true", help="only time the models that --keep kept")
    parser.add_argument("--seconds", type=float, default=4, help="time for each latency comparison; 0 for none (4)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--make", nargs=4, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.make:
        name, variant, source, target = a.make
        make(EXPERIMENTS[name](a.text), variant, Path(source), Path(target))
        return
    if a.latency and (a.keep is None or not a.seconds):
        parser.error("--latency needs --keep, and some --seconds")
    for name in a.names or EXPERIMENTS:
        experiment = EXPERIMENTS[name](a.text)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) if a.keep is None else a.keep / name
            folder.mkdir(parents=True, exist_ok=True)
            dense = folder / "dense.onnx"
            known = json.loads(a.out.read_text())["experiments"].get(name, {}) if a.out.exists() else {}
            found: Row = {"metric": experiment.metric, "machine": process.machine(), "about": experiment.about}
            if not a.latency:
                found["dense"] = prepared(experiment, dense)
                print(f"{name}: {experiment.metric} {found['dense']['quality']:.4g}", flush=True)
            for variant in a.only or experiment.variants:
                path = folder / file(variant)
                row = next((r for r in known.get("rows", []) if r["variant"] == variant), None)
                if not a.latency:
                    row = measure(name, experiment, variant, dense, path, a.text)
                elif row is None or not path.exists():
                    print(f"  {variant} was not kept")
                    continue
                if a.seconds and not row["failure"]:
                    row |= timed(experiment.sample, dense, path, a.seconds)
                print(f"  {row}", flush=True)
                written(row, experiment, name, found, a.out)
                if a.keep is None:
                    path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
