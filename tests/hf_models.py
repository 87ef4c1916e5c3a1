"""Tiny models of transformers with random weights, saved as ``save_pretrained`` writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = {**_SMALL, "vocab_size": 99, "max_position_embeddings": 128}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_PICTURES = {**_SMALL, "image_size": 32, "patch_size": 8}
_TWO = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 99} | {
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
_WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", _TEXT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {**_TEXT, "type_vocab_size": 1, "pad_token_id": 1}),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 99},
    ),
    "modernbert": ("ModernBertModel", "ModernBertConfig", {**_TEXT, "local_attention": 8, "pad_token_id": 0}),
    "vit": ("ViTForImageClassification", "ViTConfig", _PICTURES),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**_TEXT, "eos_token_id": 98, "bos_token_id": 97, "pad_token_id": 1},
            "vision_config": _PICTURES,
            "projection_dim": 24,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
        | {"decoder_start_token_id": 0},
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**_TWO, "max_position_embeddings": 64}),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**_TWO, "max_source_positions": 20, "max_target_positions": 40, "num_mel_bins": 8},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_GROUPED, "head_dim": 8, "sliding_window": 6}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GROUPED, **_WINDOWS, "head_dim": 8}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": 6}),
    "phi": ("PhiForCausalLM", "PhiConfig", {**_TEXT, "bos_token_id": 1, "eos_token_id": 2}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "vocab_size": 99, "n_positions": 128}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
}
"""Class, configuration and its settings, by family."""

GENERATES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi", "phi3", "gpt2", "mixtral")
"""The decoders of text."""


def make(family: str) -> Any:
    """The model, with biases and norms that are not all alike."""
    import torch

    cls, config, settings = MODELS[family]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save(family: str, folder: Path, change: Callable[[Any], Any] = lambda model: model) -> Path:
    """The model as ``save_pretrained`` writes it."""
    from graphc.frontends.huggingface.folder import quiet

    with quiet():
        change(make(family)).save_pretrained(folder)
    return folder
