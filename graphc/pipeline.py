"""``graphc optimize``: load, run a recipe, emit, reload, report. Nothing is written before everything has held."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphc.adapters import Adapter, Adapters
from graphc.contract import Backend, Pass, Progress, no_progress
from graphc.errors import BadInput
from graphc.gate import Gate
from graphc.recipe import DEFAULT, Recipe, parse_backend
from graphc.report import Report
from graphc.settings import Settings
from graphc.storage.files import check_destination
from graphc.work import Work

if TYPE_CHECKING:
    from graphc.checking import Comparison
    from graphc.data import Given, Origin
    from graphc.frontends import Source
    from graphc.presets import Choice


def optimize(
    source: str | Path | Source,
    output: str | Path | None = None,
    *,
    recipe: Recipe | str | Sequence[Pass] | None = None,
    preset: str | None = None,
    target: Backend | str = "onnxruntime",
    data: Given | None = None,
    calibrate: Given | None = None,
    max_drop: Mapping[str, float] | None = None,
    max_size: str | None = None,
    max_latency: str | None = None,
    adapters: Sequence[str | Path | Adapter] = (),
    adapter_mode: str = "fold",
    adapter_combine: str = "cat",
    progress: Progress = no_progress,
    **settings: Any,
) -> Report:
    """Make a model smaller and faster; what ``graphc optimize`` does.

    Args:
        source: An ``.onnx`` file, a folder with one, or what ``graphc.load`` returned, for torch modules with their
            example inputs.
        output: ``.onnx`` file or artifact folder to write; None writes nothing (the result is ``report.model``).
        recipe: A recipe, its text, a list of passes, or None for every exact portable pass.
        preset: Instead of a recipe: ``"small"``, ``"balanced"`` or ``"fast"`` (see ``graphc.presets``), or the name of
            a shipped recipe.
        target: A backend or its text.
        data: Inputs to check and measure on, see ``graphc.data``.
        calibrate: Inputs to collect statistics on; ``data`` if not given.
        max_drop: Metric name to the largest value that lossy passes may cost, e.g. ``{"error": 0.01}``.
        max_size: Limit of the output, e.g. ``"10MB"`` or ``"0.5x"``.
        max_latency: Limit of the latency, e.g. ``"5ms"`` or ``"0.8x"``.
        adapters: PEFT folders, each perhaps with its weight: ``"folder=0.5"`` or ``Adapter(folder, 0.5)``.
        adapter_mode: ``"fold"`` them into the weights, or keep them ``"dynamic"``, to be switched at run time.
        adapter_combine: How several are made into one, e.g. ``"ties{density=0.3}"``; see ``graphc.adapters.combine``.
        progress: Called as ``progress(what, done, total)``.
        **settings: Further fields of ``Settings``.

    Raises:
        BadInput: The model, the recipe or an option cannot be used.
        CheckFailed: A gate did not hold, or ``strict`` was given and a pass was rolled back.
    """
    from graphc import presets
    from graphc.data import origin

    gates = [Gate.drop(f"{name}={limit}") for name, limit in (max_drop or {}).items()]
    gates += [Gate.size(max_size)] if max_size else []
    gates += [Gate.latency(max_latency)] if max_latency else []
    goal = None
    if preset is not None:
        if recipe is not None:
            raise BadInput("a recipe and a preset were given", where="optimize", hint="a preset is a recipe: give one")
        goal, chosen = presets.parse(preset)
    elif recipe is None or isinstance(recipe, Recipe):
        chosen = recipe or Recipe.named(DEFAULT)
    else:
        chosen = Recipe.parse(recipe) if isinstance(recipe, str) else Recipe(tuple(recipe))
    return run(
        Path(source) if isinstance(source, str) else source,
        None if output is None else Path(output),
        Settings(
            recipe=chosen,
            recipe_given=recipe is not None or (preset is not None and goal is None),
            goal=goal,
            target=parse_backend(target) if isinstance(target, str) else target,
            adapters=Adapters.of(adapters, adapter_mode, adapter_combine),
            data=origin(data),
            calibrate=origin(calibrate),
            gates=tuple(gates),
            **settings,
        ),
        progress=progress,
    )


def verify(
    reference: str | Path | Source,
    candidate: str | Path | Source,
    *,
    data: Given | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Comparison:
    """Check that two models compute the same, up to the rounding of their dtypes; what ``graphc verify`` does.

    Args:
        reference: The model that is right: an ``.onnx`` file, an artifact folder, or what ``graphc.load`` returned.
        candidate: The model to check.
        data: Inputs to compare on, see ``graphc.data``; made to fit when not given.
        seed: Of the inputs made.
        progress: Called as ``progress(what, done, total)``.

    Raises:
        BadInput: A model or the data cannot be read.
    """
    from graphc import compiled, frontends
    from graphc import data as samples
    from graphc.checking import Checker

    a = reference if isinstance(reference, frontends.Source) else frontends.load(reference)
    given = samples.load(data, a.original) if data is not None else ()
    if not isinstance(candidate, frontends.Source) and (target := compiled.backend(Path(candidate))) is not None:
        runnable = target.load(Path(candidate), frugal=True)
        return compiled.compare(a.original, runnable, data=given, seed=seed, progress=progress)
    b = candidate if isinstance(candidate, frontends.Source) else frontends.load(candidate)
    return Checker(a.original, data=given, seed=seed, progress=progress).compare(b.original)


def default_output(source: Path, target: Backend) -> Path:
    """``model.opt.onnx`` beside ``model.onnx`` and ``model.pt2``; ``folder.opt.onnx`` beside a folder; ``folder.opt/``
    for a Hugging Face model, which goes with its tokenizer; ``name.opt.onnx`` here for ``package.module:name``. Targets
    that write no ONNX file: ``model.tvm/``."""
    from graphc.frontends import hf

    if not target.main.endswith(".onnx"):
        return source.with_name(f"{source.stem if source.suffix == '.onnx' else source.name}.{target.name}")

    if hf.knows(source):
        name = str(source).removeprefix(hf.HUB).replace("/", "-") if str(source).startswith(hf.HUB) else source.name
        return source.with_name(f"{name}.opt") if source.exists() else Path(f"{name}.opt")
    name = source.stem if source.suffix in (".onnx", ".pt2") else source.name
    return source.with_name(f"{name.rpartition(':')[2]}.opt.onnx")


def run(
    source: Path | Source,
    output: Path | None,
    settings: Settings,
    *,
    progress: Progress = no_progress,
    report_file: Path | None = None,
    depfile: Path | None = None,
    inputs: Sequence[Path] = (),
    warn: Callable[[str], None] | None = None,
) -> Report:
    """What ``optimize`` does, on parsed settings.

    Args:
        source: An ``.onnx`` file, a folder with one, or a loaded source.
        output: ``.onnx`` file or artifact folder; None writes nothing.
        settings: The flags.
        progress: Called as ``progress(what, done, total)``.
        report_file: Where to write the report: ``.json`` or ``.html``.
        depfile: Where to write the dependencies of ``output``, as make and ninja read them.
        inputs: Further files that the output depends on (the recipe).
        warn: Told, before any work, what should be known of the passes on this target; the report has it, too.
    """
    from graphc import artifact

    for written in filter(None, (report_file, depfile)):
        check_destination(written)
    if output is not None:
        artifact.check_output(source if isinstance(source, Path) else source.path, output, settings.target)
    progress("loading", 0, 0)
    loaded = _load(source, settings) if isinstance(source, Path) else source
    if loaded.others and any(getattr(each, "allow_interface", False) for each in settings.recipe.passes):
        raise BadInput(
            "the interfaces of several graphs cannot be cut",
            why=f"{' and '.join(part.name for part in loaded.parts)} hand each other what they compute, "
            "and each is pruned by itself",
            hint="leave allow-interface out",
        )
    if loaded.others and (pass_ := next((each for each in settings.recipe.passes if each.alone), None)):
        raise BadInput(
            f"'{pass_.name}' is for one graph",
            why=f"{' and '.join(part.name for part in loaded.parts)} hand each other what they compute, "
            "and each would get scales of its own",
            hint="--kv-cache merged makes one graph of a decoder; what that became can be given as like=FILE",
        )
    if loaded.others and output is not None and artifact.is_file(output):
        raise BadInput(
            f"the model becomes {len(loaded.parts)} graphs, which one file cannot hold",
            where=str(output),
            why=", ".join(part.name for part in loaded.parts),
            hint=f"give a folder: -o {output.with_suffix('')}/",
        )
    for part in loaded.parts:
        settings.target.check(part.model)
    described = [_described(part, alone=not loaded.others) for part in loaded.parts]
    stored = loaded.files
    loaded = _adapted(loaded, settings, progress)
    works = []
    for part, what in zip(loaded.parts, described, strict=True):
        own = _of_part(part, loaded, settings)
        choice = _chosen(part, own)
        works.append(Work(part, choice.applied(own) if choice else own, progress, what, choice))
    for text in dict.fromkeys(text for work in works for text in work.caveats):
        if warn is not None:
            warn(text)
    reports = [work.report() for work in works]
    report, recipe = reports[0], settings.recipe
    if loaded.others:
        report = Report.together({part.name: each for part, each in zip(loaded.parts, reports, strict=True)})
        report.input = artifact.describe_stored(report.input, stored)
        report.warnings += _apart(loaded.parts, reports)
    read = [*loaded.files, *loaded.depends, *inputs, *recipe.files()]
    files = [*read, *_files(settings.data), *_files(settings.calibrate)]
    beside = {name: write for work in works for name, write in work.loaded.beside.items()}
    artifact.place(report, output, settings, [work.try_out for work in works], beside, loaded.companions, progress)
    if depfile is not None and output is not None and not settings.dry_run:
        artifact.write_depfile(depfile, output, files)
    if report_file is not None:
        report.write(report_file)
    return report


def _apart(sources: Sequence[Source], reports: Sequence[Report]) -> list[str]:
    """A warning where lossy passes made something else of a weight in one graph than in another."""
    from graphc.storage.tensors import digest

    held: dict[str, list[tuple[Any, Any]]] = {}
    for source, report in zip(sources, reports, strict=True):
        if report.model is None or not any(each.effect == "lossy" and each.changes for each in report.passes):
            continue
        before = source.model.graph.initializers
        for name, value in report.model.graph.initializers.items():
            if name in before:
                held.setdefault(name, []).append((before[name].const_value, value.const_value))
    differ = [
        name
        for name, pairs in held.items()
        if len({digest(old) for old, _ in pairs}) == 1 and len({digest(new) for _, new in pairs}) > 1
    ]
    if not differ:
        return []
    more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
    return [f"each graph was pruned by itself, and not alike: '{differ[0]}'{more}"]


def _load(path: Path, settings: Settings) -> Source:
    from graphc import frontends

    return frontends.load(
        path, task=settings.task, kv_cache=settings.kv_cache, verify=settings.verify, seed=settings.seed
    )


def _of_part(part: Source, loaded: Source, settings: Settings) -> Settings:
    """The settings for a graph; of several graphs, each has the data that a folder holds under its name."""
    from graphc.data import Spec

    if not loaded.others:
        return settings
    own: dict[str, Any] = {}
    for name in ("data", "calibrate"):
        given = getattr(settings, name)
        if given is None:
            continue
        places: dict[str, list[Path]] = {each.name: [] for each in loaded.parts}
        if isinstance(given, Spec):
            for each, found in places.items():
                found += [p for end in ("", ".npz") if (p := Path(given.path) / f"{each}{end}").exists()]
        if not any(places.values()):
            raise BadInput(
                "the data are for none of the model's graphs",
                where=str(given.path) if isinstance(given, Spec) else "",
                hint=f"give a folder with {' or '.join(f'{name}.npz' for name in places)}",
            )
        own[name] = replace(given, path=str(places[part.name][0])) if places[part.name] else None
    return replace(settings, **own)


def _chosen(part: Source, settings: Settings) -> Choice | None:
    """What to do for the user's goal, if one was given."""
    from graphc import presets

    if settings.goal is None:
        return None
    if settings.resume:
        raise BadInput(
            "a preset cannot be given when a run is resumed",
            why="what --stop-after wrote has the recipe that was chosen",
            hint=f"leave the preset out; balanced also sets --max-drop {presets.HARMLESS}",
        )
    calibrated = settings.data is not None or settings.calibrate is not None
    return presets.choose(settings.goal, part.model, settings.target.capabilities(), calibrated=calibrated)


def _described(part: Source, *, alone: bool) -> dict[str, Any]:
    """What the report says of the input; a model that is in no file has the hash of its content."""
    from graphc import artifact

    found = artifact.describe(part.original, part.files if alone else ())
    return found | ({"path": str(part.path), "sha256": part.sha256} if part.sha256 else {})


def _adapted(loaded: Source, settings: Settings, progress: Progress) -> Source:
    from graphc.adapters import adapted

    if not settings.adapters:
        return loaded
    if settings.resume:
        raise BadInput(
            "adapters cannot be given when a run is resumed",
            why="what --stop-after wrote has its adapters already",
            hint="leave --adapter out",
        )
    progress("reading adapters", 0, 0)
    return adapted(loaded, settings.adapters, settings.seed)


def _files(given: Origin | None) -> list[Path]:
    """The files of data."""
    from graphc.data import Spec

    return given.files() if isinstance(given, Spec) else []
