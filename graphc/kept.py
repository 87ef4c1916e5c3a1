"""What is kept of a run: its result in the cache, and in a model that ``--stop-after`` wrote what is left to do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphc.contract import Context, Pass
from graphc.errors import BadInput, nearest
from graphc.recipe import Recipe
from graphc.runner import Done

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphc.data import Origin, Samples
    from graphc.frontends import Source
    from graphc.settings import Settings

_RESUME = "graphc.resume"
"""Metadata key of a model that ``--stop-after`` wrote: what is left to do, and what was done."""


def until(recipe: Recipe, last: str) -> tuple[tuple[Pass, ...], tuple[Pass, ...]]:
    """Split the passes after the first one named ``last``; empty means all now."""
    if not last:
        return recipe.passes, ()
    names = [each.name for each in recipe.passes]
    if last not in names:
        raise BadInput(f"the recipe has no pass '{last}' to stop after", hint=nearest(last, names))
    end = names.index(last) + 1
    return recipe.passes[:end], recipe.passes[end:]


def stop(model: ir.Model, later: Sequence[Pass], done: Done) -> None:
    """Write into a model what is left to do."""
    state = {"recipe": Recipe(tuple(later)).text(), "done": done.to_json()}
    model.metadata_props[_RESUME] = json.dumps(state, sort_keys=True)


def resumed(loaded: Source, settings: Settings) -> tuple[Recipe, Done | None]:
    """The recipe to run, and what is done already if the model was written by ``--stop-after``."""
    kept = loaded.model.metadata_props.get(_RESUME)
    if not settings.resume:
        return settings.recipe, None
    if kept is None:
        raise BadInput(
            "there is nothing to resume",
            where=str(loaded.path),
            why="the model was not written by --stop-after",
            hint="run it without --resume",
        )
    state = json.loads(kept)
    recipe = Recipe.parse(state["recipe"])
    if settings.recipe_given and settings.recipe.text() != recipe.text():
        raise BadInput(
            "the recipe differs from the one that was stopped",
            why=f"left to do: {recipe.text()}",
            hint="leave the recipe out to go on with that",
        )
    del loaded.model.metadata_props[_RESUME]
    return recipe, Done.from_json(loaded.model, state["done"])


def key(
    loaded: Source,
    settings: Settings,
    passes: Sequence[Pass],
    done: Done | None,
    context: Context,
    samples: Sequence[Samples | None],
) -> str | None:
    """The name in the cache of what passes make of a model: everything that it depends on.

    Args:
        loaded: The model.
        settings: The flags.
        passes: What is run.
        done: What was done before, if the run is resumed.
        context: Of the run.
        samples: The data to check on, and to calibrate on.

    Returns:
        None where a file that the recipe names is missing.
    """
    from graphc import cache, environment

    recipe = Recipe(tuple(passes))
    named = recipe.files()
    if not all(path.is_file() for path in named):
        return None
    return cache.key(
        source=loaded.sha256,
        files=[cache.file_hash(path) for path in (*loaded.files, *named)],
        recipe=recipe.text(),
        done=done.to_json() if done else None,
        target=settings.target.spec(),
        capabilities=[context.target.max_ir, dict(context.target.max_opset), sorted(context.target.kernels)],
        gates=[str(gate) for gate in settings.gates],
        data=[_hash(*each) for each in zip((settings.data, settings.calibrate), samples, strict=True)],
        part=[loaded.name, settings.task, settings.kv_cache],
        settings=[settings.seed, settings.verify, settings.unchecked],
        adapters=settings.adapters.key(),
        timings=_timings(settings),
        versions=environment.versions(),
        code=cache.code_hash(),
    )


def remember(folder: Path, done: Done) -> None:
    """Write what was done into a folder of the cache."""
    from graphc.model import save

    save(done.model, folder / "model.onnx")
    (folder / "done.json").write_text(json.dumps(done.to_json()), encoding="utf-8")


def recall(entry: Path) -> Done:
    """What ``remember`` wrote."""
    from graphc.model import load

    return Done.from_json(load(entry / "model.onnx"), json.loads((entry / "done.json").read_text(encoding="utf-8")))


def _hash(given: Origin | None, samples: Samples | None) -> Any:
    """What data is known by in the cache: its files and how they are read, or its content where code made it."""
    from graphc import cache
    from graphc.data import Spec

    if given is None or samples is None:
        return None
    if isinstance(given, Spec) and Path(given.path).exists():
        return [repr(given), [cache.file_hash(path) for path in given.files()]]
    from graphc.collection.hashing import data_hash

    return data_hash(samples, ({"labels": labels} for labels in samples.labels))


def _timings(settings: Settings) -> str:
    """The hash of the timing table that is pinned, or the machine that is measured."""
    from graphc import cache, timings

    path = settings.timings
    return cache.file_hash(path) if path is not None and path.is_file() else timings.machine()
