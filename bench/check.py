"""Judge one optimised model against its original; a process of its own, as the runtime may crash on it.

    python bench/check.py NAME ORIGINAL CANDIDATE SECONDS

Prints JSON: ``nodes`` (subgraphs and local functions included, Constant nodes not), ``constants`` (Constant
nodes), ``bytes``, ``same`` (outputs equal), ``error`` (the largest difference by the largest magnitude), ``rms``
(the root mean square of the difference by that of the output), ``why``, ``latency``, ``latency_low``,
``latency_high``, ``input_ms``.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import catalog
import numpy as np
import onnx
import onnxruntime

Outputs = list[dict[str, np.ndarray[Any, Any]]]

NOISE_FACTOR = 10
"""An error up to this multiple of what ONNX Runtime's own optimisation makes is rounding."""
SMALLEST_NOISE = 1e-6
"""Relative; a few float32 roundings."""


def session(path: Path, *, optimise: bool) -> onnxruntime.InferenceSession:
    """A session on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def outputs(path: Path, cases: Outputs, *, optimise: bool) -> Outputs:
    """All outputs by name, for every case."""
    runner = session(path, optimise=optimise)
    names = [output.name for output in runner.get_outputs()]
    return [dict(zip(names, runner.run(names, case), strict=True)) for case in cases]


def error(reference: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """The largest difference by the largest magnitude; infinite for other shapes, dtypes, non-finites."""
    if reference.shape != other.shape or reference.dtype != other.dtype:
        return float("inf")
    if not np.issubdtype(reference.dtype, np.floating):
        return 0.0 if np.array_equal(reference, other) else float("inf")
    finite = np.isfinite(reference)
    if not np.array_equal(finite, np.isfinite(other)) or not np.array_equal(
        reference[~finite], other[~finite], equal_nan=True
    ):
        return float("inf")
    if not finite.any():
        return 0.0
    a, b = reference[finite].astype(np.float64), other[finite].astype(np.float64)
    return float(np.abs(a - b).max() / max(np.abs(a).max(), np.finfo(reference.dtype).tiny))


def distance(reference: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Root mean square of the difference by that of the reference; infinite where they cannot be compared."""
    if reference.shape != other.shape or reference.dtype != other.dtype:
        return float("inf")
    a, b = reference.astype(np.float64), other.astype(np.float64)
    return float(np.sqrt(np.mean((a - b) ** 2) / max(np.mean(a**2), np.finfo(np.float32).tiny)))


def compare(original: Path, candidate: Path, cases: Outputs) -> dict[str, Any]:
    """Whether both compute the same with the runtime's optimisation off, up to rounding."""
    reference = outputs(original, cases, optimise=False)
    optimised = outputs(original, cases, optimise=True)
    got = outputs(candidate, cases, optimise=False)
    if any(list(a) != list(b) for a, b in zip(reference, got, strict=True)):
        return {"same": False, "error": None, "rms": None, "why": "output names differ"}
    worst, rms, same = 0.0, 0.0, True
    for expected, noisy, found in zip(reference, optimised, got, strict=True):
        for name, array in expected.items():
            allowed = NOISE_FACTOR * max(error(array, noisy[name]), SMALLEST_NOISE)
            this = error(array, found[name])
            worst, same = max(worst, this), same and this <= allowed
            rms = max(rms, distance(array, found[name]))
    return {
        "same": same,
        "error": worst if np.isfinite(worst) else None,
        "rms": rms if np.isfinite(rms) else None,
        "why": "" if same else "outputs differ",
    }


def latency(original: Path, candidate: Path, case: dict[str, Any], seconds: float) -> dict[str, float]:
    """Candidate's time over original's, as users run both: median and quartiles of alternating pairs."""
    runners = [session(path, optimise=True) for path in (original, candidate)]
    for runner in runners:
        runner.run(None, case)
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(pairs) < 5 or time.perf_counter() < end:
        times = [0.0, 0.0]
        for which in (0, 1) if len(pairs) % 2 else (1, 0):
            start = time.perf_counter()
            runners[which].run(None, case)
            times[which] = time.perf_counter() - start
        pairs.append((times[0], times[1]))
    low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
    return {
        "latency": round(middle, 3),
        "latency_low": round(low, 3),
        "latency_high": round(high, 3),
        "input_ms": round(statistics.median(a for a, _ in pairs) * 1e3, 3),
    }


def _nodes(nodes: Any) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nodes(graph.node)


def size(path: Path) -> dict[str, int]:
    """Nodes, Constant nodes, and bytes on disk with external data."""
    model = onnx.load(path, load_external_data=False)
    bodies = [model.graph.node, *(function.node for function in model.functions)]
    every = [node.op_type for body in bodies for node in _nodes(body)]
    data = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    return {
        "nodes": len(every) - every.count("Constant"),
        "constants": every.count("Constant"),
        "bytes": path.stat().st_size + sum((path.parent / location).stat().st_size for location in data),
    }


def main() -> None:
    name, original, candidate, seconds = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])
    cases = catalog.entry(name).arrays()
    result: dict[str, Any] = size(candidate)
    try:
        result |= compare(original, candidate, cases)
        result |= latency(original, candidate, cases[0], seconds)
    # What the runtime raises has no common class that it exports.
    except Exception as failure:
        first = str(failure).splitlines()[0].replace(str(candidate), candidate.name)
        result |= {"same": False, "error": None, "why": f"does not run: {first}"}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
