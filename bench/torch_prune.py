"""Prune a torch module with Torch-Pruning and export it: the peer of ``bench/shrink.py`` that starts from torch.

    PYTHON bench/torch_prune.py NAME RATIO OUTPUT

Group magnitude (L2), the same ratio in every group. Of transformers, heads and hidden neurons are pruned and the
residual width is not, as in the other tools.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch_models
import torch_pruning


def untouched(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers whose outputs must keep their width: classifiers, and all that writes a residual stream."""
    kept = ("_fc", "attention.output.dense", "output.dense", "embeddings", "lm_head")
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
        and any(name.endswith(suffix) or f".{suffix}." in name for suffix in kept)
    ]


def heads(model: torch.nn.Module) -> dict[torch.nn.Module, int]:
    """Head counts of the query, key and value projections."""
    config = getattr(getattr(model, "model", None), "config", None)
    return {
        module: config.num_attention_heads
        for name, module in model.named_modules()
        if name.endswith((".query", ".key", ".value"))
    }


def main() -> None:
    name, ratio, output = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
    make, inputs, export = torch_models.MAKERS[name]
    torch.manual_seed(0)
    model = make().eval()
    pruner = torch_pruning.pruner.BasePruner(
        model,
        torch_models.example(inputs),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=untouched(model),
        num_heads=heads(model),
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=ratio,
    )
    pruner.step()
    export(model, inputs, output)


if __name__ == "__main__":
    main()
