"""Attention blocks that run as one operator, and latency, for models as each tool leaves them.

    flock LOCK python bench/fuse.py [--seconds S] [NAME...]

``input`` is what ONNX Runtime makes of the model by itself, at its highest level. All variants of a model are timed in
one interleaved run with ONNX Runtime's defaults; ratios are to ``input``. Blocks are counted in the graph that the
session runs, read back. Results go to ``bench/results/fuse.json`` and ``fuse.md``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cache
import catalog
import harness
import numpy as np
import process

RESULTS = Path(__file__).parent / "results"
MODELS = (
    "fmnist-vit-tiny",
    "minilm-dynamo",
    "minilm-torchscript",
    "bert-torchscript",
    "llama-dynamo",
    "tiny-mixtral-bytes",
    "smollm2-dynamo",
)
WHOLE = ("Attention", "MultiHeadAttention", "GroupQueryAttention")
LIMIT = 120
"""Seconds that a tool has for a model."""

LENGTHS = {"smollm2-dynamo": (128, 512)}
"""Lengths of the sequence, where not those of the catalog's first case and twice that."""

_PEERS = {
    "onnxruntime.transformers": """\
import sys
from onnxruntime.transformers import optimizer
name = sys.argv[1]
kind = "vit" if "vit" in name else "gpt2" if any(n in name for n in ("llama", "mixtral", "smol")) else "bert"
model = optimizer.optimize_model(name, model_type=kind, num_heads=0, hidden_size=0, opt_level=0)
model.save_model_to_file(sys.argv[2])
""",
    "onnxscript ort_fusions": """\
import sys
import onnx_ir as ir
import onnxscript.optimizer
from onnxscript.rewriter import ort_fusions
model = ir.load(sys.argv[1])
onnxscript.optimizer.optimize(model)
result = ort_fusions.optimize_for_ort(model)
ir.save(result[0] if isinstance(result, tuple) else result, sys.argv[2])
""",
}


def variants(original: Path, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The file that each tool makes of a model, and why one made none."""
    made, failed = {"input": original}, {}
    commands = {name: [sys.executable, "-c", code] for name, code in _PEERS.items()}
    commands["graphc"] = [sys.executable, "-m", "graphc", "optimize", "--no-cache", "--no-measure", "-q"]
    for number, (name, command) in enumerate(commands.items()):
        out = folder / f"{number}.onnx"
        arguments = [str(original), "-o", str(out)] if name == "graphc" else [str(original), str(out)]
        try:
            done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            failed[name] = f"not done after {LIMIT} s"
            continue
        if done.returncode == 0 and out.exists():
            made[name] = out
        else:
            lines = done.stderr.strip().splitlines()
            failed[name] = lines[-1][:160] if lines else f"exit code {done.returncode}"
    return made, failed


def blocks(path: Path) -> int:
    """How many attentions the session runs as one operator."""
    import onnx
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = f"{folder}/optimised.onnx"
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    return sum(node.op_type in WHOLE for node in graph.node)


def attentions(path: Path) -> int:
    """How many attentions the model has: softmaxes between two products, as graphc counts them."""
    from graphc import inspection

    words = str(inspection.inspect(path)["summary"].get("attention", "0 of 0"))
    return int(words.split()[2])


def measure(name: str, seconds: float) -> dict[str, Any]:
    """Every variant of one model."""
    from graphc import runtime

    original = cache.model(name)
    results = []
    with tempfile.TemporaryDirectory(dir=cache.root()) as folder:
        made, failed = variants(original, Path(folder))
        sessions: dict[str, Any] = {}
        for label, path in list(made.items()):
            try:
                sessions[label] = runtime.session(path, optimise=True)
            except Exception as error:
                failed[label] = f"does not load: {error}"[:160]
        for inputs in _cases(name):
            shape = str(list(next(iter(inputs.values())).shape))
            wanted = sessions["input"].run(inputs)
            usable: dict[str, Any] = {}
            for label, session in sessions.items():
                try:
                    found = session.run(inputs)
                    worst = max(float(np.abs(found[key] - value).max()) for key, value in wanted.items())
                    usable[label] = (session, worst)
                except Exception as error:
                    failed[label] = f"does not run: {error}"[:160]
            times = runtime.measure({k: s for k, (s, _) in usable.items()}, inputs, seconds=seconds)
            for label, (_, worst) in usable.items():
                timing = times[label]
                results.append(
                    {
                        "variant": label,
                        "input": shape,
                        "blocks": blocks(made[label]),
                        "ms": round(timing.median * 1e3, 3),
                        "ratio": round(timing.ratio, 3),
                        "low": round(timing.ratio_low, 3),
                        "high": round(timing.ratio_high, 3),
                        "difference": worst,
                    }
                )
    return {
        "name": name,
        "attentions": attentions(original),
        "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
        "seconds": seconds,
        "results": results,
        "failed": failed,
    }


def _cases(name: str) -> list[dict[str, np.ndarray[Any, Any]]]:
    first = catalog.entry(name).arrays()[0]
    if any(array.ndim != 2 for array in first.values()):
        return [first]
    length = next(iter(first.values())).shape[1]
    wanted = LENGTHS.get(name, (length, 2 * length))
    return [{key: np.resize(array, (1, n)).astype(array.dtype) for key, array in first.items()} for n in wanted]


def page(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Fusion benchmark",
        "",
        "Written by `bench/fuse.py` from its own results; do not edit. Blocks: attentions that the session runs as one",
        "operator. Latency: median of the ratio to the input, with ONNX Runtime's own optimisation on for all; below 1",
        f"is faster. {document['machine']}; onnxruntime {document['versions']['onnxruntime']}.",
        "",
        "| model | input | variant | blocks | ms | ratio | quartiles |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for model in document["models"]:
        for row in model["results"]:
            lines.append(
                f"| {model['name']} | {row['input']} | {row['variant']} | {row['blocks']} of {model['attentions']} "
                f"| {row['ms']:.2f} | {row['ratio']:.2f} | {row['low']:.2f} to {row['high']:.2f} |"
            )
        for label, why in model["failed"].items():
            lines.append(f"| {model['name']} | | {label} | | | | {why.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to measure; default: all")
    parser.add_argument("--seconds", type=float, default=8, help="time for each model and input (8)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "fuse.json", help="result file; the table stands beside it"
    )
    arguments = parser.parse_args()
    path = arguments.out
    models = json.loads(path.read_text())["models"] if arguments.names and path.exists() else []
    for name in arguments.names or MODELS:
        if not cache.model(name).exists():
            print(f"skipping {name}: make it with bench/models.py or bench/torch_models.py")
            continue
        print(f"{name} ...", flush=True)
        new = measure(name, arguments.seconds)
        models = [*(each for each in models if each["name"] != name), new]
        for row in new["results"]:
            print("  ", row)
        print("  ", new["failed"], flush=True)
        document = {
            "schema": 1,
            "machine": process.machine(),
            "versions": {p: harness.version(sys.executable, p) for p in ("graphc", "onnxruntime", "onnxscript")},
            "models": sorted(models, key=lambda each: MODELS.index(each["name"])),
        }
        path.write_text(json.dumps(document, indent=1) + "\n")
        path.with_suffix(".md").write_text(page(document))


if __name__ == "__main__":
    main()
