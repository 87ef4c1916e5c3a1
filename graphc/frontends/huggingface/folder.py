"""A Hugging Face folder on disk: its config, its weights, and the files that go with a model. Nothing is downloaded."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from graphc.environment import to_install
from graphc.errors import BadInput, nearest
from graphc.storage.files import is_artifact

CONFIG = "config.json"
HUB = "hf:"
"""Prefix of a source that is a model's name on the hub."""

_CHECKPOINTS = ("*.safetensors*", "pytorch_model*.bin")

_BESIDE = (
    "*config*.json",
    "token*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "normalizer.json",
    "chat_template*",
)
"""What a tokenizer, a processor and ``generate`` read."""


@dataclass(frozen=True)
class Folder:
    """A model folder as transformers writes it.

    Attributes:
        path: The folder.
        config: transformers' configuration object.
        gguf: The GGUF file that has the weights; then there may be no ``config.json``.
        beside: Files that go with the model: configuration, tokenizer, processor.
    """

    path: Path
    config: Any
    gguf: Path | None
    beside: tuple[Path, ...]

    @property
    def weights(self) -> Path | None:
        """The safetensors file or the index of several; None if there is none."""
        return next(
            (p for name in ("model.safetensors", "model.safetensors.index.json") if (p := self.path / name).is_file()),
            None,
        )

    def companions(self) -> dict[str, Callable[[Path], None]]:
        """Writers of the files that go with the model, by name; those that a GGUF file holds are made from it."""
        found: dict[str, Callable[[Path], None]] = {}
        if self.gguf is not None:
            found[CONFIG] = self.config.to_json_file
            tokenizer = _gguf_tokenizer(self.gguf)
            if tokenizer is not None:
                found["tokenizer.json"] = lambda place: tokenizer.save(str(place))
        return found | {path.name: partial(_copy, path) for path in self.beside}

    @property
    def pickles(self) -> list[Path]:
        """Checkpoints in torch's own format."""
        return sorted(self.path.glob("pytorch_model*.bin"))


def _copy(source: Path, destination: Path) -> None:
    shutil.copyfile(source, destination)


def _gguf_tokenizer(path: Path) -> Any:
    """The tokenizer that a GGUF file holds, as the library tokenizers has it; None if it is of an unknown kind."""
    from transformers import AutoTokenizer

    with quiet():
        try:
            found = AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
            )
        except Exception:  # kinds of tokenizers that transformers does not convert
            return None
    return getattr(found, "backend_tokenizer", None)


def knows(path: Path) -> bool:
    """Whether a source is a model of Hugging Face's: its name on the hub, a folder with a config, or a GGUF file.

    A folder of ONNX files with a config, as an artifact is or an exporter wrote it, is none: there are no weights to
    export.
    """
    if str(path).startswith(HUB):
        return True
    if not path.is_dir():
        return path.suffix == ".gguf"
    if is_artifact(path):
        return False
    if (path / CONFIG).is_file():
        return _has_weights(path) or not any(path.glob("*.onnx"))
    return len(list(path.glob("*.gguf"))) == 1


def _has_weights(folder: Path) -> bool:
    return any(any(folder.glob(kind)) for kind in (*_CHECKPOINTS, "*.gguf"))


def require() -> None:
    """Make sure that torch and transformers can be used.

    Raises:
        BadInput: One is missing.
    """
    missing = [name for name in ("torch", "transformers", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(f"{' and '.join(missing)} must be installed to read Hugging Face models", hint=to_install("hf"))


def open_folder(path: Path) -> Folder:
    """Read the configuration of a model folder.

    Args:
        path: A folder, a ``.gguf`` file, or ``hf:`` and a model's name on the hub.

    Raises:
        BadInput: It is none, its configuration cannot be used, or the model needs code of its own.
    """
    require()
    if str(path).startswith(HUB):
        path = _from_hub(str(path).removeprefix(HUB))
    gguf = path if path.suffix == ".gguf" and path.is_file() else None
    folder = path.parent if gguf else path
    if not folder.is_dir():
        raise BadInput("there is no such folder", where=str(path), hint=f"for a model on the hub say {HUB}{path}")
    if gguf is None and not any(any(folder.glob(kind)) for kind in _CHECKPOINTS):
        found = sorted(folder.glob("*.gguf"))
        if len(found) > 1:
            raise BadInput(
                "the folder holds several GGUF files",
                where=str(folder),
                why=", ".join(p.name for p in found[:5]),
                hint="name the file",
            )
        gguf = found[0] if found else None
    config = _config(folder, gguf)
    beside = sorted({p for pattern in _BESIDE for p in folder.glob(pattern) if p.is_file()})
    return Folder(folder, config, gguf, tuple(beside))


def _config(folder: Path, gguf: Path | None) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    place = folder / CONFIG
    if gguf is not None:
        if importlib.util.find_spec("gguf") is None:
            raise BadInput("gguf must be installed to read GGUF files", where=str(gguf), hint="pip install gguf")
        with quiet():
            try:
                return AutoConfig.from_pretrained(
                    folder, gguf_file=gguf.name, local_files_only=True, trust_remote_code=False
                )
            except Exception as error:  # whatever reading somebody's file may raise
                raise BadInput("cannot use the GGUF file", where=str(gguf), why=_line(error)) from error
    if not place.is_file():
        raise BadInput(
            "this is no Hugging Face model folder",
            where=str(folder),
            why=f"it has no {CONFIG}",
            hint="give a folder that save_pretrained wrote",
        )
    document = _document(place)
    kind = document.get("model_type")
    remote = document.get("auto_map")
    if kind not in CONFIG_MAPPING:
        if remote:
            raise BadInput(
                "the model needs code of its own, which is not run",
                where=str(place),
                why=f"its auto_map names {next(iter(remote.values()), '?')}",
                hint="export it yourself and give graphc the module (package.module:factory)",
            )
        raise BadInput(
            f"the installed transformers does not know model_type '{kind}'" if kind else "the config has no model_type",
            where=str(place),
            hint=nearest(kind, list(CONFIG_MAPPING)) if kind else "give a folder that save_pretrained wrote",
        )
    with quiet():
        try:
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # configurations check themselves in many ways
            raise BadInput("the config cannot be used", where=str(place), why=_line(error)) from error


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput("the config cannot be read", where=str(path), why=_line(error)) from None
    if not isinstance(document, dict):
        raise BadInput("the config is no JSON object", where=str(path))
    return document


def _from_hub(name: str) -> Path:
    """The folder of a model on the hub: in the local cache, or downloaded."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # its exceptions share no base with those of its transport
        raise BadInput(
            "cannot get the model from the hub",
            where=name,
            why=_line(error),
            hint="download it where there is a network and give the folder",
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' remarks and progress bars from the terminal."""
    import warnings

    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
