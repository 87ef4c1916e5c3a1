"""Frontends: each turns one kind of source into an ``onnx_ir.Model``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphc.contract import PassResult

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphc.report import PassReport


@dataclass(frozen=True)
class Source:
    """A model as a frontend found it and as passes take it.

    Attributes:
        model: At the working opset, or as it was where ``result`` says why that could not be.
        original: As it was; it shares its weights with ``model``, nothing else.
        path: The file or folder it was loaded from.
        files: All files that were read or mapped, the model's first.
        result: What was converted and repaired, and what could not be.
        adapted: What adapters did to both, if there were any.
        warnings: What the user should know.
        measurements: What was measured on the way, for the report.
        beside: Writers of files that belong beside the output, by name.
        name: What the graph is called where a source has several.
        others: The further graphs of the source.
        companions: Files that go with the model (tokenizer, configuration), to be kept in an artifact folder.
    """

    model: ir.Model
    original: ir.Model
    path: Path
    files: tuple[Path, ...]
    result: PassResult
    adapted: PassReport | None = None
    warnings: tuple[str, ...] = ()
    measurements: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    name: str = "model"
    others: tuple[Source, ...] = ()
    companions: tuple[Path, ...] = ()

    def with_others(self, others: Sequence[Source]) -> Source:
        """The same source with further graphs."""
        return replace(self, others=tuple(others))

    @property
    def parts(self) -> tuple[Source, ...]:
        """All graphs, this one first."""
        return (self, *self.others)


def load(path: str | Path, *, task: str = "", kv_cache: str = "merged", verify: bool = True, seed: int = 0) -> Source:
    """Load a model from a file or folder, with the frontend that knows it.

    Args:
        path: An ``.onnx`` file, an artifact, or a folder with one ``.onnx`` file; a folder of Hugging Face's.
        task: Of a Hugging Face model: what to export instead of the head that was saved, e.g. ``"fill-mask"``.
        kv_cache: Of one that generates: ``"merged"``, ``"split"`` or ``"none"``.
        verify: Whether to compare what was exported with torch.
        seed: Of the inputs to compare on.

    Raises:
        BadInput: No frontend can use it; the message says what, where, why and what to do.
    """
    from graphc.frontends import hf, onnx

    if hf.knows(Path(path)):
        return hf.load(Path(path), task=task, kv_cache=kv_cache, verify=verify, seed=seed)
    return onnx.load(Path(path))
