"""Biases that make up for what rounding does to the means of outputs (Nagel and others, 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import is_op
from graphc.pruning.biases import add_bias
from graphc.quantization.rounding import Codes
from graphc.quantization.sites import Site
from graphc.quantization.store import plain_gemm


def possible(site: Site) -> bool:
    """Whether the outputs of a weight's products can be given a bias, and the means of their inputs be known."""
    if not site.calibrated:
        return False
    for use in site.uses:
        right = use.node.inputs[1] is site.value
        matrix = right and (plain_gemm(use.node) or (is_op(use.node, "MatMul") and len(site.shape) == 2))
        if not (matrix or is_op(use.node, "Conv")):
            return False
    return True


def correct(site: Site, codes: Codes, statistics: Mapping[Any, Any], names: edit.Names) -> list[ir.Value]:
    """Add ``(W - W') mean(x)`` to the outputs of products, before the weight is written; returns what holds the sums.

    Args:
        site: The weight, not written yet.
        codes: What becomes of it.
        statistics: Moments of the rows that it is multiplied with.
        names: For new biases.
    """
    error = np.asarray(site.held.numpy(), dtype=np.float32) - codes.values()
    edit.release(site.held)
    found = []
    for use in site.uses:
        matrices = use.matrices(error).astype(np.float64)
        means = np.atleast_2d(statistics[use.patches].mean)
        bias = np.einsum("gok,gk->go", matrices, np.broadcast_to(means, matrices.shape[::2])).reshape(-1)
        found.append(add_bias(use.node, bias, names))
    return found
