"""Make the models that only ``bench/fuse.py`` has: small encoders of random weights, by both of torch's exporters.

    PYTHON bench/fuse_models.py [NAME...]

``PYTHON`` is the interpreter of an environment with ``bench/requirements-torch.txt``.
"""

from __future__ import annotations

import argparse
from typing import Any

import cache
import torch_export
from catalog import Entry, Values

_SOURCE = "transformers 5.23, random weights, {} exporter"
_NAMES = {"dynamo": "torch.export", "torchscript": "TorchScript"}

SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "whisper-encoder": ("input_features", (1, 80, 512)),
    "vit-tiny": ("pixel_values", (1, 3, 112, 112)),
}
"""By model: its input, and the shape that is measured."""

ENTRIES = tuple(
    Entry(f"{name}-{exporter}", _SOURCE.format(_NAMES[exporter]), ({key: Values(shape)},))
    for name, (key, shape) in SHAPES.items()
    for exporter in _NAMES
)


def whisper() -> Any:
    """The encoder of Whisper tiny, for 256 positions."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=384,
        encoder_layers=4,
        encoder_attention_heads=6,
        encoder_ffn_dim=1536,
        max_source_positions=256,
        attn_implementation="eager",
    )
    return WhisperEncoder(config)


def vit() -> Any:
    """ViT tiny: width 192, 3 heads, 12 layers, 49 patches."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=112,
        attn_implementation="eager",
    )
    return ViTModel(config, add_pooling_layer=False)


def make(name: str) -> None:
    """Export one model, unoptimised and with a dynamic batch."""
    import torch

    model = name.rsplit("-", 1)[0]
    exporter: torch_export.Exporter = "dynamo" if name.endswith("-dynamo") else "torchscript"
    key, shape = SHAPES[model]

    class First(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Any) -> Any:
            return self.inner(x)[0]

    torch.manual_seed(0)
    module = First({"whisper-encoder": whisper, "vit-tiny": vit}[model]().eval()).eval()
    torch_export.export(module, (torch.zeros(2, *shape[1:]),), cache.model(name), exporter, {key: {0: "batch"}})


def main() -> None:
    names = [entry.name for entry in ENTRIES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*names, []], metavar="NAME", help="models to make; default: all")
    for name in parser.parse_args().names or names:
        if not cache.model(name).exists():
            print(f"making {name}", flush=True)
            make(name)


if __name__ == "__main__":
    main()
