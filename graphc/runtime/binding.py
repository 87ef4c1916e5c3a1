"""Sessions whose outputs are written into buffers that are inputs at the same time, as caches are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from graphc.contract import Arrays, Runnable

ROOM = 64
"""Positions that a buffer has more than what it holds at first."""


class InPlace(Runnable):
    """A session that appends to caches in place; for measuring: what is bound first is run again and again.

    Args:
        handle: An ``onnxruntime.InferenceSession``.
        provider: What runs it.
        inputs: Arrays by input name.
        shared: For each output that is written in place, the input whose buffer it shares, ``[., ., positions, .]``.

    Attributes:
        buffers: The buffers by input name.
    """

    def __init__(self, handle: Any, provider: str, inputs: Arrays, shared: Mapping[str, str]) -> None:
        import onnxruntime as ort

        self.provider = provider
        self._handle, self._binding = handle, handle.io_binding()
        self.buffers: dict[str, Any] = {}
        for name, array in inputs.items():
            if name in shared.values():
                room = np.zeros((*array.shape[:2], ROOM, *array.shape[3:]), array.dtype)
                array = np.concatenate([array, room], axis=2)
            self.buffers[name] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            self._binding.bind_ortvalue_input(name, self.buffers[name])
        for value in handle.get_outputs():
            if value.name in shared:
                self._binding.bind_ortvalue_output(value.name, self.buffers[shared[value.name]])
            else:
                self._binding.bind_output(value.name)

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Compute the outputs of what was bound; they stay where they are, and ``inputs`` are not looked at."""
        self._handle.run_with_iobinding(self._binding)
        return {}

    def results(self) -> dict[str, np.ndarray[Any, Any]]:
        """What the last run computed, by output name; caches with all of their room."""
        names = [value.name for value in self._handle.get_outputs()]
        return dict(zip(names, self._binding.copy_outputs_to_cpu(), strict=True))
