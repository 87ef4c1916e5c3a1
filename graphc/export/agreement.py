"""Whether the exported model computes what the module does: both run on the example inputs, and at other sizes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphc import runtime
from graphc.checking import Checker, Comparison, inputs
from graphc.checking.closeness import OutputError
from graphc.contract import Arrays, Runnable
from graphc.errors import BadInput
from graphc.export.arguments import Arguments
from graphc.export.capture import evaluating, quiet

if TYPE_CHECKING:
    import torch

MOST = 4
"""Cases on which module and model are compared, besides the example."""

LARGE = 1 << 30
"""Bytes of weights from which they are compared on the example alone."""


class Eager(Runnable):
    """A module as something that runs: arrays by the names of the model's interface."""

    provider = "torch"

    def __init__(self, module: torch.nn.Module, given: Arguments, model: ir.Model, results: Sequence[int]) -> None:
        self._module, self._given, self._results = module, given, results
        self._inputs = [v.name or "" for v in model.graph.inputs]
        self._outputs = [v.name or "" for v in model.graph.outputs]

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Compute all outputs, by name.

        Raises:
            BadInput: The module does not take these inputs.
        """
        import torch
        from torch.utils import _pytree as pytree

        tensors = iter([_tensor(inputs[name]) for name in self._inputs])
        call = self._given.with_values([next(tensors) if leaf.is_tensor else leaf.value for leaf in self._given.leaves])
        try:
            with evaluating(self._module), quiet():
                result = self._module(*call.args, **call.kwargs)
        except Exception as error:  # whatever somebody's code may raise
            raise BadInput("the module does not run", why=str(error).split("\n")[0]) from error
        leaves = pytree.tree_leaves(result)
        found = [torch.as_tensor(leaves[index]) for index in self._results]
        return {name: _array(tensor) for name, tensor in zip(self._outputs, found, strict=True)}


def _tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    import torch

    held = tensor.detach().cpu()
    if held.is_complex():
        held = torch.view_as_real(held)
    if held.dtype == torch.bfloat16:
        return np.asarray(held.contiguous().view(torch.int16).numpy().view(ir.DataType.BFLOAT16.numpy()))
    return np.asarray(held.contiguous().numpy())


def compare(
    module: torch.nn.Module, given: Arguments, model: ir.Model, results: Sequence[int], seed: int = 0
) -> Comparison:
    """Run the module and its exported model on the same inputs.

    The inputs are the example, and those that fit the model's interface at other sizes and that the module takes.
    The tolerance is the model's own rounding noise, see ``graphc.checking``.

    Args:
        module: With values.
        given: Example inputs.
        model: What was exported; its inputs are the tensors in ``given``.
        results: The numbers of the leaves of the module's result that are the model's outputs.
        seed: Of the inputs made.
    """
    if not runtime.installed():
        return Comparison(True, False, "ONNX Runtime is not installed")
    eager = Eager(module, given, model, results)
    names = [v.name or "" for v in model.graph.inputs]
    example = {name: _array(leaf.value) for name, leaf in zip(names, given.tensors, strict=False)}
    samples: list[Arrays] = [example, *_more(eager, model, seed)]
    found = Checker(model, data=samples, seed=seed).compare(eager)
    if found.ok or not found.outputs or not all(_is_near(each, model) for each in found.outputs if each.why):
        return found
    # torch's kernels are other algorithms than ONNX's operators, not only other roundings of the same.
    worst = max(each.max_rel for each in found.outputs)
    return dataclasses.replace(found, ok=True, why="", notes=(*found.notes, f"kernels differ by {worst:.1g}"))


def _is_near(error: OutputError, model: ir.Model) -> bool:
    """Whether an output has half of its digits in common."""
    dtype = next((v.dtype for v in model.graph.outputs if v.name == error.name), None)
    if dtype is None or not dtype.is_floating_point() or not math.isfinite(error.ratio):
        return False
    return error.max_rel <= math.sqrt(float(ml_dtypes.finfo(dtype.numpy()).eps))  # type: ignore[no-untyped-call]


def _more(eager: Eager, model: ir.Model, seed: int) -> Sequence[Arrays]:
    """Inputs at other sizes that module and model both take."""
    dynamic = any(not isinstance(size, int) for value in model.graph.inputs for size in value.shape or ())
    if not dynamic or runtime.constants_nbytes(model) > LARGE:
        return ()
    found: list[Arrays] = []

    def accepts(arrays: Arrays) -> bool:
        try:
            eager.run(arrays)
        except BadInput:
            return False
        return True

    try:
        for case in inputs.cases(model, seed=seed, accepts=accepts):
            found.append(case.arrays)
            if len(found) == MOST:
                break
    except BadInput:
        return ()
    return found
