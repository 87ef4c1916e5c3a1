"""Adapters: PEFT folders folded into a model's weights, or kept beside it to be switched at run time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from graphc.contract import Refusal
from graphc.errors import BadInput, nearest

if TYPE_CHECKING:
    from graphc.adapters.combine import Combine
    from graphc.adapters.folder import Folder
    from graphc.adapters.places import Placed
    from graphc.frontends import Source

Mode = Literal["fold", "dynamic"]

MODES: tuple[Mode, ...] = ("fold", "dynamic")


@dataclass(frozen=True)
class Adapter:
    """An adapter folder and how much of it is wanted.

    Attributes:
        folder: As PEFT saved it.
        weight: The factor of what it changes; 1 is all of it.
    """

    folder: Path
    weight: float = 1.0

    @staticmethod
    def parse(text: str | Path | Adapter) -> Adapter:
        """Read ``FOLDER`` or ``FOLDER=WEIGHT``.

        Raises:
            BadInput: The weight is no finite number.
        """
        if isinstance(text, Adapter):
            return text
        if isinstance(text, Path) or Path(text).is_dir():
            return Adapter(Path(text))
        folder, equals, weight = str(text).rpartition("=")
        if not equals:
            return Adapter(Path(text))
        if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", weight):
            raise BadInput("the weight of an adapter is a number", where=str(text), hint="e.g. --adapter folder=0.5")
        return Adapter(Path(folder), float(weight))

    def text(self) -> str:
        """As the command line has it."""
        return f"{self.folder}={self.weight:g}" if self.weight != 1 else str(self.folder)


@dataclass(frozen=True)
class Adapters:
    """What is to be done with adapters; the flags ``--adapter...``.

    Attributes:
        given: The adapters, in order.
        mode: Whether they are folded into the weights or kept to be switched.
        combine: How several are made into one, as text.
    """

    given: tuple[Adapter, ...] = ()
    mode: Mode = "fold"
    combine: str = "cat"

    @staticmethod
    def of(given: Sequence[str | Path | Adapter], mode: str = "fold", combine: str = "cat") -> Adapters:
        """Read the flags.

        Raises:
            BadInput: A weight, the mode or the method cannot be used.
        """
        if mode not in MODES:
            raise BadInput(f"there is no adapter mode '{mode}'", hint=nearest(mode, MODES))
        if given or combine != "cat":
            from graphc.adapters.combine import parse

            combine = parse(combine).spec()
        if not given and (combine != "cat" or mode != "fold"):
            raise BadInput("there is no adapter to combine or to switch", hint="give --adapter FOLDER")
        if mode == "dynamic" and combine != "cat":
            raise BadInput(
                "adapters that are switched are not combined", hint="leave --adapter-combine out, or fold them"
            )
        return Adapters(tuple(map(Adapter.parse, given)), mode, combine)

    def __bool__(self) -> bool:
        return bool(self.given)

    def text(self) -> str:
        """As the report has it."""
        options = "" if self.combine == "cat" else f" combine={self.combine}"
        return f"{self.mode}: {', '.join(each.text() for each in self.given)}{options}"

    def manifest(self) -> dict[str, Any]:
        """What an artifact says of its adapters: the same wherever their folders are."""
        if not self.given:
            return {}
        from graphc.adapters.folder import weights_file
        from graphc.cache import file_hash

        return {
            "adapters": [
                {
                    "name": each.folder.resolve().name,
                    "sha256": file_hash(weights_file(each.folder)),
                    "weight": each.weight,
                }
                for each in self.given
            ],
            "adapter_mode": self.mode,
            "adapter_combine": self.combine,
        }

    def key(self) -> list[Any]:
        """What decides on the result, besides the files."""
        return [self.mode, self.combine, [each.weight for each in self.given]]


def _refuse_split_ties(placed: Iterable[Placed]) -> None:
    """Refuse a tied weight of which only some readers are of the adapter's module: those in other graphs are not seen.

    Raises:
        BadInput: There is one.
    """
    for each in placed:
        if each.site.uses is not None:
            raise BadInput(
                f"'{each.name}' cannot be folded into a model of several graphs",
                where=f"weight '{each.site.value.name}'",
                why="other layers are tied to its weight, and which of them follow the adapter cannot be told",
                hint="merge the adapter with PEFT first, or leave this module out of it",
            )


def adapted(source: Source, wanted: Adapters, seed: int = 0) -> Source:
    """A source with adapters folded into its weights, or attached to it.

    The result is what is optimised from then on, and what it is compared with.

    Raises:
        BadInput: An adapter cannot be read, does not fit the model, or cannot be folded; it names what does not fit.
    """
    import time

    from graphc.adapters import dynamic, fold, places
    from graphc.adapters.combine import parse
    from graphc.adapters.folder import read
    from graphc.adapters.targets import targets
    from graphc.report import PassReport

    start = time.perf_counter()
    folders = [read(each.folder, each.weight) for each in wanted.given]
    everything = [target for folder in folders for target in targets(folder)]
    warnings = _bases(folders, source.path)
    beside: dict[str, Any] = {}
    models = [(part.original.clone(), part.model.clone()) for part in source.parts]
    measurements: dict[str, Any] = {}
    report = PassReport("adapter", wanted.text(), "exact")
    if wanted.mode == "dynamic":
        parts = [part.name for part in source.parts]
        dynamic.attach(dict(zip(parts, (original for original, _ in models), strict=True)), everything)
        attached = dynamic.attach(dict(zip(parts, (model for _, model in models), strict=True)), everything)
        report.changes = attached.changes()
        beside = attached.files()
    else:
        done = fold.Folded()
        how: Combine = parse(wanted.combine)
        wishes = places.wishes(everything, how, seed)
        for graphs in zip(*models, strict=True):
            for graph, placed in zip(graphs, places.place(graphs, wishes), strict=True):
                if source.others:
                    _refuse_split_ties(placed)
                fold.fold(graph, placed, done)
        report.changes = [what if n == 1 else f"{what} (×{n})" for what, n in done.changes.items()]
        report.refusals = [Refusal("", note) for note in dict.fromkeys(done.notes)]
        if done.errors:
            report.effect = "lossy"
            report.changes += [f"rounded again to {what} (×{n})" for what, n in done.grids.items()]
            worst = max(done.errors, key=lambda name: done.errors[name])
            mean = sum(done.errors.values()) / len(done.errors)
            warnings.append(
                f"{len(done.errors)} quantized weights were rounded again with their adapters: relative error "
                f"{mean:.3g} on average, {done.errors[worst]:.3g} at most ('{worst}')"
            )
            measurements["requantized"] = dict(done.errors)
    report.seconds = time.perf_counter() - start
    files = tuple(path for folder in folders for path in folder.files)
    first, *others = (
        replace(part, original=original, model=model, files=(*part.files, *files), adapted=report)
        for part, (original, model) in zip(source.parts, models, strict=True)
    )
    return replace(
        first,
        others=tuple(others),
        warnings=(*source.warnings, *warnings),
        beside={**source.beside, **beside},
        measurements={**source.measurements, **measurements},
    )


def _bases(folders: Sequence[Folder], path: Path) -> list[str]:
    """What is suspicious about the bases that adapters were trained on."""
    names = {folder.name: str(folder.config.get("base_model_name_or_path") or "") for folder in folders}
    own = _base_name(path)
    if own:
        names[path.name] = own
    known = {Path(name).name for name in names.values() if name}
    if len(known) < 2:
        return []
    listed = ", ".join(f"{owner}: {name}" for owner, name in names.items() if name)
    return [f"the adapters and the model name different bases ({listed}); their shapes fit"]


def _base_name(path: Path) -> str:
    """What a model folder says that it is."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8")) if path.is_dir() else {}
    except (OSError, ValueError):
        return ""
    return str(config.get("_name_or_path") or "") if isinstance(config, dict) else ""
