"""What a pass can ask to have collected, and what it gets: requests and statistics.

A request is hashable and says what is wanted of which values; equal requests of several passes are collected once. A
statistic holds sums that can be merged: that of two halves of the data is that of the whole.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class Statistic(abc.ABC):
    """Sums over rows of data. A subclass is a dataclass whose fields are arrays and numbers."""

    @abc.abstractmethod
    def merge(self, other: Self) -> None:
        """Add what another one saw to this one, in place."""

    def arrays(self) -> dict[str, Array]:
        """All fields as arrays, for storage."""
        return {f.name: np.asarray(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Self:
        """What :meth:`arrays` gave, as a statistic."""
        return cls(**{f.name: np.array(arrays[f.name]) for f in dataclasses.fields(cls)})  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())


S = TypeVar("S", bound=Statistic)


class Valid:
    """Which positions of a sample are real and not padding.

    Args:
        mask: ``(batch, length)``, true where a position counts; None if all do.
    """

    def __init__(self, mask: Array | None = None) -> None:
        self._mask = None if mask is None or mask.all() else mask

    def rows(self, shape: Sequence[int]) -> Array | None:
        """Which rows count of a value whose axes but the last have this shape, flat; None if all do, or none is known.

        The mask is met at the first two axes, at the first and the last one (behind heads), or where both are one.
        """
        if self._mask is None:
            return None
        batch, length = self._mask.shape
        shape = tuple(shape)
        if shape[:2] == (batch, length):
            mask = self._mask.reshape(batch, length, *[1] * (len(shape) - 2))
        elif len(shape) > 2 and (shape[0], shape[-1]) == (batch, length):
            mask = self._mask.reshape(batch, *[1] * (len(shape) - 2), length)
        elif shape[:1] == (batch * length,):
            mask = self._mask.reshape(batch * length, *[1] * (len(shape) - 1))
        else:
            return None
        return np.broadcast_to(mask, shape).reshape(-1)


def itself(name: str) -> str:
    """What a value is called among gradients, which are called as their values."""
    return f"\0{name}"


@dataclass(frozen=True)
class Request(abc.ABC, Generic[S]):
    """Something to be collected over the calibration data.

    A subclass is a frozen dataclass: equal ones are collected once.
    """

    statistic: ClassVar[type[Any]]
    """What it gives."""
    backward: ClassVar[bool] = False
    """Whether :meth:`of` gets the gradients of the loss by the values, instead of the values."""

    @abc.abstractmethod
    def values(self) -> tuple[str, ...]:
        """The names of the values that are looked at, in the order of :meth:`of`."""

    def given(self) -> tuple[str, ...]:
        """With ``backward``: those among :meth:`values` that are wanted themselves, not the gradients by them."""
        return ()

    def named(self) -> tuple[str, ...]:
        """What each of :meth:`values` is called where values are held together with gradients."""
        return tuple(itself(name) if name in self.given() else name for name in self.values())

    @abc.abstractmethod
    def of(self, arrays: Sequence[Array], valid: Valid) -> S:
        """The statistic of one sample.

        Args:
            arrays: The values, or with ``backward`` the loss's gradients by them, but for those :meth:`given`.
            valid: Which positions count.

        Raises:
            ValueError: They are not what the request says; the message says why.
        """

    def nbytes(self, sizes: Sequence[Sequence[int | None]]) -> int:
        """About how much memory the statistic takes, given the sizes of the values' axes as far as known."""
        return 0


class Statistics(Mapping[Request[Any], Any]):
    """What was collected, by request. Large ones stay on disk until they are looked at, and are not kept after.

    Args:
        held: Functions that read a statistic, by request.
    """

    def __init__(self, held: Mapping[Request[Any], Any] | None = None) -> None:
        self._held = dict(held or {})

    def __getitem__(self, request: Request[S]) -> S:
        found = self._held[request]
        statistic: S = found() if callable(found) else found
        return statistic

    def __iter__(self) -> Iterator[Request[Any]]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)
