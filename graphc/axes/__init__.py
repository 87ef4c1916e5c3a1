"""Axes: which indices of which tensors belong together, derived from one line of text per operator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphc.axes.groups import Groups
    from graphc.frontends import Source


def coupled_groups(model: str | Path | Source | ir.Model, *, allow_interface: bool = False) -> Groups:
    """The coupled groups of a model: what can be cut together, and what cannot and why.

    Args:
        model: An ``.onnx`` file or a folder with one, what ``graphc.load`` returned, or a model in memory.
        allow_interface: Whether static axes of graph inputs and outputs count as free.

    Raises:
        BadInput: The file cannot be read.
    """
    import onnx_ir as ir

    from graphc import frontends
    from graphc.axes.groups import analyse

    if isinstance(model, str | Path):
        model = frontends.load(model)
    return analyse(model if isinstance(model, ir.Model) else model.model, interface=allow_interface)
