"""Random orthogonal matrices that mix all channels about equally, in ``n log n`` steps."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from graphc.edit import Array


class Orthogonal:
    """A square matrix ``Q`` with ``Q QT = 1``: random signs, then a Hadamard matrix times a random rotation.

    Of ``n = 2^k m`` with odd ``m``, the Hadamard matrix has ``2^k`` rows (Sylvester's) and the rotation ``m``; without
    an odd part it is the randomised Hadamard matrix of QuIP# and QuaRot (Ashkboos and others, 2024).

    Args:
        n: Rows.
        seed: Of the signs and of the rotation.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self._even = n & -n
        random = np.random.default_rng([seed, n])
        self._signs = random.choice([-1.0, 1.0], n)
        odd = n // self._even
        # Signs of R's diagonal make it uniform (Mezzadri, 2007).
        q, r = np.linalg.qr(random.standard_normal((odd, odd)))
        self._odd = q * np.sign(np.diag(r))

    def apply(self, rows: Array) -> Array:
        """``rows @ Q`` for rows ``(..., n)``, in float64."""
        x = (rows.astype(np.float64) * self._signs).reshape(-1, self._even, self.n // self._even)
        half = 1
        while half < self._even:
            pairs = x.reshape(len(x), -1, 2, half, x.shape[-1])
            x = np.concatenate([pairs[:, :, :1] + pairs[:, :, 1:], pairs[:, :, :1] - pairs[:, :, 1:]], axis=2)
            half *= 2
        x = x.reshape(len(x), self._even, -1) @ self._odd / np.sqrt(self._even)
        return np.asarray(x.reshape(rows.shape))

    @cached_property
    def matrix(self) -> Array:
        """The matrix, float64."""
        return self.apply(np.eye(self.n))
