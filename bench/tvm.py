"""Compiled artifacts against ONNX Runtime: what compiling costs, what has to be shipped, and how fast it runs.

    python bench/tvm.py [--tune MINUTES] [--seconds S] [NAME...]

Every model is compiled with the default rules, and again with loops that were measured for some minutes. The three run
interleaved, with as many threads each. ``load`` is the time from an imported interpreter to the first result of
``run.py``'s class, in a process of its own. Results go to ``bench/results/tvm.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cache
import harness
import process

RESULTS = Path(__file__).parent / "results" / "tvm.json"
MODELS = {
    "fmnist-resnet": ("batch=1",),
    "light-squeezenet": (),
    "ppocr-cls": ("x.0=1", "x.2=48", "x.3=192"),
    "minilm-dynamo": ("batch=1", "seq=128"),
}
LOAD = """\
import sys, time; sys.path.insert(0, sys.argv[1]); import run, numpy as np; start = time.perf_counter()
model = run.Model(sys.argv[1]); bucket = model.buckets[0]
model.run({v["name"]: np.zeros(v["shape"], v["dtype"]) for v in bucket["inputs"]})
print(time.perf_counter() - start)
"""


def compile_(model: Path, out: Path, shapes: tuple[str, ...], threads: int, *flags: str) -> dict[str, Any]:
    """Compile a model; what it took and what has to be shipped."""
    command: list[str | Path] = [sys.executable, "-m", "graphc", "optimize", model, "-o", out, "--no-measure", "-q"]
    command += ["-t", f"tvm{{threads={threads}}}", *(["--shapes", *shapes] if shapes else []), *flags]
    usage = process.run(command, timeout_s=1800)
    if usage.failure:
        return {"failure": harness.public(usage.failure)}
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    runs = [
        subprocess.run([sys.executable, "-c", LOAD, out], capture_output=True, text=True, check=True) for _ in range(3)
    ]
    return {
        "wall_s": round(usage.wall_s, 1),
        "cpu_s": round(usage.cpu_s, 1),
        "library_mb": round(sizes["model.so"] / 1e6, 2),
        "weights_mb": round(sizes["weights.bin"] / 1e6, 2),
        "runtime_mb": round(sizes["libtvm_runtime.so"] / 1e6, 2),
        "load_s": round(min(float(run.stdout) for run in runs), 3),
    }


def measure(name: str, minutes: float, seconds: float, threads: int) -> dict[str, Any]:
    """All numbers for one model."""
    source, shapes = cache.model(name), MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        ruled, tuned = Path(folder, "ruled"), Path(folder, "tuned")
        row: dict[str, Any] = {"ruled": compile_(source, ruled, shapes, threads)}
        variants = {"ruled": ruled}
        if minutes:
            row["tuned"] = compile_(source, tuned, shapes, threads, "--tune", str(minutes))
            variants["tuned"] = tuned
        variants = {label: path for label, path in variants.items() if "failure" not in row[label]}
        command = [sys.executable, "-m", "graphc", "bench", source, *variants.values(), "--json"]
        done = subprocess.run(
            [*command, "--threads", str(threads), "--seconds", str(seconds)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return row | {"failure": harness.public(done.stderr)}
        found = json.loads(done.stdout)
        row["onnxruntime_ms"] = round(1e3 * found["models"][0]["median"], 3)
        for label, measured in zip(variants, found["models"][1:], strict=True):
            row[label] |= {key: round(measured[key], 3) for key in ("ratio", "ratio_low", "ratio_high")}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=list(MODELS), metavar="NAME")
    parser.add_argument("--tune", type=float, default=2.0, metavar="MINUTES")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = str(arguments.threads)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"models": {}}
    for name in arguments.names:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as store:
            os.environ["GRAPHC_CACHE_DIR"] = store
            results["models"][name] = row = measure(name, arguments.tune, arguments.seconds, arguments.threads)
        row["load_average"] = round(os.getloadavg()[0], 1)
        print(name, json.dumps(row), f"{time.monotonic() - start:.0f} s", flush=True)
        results |= {
            "date": datetime.now(UTC).date().isoformat(),
            "tune_minutes": arguments.tune,
            "threads": arguments.threads,
            "versions": {
                p: harness.version(sys.executable, p) for p in ("apache-tvm", "apache-tvm-ffi", "onnxruntime")
            },
        }
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
