"""Hugging Face folders that ``bench/frontends.py`` exports, and what ``torch.onnx.export`` alone makes of them.

    python bench/frontend_folders.py FOLDER OUT LAYOUT

writes every graph of the folder's model to ``OUT/GRAPH.onnx``: torch loads the model, and the exporter gets a plain
function of the graph's inputs, so that both tools make graphs with one interface.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, ViTConfig, ViTModel

from graphc.frontends.huggingface import skeleton
from graphc.frontends.huggingface.folder import open_folder
from graphc.frontends.huggingface.inputs import BATCH, PAST, SEQUENCE, Input, example
from graphc.frontends.huggingface.masks import exportable
from graphc.frontends.huggingface.parts import SIZES, parts
from graphc.frontends.huggingface.tasks import model_class

CACHED = Path(__file__).parents[1] / ".cache" / "bench"

TEXT = {**SIZES, BATCH: 1, SEQUENCE: 64, PAST: 0}
TOKEN = {**SIZES, BATCH: 1, SEQUENCE: 1, PAST: 64}


def vit(folder: Path) -> None:
    """The shape of ViT-tiny: 12 layers of width 192, images of 224 x 224."""
    sizes = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    _save(ViTModel, ViTConfig(**sizes), folder)


def mixtral(folder: Path) -> None:
    """Four layers of width 256 with 8 experts each."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    _save(MixtralForCausalLM, MixtralConfig(**sizes, intermediate_size=512, vocab_size=4096), folder)


def large(folder: Path) -> None:
    """A Llama of 1.38 GB: 22 layers of width 1024."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 22, "num_attention_heads": 16, "num_key_value_heads": 8}
    _save(LlamaForCausalLM, LlamaConfig(**sizes, intermediate_size=3584, vocab_size=16000), folder)


def _save(cls: Any, config: Any, folder: Path) -> None:
    import torch

    torch.manual_seed(0)
    cls(config).save_pretrained(folder)


FOLDERS: dict[str, tuple[Callable[[Path], None] | str, str, tuple[dict[str, int], ...]]] = {
    "minilm-hf": ("minilm", "merged", (TEXT,)),
    "mixtral-hf": (mixtral, "merged", (TEXT, TOKEN)),
    "smollm2-hf": ("smollm2-hf", "merged", (TEXT, TOKEN)),
    "smollm2-hf-split": ("smollm2-hf", "split", (TEXT, TOKEN)),
    "vit-hf": (vit, "merged", (TEXT,)),
}
"""What makes the folder or where it lies, the layout of the cache, and the sizes at which its graphs are timed: of one
graph all of them, of two graphs the first and the second."""


def described(inputs: tuple[Input, ...], sizes: dict[str, int]) -> str:
    """The sizes at which a graph is timed, in words; ``model`` where it takes no text."""
    if not any(SEQUENCE in str(dim) for each in inputs for dim in each.dims):
        return "model"
    past = f" after {sizes[PAST]}" if sizes[PAST] else ""
    return f"{sizes[SEQUENCE]} token{'s' * (sizes[SEQUENCE] > 1)}{past}"


def made(source: Callable[[Path], None] | str, scratch: Path) -> Path:
    """The folder of a model; it is made in ``scratch`` if it is not cached."""
    if isinstance(source, str):
        return CACHED / source
    source(scratch)
    return scratch


def interface(folder: Path, layout: str) -> dict[str, tuple[Input, ...]]:
    """The inputs of every graph."""
    opened = open_folder(folder)
    model = skeleton.skeleton(model_class(opened.config), opened.config)
    return {part.name: part.inputs for part in parts(model, folder, layout)}


def arrays(inputs: tuple[Input, ...], sizes: dict[str, int]) -> dict[str, Any]:
    """Inputs of a graph at some sizes; tokens and positions are those of a text."""
    given = {each.name: tensor.numpy() for each, tensor in zip(inputs, example(inputs, sizes), strict=True)}
    generator = np.random.default_rng(0)
    for each in inputs:
        if each.kind == "ids":
            given[each.name] = generator.integers(0, each.bound, each.shape(sizes))
        elif each.kind == "values":
            given[each.name] = generator.standard_normal(each.shape(sizes), np.float32)
    return given


def export(folder: Path, out: Path, layout: str) -> None:
    """What somebody does without graphc: load the model, export each graph with the exporter's own optimisation."""
    import torch

    opened = open_folder(folder)
    model: Any = skeleton.loaded(model_class(opened.config), opened)
    out.mkdir()
    for part in parts(model, folder, layout):
        with exportable(), skeleton.calling(model, part.forward):
            torch.onnx.export(
                model,
                (example(part.inputs, SIZES),),
                str(out / f"{part.name}.onnx"),
                input_names=[each.name for each in part.inputs],
                output_names=list(part.outputs),
                dynamic_shapes=([dict.fromkeys(each.axes, torch.export.Dim.AUTO) for each in part.inputs],),
                optimize=True,
                external_data=False,
            )


def graphs(folder: Path) -> dict[str, Path]:
    """The graphs in what a tool wrote."""
    return {path.stem: path for path in sorted(folder.glob("*.onnx"))}


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
