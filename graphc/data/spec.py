"""What the user says about data: a path, and how to read what is there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from graphc.errors import BadInput


def option(default: Any, help: str) -> Any:
    """A field that is an option of data."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Spec:
    """A path with options: ``novel.txt{window=256 samples=64}``."""

    path: str
    samples: int = option(0, "Cases that are used at most, the first ones; 0 is all.")
    tokenizer: Path | None = option(None, "Text: a tokenizer.json, or a folder with one.")  # noqa: RUF009
    window: int = option(512, "Text: tokens of each window, where the model leaves it open.")
    stride: int = option(0, "Text: tokens between the starts of two windows; 0 is the window.")
    lines: bool = option(False, "Text: each line is a case of its own, with special tokens, padded; no windows.")
    preprocess: Path | None = option(None, "Images: a preprocessor_config.json; one in the folder is found.")  # noqa: RUF009
    size: int = option(0, "Images: height and width, where the model leaves them open.")
    scale: float = option(1 / 255, "Images: what pixels from 0 to 255 are multiplied with.")
    mean: tuple[float, ...] = option((), "Images: what is then subtracted from each channel.")
    std: tuple[float, ...] = option((), "Images: what each channel is then divided by.")

    @staticmethod
    def parse(text: str) -> Spec:
        """Read ``PATH`` or ``PATH{option=value ...}``.

        Raises:
            BadInput: An unknown option, or a value of the wrong type.
        """
        from graphc.recipe import build, options

        path, brace, rest = text.partition("{")
        if not brace:
            return Spec(text)
        given = options(f"data{{{rest}")
        if "path" in given:
            raise BadInput("the path stands before the brace", where=text)
        return build(Spec, path, {"path": path, **given}, text)

    @staticmethod
    def of(given: Spec | Path | str) -> Spec:
        """A specification from any form of it."""
        if isinstance(given, Spec):
            return given
        return Spec.parse(given) if isinstance(given, str) else Spec(str(given))

    def with_tokenizer(self, path: Path | None) -> Spec:
        """With this tokenizer, where none is named."""
        return self if path is None or self.tokenizer is not None else replace(self, tokenizer=path)

    def files(self) -> list[Path]:
        """The files that decide on the samples."""
        path, sign, _ = self.path.rpartition(":")
        place = Path(path if sign and path.endswith(".py") else self.path)
        return [f for each in (place, self.tokenizer, self.preprocess) if each is not None for f in _below(each)]


def _below(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
