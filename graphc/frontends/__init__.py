"""Frontends: each turns one kind of source into an ``onnx_ir.Model``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphc.contract import PassResult
from graphc.errors import BadInput

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch.export import ExportedProgram
    from torch.nn import Module

    from graphc.export.dims import Dynamic
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
        companions: Writers of files that go with the model (tokenizer, configuration) into an artifact folder, by name.
        notes: How it was made, where it was not a model already: what was tried, what it was compared with.
        depends: What else it was made from: Python files of the user, an exported program.
        sha256: The hash of what the model says, where it is in no file.
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
    notes: tuple[str, ...] = ()
    depends: tuple[Path, ...] = ()
    sha256: str = ""
    name: str = "model"
    others: tuple[Source, ...] = ()
    companions: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)

    def with_others(self, others: Sequence[Source]) -> Source:
        """The same source with further graphs."""
        return replace(self, others=tuple(others))

    @property
    def parts(self) -> tuple[Source, ...]:
        """All graphs, this one first."""
        return (self, *self.others)


def load(
    source: str | Path | Module | ExportedProgram,
    example: Any = None,
    *,
    dynamic: Dynamic = "auto",
    task: str = "",
    kv_cache: str = "merged",
    verify: bool = True,
    seed: int = 0,
) -> Source:
    """Load a model with the frontend that knows it.

    Args:
        source: An ``.onnx`` file, an artifact, or a folder with one ``.onnx`` file; a folder of Hugging Face's; a torch
            module, an exported program or its ``.pt2`` file, or ``package.module:name`` of a module.
        example: Of a torch module: example inputs, as a tensor, a tuple, or a dict by name.
        dynamic: Of a torch module: ``"auto"`` keeps batch and sequence dynamic where it allows, None or False makes all
            sizes static, ``{input: {axis: name}}`` asks for these.
        task: Of a Hugging Face model: what to export instead of the head that was saved, e.g. ``"fill-mask"``.
        kv_cache: Of one that generates: ``"merged"``, ``"split"`` or ``"none"``.
        verify: Whether to compare what was exported with torch.
        seed: Of the inputs to compare on.

    Raises:
        BadInput: No frontend can use it; the message says what, where, why and what to do.
        CheckFailed: What was exported computes something else than the module.
    """
    if is_torch(source):
        from graphc.frontends import torch as frontend

        return frontend.load(source, example, dynamic=dynamic, verify=verify, seed=seed)
    from graphc.frontends import hf, onnx

    path = Path(source)
    if example is not None:
        raise BadInput("only torch modules take example inputs", where=str(path), hint="leave them out")
    if hf.knows(path):
        return hf.load(path, task=task, kv_cache=kv_cache, verify=verify, seed=seed)
    return onnx.load(path)


def is_torch(source: object) -> bool:
    """Whether a source is a torch module, or names one."""
    if not isinstance(source, str | Path):
        return True
    from graphc.export.entry import is_entry
    from graphc.frontends import hf

    if str(source).startswith(hf.HUB):
        return False
    return Path(source).suffix == ".pt2" or is_entry(str(source))
