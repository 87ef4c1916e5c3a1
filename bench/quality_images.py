"""The image classifiers of ``bench/quality.py``: Fashion-MNIST, accuracy on 1000 test images at parts of the FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from experiment import Array, Experiment, Variant, methods

from graphc import runtime

ROOT = Path(__file__).parents[1]
RATIOS = (0.3, 0.5)

ONE_SHOT = {
    "random": "criterion=random",
    "magnitude": "criterion=l2",
    "magnitude, global": "criterion=l2 allocate=global",
    "taylor": "criterion=taylor allocate=global",
    "flap": "criterion=flap allocate=global compensate=mean",
    "flap + ls": "criterion=flap allocate=global compensate=ls",
    "wanda + ls": "criterion=wanda compensate=ls",
    "obs + ls": "criterion=obs compensate=ls",
    "obs, per cost + ls": "criterion=obs allocate=per-cost compensate=ls",
    "obs, knapsack + ls": "criterion=obs allocate=knapsack compensate=ls",
    "obs, evolution + ls": "criterion=obs allocate=evolution compensate=ls",
    "obs + ls, sequential": "criterion=obs compensate=ls sequential=true",
}

HEALED = {
    "magnitude, healed": "criterion=l2",
    "flap + ls, healed": "criterion=flap allocate=global compensate=ls",
    "obs + ls, healed": "criterion=obs compensate=ls",
    "obs, per cost + ls, healed": "criterion=obs allocate=per-cost compensate=ls",
}
"""What is healed afterwards: 200 steps on the calibration images, with their labels."""

ABOUT = """\
The part removed is of the FLOPs; the column FLOPs is what is left, as `graphc inspect` counts the file of each row.
Calibration has 1000 images, with labels for gradients and healing. Torch-Pruning 1.6.1 (`bench/torch_fashion.py`)
prunes the same model as a torch module, by its group importances, to the same part of the FLOPs."""


def resnet(text: Path | None) -> Experiment:
    """ResNet-8: channels go."""
    return _fashion("fmnist_resnet", "channel")


def vit(text: Path | None) -> Experiment:
    """A ViT of 4 layers: heads and neurons go."""
    return _fashion("fmnist_vit_tiny", "head,neuron")


def _peers(name: str) -> Sequence[Variant]:
    """Torch-Pruning with its two usual importances, the same ratio everywhere or one threshold."""
    return [
        Variant(f"Torch-Pruning: {importance}, {scope}", ratio, "", peer=(name, importance, scope, f"{1 - ratio:g}"))
        for ratio in RATIOS
        for importance in ("magnitude", "taylor")
        for scope in ("local", "global")
    ]


def _fashion(name: str, kinds: str) -> Experiment:
    with np.load(ROOT / "tests" / "data" / "fashion_mnist_2k.npz") as stored:
        arrays = {key: stored[key] for key in stored.files}

    def images(key: str) -> Array:
        return ((arrays[key].astype(np.float32) / 255 - 0.286) / 0.353)[:, None]

    calibration = [
        ({"image": images("calib_x")[i : i + 50]}, arrays["calib_y"][i : i + 50].astype(np.int64))
        for i in range(0, 1000, 50)
    ]
    test, labels = images("test_x"), arrays["test_y"]

    def accuracy(path: Path) -> float:
        session = runtime.session(path, optimise=True, threads=1)
        found = [session.run({"image": test[i : i + 100]})["logits"].argmax(axis=1) for i in range(0, 1000, 100)]
        return float((np.concatenate(found) == labels).mean())

    variants = methods("flops", kinds, 1.0, RATIOS, ONE_SHOT)
    variants += methods("flops", kinds, 1.0, RATIOS, HEALED, "shrink,heal")
    variants += _peers(name)
    model = ROOT / "tests" / "data" / f"{name}.onnx"
    sample = {"image": test[:32]}
    return Experiment(model, "simplify,fuse", calibration, accuracy, "accuracy", sample, variants, ABOUT)
