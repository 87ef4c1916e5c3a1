"""Tiny random transformers as exporters write them: ``tests/data/attention/*.onnx``, and the slow tests' models.

Run it with torch and transformers installed (``python tests/fragments/transformers_export.py``); the files are
committed, tests only read them. Metadata is left out: it names files of the machine.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "data" / "attention"

COMMITTED = (
    ("bert", "sdpa", "dynamo"),
    ("bert", "eager", "torchscript"),
    ("gpt2", "eager", "dynamo"),
    ("gpt2", "sdpa", "torchscript"),
    ("gptj", "eager", "dynamo"),
    ("neox", "sdpa", "dynamo"),
    ("phi", "eager", "dynamo"),
    ("qwen3", "sdpa", "dynamo"),
    ("gemma2", "eager", "dynamo"),
    ("falcon", "sdpa", "dynamo"),
    ("swin", "eager", "dynamo"),
    ("t5", "eager", "dynamo"),
    ("whisper", "sdpa", "dynamo"),
    ("encoder", "eager", "dynamo"),
)
"""Architecture, implementation of attention, exporter."""

EXPECTED: dict[str, dict[str, int]] = {
    "bert": {"Attention": 1, "LayerNormalization": 3, "Gelu": 1},
    "distilbert": {"Attention": 1},
    "gpt2": {"Attention": 1, "Gelu": 1},
    "gptj": {"Attention": 1, "RotaryEmbedding": 2},
    "neox": {"Attention": 1, "RotaryEmbedding": 2},
    "phi": {"Attention": 1, "RotaryEmbedding": 2},
    "llama": {"Attention": 1, "RotaryEmbedding": 2, "RMSNormalization": 3},
    "qwen3": {"Attention": 1, "RotaryEmbedding": 2, "RMSNormalization": 5},
    "gemma2": {"Attention": 1, "RotaryEmbedding": 2, "RMSNormalization": 5},
    "mixtral": {"Attention": 1, "RotaryEmbedding": 2, "RMSNormalization": 3},
    "cohere": {"Attention": 1, "RotaryEmbedding": 2},
    "falcon": {"Attention": 1, "RotaryEmbedding": 2},
    "vit": {"Attention": 1},
    "clip": {"Attention": 1},
    "swin": {"Attention": 2},
    "t5": {"Attention": 3, "RMSNormalization": 7},
    "bart": {"Attention": 3},
    "whisper": {"Attention": 3},
    "encoder": {"Attention": 1},
}
"""What must be recognised of one layer of each architecture."""

_WIDTH, _HEADS, _HIDDEN, _WORDS = 16, 4, 24, 32
_LAYER = {"hidden_size": _WIDTH, "num_hidden_layers": 1, "num_attention_heads": _HEADS, "intermediate_size": _HIDDEN}
_TEXT = {"vocab_size": _WORDS, "max_position_embeddings": 32}
_DECODER = {**_LAYER, **_TEXT, "num_key_value_heads": 2, "use_cache": False}
_SIDES = {
    "d_model": _WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": _HEADS,
    "decoder_attention_heads": _HEADS,
    "encoder_ffn_dim": _HIDDEN,
    "decoder_ffn_dim": _HIDDEN,
    "use_cache": False,
}


def _model(name: str, attention: str) -> Any:
    """A random model of one layer."""
    import transformers as t

    with_attention = {"attn_implementation": attention}
    small: dict[str, Callable[[], Any]] = {
        "bert": lambda: t.BertModel(t.BertConfig(**_LAYER, **_TEXT, **with_attention), add_pooling_layer=False),
        "distilbert": lambda: t.DistilBertModel(
            t.DistilBertConfig(dim=_WIDTH, n_layers=1, n_heads=_HEADS, hidden_dim=_HIDDEN, **_TEXT, **with_attention)
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(_gpt(t.GPT2Config, with_attention)),
        "gptj": lambda: t.GPTJForCausalLM(_gpt(t.GPTJConfig, {**with_attention, "rotary_dim": 2})),
        "neox": lambda: t.GPTNeoXForCausalLM(
            t.GPTNeoXConfig(rotary_pct=0.5, **_LAYER, **_TEXT, use_cache=False, **with_attention)
        ),
        "phi": lambda: t.PhiForCausalLM(
            t.PhiConfig(partial_rotary_factor=0.5, **{**_DECODER, "num_key_value_heads": _HEADS}, **with_attention)
        ),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_DECODER, **with_attention)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(head_dim=8, **_DECODER, **with_attention)),
        "gemma2": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(head_dim=8, sliding_window=4, pad_token_id=0, **_DECODER, **with_attention)
        ),
        "mixtral": lambda: t.MixtralForCausalLM(
            t.MixtralConfig(num_local_experts=4, experts_implementation="batched_mm", **_DECODER, **with_attention)
        ),
        "cohere": lambda: t.CohereForCausalLM(t.CohereConfig(pad_token_id=0, **_DECODER, **with_attention)),
        "falcon": lambda: t.FalconForCausalLM(
            t.FalconConfig(
                **{k: v for k, v in _LAYER.items() if k != "intermediate_size"},
                vocab_size=_WORDS,
                multi_query=True,
                use_cache=False,
                **with_attention,
            )
        ),
        "vit": lambda: t.ViTModel(
            t.ViTConfig(**_LAYER, image_size=8, patch_size=4, **with_attention), add_pooling_layer=False
        ),
        "clip": lambda: t.CLIPTextModel(t.CLIPTextConfig(**_LAYER, **_TEXT, eos_token_id=2, **with_attention)),
        "swin": lambda: t.SwinModel(
            t.SwinConfig(
                image_size=16, patch_size=2, embed_dim=8, depths=[2], num_heads=[2], window_size=4, **with_attention
            ),
            add_pooling_layer=False,
        ),
        "t5": lambda: t.T5Model(
            t.T5Config(
                d_model=_WIDTH,
                d_kv=4,
                d_ff=_HIDDEN,
                num_layers=1,
                num_heads=_HEADS,
                vocab_size=_WORDS,
                use_cache=False,
                decoder_start_token_id=0,
                **with_attention,
            )
        ),
        "bart": lambda: t.BartModel(t.BartConfig(**_SIDES, **_TEXT, **with_attention)),
        "whisper": lambda: t.WhisperModel(
            t.WhisperConfig(
                **_SIDES,
                max_source_positions=8,
                max_target_positions=16,
                num_mel_bins=4,
                vocab_size=_WORDS,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
                **with_attention,
            )
        ),
        "encoder": _encoder,
    }
    return small[name]()


def _gpt(config: Any, more: dict[str, Any]) -> Any:
    return config(n_embd=_WIDTH, n_layer=1, n_head=_HEADS, n_positions=32, vocab_size=_WORDS, use_cache=False, **more)


def _encoder() -> Any:
    """torch's own encoder layer."""
    from torch import nn

    layer = nn.TransformerEncoderLayer(_WIDTH, _HEADS, _HIDDEN, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


def _inputs(name: str) -> tuple[dict[str, Any], list[dict[int, str]]]:
    """Example inputs by name, and their dynamic axes."""
    import torch

    ids = torch.arange(2 * 7).reshape(2, 7) % _WORDS
    mask, both = torch.ones(2, 7, dtype=torch.int64), {0: "batch", 1: "seq"}
    if name == "encoder":
        return {"src": torch.zeros(2, 7, _WIDTH), "src_key_padding_mask": mask == 0}, [both, both]
    if name in ("vit", "swin"):
        size = 8 if name == "vit" else 16
        return {"pixel_values": torch.zeros(2, 3, size, size)}, [{0: "batch"}]
    if name == "whisper":
        return {"input_features": torch.zeros(2, 4, 16), "decoder_input_ids": ids}, [{0: "batch"}, both]
    found = {"input_ids": ids, "attention_mask": mask}
    if name in ("t5", "bart"):
        found["decoder_input_ids"] = ids.clone()
    return found, [both] * len(found)


def export(name: str, attention: str, exporter: str, path: Path, opset: int = 0) -> None:
    """Write one model to a file."""
    import torch

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    model = _model(name, attention)
    inputs, axes = _inputs(name)
    output = "logits" if hasattr(model, "lm_head") or "CausalLM" in type(model).__name__ else "last_hidden_state"

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: Any) -> Any:
            result = self.model(**dict(zip(inputs, values, strict=True)))
            return result if isinstance(result, torch.Tensor) else result[output]

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    common = {"input_names": list(inputs), "output_names": ["output"]}
    if exporter == "dynamo":
        dims = {each: torch.export.Dim(each) for each in ("batch", "seq")}
        torch.onnx.export(
            Positional().eval(),
            tuple(inputs.values()),
            path,
            dynamo=True,
            optimize=False,
            external_data=False,
            verbose=False,
            opset_version=opset or 18,
            dynamic_shapes=(tuple({i: dims[d] for i, d in each.items()} for each in axes),),
            **common,
        )
    else:
        torch.onnx.export(
            Positional().eval(),
            tuple(inputs.values()),
            path,
            dynamo=False,
            do_constant_folding=False,
            opset_version=opset or (17 if attention == "sdpa" else 14),
            dynamic_axes=dict(zip(inputs, axes, strict=True)),
            **common,
        )
    strip(path)


def strip(path: Path) -> None:
    """Leave out what names files of this machine."""
    import onnx

    model = onnx.load(path)
    for holder in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input):
        holder.ClearField("metadata_props")
        holder.ClearField("doc_string")
    onnx.save(model, path)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, attention, exporter in COMMITTED:
        path = FOLDER / f"{name}-{attention}-{exporter}.onnx"
        export(name, attention, exporter, path)
        print(path.name, path.stat().st_size, flush=True)


if __name__ == "__main__":
    main()
