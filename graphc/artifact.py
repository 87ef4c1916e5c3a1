"""From a finished model to its place on disk: emit beside, reload, compare, measure, and only then rename."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphc import edit, files
from graphc.cache import file_hash
from graphc.contract import Arrays
from graphc.errors import BadInput, CheckFailed
from graphc.gate import Gate
from graphc.model import nbytes, parameters, remove_stale
from graphc.views.units import seconds, size

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphc.frontends import Source
    from graphc.pipeline import Settings
    from graphc.report import Report

SCHEMA = "graphc-artifact/1"

SLOWER = 1.05
"""Latency ratio from which the report says that the output is slower, if the spread is below it too."""

Progress = Callable[[str, int, int], None]


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
    source: Source,
    settings: Settings,
    samples: Sequence[Arrays],
    progress: Progress,
) -> None:
    """Emit ``report.model``, check and measure what was emitted, and put it at ``output``.

    Without an output, or on a dry run, everything is done but the last step.

    Raises:
        BadInput: The output cannot be written.
        CheckFailed: What was emitted does not load or breaks a gate; then nothing is written.
    """
    assert report.model is not None
    if output is None:
        report.output = describe(report.model, ())
        return
    single = is_file(output)
    make = files.staging if single or settings.dry_run else files.folder
    with make(output.absolute()) as staging:
        emitted = _emit(report.model, staging, output, settings)
        main = emitted if single else emitted / "model.onnx"
        written = [p for p in staging.iterdir() if p.is_file() and p.name != files.MANIFEST]
        report.output = describe(report.model, [main, *(p for p in written if p != main)])
        report.output["path"] = "" if settings.dry_run else str(output)
        _examine(report, emitted, source, settings, samples, progress)
        if not single:
            _write_json(emitted / files.MANIFEST, _manifest(report, written, emitted))
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
    from graphc.pipeline import versions

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


def _examine(
    report: Report,
    emitted: Path,
    source: Source,
    settings: Settings,
    samples: Sequence[Arrays],
    progress: Progress,
) -> None:
    """Load what was emitted in a fresh session as a user would, run it, time it against the input, hold the gates.

    Raises:
        CheckFailed: It does not load or run, although the model did, or a gate does not hold.
    """
    for gate in settings.gates:
        if gate.kind == "size":
            _hold(gate, report.output["bytes"], report.input["bytes"], size)
    latency = [gate for gate in settings.gates if gate.kind == "latency"]
    runs = report.rewrite.get("checked", True) or not settings.verify
    if not runs or not (settings.verify or settings.measure or latency):
        return
    progress("loading what was emitted", 0, 0)
    from graphc import measure

    # Runtimes repack weights to run fast, which takes as much memory again.
    timed = bool(latency) or (settings.measure and nbytes(report.model) <= measure.LARGEST)
    try:
        sample = samples[0] if samples else measure.sample(report.model, settings.seed)
        loaded = settings.target.load(emitted, frugal=not timed)
        loaded.run(sample)
    except BadInput as error:
        raise CheckFailed(
            "what was emitted does not run; nothing was written",
            where=error.where,
            why=error.why or error.what,
            hint="please report this as a defect of graphc, with the model if you may",
        ) from error
    if not timed:
        if settings.measure:
            report.warnings.append("not timed, to spare memory: 'graphc bench INPUT OUTPUT' times large models")
        return
    progress("measuring", 0, 0)
    found = measure.against(source.original, loaded, sample)
    if found is None:
        return
    report.measurements["latency"] = found
    for gate in latency:
        _hold(gate, found["output"]["median"], found["input"]["median"], seconds)
    if found["ratio_low"] > SLOWER:
        report.warnings.append(
            f"the output is slower than the input here: {found['ratio']:.2f}x "
            f"({found['ratio_low']:.2f} to {found['ratio_high']:.2f})"
        )


def _hold(gate: Gate, value: float, before: float, show: Callable[[float], str]) -> None:
    limit = gate.limit * before if gate.relative else gate.limit
    if value > limit:
        raise CheckFailed(
            f"the gate '{gate}' does not hold; nothing was written",
            why=f"{show(value)} is more than {show(limit)}",
            hint="choose a stronger recipe, or a milder limit",
        )
