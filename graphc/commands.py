"""What each command does with its arguments: calls a function of the library, and prints what it returns."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphc.errors import BadInput, ExitCode

if TYPE_CHECKING:
    from graphc.settings import Settings

_TARGET = ("shapes", "tune", "trials")
"""Flags that stand for an option of the target."""


def _settings(a: Any) -> Settings:
    from graphc import presets
    from graphc.adapters import Adapters
    from graphc.gate import Gate
    from graphc.recipe import DEFAULT, Recipe, parse_backend
    from graphc.settings import Settings

    goal = None
    if a.preset:
        goal, recipe = presets.parse(a.preset)
    else:
        recipe = Recipe.parse(a.passes) if a.passes is not None else Recipe.named(a.recipe or DEFAULT)
    if goal and (a.ratio is not None or a.mask or a.allow_interface):
        raise BadInput(
            f"preset '{goal}' chooses the options of its passes itself",
            hint=f"leave --ratio, --mask and --allow-interface out, or take a recipe; 'graphc list {goal}'",
        )
    if a.ratio is not None:
        recipe = recipe.with_option("ratio", a.ratio)
    if a.mask:
        recipe = recipe.with_option("mask", a.mask)
    if a.allow_interface:
        recipe = recipe.with_option("allow_interface", True)
    gates = [Gate.drop(text) for text in a.max_drop]
    gates += [Gate.size(a.max_size)] if a.max_size else []
    gates += [Gate.latency(a.max_latency)] if a.max_latency else []
    return Settings(
        recipe=recipe,
        recipe_given=goal is None and bool(a.passes is not None or a.recipe or a.preset),
        goal=goal,
        target=parse_backend(a.target, {name: value for name in _TARGET if (value := getattr(a, name)) is not None}),
        adapters=Adapters.of(a.adapter, a.adapter_mode, a.adapter_combine),
        task=a.task,
        kv_cache=a.kv_cache,
        data=_data(a.data, a.tokenizer),
        calibrate=_data(a.calibrate, a.tokenizer),
        gates=tuple(gates),
        seed=a.seed,
        strict=a.strict,
        unchecked=a.unchecked,
        verify=not a.no_verify,
        measure=not a.no_measure,
        cache=not a.no_cache,
        timings=a.timings,
        stop_after=a.stop_after or "",
        resume=a.resume,
        dry_run=a.dry_run,
    )


def _data(text: str | None, tokenizer: Path | None) -> Any:
    if text is None:
        return None
    from graphc.data import Spec

    return Spec.parse(text).with_tokenizer(tokenizer)


def _source(a: Any, model: Path, *, verify: bool = False) -> Any:
    """What is loaded later as it is, or a torch module, exported."""
    from graphc.export import examples
    from graphc.frontends import is_torch, load

    axes = examples.axes(a.dynamic)
    if not is_torch(model):
        if a.inputs:
            raise BadInput("only torch modules take --inputs", where=str(model), hint="leave them out, or give --data")
        return model
    return load(
        model, examples.read(a.inputs) if a.inputs else None, dynamic=axes, verify=verify, seed=getattr(a, "seed", 0)
    )


def optimize(a: Any) -> int:
    """``graphc optimize``."""
    settings = _settings(a)
    from graphc.artifact import check_output
    from graphc.pipeline import default_output, run
    from graphc.views.progress import bar

    output = a.output or default_output(a.model, settings.target)
    check_output(a.model, output, settings.target)
    with bar(a.quiet or a.json) as progress:
        progress("loading", 0, 0)
        silent = a.quiet or a.json
        report = run(
            _source(a, a.model, verify=settings.verify),
            output,
            settings,
            progress=progress,
            report_file=a.report,
            depfile=a.depfile,
            inputs=[Path(p) for p in (a.recipe,) if p and Path(p).is_file()],
            warn=None if silent else lambda text: print(f"graphc: note: {text}", file=sys.stderr),
        )
    if a.json:
        _print_json(report.to_json())
    elif not a.quiet:
        from graphc.views.terminal import show_report

        show_report(report.to_json(), why=a.why, verbose=a.verbose)
    return ExitCode.CHECK_FAILED if a.strict and not report.ok else ExitCode.OK


def inspect(a: Any) -> int:
    """``graphc inspect``."""
    if a.text:
        from graphc.frontends import load
        from graphc.model import text

        source = _source(a, a.model)
        print(text((load(source) if isinstance(source, Path) else source).original))
        return ExitCode.OK
    if a.groups or a.dot or a.svg:
        return _show_groups(a)
    if a.blocks:
        return _show_blocks(a)
    from graphc import inspection

    found = inspection.inspect(_source(a, a.model))
    if a.json:
        _print_json(found)
    else:
        from graphc.views.terminal import show_inspection

        show_inspection(found)
    return ExitCode.OK


def _groups(a: Any) -> Any:
    from graphc.axes import coupled_groups

    return coupled_groups(_source(a, a.model), allow_interface=a.allow_interface)


def _show_groups(a: Any) -> int:
    from graphc.views import groups as view

    found = _groups(a)
    if a.dot or a.svg:
        picture, destination = (view.dot(found), a.dot) if a.dot else (view.svg(found), a.svg)
        if destination == "-":
            print(picture, end="")
        else:
            from graphc.storage.files import write

            write(Path(destination), picture)
    elif a.json:
        _print_json(view.document(found))
    else:
        from graphc.views.terminal import show_groups

        show_groups(found)
    return ExitCode.OK


def _show_blocks(a: Any) -> int:
    from graphc.depth.structure import find
    from graphc.frontends import load

    found = find(load(a.model).model)
    if a.json:
        from graphc.views import blocks

        _print_json(blocks.document(found))
    else:
        from graphc.views.terminal import show_blocks

        show_blocks(found)
    return ExitCode.OK


def explain(a: Any) -> int:
    """``graphc explain``."""
    print(_groups(a).explain(a.name))
    return ExitCode.OK


def verify(a: Any) -> int:
    """``graphc verify``."""
    from graphc import pipeline
    from graphc.views.progress import bar

    with bar(a.json) as progress:
        pair = [_source(a, each, verify=True) for each in (a.a, a.b)]
        comparison = pipeline.verify(*pair, data=_data(a.data, a.tokenizer), seed=a.seed, progress=progress)
    if a.json:
        _print_json(comparison.to_json())
    else:
        from graphc.views.terminal import show_comparison

        show_comparison(comparison.to_json(), str(a.a), str(a.b))
    return ExitCode.OK if comparison.ok and comparison.checked else ExitCode.CHECK_FAILED


def bench(a: Any) -> int:
    """``graphc bench``."""
    from graphc import measure
    from graphc.views.progress import bar

    with bar(a.json) as progress:
        found = measure.bench(
            [_source(a, each) for each in a.models],
            data=_data(a.data, a.tokenizer),
            seconds=a.seconds,
            threads=a.threads,
            provider=a.provider,
            progress=progress,
        )
    if a.json:
        _print_json(found)
    else:
        from graphc.views.terminal import show_bench

        show_bench(found)
    return ExitCode.OK


def list(a: Any) -> int:
    """``graphc list``."""
    from graphc.catalogue import catalogue, describe

    found = catalogue() if a.what is None else describe(a.what)
    if a.json:
        _print_json(found)
    else:
        from graphc.views.terminal import show_catalogue

        show_catalogue(found)
    return ExitCode.OK


def doctor(a: Any) -> int:
    """``graphc doctor``."""
    from graphc.doctor import examine

    found = examine()
    if a.json:
        _print_json(found)
    else:
        from graphc.views.terminal import show_doctor

        show_doctor(found)
    return ExitCode.OK


def _print_json(document: Any) -> None:
    import json

    print(json.dumps(document, indent=2, ensure_ascii=False))
