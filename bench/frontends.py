"""Compare exporting and optimising torch models with ``torch.onnx.export`` alone: time, memory, nodes, latency.

    python bench/frontends.py [--rounds N] [--seconds S] [NAME...]

Every tool runs as a whole fresh process, in turns; both outputs are then timed against each other in one interleaved
run of ONNX Runtime with its own optimisation on. Results go to ``bench/results/frontends.json``; with names, only those
models are measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import harness
import process

from graphc import edit, measure, model

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


def command(tool: str, name: str, out: Path) -> list[str | Path]:
    """The command that makes ``out`` of a module."""
    if tool == BASE:
        return [sys.executable, "-c", _TORCH, name, out]
    flags = ["--no-cache", "--no-measure", "-q", *tool.split()[1:]]
    return [sys.executable, "-m", "graphc", "optimize", f"frontend_models:{name}", "-o", out, *flags]


def compare(name: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Run every tool on one module, in turns, and time what they wrote."""
    usages: dict[str, list[process.Usage]] = {tool: [] for tool in TOOLS}
    load = round(os.getloadavg()[0], 1)
    environment = {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        outputs = {tool: Path(scratch) / f"{i}.onnx" for i, tool in enumerate(TOOLS)}
        for _ in range(rounds):
            for tool, out in outputs.items():
                usages[tool].append(process.run(command(tool, name, out), environment))
        results: dict[str, Any] = {}
        for tool, runs in usages.items():
            results[tool] = harness.summary(runs)
            if not results[tool]["failure"]:
                results[tool]["nodes"] = sum(
                    node.op_type != "Constant" for node in edit.nodes(model.load(outputs[tool]))
                )
        if not any(each["failure"] for each in results.values()):
            found = measure.bench([outputs[BASE], outputs["graphc"]], seconds=seconds, threads=1)
            results["graphc"]["latency"] = {
                k: round(found["models"][1][k], 3) for k in ("ratio", "ratio_low", "ratio_high")
            }
    measured = datetime.now(UTC).strftime("%Y-%m-%d")
    return {"name": name, "measured": measured, "rounds": rounds, "seconds": seconds, "load": load, "tools": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", choices=[*MODULES, []], metavar="NAME", help="models to measure; default: all"
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
    for name in arguments.names or MODULES:
        print(f"{name} ...", flush=True)
        new = compare(name, arguments.rounds, arguments.seconds)
        kept = [old for old in results["models"] if old["name"] != name]
        results["models"] = sorted([*kept, new], key=lambda each: each["name"])
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        for tool, each in new["tools"].items():
            print(f"  {tool:20} " + "  ".join(f"{key}={value}" for key, value in each.items() if value != ""))


if __name__ == "__main__":
    main()
