"""ONNX Runtime: a portable ONNX model, or a folder with one, its manifest and a script that runs it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphc.contract import Backend, Capabilities, Progress, Runnable, Timer, no_progress, option
from graphc.errors import BadInput
from graphc.storage import files

if TYPE_CHECKING:
    import onnx_ir as ir

MODEL = "model.onnx"


@dataclass(frozen=True)
class OnnxRuntime(Backend):
    """ONNX that ONNX Runtime loads, on this machine or, by default, on any.

    The weights of a large model stand in a data file beside it.
    """

    provider: str = option("CPUExecutionProvider", "the execution provider that runs the model")
    portable: bool = option(True, "emit only standard operators, which every ONNX runtime has")
    threads: int = option(0, "threads within an operator; 0 lets ONNX Runtime choose")

    def check(self, model: ir.Model) -> None:
        here = self.capabilities().providers
        if here and self.provider not in here:
            raise BadInput(
                f"'{self.provider}' does not start on this machine",
                where="-t onnxruntime{provider}",
                why=f"ONNX Runtime starts {', '.join(here)} here; what is emitted could be neither checked nor timed",
                hint="build where the device and its ONNX Runtime are, or leave provider out: the file runs there, too",
            )

    def capabilities(self) -> Capabilities:
        from dataclasses import replace

        found = _capabilities(self.portable)
        if self.provider not in found.providers:
            return found
        # The one that the model is for comes first.
        return replace(found, providers=(self.provider, *(p for p in found.providers if p != self.provider)))

    def emit(self, model: ir.Model, folder: Path, *, progress: Progress = no_progress) -> Mapping[str, Any]:
        from graphc import model as models
        from graphc.runtime.scripts import script

        models.save(self._emitted(model), folder / MODEL)
        files.write(folder / "run.py", script([model]))
        return self._needs(model)

    def _emitted(self, model: ir.Model) -> ir.Model:
        """What is written of a model."""
        from graphc.opset.portable import portable
        from graphc.runtime import integers

        made = portable(model, self.capabilities())
        if integers.session_options(made):
            integers.part(made)
        return made

    def _needs(self, model: ir.Model) -> dict[str, Any]:
        from graphc import caches
        from graphc.runtime import integers

        options, pairs = integers.session_options(model), caches.pairs(model)
        needs = {"provider": self.provider, "threads": self.threads, "session_options": options}
        return needs | ({"caches": pairs, "in_place": caches.in_place(model)} if pairs else {})

    def emit_parts(self, models: Mapping[str, ir.Model], folder: Path) -> Mapping[str, Mapping[str, Any]]:
        from graphc import model as several
        from graphc.runtime.scripts import script

        several.save_together({name: self._emitted(model) for name, model in models.items()}, folder)
        if text := script(list(models.values())):
            files.write(folder / "run.py", text)
        return {name: self._needs(model) for name, model in models.items()}

    def emit_file(self, model: ir.Model, path: Path) -> None:
        from graphc import model as models

        models.save(self._emitted(model), path)

    def load(self, path: Path, *, frugal: bool = False) -> Runnable:
        from graphc import model as models
        from graphc import runtime

        path, settings = _file(path)
        # ONNX Runtime copies weights that are in the model's own file; frugally they are mapped instead.
        large = frugal and path.is_file() and path.stat().st_size > runtime.BIG
        return runtime.session(
            models.load(path) if large else path,
            optimise=True,
            provider=settings.get("provider", self.provider),
            options=settings.get("session_options", {}),
            threads=settings.get("threads", self.threads),
            frugal=frugal,
        )

    def timer(self) -> Timer:
        from graphc import timings

        return timings.in_sessions

    def unrealised(self, path: Path) -> Sequence[str]:
        from graphc import model as models
        from graphc.runtime import realised

        path, settings = _file(path)
        missing = realised.unrealised(
            models.load(path),
            path,
            provider=settings.get("provider", self.provider),
            options=settings.get("session_options", {}),
        )
        return [f"{each} emitted as one operator, which this runtime computes piece by piece" for each in missing]


def _file(path: Path) -> tuple[Path, Mapping[str, Any]]:
    """The model file of what was emitted, and what its manifest says of the runtime."""
    if path.is_dir():
        return path / MODEL, _manifest(path).get("runtime", {})
    if files.is_artifact(path.parent):
        return path, _manifest(path.parent).get("parts", {}).get(path.stem, {}).get("runtime", {})
    return path, {}


@cache
def _capabilities(portable: bool) -> Capabilities:
    """What the installed ONNX Runtime loads; without one, what every version since 1.20 does."""
    from dataclasses import replace

    from graphc import runtime

    try:
        found = runtime.capabilities()
    except BadInput:
        found = Capabilities("onnxruntime", max_ir=10, max_opset={"": 21, "ai.onnx.ml": 5})
    return replace(found, portable=portable)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / files.MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput("cannot read the artifact's manifest", where=str(path), why=str(error)) from None
    if not isinstance(manifest, dict):
        raise BadInput("the artifact's manifest is no JSON object", where=str(path))
    return manifest
