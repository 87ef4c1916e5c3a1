"""Compiled artifacts against ONNX Runtime: what compiling costs, what has to be shipped, and how fast it runs.

    python bench/tvm.py [--variant VARIANT]... [--again] [--seconds S] [NAME...]

A row is a model and a way to compile it: by the rules for any processor (``untuned``), by the rules for this processor
(``native``), or with loops that were measured for some minutes (``tuned-2``, ``tuned-10``). Rows that are there are not
measured again without ``--again``, and each is written at once: what was interrupted goes on where it was. Artifact and
ONNX Runtime run interleaved, with as many threads each. ``load`` is the time from an imported interpreter to the first
result of ``run.py``'s class, in a process of its own. Results go to ``bench/results/tvm.json``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
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
MODELS: dict[str, tuple[str, ...]] = {
    "fmnist-resnet": ("batch=1",),
    "light-squeezenet": (),
    "light-resnet50": (),
    "efficientnet-lite0": ("batch=1",),
    "ppocr-cls": ("x.0=1", "x.2=48", "x.3=192"),
    "minilm-dynamo": ("batch=1", "seq=128"),
    "fmnist_resnet/graphc-int8-static": ("batch=1",),
    "efficientnet-lite0/graphc-int8-static": ("batch=1",),
    "smollm2-decode": ("input_ids.0=1", "past_key_values.0.key.2=128"),
}
"""The models, and their sizes, by name or by ``input.axis``; SmolLM2 makes one token after 128. What has a
folder was made by ``bench/quantize.py``: ONNX Runtime runs the same integers."""

VARIANTS = {
    "untuned": ("", ()),
    "native": (" target=native", ()),
    "tuned-2": ("", ("--tune", "2")),
    "tuned-10": ("", ("--tune", "10")),
}
"""Options of the target and flags."""

LOAD = """\
import sys, time; sys.path.insert(0, sys.argv[1]); import run, numpy as np; start = time.perf_counter()
model = run.Model(sys.argv[1]); bucket = model.buckets[0]
model.run({v["name"]: np.zeros(v["shape"], v["dtype"]) for v in bucket["inputs"]})
print(time.perf_counter() - start)
"""


def sizes(source: Path, wanted: tuple[str, ...]) -> list[str]:
    """``--shapes`` with the names that a model has for dimensions which are given as ``input.axis``."""
    from graphc import model as models
    from graphc.shapes import fix

    found = fix.symbols(models.load(source))
    names = {place.replace("[", ".").rstrip("]"): name for name, places in found.items() for place in places}
    return ["=".join((names.get(place, place), size)) for place, _, size in (each.partition("=") for each in wanted)]


def measure(name: str, variant: str, seconds: float, threads: int, out: Path) -> dict[str, Any]:
    """All numbers of a row; the artifact is made in ``out``."""
    source = cache.root() / "quantized" / f"{name}.onnx" if "/" in name else cache.model(name)
    shapes = sizes(source, MODELS[name])
    options, flags = VARIANTS[variant]
    command: list[str | Path] = [sys.executable, "-m", "graphc", "optimize", source, "-o", out, "--no-measure", "-q"]
    command += ["-t", f"tvm{{threads={threads}{options}}}", *(["--shapes", *shapes] if shapes else []), *flags]
    usage = process.run(command, timeout_s=3600)
    if usage.failure:
        return {"failure": harness.public(usage.failure)}
    ffi = Path(importlib.util.find_spec("tvm_ffi").submodule_search_locations[0], "lib", "libtvm_ffi.so")  # type: ignore
    nbytes = {path.name: path.stat().st_size for path in out.iterdir()} | {ffi.name: ffi.stat().st_size}
    needed = ("model.so", "weights.bin", "libtvm_runtime.so", ffi.name)
    checked = subprocess.run(
        [sys.executable, out / "run.py", "--check"], capture_output=True, text=True, env=_environment(), check=False
    )
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    row: dict[str, Any] = {
        "wall_s": round(usage.wall_s, 1),
        "cpu_s": round(usage.cpu_s, 1),
        "library_mb": round(nbytes["model.so"] / 1e6, 2),
        "weights_mb": round(nbytes["weights.bin"] / 1e6, 2),
        "runtime_mb": round((nbytes["libtvm_runtime.so"] + nbytes[ffi.name]) / 1e6, 2),
        "needed_mb": round(sum(nbytes[name] for name in needed) / 1e6, 2),
        "load_s": round(min(_load(out) for _ in range(3)), 3),
        "error": max(map(float, re.findall(r"relative error (\S+)", checked.stdout)), default=None),
        "worst": report["measurements"]["compiled"]["worst"],
        "notes": [warning for warning in report["warnings"] if "double precision" in warning],
    }
    bench = (sys.executable, "-m", "graphc", "bench")
    done = subprocess.run(
        [*bench, source, out, "--json", "--threads", str(threads), "--seconds", str(seconds)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return row | {"failure": harness.public(done.stderr)}
    before, after = json.loads(done.stdout)["models"]
    row |= {"onnxruntime_ms": round(1e3 * before["median"], 3), "tvm_ms": round(1e3 * after["median"], 3)}
    return row | {key: round(after[key], 3) for key in ("ratio", "ratio_low", "ratio_high")}


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _load(out: Path) -> float:
    run = subprocess.run(
        [sys.executable, "-c", LOAD, out], capture_output=True, text=True, env=_environment(), check=True
    )
    return float(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=list(MODELS), metavar="NAME")
    parser.add_argument("--variant", action="append", choices=VARIANTS)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = str(arguments.threads)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    for name in arguments.names:
        for variant in arguments.variant or VARIANTS:
            if variant in results["rows"].get(name, {}) and not arguments.again:
                continue
            start = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                os.environ["GRAPHC_CACHE_DIR"] = str(Path(folder, "cache"))
                row = measure(name, variant, arguments.seconds, arguments.threads, Path(folder, "out"))
            row["load_average"] = round(os.getloadavg()[0], 1)
            print(name, variant, json.dumps(row), f"{time.monotonic() - start:.0f} s", flush=True)
            # Read again: another row may have been written in the meantime.
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
            results["rows"].setdefault(name, {})[variant] = row
            results |= {
                "date": datetime.now(UTC).date().isoformat(),
                "threads": arguments.threads,
                "versions": {
                    p: harness.version(sys.executable, p) for p in ("apache-tvm", "apache-tvm-ffi", "onnxruntime")
                },
            }
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
