"""Torch modules with random weights, and their example inputs, as ``bench/frontends.py`` exports them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

Example = tuple[torch.nn.Module, dict[str, Any]]


class _Tensor(torch.nn.Module):
    """A transformers model with one tensor as its result."""

    def __init__(self, model: torch.nn.Module, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output


class _Text(_Tensor):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[self.output]


class _Image(_Tensor):
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values)[self.output]


def _tokens(vocabulary: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (2, 64), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def minilm() -> Example:
    """The shape of all-MiniLM-L6-v2: 6 layers of width 384."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    model = BertModel(BertConfig(**sizes), add_pooling_layer=False)
    return _Text(model, "last_hidden_state"), _tokens(30522)


def vit() -> Example:
    """The shape of ViT-tiny: 12 layers of width 192, images of 224 x 224."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    model = ViTModel(ViTConfig(**sizes), add_pooling_layer=False)
    return _Image(model, "last_hidden_state"), {"pixel_values": torch.randn(2, 3, 224, 224)}


def smollm2() -> Example:
    """The blocks of SmolLM2-135M, 8 of its 30, with a tenth of its vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        num_hidden_layers=8,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=4915,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return _Text(LlamaForCausalLM(config), "logits"), _tokens(4915)
