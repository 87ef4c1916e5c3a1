"""What an adapter adds to a weight, as two factors, and the weight with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphc.edit import Array
from graphc.lora.branch import Path
from graphc.rewrites.base import Refused
from graphc.rewrites.weights import PIECE, changed


@dataclass(frozen=True)
class Update:
    """What is added to a weight, seen as a matrix of ``rows`` by the rest, as it is stored: ``scale left @ right``.

    Attributes:
        path: Where ``left`` and ``right`` come from; they are read when needed.
        scale: The factor.
        transposed: Whether the weight is stored as (channels out, channels in).
    """

    path: Path
    scale: float
    transposed: bool

    def factors(self) -> tuple[Array, Array]:
        """``left`` of shape (rows, rank) and ``right`` of shape (rank, columns), float64."""
        path = self.path
        if path.kind == "image":
            left, *rest = (p.weight.array() for p in path.products)
            left = left.reshape(left.shape[:2])
            if path.diagonals[0] is not None:
                left = path.diagonals[0][:, None] * left
            for more in rest[:-1]:
                left = left @ more.reshape(more.shape[:2])
            return left, rest[-1].reshape(len(rest[-1]), -1)
        arrays = [
            p.weight.array() if diagonal is None else p.weight.array() * diagonal
            for p, diagonal in zip(path.products, path.diagonals, strict=True)
        ]
        right, *rest = arrays
        left = rest.pop()
        while rest:
            left = left @ rest.pop()
        if path.width is not None:
            after = path.width - path.offset - right.shape[1]
            right = np.pad(right, ((0, 0), (path.offset, after)))
        return (right.T, left.T) if self.transposed else (left, right)


def updated(
    held: ir.TensorProtocol, updates: Sequence[Update], name: str, factor: Array | None = None
) -> ir.TensorProtocol:
    """A weight plus its updates, computed in float64 and rounded once; a big one when it is read.

    Args:
        held: The weight.
        updates: What is added.
        name: The name of the new tensor.
        factor: What the weight is multiplied by first: it broadcasts to the weight seen as rows by the rest.

    Raises:
        Refused: Values overflow, as far as that can be seen without reading a big float32 weight.
    """

    def compute(array: Array) -> Array:
        factors = [update.factors() for update in updates]
        new = np.empty(array.shape, array.dtype)
        old, made = array.reshape(len(array), -1), new.reshape(len(array), -1)
        rows = max(1, PIECE // old.shape[1])
        for i in range(0, len(old), rows):
            piece = old[i : i + rows].astype(np.float64)
            if factor is not None:
                piece *= factor[i : i + rows] if factor.ndim and len(factor) > 1 else factor
            for update, (left, right) in zip(updates, factors, strict=True):
                piece += (update.scale * left[i : i + rows]) @ right
            with np.errstate(over="ignore"):
                made[i : i + rows] = piece.astype(array.dtype)
        return new

    tensor = changed(held, compute, name)
    if tensor is None:
        raise Refused(f"the folded weight does not fit in {held.dtype.name.lower()}")
    return tensor
