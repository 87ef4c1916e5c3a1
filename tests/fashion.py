"""Fashion-MNIST pictures, as the models of ``tests/data`` were trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

Part = Literal["calib", "test"]


def fashion(part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Pictures ``(1000, 1, 28, 28)`` and their classes ``(1000,)``."""
    with np.load(Path(__file__).parent / "data" / "fashion_mnist_2k.npz", allow_pickle=False) as data:
        pictures = ((data[f"{part}_x"][:, None].astype(np.float32) / 255) - 0.286) / 0.353
        return pictures.astype(np.float32), data[f"{part}_y"].astype(np.int64)


def batches(part: Part, count: int, size: int) -> list[dict[str, np.ndarray]]:
    """The first pictures as samples of so many each."""
    pictures, _ = fashion(part)
    return [{"image": pictures[i : i + size]} for i in range(0, count, size)]
