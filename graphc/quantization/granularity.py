"""Which elements of a tensor share a scale: all, those of an index of an axis, or those of a block along an axis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphc.edit import Array


@dataclass(frozen=True)
class Granularity:
    """As DequantizeLinear has it.

    Attributes:
        axis: The axis along which scales differ; None if there is one scale.
        block: How many elements along the axis share a scale, the last block being what is left; 0 if scales have that
            one axis only.
    """

    axis: int | None = None
    block: int = 0

    def attributes(self) -> dict[str, int]:
        """Those of DequantizeLinear."""
        if self.axis is None:
            return {}
        return {"axis": self.axis, "block_size": self.block} if self.block else {"axis": self.axis}

    def reduced(self, values: Array, how: Callable[..., Any]) -> Array:
        """A number of each group, in the shape of scales.

        Args:
            values: The values.
            how: A reduction of numpy, for which the last value may stand several times (``np.min``), or ``np.sum``.
        """
        if self.axis is None:
            return np.asarray(how(values))
        if not self.block:
            return np.asarray(how(values, axis=tuple(i for i in range(values.ndim) if i != self.axis)))
        size = values.shape[self.axis]
        starts = np.arange(0, size, self.block)
        ufunc = {np.min: np.minimum, np.max: np.maximum, np.sum: np.add}[how]
        return np.asarray(ufunc.reduceat(values, starts, axis=self.axis))

    def spread(self, scales: Array, shape: tuple[int, ...]) -> Array:
        """Scales so that they broadcast to values of a shape."""
        if self.axis is None:
            return scales.reshape(())
        if self.block:
            return np.repeat(scales, self.block, self.axis).take(range(shape[self.axis]), self.axis)
        return scales.reshape([-1 if i == self.axis else 1 for i in range(len(shape))])

    def sliced(self, ndim: int) -> int | None:
        """An axis along which groups can be done apart; None if there is none."""
        if self.axis is None:
            return None
        if not self.block:
            return self.axis
        return next((i for i in range(ndim) if i != self.axis), None)
