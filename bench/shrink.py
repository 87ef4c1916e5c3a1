"""One-shot magnitude pruning without healing: what it takes away, what it gains, and what it costs.

    python bench/shrink.py [--peers PYTHON] [--torch PYTHON] [--seconds S] [NAME...]

The same ratio of units goes from every channel, neuron and attention-head group that a tool finds, smallest L2 norm
first. ``graphc`` is ``simplify,fuse,prune,shrink``; ``exact`` is the same without pruning, to tell what cutting
adds. Latency is in ONNX Runtime, relative to the input. Results go to ``bench/results/shrink.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cache
import harness
import process

RESULTS = Path(__file__).parent / "results" / "shrink.json"
RATIOS = (0.25, 0.5)
MODELS = (
    "ppocr-cls",
    "ppocr-det",
    "ppocr-rec",
    "efficientnet-lite0",
    "fmnist-resnet",
    "fmnist-vit-tiny",
    "minilm-dynamo",
    "smollm2-dynamo",
    "synthetic-2.4gb",
)
TORCH = ("efficientnet-lite0", "minilm-dynamo")
"""Models whose torch module Torch-Pruning can be given."""

_ONNXSIM = """\
import sys, onnx, onnxsim
model, _ = onnxsim.simplify(onnx.load(sys.argv[1]))
model = onnxsim.apply_structured_pruning(model, sparsity=float(sys.argv[3]))
onnx.save(onnxsim.apply_attention_head_pruning(model, sparsity=float(sys.argv[3])), sys.argv[2])
"""


def _recipe(prune: str) -> harness.Command:
    return harness.graphc("-p", f"simplify,fuse,{prune}shrink,simplify")


def _torch_pruning(name: str, ratio: float) -> harness.Command:
    code = Path(__file__).with_name("torch_prune.py")
    return lambda python, model, out, large: [python, code, name, str(ratio), out]


def commands(name: str, ratio: float, pythons: dict[str, str]) -> dict[str, tuple[str, harness.Command]]:
    """Interpreter and command by variant, for one model and ratio; what is not installed is left out."""
    graphc = pythons["graphc"]
    found = {
        "graphc": (graphc, _recipe(f"prune{{ratio={ratio}}},")),
        "graphc, multiple of 8": (graphc, _recipe(f"prune{{ratio={ratio} multiple-of=8}},")),
    }
    if "onnxsim" in pythons:
        found["onnxsim"] = (pythons["onnxsim"], harness.script(_ONNXSIM, str(ratio)))
    if "torch-pruning" in pythons and name in TORCH:
        found["Torch-Pruning"] = (pythons["torch-pruning"], _torch_pruning(name, ratio))
    return found


def measure(name: str, pythons: dict[str, str], seconds: float) -> dict[str, Any]:
    """Every variant on one model, whose file exists."""
    original = cache.model(name)
    large = harness.size(original) > harness.LARGE
    load = round(os.getloadavg()[0], 1)
    runs = {(0.0, "exact"): (pythons["graphc"], _recipe(""))}
    for ratio in RATIOS:
        for variant, run in commands(name, ratio, pythons).items():
            if not large or variant == "graphc":
                runs[ratio, variant] = run
    results = [{"ratio": 0.0, "variant": "input"} | _judge(name, original, original, seconds)]
    with tempfile.TemporaryDirectory(dir=cache.root()) as scratch:
        for number, ((ratio, variant), (python, command)) in enumerate(runs.items()):
            out = Path(scratch) / str(number) / original.name
            out.parent.mkdir()
            usage = process.run(command(python, original, out, large))
            result = {"ratio": ratio, "variant": variant} | harness.summary([usage])
            if not usage.failure:
                result |= _judge(name, original, out, seconds)
            results.append(result)
            for file in out.parent.iterdir():
                file.unlink()
    return {
        "name": name,
        "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
        "seconds": seconds,
        "load": load,
        "results": results,
    }


def _judge(name: str, original: Path, candidate: Path, seconds: float) -> dict[str, Any]:
    code = Path(__file__).with_name("cost.py")
    done = subprocess.run([sys.executable, code, name, candidate], capture_output=True, text=True, check=False)
    cost = json.loads(done.stdout) if done.returncode == 0 else {"parameters": None, "flops": None}
    return cost | harness.check(name, original, candidate, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to measure; default: all")
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="interpreter with onnxsim")
    parser.add_argument("--torch", default=sys.executable, metavar="PYTHON", help="interpreter with torch-pruning")
    parser.add_argument("--seconds", type=float, default=3, help="time for each latency comparison (3)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file (bench/results/shrink.json)")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in MODELS:
            parser.error(f"there is no model {name}; there is: {', '.join(MODELS)}")

    wanted = {"graphc": sys.executable, "onnxsim": arguments.peers, "torch-pruning": arguments.torch}
    found = {package: harness.version(python, package) for package, python in wanted.items()}
    versions = {package: number for package, number in found.items() if number}
    for package in wanted.keys() - versions.keys():
        print(f"skipping {package}: it is not installed")
    results: dict[str, Any] = {
        "schema": 1,
        "machine": process.machine(),
        "python": sys.version.split()[0],
        "versions": versions | {"onnxruntime": harness.version(sys.executable, "onnxruntime")},
        "models": [],
    }
    if arguments.names and arguments.out.exists():
        results["models"] = json.loads(arguments.out.read_text())["models"]
    for name in MODELS:
        if arguments.names and name not in arguments.names:
            continue
        if not cache.model(name).exists():
            print(f"skipping {name}: make it with bench/models.py or bench/torch_models.py")
            continue
        print(f"{name} ...", flush=True)
        new = measure(name, {package: wanted[package] for package in versions}, arguments.seconds)
        kept = [old for old in results["models"] if old["name"] != name]
        results["models"] = sorted([*kept, new], key=lambda each: MODELS.index(each["name"]))
        arguments.out.parent.mkdir(exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        shown = ("cpu_s", "anon_mb", "parameters", "flops", "latency", "rms", "failure", "why")
        for each in new["results"]:
            values = "  ".join(f"{key}={each[key]}" for key in shown if each.get(key) not in ("", None))
            print(f"  {each['ratio']:.2f} {each['variant']:22} {values}")


if __name__ == "__main__":
    main()
