"""Adapter folders as PEFT writes them, read without PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphc.edit import Array
from graphc.errors import BadInput

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"

FOLDABLE = ("LORA", "ADALORA", "IA3", "TRAINABLE_TOKENS")

_DYNAMIC = {
    "alora_invocation_tokens": "aLoRA, which depends on the tokens it sees",
    "arrow_config": "Arrow, which routes between adapters by their input",
    "kasa_config": "KaSA, which was trained on a truncated base",
    "layer_replication": "layer replication, which changes the architecture",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA, which pools its input",
}
"""Options of LoRA with which it is no plain update of a weight."""

_MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base weights, so that the adapter belongs to a base that nobody has."""


@dataclass(frozen=True)
class Folder:
    """An adapter folder.

    Attributes:
        path: The folder.
        weight: How much of the adapter is wanted.
        config: What its configuration says.
        tensors: Its arrays by name, without PEFT's prefix.
        files: What was read.
    """

    path: Path
    weight: float
    config: Mapping[str, Any]
    tensors: Mapping[str, Array]
    files: tuple[Path, ...]

    @property
    def kind(self) -> str:
        """PEFT's name of the method."""
        return str(self.config["peft_type"])

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    def pattern(self, which: str, module: str, default: Any) -> Any:
        """The value of ``rank_pattern`` or ``alpha_pattern`` for a module."""
        for key, value in (self.config.get(which) or {}).items():
            try:
                if re.match(rf"(.*\.)?({key})$", module):
                    return value
            except re.error as error:
                raise self.bad(f"'{which}' has a key that is no regular expression", f"{key}: {error}") from None
        return default

    def bad(self, what: str, why: str = "", hint: str = "") -> BadInput:
        """An error about this adapter."""
        return BadInput(what, where=str(self.path), why=why, hint=hint)


def read(path: Path, weight: float = 1.0) -> Folder:
    """Read an adapter folder; its arrays stay in memory, they are small.

    Raises:
        BadInput: It is no adapter folder, it is damaged, has NaN, or is of a kind that cannot be folded.
    """
    if not path.is_dir():
        what = "the adapter is no folder" if path.exists() else "there is no such adapter"
        raise BadInput(what, where=str(path), hint=f"give the folder with {CONFIG}")
    config = _config(path / CONFIG)
    source = weights_file(path)
    tensors = _pickled(source) if source.name == PICKLED else _safetensors(source)
    found = Folder(path, weight, config, dict(_stripped(tensors)), (path / CONFIG, source))
    _check(found)
    return found


def weights_file(path: Path) -> Path:
    """The file of an adapter folder that has its weights.

    Raises:
        BadInput: There is none.
    """
    for name in (TENSORS, PICKLED):
        if (path / name).is_file():
            return path / name
    raise BadInput("the adapter has no weights", where=str(path), why=f"there is no {TENSORS}")


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput("this is no adapter folder", where=str(path.parent), why=f"it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise BadInput("cannot read the adapter's configuration", where=str(path), why=str(error)) from None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise BadInput("the adapter's configuration has no 'peft_type'", where=str(path))
    return config


def _safetensors(path: Path) -> dict[str, Array]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found: dict[str, Array] = load_file(path)
    except OSError as error:
        raise BadInput("cannot read the adapter", where=str(path), why=error.strerror or str(error)) from None
    except (SafetensorError, KeyError) as error:
        raise BadInput("this is no safetensors file", where=str(path), why=str(error)) from None
    return found


def _pickled(path: Path) -> dict[str, Array]:
    """A ``.bin`` file, through torch's reader that admits tensors only."""
    try:
        import torch
    except ImportError:
        raise BadInput(
            f"only torch can read {path.name}",
            where=str(path),
            hint="install torch, or save the adapter again with safe_serialization=True",
        ) from None
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
        return {
            name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
            for name, tensor in held.items()
        }
    except Exception as error:  # pickles fail in every way there is
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput("cannot read the adapter", where=str(path), why=why) from None


def _stripped(tensors: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    """Names without what PEFT puts in front, and without the copies that it keeps of replaced modules."""
    for name in sorted(tensors):
        if ".original_module." in name:
            continue
        yield name.removeprefix("base_model.model.").replace(".modules_to_save.", "."), tensors[name]


def _check(folder: Folder) -> None:
    if folder.kind not in FOLDABLE:
        raise folder.bad(
            f"adapters of type {folder.kind} cannot be folded",
            "they are no update of the base's weights, or none that graphc knows",
            f"foldable are: {', '.join(FOLDABLE)}",
        )
    if not folder.tensors:
        raise folder.bad("the adapter is empty")
    if folder.kind == "LORA":
        for option, what in _DYNAMIC.items():
            if folder.config.get(option):
                raise folder.bad("the adapter cannot be folded", f"it uses {what} ('{option}')")
        begun = str(folder.config.get("init_lora_weights", True)).lower()
        if begun.startswith(_MUTATING):
            raise folder.bad(
                "the adapter belongs to a base that was changed when its training began",
                f"init_lora_weights is '{begun}'",
                "save it again with path_initial_model_for_weight_conversion, which makes it a plain LoRA",
            )
    for name, array in folder.tensors.items():
        if array.dtype.kind not in "fV" and array.dtype.name != "bfloat16":
            raise folder.bad(f"'{name}' is {array.dtype}, not floating point")
        if not np.isfinite(array.astype(np.float32) if array.dtype.kind != "f" else array).all():
            raise folder.bad(f"'{name}' has NaN or infinite values", hint="the training has failed: use another one")
