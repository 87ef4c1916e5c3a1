"""Compares exported graphs with the torch model that they came from, at several sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from graphc.errors import BadInput, CheckFailed
from graphc.frontends.huggingface.inputs import BATCH, ENCODED, PAST, SEQUENCE, sample
from graphc.frontends.huggingface.parts import Part

if TYPE_CHECKING:
    import onnx_ir as ir

LARGEST = 1 << 30
"""Bytes of weights up to which a model is compared: torch holds them in memory."""

TOLERANCE = float(np.sqrt(np.finfo(np.float32).eps))
"""Largest difference allowed, in parts of the largest number of the output."""

_CASES: Mapping[str, tuple[int, ...]] = {
    BATCH: (1, 2, 3, 1, 2),
    SEQUENCE: (1, 7, 1, 5, 4),
    PAST: (0, 0, 9, 6, 3),
    ENCODED: (4, 9, 5, 1, 8),
    "samples": (4000, 5000, 4800, 6000, 4400),
}
_OTHERS = (1, 3, 2, 5, 4)
"""Sizes of dynamic dimensions, case by case; with 1, and with an empty past."""


def against_torch(part: Part, model: ir.Model, seed: int = 0) -> dict[str, Any]:
    """Run a graph in ONNX Runtime and the part in torch, on the same random inputs.

    Batches of several are padded on the left. torch runs with transformers' own masks.

    Args:
        part: Made from a model that has its weights.
        model: The graph.
        seed: Of the inputs.

    Returns:
        ``cases`` (the sizes of each), ``worst`` (largest difference, in parts of the output's largest number).

    Raises:
        BadInput: ONNX Runtime is missing or does not run the graph.
        CheckFailed: They differ.
    """
    import torch

    from graphc import runtime

    session = runtime.session(model, optimise=False, frugal=True)
    symbols = {name for each in part.inputs for dim in each.axes.values() for name in dim.split(" + ")}
    cases, worst = [], 0.0
    for number in range(len(_OTHERS)):
        sizes = {name: _CASES.get(name, _OTHERS)[number] for name in sorted(symbols) if not name.isdigit()}
        if sizes in cases:
            continue
        inputs = sample(part.inputs, sizes, np.random.default_rng((seed, number)))
        with torch.no_grad():
            # A forward may write into what it is given.
            wanted = part.forward([torch.from_numpy(array.copy()) for array in inputs.values()])
        found = session.run({name: inputs[name] for name in session.input_names})
        for name, want in zip(part.outputs, wanted, strict=True):
            error = _difference(found[name], want.numpy())
            worst = max(worst, error)
            if not error <= TOLERANCE:
                raise CheckFailed(
                    f"the exported {part.name} differs from the torch model",
                    where=f"output '{name}' at {', '.join(f'{k}={v}' for k, v in sizes.items())}",
                    why=f"by {error:.2g} of its largest number, more than {TOLERANCE:.2g}",
                    hint="please report this as a defect of graphc; --no-verify goes on all the same",
                )
        cases.append(sizes)
    session.close()
    return {"cases": cases, "worst": worst}


def _difference(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    """The largest difference in parts of the largest number wanted; infinite where shapes differ."""
    if found.shape != wanted.shape:
        return float("inf")
    if not wanted.size:
        return 0.0
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    if np.array_equal(a, b, equal_nan=True):
        return 0.0
    return float(np.max(np.abs(a - b)) / max(float(np.max(np.abs(b))), np.finfo(np.float32).tiny))


def can_compare() -> bool:
    """Whether ONNX Runtime is there."""
    from graphc import runtime

    try:
        runtime.require()
    except BadInput:
        return False
    return True
