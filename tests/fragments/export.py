"""Writes ``tests/data/fragments/*.onnx``: small PyTorch modules as three exporters write them.

Run it with PyTorch installed (``python tests/fragments/export.py``); the files are committed, tests only read them.
``exported.json`` holds, for each module, the groups that must be found: kind, size, and whether zeros make the cut
exact.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

FOLDER = Path(__file__).parent.parent / "data" / "fragments"


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(6)
        self.a = nn.Conv2d(6, 4, 3, padding=1)
        self.a_bn = nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 6, 3, padding=1)
        self.b_bn = nn.BatchNorm2d(6)
        self.c = nn.Conv2d(6, 7, 3, stride=2, padding=1)
        self.down = nn.Conv2d(6, 7, 1, stride=2)
        self.head = nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem_bn(self.stem(x)))
        x = F.relu(x + self.b_bn(self.b(F.relu(self.a_bn(self.a(x))))))
        x = F.relu(self.c(x) + self.down(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 12, 1, groups=2)
        self.d = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.b = nn.Conv2d(12, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.a(x))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.b(self.d(x))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Conv2d(3, 4, 3, padding=1)
        self.d = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.s1 = nn.Conv2d(6, 3, 1)
        self.s2 = nn.Conv2d(3, 6, 1)
        self.u = nn.ConvTranspose2d(6, 5, 2, stride=2)
        self.o = nn.Conv2d(9, 5, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        e = F.silu(self.e(x))
        d = self.d(e)
        d = d * torch.sigmoid(self.s2(F.relu(self.s1(d.mean((2, 3), keepdim=True)))))
        return self.o(torch.cat([e, self.u(d)], 1))


class PixelShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1)
        self.act = nn.PReLU(12)
        self.b = nn.Conv2d(3, 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.pixel_shuffle(self.act(self.a(x)), 2))


class Transformer(nn.Module):
    """A pre-norm encoder block with fused qkv in timm's order, between an embedding and a class token's head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.pos = nn.Parameter(torch.randn(1, 5, 12))
        self.n1, self.n2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.qkv, self.proj = nn.Linear(12, 24), nn.Linear(8, 12)
        self.f1, self.f2 = nn.Linear(12, 10), nn.Linear(10, 12)
        self.head = nn.Linear(12, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.pos
        n, s, _ = x.shape
        q, k, v = self.qkv(self.n1(x)).reshape(n, s, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, s, 8)
        x = x + self.proj(o)
        x = x + self.f2(F.gelu(self.f1(self.n2(x))))
        return self.head(x[:, 0])


class Rms(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class Llama(nn.Module):
    """Grouped queries, rotary positions, RMSNorm, a gated feed-forward, and a tied head."""

    heads, kv, dim = 4, 2, 6

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 10)
        self.n1, self.n2, self.n3 = Rms(10), Rms(10), Rms(10)
        self.q = nn.Linear(10, 24, bias=False)
        self.k, self.v = nn.Linear(10, 12, bias=False), nn.Linear(10, 12, bias=False)
        self.o = nn.Linear(24, 10, bias=False)
        self.g, self.u = nn.Linear(10, 14, bias=False), nn.Linear(10, 14, bias=False)
        self.d = nn.Linear(14, 10, bias=False)
        self.register_buffer("inv_freq", 1.0 / 100 ** (torch.arange(3) / 3))

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        n, s, _ = x.shape
        angles = torch.arange(s, dtype=torch.float32)[:, None] * self.inv_freq
        angles = torch.cat([angles, angles], -1)
        cos, sin = angles.cos(), angles.sin()
        h = self.n1(x)
        q = self.rotate(self.q(h).view(n, s, 4, 6).transpose(1, 2), cos, sin)
        k = self.rotate(self.k(h).view(n, s, 2, 6).transpose(1, 2), cos, sin)
        v = self.v(h).view(n, s, 2, 6).transpose(1, 2)
        k = k[:, :, None].expand(n, 2, 2, s, 6).reshape(n, 4, s, 6)
        v = v[:, :, None].expand(n, 2, 2, s, 6).reshape(n, 4, s, 6)
        p = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(6), -1)
        x = x + self.o((p @ v).transpose(1, 2).reshape(n, s, 24))
        h = self.n2(x)
        x = x + self.d(F.silu(self.g(h)) * self.u(h))
        return self.n3(x) @ self.embed.weight.T


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(8, 4, batch_first=True, bidirectional=True)
        self.second = nn.LSTM(8, 3, batch_first=True)
        self.head = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.first(x)
        y, _ = self.second(y)
        return self.head(y[:, -1])


class Experts(nn.Module):
    """Top 2 of 4 experts with stacked weights."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.up = nn.Parameter(torch.randn(4, 8, 6) * 0.5)
        self.down = nn.Parameter(torch.randn(4, 6, 5) * 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, index = torch.topk(torch.softmax(self.router(x), -1), 2)
        weight = weight / weight.sum(-1, keepdim=True)
        h = F.silu(x[:, None, None] @ self.up[index])
        return ((h @ self.down[index])[:, :, 0] * weight[:, :, None]).sum(1)


IMAGE = (torch.randn(2, 3, 8, 8),)
IDS = (torch.randint(0, 11, (2, 5)),)
MODULES: dict[str, tuple[type[nn.Module], tuple[torch.Tensor, ...], list[tuple[str, int, bool]]]] = {
    "resnet": (ResNet, IMAGE, [("channel", 6, True), ("channel", 4, True), ("channel", 7, True)]),
    "shuffle": (Shuffle, (torch.randn(2, 4, 8, 8),), [("channel", 6, True)]),
    "unet": (UNet, IMAGE, [("channel", 4, True), ("channel", 6, True), ("channel", 3, True), ("channel", 5, True)]),
    "pixelshuffle": (PixelShuffle, IMAGE, [("channel", 3, True)]),
    "transformer": (
        Transformer,
        IDS,
        [("width", 12, False), ("head", 2, True), ("head_dim", 4, True), ("neuron", 10, True)],
    ),
    "llama": (
        Llama,
        IDS,
        [
            ("width", 10, True), ("head", 2, True), ("head", 2, True), ("head_dim", 3, True),
            ("head_dim", 6, True), ("neuron", 14, True),
        ],
    ),
    "lstm": (Lstm, (torch.randn(2, 5, 8),), [("neuron", 4, True), ("neuron", 3, True)]),
    "experts": (Experts, (torch.randn(7, 8),), [("expert", 4, True), ("neuron", 6, True)]),
}  # fmt: skip
STATIC_BATCH = {"lstm"}


def export(name: str, how: str) -> Path:
    torch.manual_seed(0)
    kind, inputs, _ = MODULES[name]
    module = kind().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.abs().max() == 0:
                parameter.normal_()
    path = FOLDER / f"{name}-{how}.onnx"
    dynamic: dict[str, Any] = {}
    if name not in STATIC_BATCH and name != "transformer":
        if how == "torchscript":
            dynamic = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
        else:
            dynamic = {"dynamic_shapes": ({0: torch.export.Dim("batch", min=1, max=64)},)}
    if how == "torchscript":
        torch.onnx.export(module, inputs, path, dynamo=False, opset_version=18, **dynamic)
    else:
        torch.onnx.export(
            module,
            inputs,
            path,
            dynamo=True,
            opset_version=20,
            optimize=how == "dynamo",
            external_data=False,
            **dynamic,
        )
    _strip(path)
    return path


def _strip(path: Path) -> None:
    """Drop doc strings and metadata: they hold paths of the machine that exported."""
    import onnx

    model = onnx.load(path)

    def clean(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
            for attr in node.attribute:
                if attr.type == onnx.AttributeProto.GRAPH:
                    clean(attr.g)
        del graph.metadata_props[:]
        for value in (*graph.value_info, *graph.input, *graph.output):
            del value.metadata_props[:]
        for held in graph.initializer:
            del held.metadata_props[:]

    clean(model.graph)
    for function in model.functions:
        del function.metadata_props[:]
        for node in function.node:
            node.doc_string = ""
            del node.metadata_props[:]
    del model.metadata_props[:]
    model.graph.doc_string = ""
    onnx.save(model, path)


def main() -> None:
    warnings.simplefilter("ignore")
    FOLDER.mkdir(parents=True, exist_ok=True)
    chosen = sys.argv[1:] or list(MODULES)
    for name in chosen:
        for how in ("dynamo", "dynamo-raw", "torchscript"):
            path = export(name, how)
            print(path.name, path.stat().st_size)
    truth = {name: groups for name, (_, _, groups) in MODULES.items()}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(groups)}" for name, groups in truth.items())
    (FOLDER / "exported.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
