"""Time finding what belongs together in one model: graphc on the ONNX graph, Torch-Pruning on the torch module.

    PYTHON bench/group_models.py NAME ROUNDS

``PYTHON`` is the interpreter of an environment with ``bench/requirements-torch.txt``. Both tools run in one process,
taking turns. A line of JSON comes after every round, so that a round that does not end costs only itself.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import cache
import onnx_ir as ir
import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional
from torch_export import export

from graphc.axes.groups import analyse

Example = tuple[nn.Module, Any]


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and batch normalisation."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Bottleneck(nn.Module):
    """He et al. 2016, figure 5."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.a, self.b, self.c = conv(inputs, width), conv(width, width, 3, stride), conv(width, outputs)
        changed = stride > 1 or inputs != outputs
        self.shortcut = conv(inputs, outputs, 1, stride) if changed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu(self.b(functional.relu(self.a(x))))
        return functional.relu(self.c(inner) + self.shortcut(x))


def resnet50() -> Example:
    layers: list[nn.Module] = [conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(count):
            layers.append(Bottleneck(inputs, width, stride if i == 0 else 1))
            inputs = 4 * width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)]
    return nn.Sequential(*layers, *head), torch.randn(1, 3, 224, 224)


class Dense(nn.Module):
    """Huang et al. 2017: what a layer makes is joined to what it was given."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, 4 * growth, 1, bias=False))
        self.second = nn.Sequential(
            nn.BatchNorm2d(4 * growth), nn.ReLU(), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.second(self.first(x))], 1)


def densenet121() -> Example:
    layers: list[nn.Module] = [conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    width = 64
    for k, count in enumerate((6, 12, 24, 16)):
        for _ in range(count):
            layers.append(Dense(width, 32))
            width += 32
        if k < 3:
            layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
            width //= 2
    head = [nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000)]
    return nn.Sequential(*layers, *head), torch.randn(1, 3, 224, 224)


class Block(nn.Module):
    """A pre-norm transformer block with one matrix for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        made = self.qkv(self.first(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = made.permute(2, 0, 3, 1, 4).unbind(0)
        scores = torch.softmax(q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5, -1)
        x = x + self.out((scores @ v).transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.second(x))))


class ViT(nn.Module):
    """ViT-S/16 (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int = 384, heads: int = 6, layers: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 197, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit() -> Example:
    return ViT(), torch.randn(1, 3, 224, 224)


class C2f(nn.Module):
    """The block of YOLOv8: two halves, one of which goes through bottlenecks, all joined."""

    def __init__(self, inputs: int, outputs: int, count: int) -> None:
        super().__init__()
        half = outputs // 2
        self.enter, self.leave = conv(inputs, outputs), conv((2 + count) * half, outputs)
        self.inner = nn.ModuleList(
            nn.Sequential(conv(half, half, 3), nn.SiLU(), conv(half, half, 3)) for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = list(functional.silu(self.enter(x)).chunk(2, 1))
        for inner in self.inner:
            parts.append(parts[-1] + functional.silu(inner(parts[-1])))
        return functional.silu(self.leave(torch.cat(parts, 1)))


class Yolo(nn.Module):
    """A backbone, a feature pyramid and two heads in the manner of YOLOv8-s."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 32, 3, 2), nn.SiLU(), conv(32, 64, 3, 2), nn.SiLU(), C2f(64, 64, 1))
        self.middle = nn.Sequential(conv(64, 128, 3, 2), nn.SiLU(), C2f(128, 128, 2))
        self.deep = nn.Sequential(conv(128, 256, 3, 2), nn.SiLU(), C2f(256, 256, 2))
        self.up = C2f(256 + 128, 128, 1)
        self.down, self.join = conv(128, 128, 3, 2), C2f(128 + 256, 256, 1)
        self.heads = nn.ModuleList(nn.Sequential(conv(w, 64, 3), nn.SiLU(), nn.Conv2d(64, 84, 1)) for w in (128, 256))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        middle = self.middle(self.stem(x))
        deep = self.deep(middle)
        fine = self.up(torch.cat([functional.interpolate(deep, scale_factor=2.0), middle], 1))
        coarse = self.join(torch.cat([self.down(fine), deep], 1))
        return self.heads[0](fine), self.heads[1](coarse)


def yolo() -> Example:
    return Yolo(), torch.randn(1, 3, 640, 640)


def minilm() -> Example:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    config._attn_implementation = "eager"
    return BertModel(config, add_pooling_layer=False), {"input_ids": torch.ones(1, 8, dtype=torch.long)}


def smollm2() -> Example:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=4096,
        use_cache=False,
    )
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config), {"input_ids": torch.ones(1, 8, dtype=torch.long)}


MODELS: dict[str, tuple[Callable[[], Example], str]] = {
    "resnet50": (resnet50, ""),
    "densenet121": (densenet121, ""),
    "vit-s": (vit, ""),
    "yolo-like": (yolo, ""),
    "minilm": (minilm, "minilm-dynamo"),
    "smollm2": (smollm2, "smollm2-dynamo"),
}
"""Module and, where exporting takes minutes, the benchmark model that was exported from the same architecture."""


def graph(name: str, module: nn.Module, example: Any, cached: str) -> ir.Model:
    path = cache.model(cached) if cached else cache.root() / f"groups-{name}.onnx"
    if not path.exists():
        export(module, (example,), path, "torchscript", {"x": {}}, opset=17, fold=True)
    return ir.load(path)


def peer(module: nn.Module, example: Any) -> dict[str, float]:
    """Seconds until Torch-Pruning has its dependency graph, and until it has listed its groups."""
    start = time.process_time()
    built = torch_pruning.DependencyGraph().build_dependency(module, example_inputs=example)
    graph_s = time.process_time() - start
    groups = len(list(built.get_all_groups()))
    return {
        "torch_pruning_s": graph_s,
        "torch_pruning_groups_s": time.process_time() - start,
        "torch_pruning_groups": groups,
    }


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    name, rounds = sys.argv[1], int(sys.argv[2])
    build, cached = MODELS[name]
    module, example = build()
    module.eval()
    model = graph(name, module, example, cached)
    analyse(model)
    # What was loaded before (torch above all) is not searched for garbage while either tool runs.
    gc.collect()
    gc.freeze()
    for _ in range(rounds):
        start = time.process_time()
        found = analyse(model)
        ours = time.process_time() - start
        row: dict[str, Any] = {"nodes": sum(1 for _ in model.graph), "groups": len(found), "graphc_s": ours}
        print(json.dumps(row), flush=True)
        try:
            row = peer(module, example)
        except Exception as problem:
            row = {"failure": f"{type(problem).__name__}: {problem}".splitlines()[0][:120]}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
