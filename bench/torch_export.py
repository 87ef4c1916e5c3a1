"""How torch modules become benchmark models: by either exporter, unoptimised; a file is there once it is complete."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Exporter = Literal["dynamo", "torchscript"]


def export(
    module: Any,
    example: tuple[Any, ...],
    path: Path,
    exporter: Exporter,
    inputs: Mapping[str, Mapping[int, str]],
    *,
    opset: int = 14,
    fold: bool = False,
) -> None:
    """Write a module as ONNX.

    Args:
        module: It takes tensors by position, and makes one.
        example: Its inputs.
        path: The file.
        exporter: ``dynamo`` for the one of ``torch.export``.
        inputs: The names of the inputs, with those of their dynamic axes; TorchScript gives the output the first one's.
        opset: TorchScript's; the other has its own.
        fold: Whether TorchScript's exporter folds constants.
    """
    import torch

    partial = path.with_suffix(".partial")
    common: dict[str, Any] = {"input_names": list(inputs)}
    if any(inputs.values()):
        common["output_names"] = ["output"]
    if exporter == "dynamo":
        dims = {name: torch.export.Dim(name) for axes in inputs.values() for name in axes.values()}
        common["dynamic_shapes"] = tuple({axis: dims[name] for axis, name in axes.items()} for axes in inputs.values())
        common |= {"optimize": False, "external_data": False}
    else:
        dynamic = {**inputs, "output": next(iter(inputs.values()))} if any(inputs.values()) else None
        common |= {"do_constant_folding": fold, "opset_version": opset, "dynamic_axes": dynamic}
    torch.onnx.export(module, example, partial, dynamo=exporter == "dynamo", **common)
    partial.replace(path)
