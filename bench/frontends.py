"""Compare exporting and optimising torch models with ``torch.onnx.export`` alone: time, memory, nodes, latency.

    python bench/frontends.py [--rounds N] [--seconds S] [NAME...]

Models are torch modules (``frontend_models.py``), Hugging Face folders (``frontend_folders.py``), and a folder that is
large (``large-hf``), which graphc alone exports. Every tool runs as a whole fresh process, in turns; both outputs are
then timed against each other in one interleaved run of ONNX Runtime with its own optimisation on. Results go to
``bench/results/frontends.json``; with names, only those models are measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import frontend_folders
import harness
import numpy as np
import process

from graphc import edit, measure, model, runtime

RESULTS = Path(__file__).parent / "results" / "frontends.json"
_TORCH = """\
import sys, torch, frontend_models
module, example = getattr(frontend_models, sys.argv[1])()
batch = torch.export.Dim.AUTO
shapes = {k: {0: batch, 1: batch} if v.dim() == 2 else {0: batch} for k, v in example.items()}
torch.onnx.export(
    module.eval(), (), sys.argv[2], kwargs=example, optimize=True, external_data=False, dynamic_shapes=shapes
)
"""
BASE = "torch.onnx.export"
TOOLS = ("graphc", "graphc --no-verify", BASE)
MODULES = ("minilm", "vit", "smollm2")
"""Factories in ``frontend_models``."""
LARGE = "large-hf"
PAIRS = 12
"""Runs of both models at least; the first two are the warm-up."""
NAMES = (*MODULES, *frontend_folders.FOLDERS, LARGE)
ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}


def command(tool: str, name: str, folder: Path | None, out: Path) -> list[str | Path]:
    """The command that makes ``out`` of a module, or of a folder."""
    layout = frontend_folders.FOLDERS[name][1] if name in frontend_folders.FOLDERS else "merged"
    if tool == BASE:
        if folder is None:
            return [sys.executable, "-c", _TORCH, name, out]
        return [sys.executable, frontend_folders.__file__, folder, out, layout]
    flags = ["--no-cache", "--no-measure", "-q", *tool.split()[1:]]
    source = f"frontend_models:{name}" if folder is None else folder
    return [sys.executable, "-m", "graphc", "optimize", source, "-o", out, "--kv-cache", layout, *flags]


def compare(name: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Run every tool on one model, in turns, and time what they wrote."""
    load = round(os.getloadavg()[0], 1)
    usages: dict[str, list[process.Usage]] = {tool: [] for tool in (TOOLS if name != LARGE else TOOLS[:1])}
    with tempfile.TemporaryDirectory() as scratch:
        folder = _folder(name, Path(scratch) / "source")
        outputs = {tool: Path(scratch) / (f"{i}.onnx" if folder is None else str(i)) for i, tool in enumerate(usages)}
        for _ in range(rounds):
            for tool, out in outputs.items():
                if out.is_dir():
                    shutil.rmtree(out)
                usages[tool].append(process.run(command(tool, name, folder, out), ENVIRONMENT))
        results: dict[str, Any] = {}
        for tool, runs in usages.items():
            results[tool] = harness.summary(runs)
            if not results[tool]["failure"]:
                loaded = [model.load(path) for path in _graphs(outputs[tool]).values()]
                results[tool]["nodes"] = sum(n.op_type != "Constant" for each in loaded for n in edit.nodes(each))
                results[tool]["weights_mb"] = round(sum(map(model.nbytes, loaded)) / 1e6, 1)
        if BASE in results and not any(each["failure"] for each in results.values()):
            results["graphc"]["latency"] = _latencies(name, folder, outputs, seconds)
    measured = datetime.now(UTC).strftime("%Y-%m-%d")
    return {"name": name, "measured": measured, "rounds": rounds, "seconds": seconds, "load": load, "tools": results}


def _folder(name: str, scratch: Path) -> Path | None:
    """The folder of a model, None for a module."""
    if name in MODULES:
        return None
    source = frontend_folders.large if name == LARGE else frontend_folders.FOLDERS[name][0]
    return frontend_folders.made(source, scratch)


def _graphs(out: Path) -> dict[str, Path]:
    return frontend_folders.graphs(out) if out.is_dir() else {"model": out}


def _latencies(name: str, folder: Path | None, outputs: dict[str, Path], seconds: float) -> dict[str, Any]:
    """The latency of every graph relative to the exporter's, at each size."""
    before, after = _graphs(outputs[BASE]), _graphs(outputs["graphc"])
    if folder is None:
        return {"model": _ratio(before["model"], after["model"], None, seconds)}
    _, layout, sizes = frontend_folders.FOLDERS[name]
    interface = frontend_folders.interface(folder, layout)
    parts = list(interface) if len(interface) > 1 else list(interface) * len(sizes)
    return {
        frontend_folders.described(interface[part], each): _ratio(
            before[part], after[part], frontend_folders.arrays(interface[part], each), seconds
        )
        for part, each in zip(parts, sizes, strict=True)
    }


def _ratio(before: Path, after: Path, data: Mapping[str, Any] | None, seconds: float) -> dict[str, float]:
    """Alternating pairs on one thread, by its CPU time: other work on the machine does not count."""
    sessions = [runtime.session(path, optimise=True, threads=1) for path in (before, after)]
    arrays = data if data is not None else measure.sample(model.load(before))
    pairs: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(pairs) < PAIRS or time.perf_counter() < end:
        pair = [0.0, 0.0]
        for i in (0, 1) if len(pairs) % 2 else (1, 0):
            start = time.thread_time()
            sessions[i].run(arrays)
            pair[i] = time.thread_time() - start
        pairs.append(pair)
    times = np.array(pairs[2:])
    low, median, high = (float(q) for q in np.percentile(times[:, 1] / times[:, 0], (25, 50, 75)))
    return {"ratio": round(median, 3), "ratio_low": round(low, 3), "ratio_high": round(high, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", choices=[*NAMES, []], metavar="NAME", help="models to measure; default: all"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each tool on each model (3)")
    parser.add_argument("--seconds", type=float, default=5, help="time for each latency comparison (5)")
    arguments = parser.parse_args()
    packages = ("torch", "transformers", "onnx-ir", "onnxruntime", "onnxscript")
    results: dict[str, Any] = {
        "schema": 1,
        "machine": process.machine(),
        "python": sys.version.split()[0],
        "versions": {name: harness.version(sys.executable, name) for name in packages},
        "models": json.loads(RESULTS.read_text())["models"] if RESULTS.exists() else [],
    }
    for name in arguments.names or NAMES:
        print(f"{name} ...", flush=True)
        new = compare(name, arguments.rounds, arguments.seconds)
        kept = [old for old in results["models"] if old["name"] != name]
        results["models"] = sorted([*kept, new], key=lambda each: each["name"])
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        for tool, each in new["tools"].items():
            print(f"  {tool:20} " + "  ".join(f"{key}={value}" for key, value in each.items() if value != ""))


if __name__ == "__main__":
    main()
