"""Compare graphc with its peers on the benchmark models: time, memory, nodes left, latency, outputs.

    python bench/compile.py [--peers PYTHON] [--rounds N] [--seconds S] [NAME...]

Every tool runs as a whole fresh process, and within a model the tools take turns. Results go to
``bench/results/compile.json``; with names, only those models are measured again. ``PYTHON`` is the
interpreter of an environment with ``bench/requirements-peers.txt``. Tools and models that are missing are
skipped and named.
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

import cache
import catalog
import harness
import process

RESULTS = Path(__file__).parent / "results" / "compile.json"
_ORT = """\
import sys, onnxruntime as ort
options = ort.SessionOptions()
options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
options.optimized_model_filepath = sys.argv[2]
if len(sys.argv) > 3:
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", sys.argv[3])
ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
"""
_ONNXSCRIPT = """\
import sys, onnx_ir, onnxscript.optimizer
model = onnx_ir.load(sys.argv[1])
onnxscript.optimizer.optimize(model)
onnx_ir.save(model, sys.argv[2], external_data=sys.argv[3] if len(sys.argv) > 3 else None)
"""

GRAPHC, UNVERIFIED = "graphc", "graphc --no-verify"
TOOLS: dict[str, tuple[str, harness.Command]] = {
    GRAPHC: ("graphc", harness.graphc()),
    UNVERIFIED: ("graphc", harness.graphc("--no-verify")),
    "onnxslim": ("onnxslim", harness.entry_point("import onnxslim.cli; onnxslim.cli.main()")),
    "onnxsim": ("onnxsim", harness.entry_point("import onnxsim; onnxsim.main()")),
    "ONNX Runtime BASIC": ("onnxruntime", harness.script(_ORT)),
    "onnxscript": ("onnxscript", harness.script(_ONNXSCRIPT)),
}
"""By name: the package that must be importable, and the command."""


def measure(entry: catalog.Entry, tools: dict[str, str], rounds: int, seconds: float) -> dict[str, Any]:
    """Run every tool on one model, in turns, and judge what each wrote.

    Args:
        entry: The model; its file exists.
        tools: The interpreter by tool.
        rounds: How often each tool runs; the median of the times and the maximum of the memory count.
        seconds: How long to time each output against the input.
    """
    original = cache.model(entry.name)
    large = harness.size(original) > harness.LARGE
    load = round(os.getloadavg()[0], 1)
    usages: dict[str, list[process.Usage]] = {tool: [] for tool in tools}
    with tempfile.TemporaryDirectory(dir=cache.root()) as scratch:
        order = list(tools)
        outputs = {}
        for tool in order:
            folder = Path(scratch) / tool.replace(" ", "_")
            folder.mkdir()
            outputs[tool] = folder / original.name
        for _ in range(1 if large else rounds):
            for tool in order:
                command = TOOLS[tool][1](tools[tool], original, outputs[tool], large)
                usages[tool].append(process.run(command))
            order = order[1:] + order[:1]
        results: dict[str, Any] = {}
        for tool, runs in usages.items():
            results[tool] = harness.summary(runs)
            if not results[tool]["failure"]:
                results[tool] |= harness.check(entry.name, original, outputs[tool], seconds)
    return {
        "name": entry.name,
        "source": entry.source,
        "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
        "rounds": 1 if large else rounds,
        "seconds": seconds,
        "load": load,
        "input": harness.check(entry.name, original, original, seconds),
        "tools": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to measure; default: all")
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="interpreter with the peers")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each tool on each model (3)")
    parser.add_argument("--seconds", type=float, default=3, help="time for each latency comparison (3)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file (bench/results/compile.json)")
    arguments = parser.parse_args()
    names = [entry.name for entry in catalog.CATALOG]
    for name in arguments.names:
        if name not in names:
            parser.error(f"there is no model {name}; there is: {', '.join(names)}")

    tools, versions = {}, {}
    for tool, (package, _) in TOOLS.items():
        python = sys.executable if package == "graphc" else arguments.peers
        version = harness.version(python, package)
        if version is None:
            print(f"skipping {tool}: {package} is not installed for it")
            continue
        tools[tool] = python
        versions[package] = version
    for package in ("onnx", "onnx-ir", "onnxruntime"):
        versions.setdefault(package, harness.version(sys.executable, package) or "missing")

    results: dict[str, Any] = {
        "schema": 1,
        "machine": process.machine(),
        "python": sys.version.split()[0],
        "versions": versions,
    }
    results["models"] = []
    if arguments.names and arguments.out.exists():
        before = json.loads(arguments.out.read_text())
        results["models"] = before["models"]
    for entry in catalog.CATALOG:
        if arguments.names and entry.name not in arguments.names:
            continue
        if not cache.model(entry.name).exists():
            print(f"skipping {entry.name}: make it with bench/models.py or bench/torch_models.py")
            continue
        print(f"{entry.name} ...", flush=True)
        new = measure(entry, tools, arguments.rounds, arguments.seconds)
        kept = [old for old in results["models"] if old["name"] != entry.name]
        results["models"] = sorted([*kept, new], key=lambda each: names.index(each["name"]))
        arguments.out.parent.mkdir(exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        for tool, each in new["tools"].items():
            shown = ("wall_s", "cpu_s", "anon_mb", "nodes", "latency", "same", "failure", "why")
            print(f"  {tool:20} " + "  ".join(f"{key}={each[key]}" for key in shown if each.get(key) not in ("", None)))


if __name__ == "__main__":
    main()
