"""How long it takes to find what belongs together, against Torch-Pruning's dependency graph.

    python bench/groups.py [--torch PYTHON] [--rounds N] [NAME...]

``PYTHON`` has ``bench/requirements-torch.txt``; without it only the synthetic Llama of 7 billion parameters is
analysed, which needs neither torch nor weights. CPU seconds, one thread, both tools taking turns in one process; the
median of the rounds. Torch-Pruning is timed until its dependency graph stands (which runs the model once), and
until it has listed its groups as well; graphc's time covers both. Results go to ``bench/results/groups.json``.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import llama

from graphc.axes.groups import analyse

RESULTS = Path(__file__).parent / "results" / "groups.json"
MODELS = ("resnet50", "densenet121", "vit-s", "yolo-like", "minilm", "smollm2")
TIMEOUT = 300
"""Seconds after which a tool counts as not finishing."""


def synthetic(rounds: int) -> dict[str, Any]:
    """The 32-layer Llama, without data."""
    model = llama.llama_7b()
    gc.collect()
    gc.freeze()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        found = analyse(model)
        times.append(time.process_time() - start)
    nodes = sum(1 for _ in model.graph)
    return {"model": "llama-7b-synthetic", "nodes": nodes, "groups": len(found), "graphc_s": statistics.median(times)}


def compared(name: str, python: str, rounds: int) -> dict[str, Any]:
    """One model through both tools, in the interpreter that has torch."""
    code = Path(__file__).with_name("group_models.py")
    failure = ""
    try:
        done = subprocess.run(
            [python, code, name, str(rounds)], capture_output=True, text=True, check=False, timeout=TIMEOUT
        )
        output = done.stdout
        if done.returncode:
            failure = (done.stderr.strip().splitlines() or ["it ended"])[-1][:120]
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
        failure = f"not finished in {TIMEOUT} s"
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    result: dict[str, Any] = {"model": name}
    for row in rows:
        result |= {k: v for k, v in row.items() if not k.endswith("_s")}
    for key in ("graphc_s", "torch_pruning_s", "torch_pruning_groups_s"):
        times = [row[key] for row in rows if key in row]
        if times:
            result[key] = statistics.median(times)
    if "torch_pruning_s" not in result and failure:
        result["failure"] = failure
    if "torch_pruning_s" in result:
        result["ratio"] = result["torch_pruning_s"] / result["graphc_s"]
        result["ratio_groups"] = result["torch_pruning_groups_s"] / result["graphc_s"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=MODELS, help="models to compare")
    parser.add_argument("--torch", metavar="PYTHON", help="interpreter with torch, torch-pruning and transformers")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows = [synthetic(arguments.rounds)]
    for name in arguments.names if arguments.torch else ():
        rows.append(compared(name, arguments.torch, arguments.rounds))
    for row in rows:
        print(" ".join(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
    report = {"date": datetime.now(UTC).date().isoformat(), "rounds": arguments.rounds, "rows": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
