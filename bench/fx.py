"""Compare torch modules made of models with ONNX Runtime, and their speed with the modules that were exported.

    PYTHON bench/fx.py [--speed] [NAME...]

Without names, all models that ``bench/models.py`` and ``bench/torch_models.py`` have cached are compared. ``--speed``
times a forward pass against the original module, eager, on one thread, in turns. Writes ``bench/results/fx.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cache
import catalog
import numpy as np
import torch

from graphc import frontends, fx
from graphc.checking import Checker
from graphc.contract import Arrays, Runnable
from graphc.errors import BadInput

RESULTS = Path(__file__).parent / "results" / "fx.json"
LARGEST = 1 << 30
"""Bytes of a model from which on it is left out: the comparison holds it three times."""


@dataclass
class Module(Runnable):
    """A module made of a model, as something that runs."""

    module: Any
    provider: str = "torch"

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        with torch.no_grad():
            got = self.module(
                *(torch.from_numpy(np.asarray(inputs[key])) for key in self.module.meta["inputs"].values())
            )
        return {key: value.numpy() for key, value in got.items()}


def compare(name: str) -> dict[str, Any]:
    """Whether the module computes what ONNX Runtime does, up to rounding as ``graphc verify`` judges it."""
    path = cache.model(name)
    cases = catalog.entry(name).arrays()
    model = frontends.load(path).model
    try:
        module = fx.to_torch(model)
    except BadInput as error:
        return {"model": name, "why": str(error)}
    verdict = Checker(model, data=cases).compare(Module(module))
    error = max((o.max_rel for o in verdict.outputs), default=0.0)
    row = {"model": name, "same": verdict.ok and verdict.checked, "why": verdict.why, "error": error}
    return row | {"by_noise": verdict.worst.ratio if verdict.worst else None} | _gradients(module, cases[0])


def _gradients(module: Any, case: dict[str, Any]) -> dict[str, int]:
    """How many parameters there are and how many of them get a gradient from the outputs."""
    inputs = [torch.from_numpy(np.asarray(case[key])) for key in module.meta["inputs"].values()]
    total = sum(
        (v.double().square().mean() for v in module(*inputs).values() if v.is_floating_point()), torch.zeros(())
    )
    parameters = list(module.parameters())
    if total.requires_grad:
        total.backward()
    return {"parameters": len(parameters), "gradients": sum(p.grad is not None for p in parameters)}


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def speed(name: str, original: torch.nn.Module, inputs: tuple[torch.Tensor, ...], seconds: float) -> dict[str, Any]:
    """The time of the module made of the exported model over that of the original: median and quartiles of pairs."""
    made = fx.to_torch(frontends.load(cache.model(name)).model).eval()
    original = original.eval()
    runs = (lambda: original(*inputs), lambda: made(*inputs))
    pairs: list[tuple[float, float]] = []
    with torch.no_grad():
        for run in runs * 3:
            run()
        end = time.perf_counter() + seconds
        while len(pairs) < 9 or time.perf_counter() < end:
            first = len(pairs) % 2
            times = [0.0, 0.0]
            for which in (first, 1 - first):
                times[which] = timed(runs[which])
            pairs.append((times[0], times[1]))
    low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
    return {
        "model": name,
        "shape": list(inputs[0].shape),
        "ratio": round(middle, 3),
        "low": round(low, 3),
        "high": round(high, 3),
        "original_ms": round(statistics.median(a for a, _ in pairs) * 1e3, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models; default: all that are cached")
    parser.add_argument("--speed", action="store_true", help="time a forward pass against the original module")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing, for each model and size")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows = list(_speeds(options.names, options.seconds)) if options.speed else list(_compared(options.names))
    kind = "speed" if options.speed else "agreement"
    kept = {row["model"] + str(row.get("shape", "")): row for row in results.get(kind, [])}
    kept |= {row["model"] + str(row.get("shape", "")): row for row in rows}
    results |= {"torch": torch.__version__, kind: [kept[key] for key in sorted(kept)]}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def _compared(names: list[str]) -> Iterator[dict[str, Any]]:
    for entry in catalog.CATALOG:
        path = cache.model(entry.name)
        if (entry.name not in names) if names else (not path.exists() or _size(path) > LARGEST):
            continue
        row = compare(entry.name)
        print(row, flush=True)
        yield row


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.glob(path.name + "*"))


def _speeds(names: list[str], seconds: float) -> Iterator[dict[str, Any]]:
    import torch_models

    makers = {name: torch_models.MAKERS[name] for name in ("minilm-dynamo", "minilm-torchscript", "llama-dynamo")}
    makers["vit-dynamo"] = (vit, torch_models.IMAGE, torch_models.dynamo)
    for name in names or makers:
        make, inputs, export = makers[name]
        torch.manual_seed(0)
        original = make().eval()
        path = cache.model(name)
        if not path.exists():
            export(original, inputs, path)
        if inputs is torch_models.IMAGE:
            examples = [(torch.randn(n, 3, 224, 224),) for n in (1, 4)]
        else:
            examples = [
                (torch.arange(b * s).reshape(b, s), torch.ones(b, s, dtype=torch.int64)) for b, s in ((1, 16), (4, 64))
            ]
        for example in examples:
            row = speed(name, original, example, seconds)
            print(row, flush=True)
            yield row


def vit() -> torch.nn.Module:
    """A vision transformer of the size of ViT-tiny, 12 layers of width 192, with random weights."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768)

    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = ViTModel(config, add_pooling_layer=False)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.model(pixel_values=image).last_hidden_state

    return Features()


if __name__ == "__main__":
    main()
