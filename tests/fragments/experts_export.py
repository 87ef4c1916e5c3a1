"""Experts in a Python loop, as the exporters write them: ``tests/data/experts/*.onnx``.

Run it with torch installed (``python -m tests.fragments.experts_export``); the files are committed, tests only read
them. The loops are spelt as in transformers up to 4.57 (Mixtral, Qwen-MoE, OLMoE), DeepSeek's and Mistral's own code.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

FOLDER = Path(__file__).parent.parent / "data" / "experts"
WIDTH, HIDDEN, EXPERTS, SLOTS = 6, 5, 3, 2


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.w2 = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.w3 = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList([Expert() for _ in range(EXPERTS)])


class Mixtral(Experts):
    """transformers 4: one-hot masks by expert, and ``index_add_``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        rows = x.view(-1, width)
        weights = F.softmax(self.gate(rows), dim=1, dtype=torch.float)
        weights, chosen = torch.topk(weights, SLOTS, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        total = torch.zeros((batch * length, width), dtype=x.dtype)
        mask = F.one_hot(chosen, num_classes=EXPERTS).permute(2, 1, 0)
        for number, expert in enumerate(self.experts):
            slot, token = torch.where(mask[number])
            state = rows[None, token].reshape(-1, width)
            total.index_add_(0, token, expert(state) * weights[token, slot, None])
        return total.reshape(batch, length, width)


class Deepseek(Experts):
    """Weights read off the probabilities, comparisons with each expert, and ``+=`` at an index."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.view(-1, WIDTH)
        scores = self.gate(rows).softmax(dim=-1)
        chosen = torch.topk(scores, SLOTS, dim=-1)[1]
        weights = scores.gather(1, chosen)
        total = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            total[token] += expert(rows[token]) * weights[token, slot, None]
        return total.view(x.shape)


class Mistral(Experts):
    """The largest logits, with a softmax of these alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.view(-1, WIDTH)
        weights, chosen = torch.topk(self.gate(rows), SLOTS)
        weights = F.softmax(weights, dim=1)
        total = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            total[token] += weights[token, slot, None] * expert(rows[token])
        return total.view(x.shape)


def export(kind: type[Experts], exporter: str, path: Path) -> None:
    """Write one module to a file."""
    torch.manual_seed(0)
    module, x = kind().eval(), torch.randn(2, 7, WIDTH)
    names = {"input_names": ["x"], "output_names": ["y"]}
    if exporter == "dynamo":
        dims = {0: torch.export.Dim("B"), 1: torch.export.Dim("S")}
        torch.onnx.export(
            module, (x,), path, dynamo=True, opset_version=18, external_data=False, verbose=False,
            dynamic_shapes=(dims,), **names,
        )  # fmt: skip
    else:
        torch.onnx.export(
            module, (x,), path, dynamo=False, opset_version=17, dynamic_axes={"x": {0: "B", 1: "S"}}, **names
        )


def main() -> None:
    from tests.fragments.transformers_export import strip

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    FOLDER.mkdir(exist_ok=True)
    for kind in (Mixtral, Deepseek, Mistral):
        for exporter in ("dynamo", "torchscript"):
            path = FOLDER / f"{kind.__name__.lower()}-{exporter}.onnx"
            export(kind, exporter, path)
            strip(path)
            print(path.name, path.stat().st_size, flush=True)


if __name__ == "__main__":
    main()
