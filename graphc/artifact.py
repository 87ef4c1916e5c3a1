"""From a finished model to its place on disk: emitted beside it, tried out, and only then renamed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphc import edit
from graphc.cache import file_hash
from graphc.errors import BadInput
from graphc.model import nbytes, parameters, remove_stale
from graphc.storage import files

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphc.report import Report
    from graphc.settings import Settings

SCHEMA = "graphc-artifact/1"


def is_file(output: Path) -> bool:
    """Whether an output path means one ``.onnx`` file rather than an artifact folder."""
    return output.suffix == ".onnx" and not output.is_dir()


def check_output(source: Path, output: Path) -> None:
    """Refuse an output that cannot work, before any work is done.

    Raises:
        BadInput: It is the input, or lies where nothing can be written.
    """
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


def place(
    report: Report,
    output: Path | None,
    settings: Settings,
    try_out: Callable[[Report, Path], None],
    beside: Mapping[str, Callable[[Path], None]],
) -> None:
    """Emit ``report.model``, have what was emitted tried out, and only then put it at ``output``.

    Without an output nothing is emitted; on a dry run everything is done but the last step. ``beside`` has writers of
    further files, by name.

    Raises:
        BadInput: The output cannot be written.
        CheckFailed: ``try_out`` raised it; then nothing is written.
    """
    assert report.model is not None
    if output is None:
        report.output = describe(report.model, ())
        return
    single = is_file(output)
    make = files.staging if single or settings.dry_run else files.folder
    with make(output.absolute()) as staging:
        emitted = _emit(report.model, staging, output, settings)
        for name, write in beside.items():
            write(staging / name)
        main = emitted if single else emitted / "model.onnx"
        written = [p for p in staging.iterdir() if p.is_file() and p.name != files.MANIFEST]
        report.output = describe(report.model, [main, *(p for p in written if p != main)])
        report.output["path"] = "" if settings.dry_run else str(output)
        try_out(report, emitted)
        if not single:
            _write_json(emitted / files.MANIFEST, _manifest(report, written, emitted) | settings.adapters.manifest())
            report.write(emitted / "report.json")
        elif not settings.dry_run:
            _move(emitted, output.absolute())


def write_depfile(path: Path, output: Path, inputs: Sequence[Path]) -> None:
    """Write ``output: inputs`` as make and ninja read it.

    Raises:
        BadInput: The file cannot be written.
    """
    names = [str(p).replace("$", "$$").replace("#", "\\#").replace(" ", "\\ ") for p in (output, *inputs)]
    files.write(path, f"{names[0]}: \\\n" + " \\\n".join(f"  {name}" for name in names[1:]) + "\n")


def _emit(model: ir.Model, staging: Path, output: Path, settings: Settings) -> Path:
    """Write the output into ``staging``; return what a backend can load: the file, or the folder itself."""
    if is_file(output):
        settings.target.emit_file(model, staging / output.name)
        return staging / output.name
    needs = settings.target.emit(model, staging)
    _write_json(staging / files.MANIFEST, {"schema": SCHEMA, "target": settings.target.spec(), "runtime": dict(needs)})
    return staging


def _manifest(report: Report, written: Sequence[Path], folder: Path) -> dict[str, Any]:
    """What must be the same, byte for byte, when the same input is built again."""
    from graphc.environment import versions

    assert report.model is not None
    begun: dict[str, Any] = json.loads((folder / files.MANIFEST).read_text(encoding="utf-8"))
    return begun | {
        "inputs": [_interface(v) for v in report.model.graph.inputs],
        "outputs": [_interface(v) for v in report.model.graph.outputs],
        "source": {"sha256": report.input["sha256"]},
        "recipe": report.recipe,
        "versions": versions(),
        "files": {p.name: file_hash(p) for p in sorted(written)},
    }


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
