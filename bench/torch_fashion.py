"""Prune a Fashion-MNIST model with Torch-Pruning and export it: the peer of ``bench/quality.py``.

    PYTHON bench/torch_fashion.py NAME IMPORTANCE SCOPE PART OUTPUT

``NAME`` is a model of ``tests/data``, whose weights go into a torch module of the same make. ``IMPORTANCE`` is
magnitude or taylor (the loss of the calibration images), ``SCOPE`` is local (the same ratio in every group) or global.
The ratio is the one that comes nearest to ``PART`` of the FLOPs, as torch counts them. Of the transformer, heads and
hidden neurons are pruned, as graphc does, and locally the number of heads that is nearest to the ratio.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import torch
import torch_pruning
from onnx import numpy_helper
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

HEADS = 4
DATA = Path(__file__).parents[1] / "tests" / "data"


class Block(nn.Module):
    """Two convolutions and a shortcut; batch norms are part of the weights already."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(inner, outer, 3, stride, 1)
        self.c2 = nn.Conv2d(outer, outer, 3, 1, 1)
        self.sc = nn.Sequential(nn.Conv2d(inner, outer, 1, stride)) if stride > 1 else nn.Sequential()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.c2(torch.relu(self.c1(x))) + self.sc(x))


class ResNet(nn.Module):
    """``tests/data/fmnist_resnet.onnx``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, 2, 1)
        self.layers = nn.Sequential(Block(32, 32, 1), Block(32, 64, 2), Block(64, 128, 2))
        self.fc = nn.Linear(128, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layers(torch.relu(self.stem(image))).mean((2, 3)))


class Attention(nn.Module):
    """Heads of 24; there may be any number of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.reshape(projected.shape[0], projected.shape[1], -1, 24).transpose(1, 2)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        mixed = torch.softmax(q @ k.transpose(2, 3) * 24**-0.5, -1) @ v
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(width, 1e-12)
        self.attention = Attention(width)
        self.layernorm_after = nn.LayerNorm(width, 1e-12)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 2 * width), "fc2": nn.Linear(2 * width, width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.layernorm_before(x))
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.layernorm_after(x))))


class ViT(nn.Module):
    """``tests/data/fmnist_vit_tiny.onnx``."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 96))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 50, 96))
        self.projection = nn.Conv2d(1, 96, 4, 4)
        self.layers = nn.Sequential(*(Layer(96) for _ in range(4)))
        self.layernorm = nn.LayerNorm(96, 1e-12)
        self.classifier = nn.Linear(96, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        patches = self.projection(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], 1) + self.position_embeddings
        return self.classifier(self.layernorm(self.layers(x))[:, 0])


def weights(name: str) -> dict[str, torch.Tensor]:
    """The parameters of a model of ``tests/data``, under the names of the modules above."""
    graph = onnx.load(DATA / f"{name}.onnx").graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    readers = {name: node for node in graph.node for name in node.input}
    found = {}
    for tensor, array in held.items():
        reader, array = readers[tensor], torch.from_numpy(array.copy())
        if reader.op_type == "MatMul":  # a transposed weight without its name: that of the bias behind it
            bias = next(i for i in readers[reader.output[0]].input if i in held)
            found[bias.replace(".bias", ".weight")] = array.T
        else:
            found[tensor.replace(".weight_bias", ".bias")] = array
    for part in ("m.", "vit.", "embeddings.", "patch_embeddings."):
        found = {key.removeprefix(part): array for key, array in found.items()}
    return found


def model(name: str) -> nn.Module:
    """The trained module."""
    made = ResNet() if name == "fmnist_resnet" else ViT()
    known = weights(name)
    made.load_state_dict({key: known[key] for key in made.state_dict()})
    return made.eval()


def flops(made: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made(torch.zeros(1, 1, 28, 28))
    return int(counter.get_total_flops())


def pruned(name: str, importance: str, scope: str, ratio: float) -> nn.Module:
    """The module without ``ratio`` of its channels, or of its heads and neurons."""
    made = model(name)
    taylor = importance == "taylor"
    rank = torch_pruning.importance
    kept = [each for each in made.modules() if each in (getattr(made, "fc", None), getattr(made, "classifier", None))]
    heads: dict[nn.Module, int] = {}
    for key, each in made.named_modules():
        if key.endswith(("q_proj", "k_proj", "v_proj")):
            heads[each] = HEADS
        if key.endswith(("o_proj", "fc2", "projection")):
            kept.append(each)
    pruner = torch_pruning.pruner.BasePruner(
        made,
        torch.zeros(1, 1, 28, 28),
        importance=rank.GroupTaylorImportance() if taylor else rank.GroupMagnitudeImportance(p=2),
        global_pruning=scope == "global",
        pruning_ratio=ratio,
        ignored_layers=kept,
        num_heads=heads,
        prune_num_heads=bool(heads),
        prune_head_dims=not heads,
        head_pruning_ratio=round(ratio * HEADS) / HEADS if scope == "local" else ratio,
    )
    if taylor:
        with np.load(DATA / "fashion_mnist_2k.npz") as stored:
            images = torch.from_numpy(((stored["calib_x"].astype(np.float32) / 255 - 0.286) / 0.353)[:, None])
            labels = torch.from_numpy(stored["calib_y"].astype(np.int64))
        nn.functional.cross_entropy(made(images), labels).backward()
    pruner.step()
    return made


def main() -> None:
    name, importance, scope, part, output = *sys.argv[1:4], float(sys.argv[4]), Path(sys.argv[5])
    wanted = part * flops(model(name))
    low, high = 0.0, 1.0
    while high - low > 4e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if flops(pruned(name, importance, scope, middle)) <= wanted else (middle, high)
    found = [pruned(name, importance, scope, ratio) for ratio in (low, high)]
    torch.onnx.export(
        min(found, key=lambda each: abs(flops(each) - wanted)),
        (torch.zeros(2, 1, 28, 28),),
        output,
        dynamo=True,
        optimize=False,
        external_data=False,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )


if __name__ == "__main__":
    main()
