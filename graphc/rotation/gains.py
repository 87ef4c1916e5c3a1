"""Gains of normalisations that ``rotate`` left in the graph as matrices, known again by what they are."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from graphc import edit
from graphc.contraction import Contraction
from graphc.rewrites.weights import reading

_NORMED = ("Div", "Mul", "RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
"""What ends a normalisation by the root mean square, in one operator or in several."""


def turned(uses: list[Contraction]) -> bool:
    """Whether a weight is ``QT G Q`` with a rotation ``Q`` and a diagonal ``G``, behind a normalisation.

    Such a matrix is square and symmetric, as no trained one is. All that comes later is multiplied with it.

    Args:
        uses: All that multiplies with the weight.
    """
    if len(uses) != 1 or len(uses[0].shape) != 2 or uses[0].shape[0] != uses[0].shape[1]:
        return False
    node = uses[0].activation.producer()
    held = edit.tensor(uses[0].weight)
    if node is None or node.op_type not in _NORMED or held is None:
        return False
    with reading(held) as array:
        few = array[:4].astype(np.float64)
        near = 8 * float(ml_dtypes.finfo(array.dtype).eps) * float(np.abs(few).max())  # type: ignore[no-untyped-call]
        if np.abs(few - array[:, :4].T.astype(np.float64)).max() > near or not few[0, 1:].any():
            return False
        wide = array.astype(np.float64)
        return bool(np.abs(wide - wide.T).max() <= 8 * near)
