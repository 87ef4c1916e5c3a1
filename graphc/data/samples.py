"""Samples: cases to feed a model, and what its outputs should be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np

from graphc.contract import Arrays

Array = np.ndarray[Any, np.dtype[Any]]


class Samples(Sequence[Arrays]):
    """Cases, each arrays by input name; made when they are looked at, where they would be large together.

    Args:
        cases: The cases, or functions that make them.
        labels: What the outputs should be, one array a case; empty if unknown.
    """

    def __init__(self, cases: Sequence[Arrays | Callable[[], Arrays]], labels: Sequence[Array] = ()) -> None:
        self._cases = cases
        self.labels = tuple(labels)

    @overload
    def __getitem__(self, index: int) -> Arrays: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Arrays | Samples:
        if isinstance(index, slice):
            return Samples(self._cases[index], self.labels[index])
        found = self._cases[index]
        return found() if callable(found) else found

    def __len__(self) -> int:
        return len(self._cases)
