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
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cache
import catalog
import process

RESULTS = Path(__file__).parent / "results" / "compile.json"
LARGE = 1 << 30
"""From this many bytes on, peers are told to write external data, and each tool runs once."""

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

Command = Callable[[str, Path, Path, bool], list[str | Path]]
"""From interpreter, input, output, and whether external data is needed."""


def _graphc(*flags: str) -> Command:
    fixed = ("--no-cache", "--no-measure", "-q", *flags)
    return lambda python, model, out, large: [python, "-m", "graphc", "optimize", model, "-o", out, *fixed]


def _command_line(code: str) -> Command:
    return lambda python, model, out, large: [
        *(python, "-c", code, model, out),
        *(["--save-as-external-data"] if large else []),
    ]


def _script(code: str) -> Command:
    return lambda python, model, out, large: [
        *(python, "-c", code, model, out),
        *([out.name + ".data"] if large else []),
    ]


GRAPHC, UNVERIFIED = "graphc", "graphc --no-verify"
TOOLS: dict[str, tuple[str, Command]] = {
    GRAPHC: ("graphc", _graphc()),
    UNVERIFIED: ("graphc", _graphc("--no-verify")),
    "onnxslim": ("onnxslim", _command_line("import onnxslim.cli; onnxslim.cli.main()")),
    "onnxsim": ("onnxsim", _command_line("import onnxsim; onnxsim.main()")),
    "ONNX Runtime BASIC": ("onnxruntime", _script(_ORT)),
    "onnxscript": ("onnxscript", _script(_ONNXSCRIPT)),
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
    large = _size(original) > LARGE
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
            results[tool] = _summary(runs)
            if not results[tool]["failure"]:
                results[tool] |= _check(entry.name, original, outputs[tool], seconds)
    return {
        "name": entry.name,
        "source": entry.source,
        "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
        "rounds": 1 if large else rounds,
        "input": _check(entry.name, original, original, seconds),
        "tools": results,
    }


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.glob(path.name + "*"))


def _summary(runs: list[process.Usage]) -> dict[str, Any]:
    failure = next((run.failure for run in runs if run.failure), "")
    return {
        "wall_s": statistics.median(run.wall_s for run in runs),
        "cpu_s": statistics.median(run.cpu_s for run in runs),
        "rss_mb": max(run.rss_mb for run in runs),
        "anon_mb": max(run.anon_mb for run in runs),
        "failure": _public(failure),
    }


def _public(text: str) -> str:
    """A message without the folders of this machine, and no longer than a line."""
    words = (Path(word.strip("'\"")).name if "/" in word else word for word in text.split())
    return " ".join(words)[:160]


def _check(name: str, original: Path, candidate: Path, seconds: float) -> dict[str, Any]:
    script = Path(__file__).with_name("check.py")
    command: list[str | Path] = [sys.executable, script, name, original, candidate, str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"same": False, "error": None, "why": f"checking it ended with status {done.returncode}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result | {"why": _public(result["why"])}


def _version(python: str, package: str) -> str | None:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


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
        version = _version(python, package)
        if version is None:
            print(f"skipping {tool}: {package} is not installed for it")
            continue
        tools[tool] = python
        versions[package] = version
    for package in ("onnx", "onnx-ir", "onnxruntime"):
        versions.setdefault(package, _version(sys.executable, package) or "missing")

    results: dict[str, Any] = {
        "schema": 1,
        "machine": process.machine(),
        "python": sys.version.split()[0],
        "versions": versions,
    }
    results |= {"rounds": arguments.rounds, "seconds": arguments.seconds, "models": []}
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
