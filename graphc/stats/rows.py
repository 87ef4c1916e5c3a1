"""Rows of channels: how a value is read as the input of a contraction, one row for each dot product.

A contraction multiplies rows ``x`` of ``n`` channels with a weight ``(m, n)``. In a MatMul the rows are all positions
of the activation; in a convolution each output position sees a patch; in grouped and batched ones, and where a router
picks a row's expert, rows fall into groups, each with a weight of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from graphc.stats.base import Array, S, Valid

CHUNK = 1 << 24
"""Elements of patches that are laid out in memory together."""


@dataclass(frozen=True)
class Window:
    """The patches of a convolution, per spatial axis; ``pads`` are those before all axes and then those after.

    With ``auto`` (SAME_UPPER or SAME_LOWER), the pads follow from the size.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto: str = ""

    def padding(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Zeros before and after each spatial axis."""
        count = len(self.kernel)
        if not self.auto:
            return list(zip(self.pads[:count], self.pads[count:], strict=True))
        found = []
        for size, kernel, stride, dilation in zip(sizes, self.kernel, self.strides, self.dilations, strict=True):
            total = max(0, (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size)
            less, more = total // 2, total - total // 2
            found.append((less, more) if self.auto == "SAME_UPPER" else (more, less))
        return found

    def patches(self, images: Array) -> Array:
        """``(images, channels, *spatial)`` -> ``(rows, channels * kernel elements)``."""
        spatial = tuple(range(2, images.ndim))
        padded = np.pad(images, [(0, 0), (0, 0), *self.padding(images.shape[2:])])
        spans = tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))
        view = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=spatial)
        steps = (slice(None), slice(None), *(slice(None, None, s) for s in self.strides))
        taps = tuple(slice(None, None, d) for d in self.dilations)
        view = view[(*steps, *taps)]
        view = np.moveaxis(view, 1, 1 + len(spatial))
        return view.reshape(-1, images.shape[1] * int(np.prod(self.kernel)))


@dataclass(frozen=True)
class Rows:
    """How to read a value as rows of channels.

    Attributes:
        axis: The axis of the channels.
        groups: Into how many equal parts the channels fall, each with a weight of its own.
        window: The patches of a convolution, whose channels are then ``channels * kernel elements``.
        batch: How many leading axes only count weights (a batched MatMul with a stack of them).
        by: The name of a value with the number of each row's group (its expert); "" if there is none.
        size: The number of groups that ``by`` counts.
    """

    axis: int = -1
    groups: int = 1
    window: Window | None = None
    batch: int = 0
    by: str = ""
    size: int = 0

    @property
    def grouped(self) -> bool:
        """Whether there is a leading axis of groups in what is collected."""
        return self.groups > 1 or self.batch > 0 or bool(self.by)

    def split(self, x: Array, index: Array | None, valid: Valid) -> Iterator[tuple[int, Array]]:
        """The rows of every group, ``(group, (rows, channels))``; a group may come several times, or not at all."""
        if self.window is not None:
            yield from self._patches(x, self.window)
            return
        x = np.moveaxis(x, self.axis, -1)
        if self.batch:
            flat = x.reshape(-1, *x.shape[self.batch :])
            for group, rows in enumerate(flat):
                yield group, rows.reshape(-1, rows.shape[-1])
            return
        keep = valid.rows(x.shape[:-1])
        rows = x.reshape(-1, x.shape[-1])
        if index is not None:
            yield from self._by_index(rows, index)
            return
        if keep is not None:
            rows = rows[keep]
        width = rows.shape[1] // self.groups
        for group in range(self.groups):
            yield group, rows[:, group * width : (group + 1) * width]

    def _patches(self, x: Array, window: Window) -> Iterator[tuple[int, Array]]:
        width = x.shape[1] // self.groups
        elements = width * int(np.prod(window.kernel)) * int(np.prod(x.shape[2:]))
        step = max(1, CHUNK // max(1, elements))
        for group in range(self.groups):
            part = x[:, group * width : (group + 1) * width]
            for start in range(0, len(x), step):
                yield group, window.patches(part[start : start + step])

    def _by_index(self, rows: Array, index: Array) -> Iterator[tuple[int, Array]]:
        flat = index.reshape(-1)
        if len(rows) % max(len(flat), 1):
            raise ValueError(f"{len(rows)} rows cannot be told apart by {len(flat)} indices")
        flat = np.repeat(flat, len(rows) // max(len(flat), 1))
        for group in range(self.size):
            yield group, rows[flat == group]

    def count(self, x: Array) -> int:
        """How many groups there are."""
        if self.by:
            return self.size
        return int(np.prod(np.moveaxis(x, self.axis, -1).shape[: self.batch])) if self.batch else self.groups

    def width(self, sizes: Sequence[int | None]) -> int:
        """How many channels a row has, as far as the sizes of the value are known."""
        size = sizes[self.axis] if -len(sizes) <= self.axis < len(sizes) else None
        patch = int(np.prod(self.window.kernel)) if self.window else 1
        return (size or 0) // max(self.groups, 1) * patch


PLAIN = Rows()
"""Every position of the value is a row, its last axis the channels."""


def collect(rows: Rows, arrays: Sequence[Array], name: str, valid: Valid, of: Callable[[Array], S]) -> S:
    """The statistic of a value's rows; stacked along a leading axis where they fall into groups.

    Args:
        rows: How the value is read.
        arrays: The value, and the groups of its rows if ``rows.by``.
        name: The value's name.
        valid: Which positions count.
        of: The statistic of rows ``(rows, channels)``, of one group.
    """
    x = finite(arrays[0], name)
    parts: dict[int, S] = {}
    for group, part in rows.split(x, arrays[1] if rows.by else None, valid):
        made = of(part)
        if group in parts:
            parts[group].merge(made)
        else:
            parts[group] = made
    if not rows.grouped:
        return parts[0]
    stacked = [parts[group].arrays() for group in range(rows.count(x))]
    return type(parts[0]).from_arrays({key: np.stack([s[key] for s in stacked]) for key in stacked[0]})


def finite(rows: Array, name: str) -> Array:
    """Rows as float64 or float32.

    Raises:
        ValueError: There is NaN or infinity.
    """
    if rows.dtype not in (np.float64, np.float32):
        rows = rows.astype(np.float32)
    if not np.isfinite(rows).all():
        raise ValueError(f"the value '{name}' has NaN or infinity")
    return rows
