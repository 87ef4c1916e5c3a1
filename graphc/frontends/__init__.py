"""Frontends: each turns one kind of source into an ``onnx_ir.Model``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from graphc.contract import PassResult

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Source:
    """A model as a frontend found it and as passes take it.

    Attributes:
        model: At the working opset, or as it was where ``result`` says why that could not be.
        original: As it was; it shares its weights with ``model``, nothing else.
        path: The file or folder it was loaded from.
        files: All files that were read or mapped, the model's first.
        result: What was converted and repaired, and what could not be.
    """

    model: ir.Model
    original: ir.Model
    path: Path
    files: tuple[Path, ...]
    result: PassResult


def load(path: str | Path) -> Source:
    """Load a model from a file or folder, with the frontend that knows it.

    Raises:
        BadInput: No frontend can use it; the message says what, where, why and what to do.
    """
    from graphc.frontends import onnx

    return onnx.load(Path(path))
