"""Compare what a session makes of models that graphc and others have fused: attention blocks, latency, memory.

    python bench/fuse.py [--peers PYTHON] [--seconds S] [NAME...]

Every variant is run by ONNX Runtime with all of its own optimisation, in turns within a model, each against the input
in the same round. ``PYTHON`` is the interpreter of an environment with ``bench/requirements-peers.txt``. With names,
only those models are measured again, and the others keep their results. Models that only this benchmark has are made by
``bench/fuse_models.py`` and ``bench/fuse_decoder.py``.
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
import catalog
import fuse_decoder
import fuse_models
import harness
import numpy as np
import process

RESULTS = Path(__file__).parent / "results" / "fuse.json"
MODELS = (
    "minilm-dynamo",
    "minilm-torchscript",
    "bert-torchscript",
    "fmnist-vit-tiny",
    *(entry.name for entry in fuse_models.ENTRIES),
    "tiny-mixtral-bytes",
    "ppocr-rec",
    "llama-dynamo",
    "smollm2-dynamo",
    *fuse_decoder.SIZES,
)
WHOLE = ("Attention", "MultiHeadAttention", "GroupQueryAttention")
LIMIT = 180
"""Seconds that a tool has for a model."""

LENGTHS = {"smollm2-dynamo": (128, 512), "minilm-dynamo": (16, 128), "minilm-torchscript": (16, 128)}
"""Lengths of the sequence, where not those of the catalog's first case and twice that."""

_TRANSFORMERS = """\
import sys
from onnxruntime.transformers import optimizer
model = optimizer.optimize_model(sys.argv[1], model_type=sys.argv[3], num_heads=0, hidden_size=0, opt_level=0)
model.save_model_to_file(sys.argv[2])
"""
_FUSIONS = """\
import sys
import onnx_ir as ir
import onnxscript.optimizer
from onnxscript.rewriter import ort_fusions
model = ir.load(sys.argv[1])
onnxscript.optimizer.optimize(model)
result = ort_fusions.optimize_for_ort(model)
ir.save(result[0] if isinstance(result, tuple) else result, sys.argv[2])
"""
INPUT = "input"
IN_PLACE = "graphc, caches in place"
"""Of graphs for one token: each cache and what it becomes are one buffer, as ``run.py`` of the artifact has them."""

_IN_PLACE = "simplify,fold-lora,fuse,shrink,recognise,simplify,lower{in-place=true length=512}"
KINDS = {"vit": "vit", "whisper": "bart", "llama": "gpt2", "mixtral": "gpt2", "smollm2": "gpt2"}
"""What onnxruntime.transformers calls a model, by a part of its name."""


def tools(name: str) -> dict[str, harness.Command]:
    """The command of every tool, by label."""
    kind = next((kind for part, kind in KINDS.items() if part in name), "bert")
    one_token = fuse_decoder.SIZES.get(name, ((0, 0),))[0][0] == 1
    own = {IN_PLACE: harness.graphc("-t", "onnxruntime{portable=false}", "-p", _IN_PLACE)} if one_token else {}
    return {
        "onnxruntime.transformers": harness.script(_TRANSFORMERS, kind),
        "onnxscript ort_fusions": harness.script(_FUSIONS),
        "onnxslim": harness.entry_point("import onnxslim.cli; onnxslim.cli.main()"),
        "onnxsim": harness.entry_point("import onnxsim; onnxsim.main()"),
        "graphc": harness.graphc(),
        "graphc, not portable": harness.graphc("-t", "onnxruntime{portable=false}"),
        **own,
    }


def variants(original: Path, folder: Path, peers: str) -> tuple[dict[str, Path], dict[str, str]]:
    """The file that each tool makes of a model, and why one made none."""
    made, failed = {INPUT: original}, {}
    for number, (label, command) in enumerate(tools(original.stem).items()):
        out = folder / f"{number}.onnx"
        python = sys.executable if label.startswith("graphc") else peers
        line = command(python, original, out, False)
        try:
            done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            failed[label] = f"not done after {LIMIT} s"
            continue
        if done.returncode == 0 and out.exists():
            made[label] = out
        else:
            lines = done.stderr.strip().splitlines()
            failed[label] = harness.public(lines[-1]) if lines else f"exit code {done.returncode}"
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


def measure(name: str, seconds: float, peers: str) -> dict[str, Any]:
    """Every variant of one model."""
    from graphc import runtime
    from graphc.memory import peak_memory

    original = cache.model(name)
    load = round(os.getloadavg()[0], 1)
    results = []
    with tempfile.TemporaryDirectory(dir=cache.root()) as folder:
        made, failed = variants(original, Path(folder), peers)
        sessions: dict[str, Any] = {}
        for label, path in list(made.items()):
            try:
                sessions[label] = runtime.session(path, optimise=True)
            except Exception as error:
                failed[label] = harness.public(f"does not load: {error}")
        for number, (shape, inputs) in enumerate(_cases(name).items()):
            wanted = sessions[INPUT].run(inputs)
            usable: dict[str, Any] = {}
            for label, session in sessions.items():
                try:
                    runnable, found = session, session.run(inputs)
                    if label == IN_PLACE:
                        runnable = session.in_place(inputs, _caches(made[label]))
                    pairs = zip(found.values(), wanted.values(), strict=True)
                    usable[label] = runnable, max(float(np.abs(a - b).max()) for a, b in pairs)
                except Exception as error:
                    failed[label] = harness.public(f"does not run: {error}")
            times = runtime.measure({k: s for k, (s, _) in usable.items()}, inputs, seconds=seconds)
            for label, (_, worst) in usable.items():
                timing = times[label]
                row: dict[str, Any] = {
                    "variant": label,
                    "input": shape,
                    "ms": round(timing.median * 1e3, 3),
                    "ratio": round(timing.ratio, 3),
                    "low": round(timing.ratio_low, 3),
                    "high": round(timing.ratio_high, 3),
                    "difference": worst,
                }
                if number == 0:
                    memory = peak_memory(made[label], inputs)
                    row |= {"blocks": blocks(made[label]), "peak_mb": round((memory.peak - memory.base) / 1e6, 1)}
                results.append(row)
    return {
        "name": name,
        "attentions": attentions(original),
        "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
        "seconds": seconds,
        "load": load,
        "results": results,
        "failed": failed,
    }


def _caches(path: Path) -> dict[str, str]:
    """The outputs that continue caches, each with its cache, if all of them can be appended to in place."""
    from graphc import caches, model

    loaded = model.load(path)
    if not caches.in_place(loaded):
        raise ValueError("the caches cannot be appended to in place")
    return {after: before for before, after in caches.pairs(loaded).items()}


def _entry(name: str) -> catalog.Entry:
    own = {entry.name: entry for entry in fuse_models.ENTRIES}
    return own[name] if name in own else catalog.entry(name)


def _cases(name: str) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """The inputs of a model, by what they are called in the results."""
    if name in fuse_decoder.SIZES:
        return fuse_decoder.cases(name)
    first = _entry(name).arrays()[0]
    found = [first]
    if all(array.ndim == 2 for array in first.values()):
        length = next(iter(first.values())).shape[1]
        wanted = LENGTHS.get(name, (length, 2 * length))
        found = [{key: np.resize(array, (1, n)).astype(array.dtype) for key, array in first.items()} for n in wanted]
    return {str(list(next(iter(inputs.values())).shape)): inputs for inputs in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"models to measure; default: all of {', '.join(MODELS)}"
    )
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="interpreter with the peers")
    parser.add_argument("--seconds", type=float, default=8, help="time for each model and input (8)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file (bench/results/fuse.json)")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in MODELS:
            parser.error(f"there is no model {name}; there is: {', '.join(MODELS)}")
    path = arguments.out
    models = json.loads(path.read_text())["models"] if arguments.names and path.exists() else []
    for name in arguments.names or MODELS:
        if not cache.model(name).exists():
            print(f"skipping {name}: make it with bench/models.py, torch_models.py, fuse_models.py or fuse_decoder.py")
            continue
        print(f"{name} ...", flush=True)
        new = measure(name, arguments.seconds, arguments.peers)
        models = [*(each for each in models if each["name"] != name), new]
        for row in new["results"]:
            print("  ", row)
        print("  ", new["failed"], flush=True)
        document = {
            "schema": 1,
            "machine": process.machine(),
            "versions": {p: harness.version(sys.executable, p) for p in ("graphc", "onnxruntime")}
            | {p: harness.version(arguments.peers, p) for p in ("onnxscript", "onnxslim", "onnxsim")},
            "models": sorted(models, key=lambda each: MODELS.index(each["name"])),
        }
        path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
