"""From a finished model to its place on disk: emitted beside it, tried out, and only then renamed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphc import edit
from graphc.cache import file_hash
from graphc.contract import no_progress
from graphc.errors import BadInput
from graphc.model import nbytes, parameters, remove_stale
from graphc.report import summed
from graphc.storage import files
from graphc.trial import hold_sizes

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphc.contract import Backend, Progress
    from graphc.report import Report
    from graphc.settings import Settings

SCHEMA = "graphc-artifact/1"

MAIN = "model"
"""The name of a model that is one graph."""


def is_file(output: Path) -> bool:
    """Whether an output path means one ``.onnx`` file rather than an artifact folder."""
    return output.suffix == ".onnx" and not output.is_dir()


def check_output(source: Path, output: Path, target: Backend) -> None:
    """Refuse an output that cannot work, before any work is done.

    Raises:
        BadInput: It is the input, or lies where nothing can be written, or is a file where the target writes folders.
    """
    if is_file(output) and not target.main.endswith(".onnx"):
        raise BadInput(
            f"target '{target.name}' writes a folder, not one file",
            where=str(output),
            hint=f"-o {output.with_suffix('')}/",
        )
    if is_file(output):
        files.check_destination(output, (source,))
    elif output.exists() and source.exists() and output.samefile(source):
        raise BadInput("the output is the input", where=str(output), hint="choose another name with -o")
    else:
        files.check_folder(output)


def describe(model: ir.Model, stored: Sequence[Path]) -> dict[str, Any]:
    """What a report says of a model: ``path, sha256, bytes, parameters, nodes, ir, opset``.

    Args:
        model: The model.
        stored: Its files, the main one first; empty for one that is only in memory.
    """
    return {
        "path": str(stored[0]) if stored else "",
        "sha256": file_hash(stored[0]) if stored else "",
        "bytes": sum(p.stat().st_size for p in stored) if stored else nbytes(model),
        "parameters": parameters(model),
        "nodes": sum(1 for _ in edit.nodes(model)),
        "ir": model.ir_version,
        "opset": dict(sorted(model.opset_imports.items())),
    }


def describe_stored(described: Mapping[str, Any], stored: Sequence[Path]) -> dict[str, Any]:
    """The same with the path, hash and size of files, the main one first."""
    return {
        **described,
        "path": str(stored[0]),
        "sha256": file_hash(stored[0]),
        "bytes": sum(p.stat().st_size for p in stored),
    }


TryOut = Callable[["Report", Path], None]
"""Tries out what was emitted for a report; see ``graphc.trial``."""


def place(
    report: Report,
    output: Path | None,
    settings: Settings,
    try_out: Sequence[TryOut],
    beside: Mapping[str, Callable[[Path], None]],
    companions: Mapping[str, Callable[[Path], None]] | None = None,
    progress: Progress = no_progress,
) -> None:
    """Emit the models of a report, have what was emitted tried out, and only then put it at ``output``.

    Without an output nothing is emitted; on a dry run everything is done but the last step.

    Args:
        report: Of the run; its ``output`` and those of its parts are filled in.
        output: A file or folder.
        settings: The flags of the run.
        try_out: For the report, or for each of its parts.
        beside: Writers of further files, by name.
        companions: Writers of files for an artifact folder only, by name.
        progress: ``progress(what, done, total)``.

    Raises:
        BadInput: The output cannot be written.
        CheckFailed: ``try_out`` raised it; then nothing is written.
    """
    each = report.parts or {MAIN: report}
    if output is None:
        for part in each.values():
            assert part.model is not None
            part.output = describe(part.model, ())
        report.output = summed([part.output for part in each.values()])
        return
    single = is_file(output)
    make = files.staging if single or settings.dry_run else files.folder
    with make(output.absolute()) as staging:
        emitted = _emit(report, staging, output, settings, progress)
        for name, write in beside.items():
            write(staging / name)
        written = [p for p in staging.iterdir() if p.is_file() and p.name != files.MANIFEST]
        for (name, part), check in zip(each.items(), try_out, strict=True):
            assert part.model is not None
            main = emitted if single else staging / (f"{name}.onnx" if report.parts else settings.target.main)
            stored = [main, *(p for p in written if p != main)]
            part.output = describe(part.model, () if report.parts else stored)
            part.output["path"] = "" if settings.dry_run else str(output / main.name if report.parts else output)
            check(part, main if report.parts else emitted)
        if report.parts:
            report.output = describe_stored(summed([part.output for part in each.values()]), written)
            report.output["path"] = "" if settings.dry_run else str(output)
            hold_sizes(report, settings)
        if not single:
            for name, write in (companions or {}).items():
                write(staging / name)
            written = [p for p in staging.iterdir() if p.is_file() and p.name != files.MANIFEST]
            _write_json(staging / files.MANIFEST, _manifest(report, written, staging) | settings.adapters.manifest())
            report.write(staging / "report.json")
        elif not settings.dry_run:
            _move(emitted, output.absolute())


def write_depfile(path: Path, output: Path, inputs: Sequence[Path]) -> None:
    """Write ``output: inputs`` as make and ninja read it.

    Raises:
        BadInput: The file cannot be written.
    """
    names = [str(p).replace("$", "$$").replace("#", "\\#").replace(" ", "\\ ") for p in (output, *inputs)]
    files.write(path, f"{names[0]}: \\\n" + " \\\n".join(f"  {name}" for name in names[1:]) + "\n")


def _emit(report: Report, staging: Path, output: Path, settings: Settings, progress: Progress) -> Path:
    """Write the output into ``staging``; return what a backend can load: the file, or the folder itself."""
    target = settings.target
    begun: dict[str, Any] = {"schema": SCHEMA, "target": target.spec()}
    if report.parts:
        models = {name: part.model for name, part in report.parts.items() if part.model is not None}
        needs = target.emit_parts(models, staging)
        begun |= {"parts": {name: {"runtime": dict(each)} for name, each in needs.items()}}
    else:
        assert report.model is not None
        if is_file(output):
            target.emit_file(report.model, staging / output.name)
            return staging / output.name
        begun |= {"runtime": dict(target.emit(report.model, staging, progress=progress))}
    _write_json(staging / files.MANIFEST, begun)
    return staging


def _manifest(report: Report, written: Sequence[Path], folder: Path) -> dict[str, Any]:
    """What must be the same, byte for byte, when the same input is built again."""
    from graphc.environment import versions

    begun: dict[str, Any] = json.loads((folder / files.MANIFEST).read_text(encoding="utf-8"))
    for name, part in report.parts.items():
        begun["parts"][name] |= _interfaces(part) | _timings(part)
    return begun | {
        **({} if report.parts else _interfaces(report) | _timings(report)),
        "source": {"sha256": report.input["sha256"]},
        "recipe": report.recipe,
        "versions": versions(),
        "files": {p.name: file_hash(p) for p in sorted(written)},
    }


def _timings(report: Report) -> dict[str, Any]:
    """The hash of the timing table, where it decided something."""
    return {"timings": report.timings} if report.timings else {}


def _interfaces(report: Report) -> dict[str, Any]:
    assert report.model is not None
    graph = report.model.graph
    return {"inputs": [_interface(v) for v in graph.inputs], "outputs": [_interface(v) for v in graph.outputs]}


def _interface(value: ir.Value) -> dict[str, Any]:
    shape = None if value.shape is None else [d if isinstance(d, int) else d.value for d in value.shape]
    return {
        "name": value.name,
        "type": value.dtype.name.lower() if value.dtype is not None else "",
        "shape": shape,
    }


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _move(emitted: Path, output: Path) -> None:
    """Rename the staged file to its place, its data first: the rename of the model is the commit."""
    with files.exclusive(output.parent):
        data = [p for p in emitted.parent.iterdir() if p != emitted]
        for path in data:
            path.replace(output.parent / path.name)
        emitted.replace(output)
        remove_stale(output, {output.parent / path.name for path in data})
