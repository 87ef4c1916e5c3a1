"""The tensors that models of transformers take: by what is in them, not by architecture."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphc.errors import BadInput
from graphc.shapes.expressions import evaluate

if TYPE_CHECKING:
    import torch

Sizes = Mapping[str, int]
"""Sizes by the name of a dynamic dimension."""

BATCH, SEQUENCE, PAST = "batch_size", "sequence_length", "past_sequence_length"
TOTAL = f"{PAST} + {SEQUENCE}"
ENCODED = "encoder_sequence_length"


@dataclass(frozen=True)
class Input:
    """One input of a graph.

    Attributes:
        name: Its name.
        dims: Its sizes: a number, the name of a dynamic dimension, or a sum of such names.
        kind: What is in it: ``ids``, ``mask``, ``positions``, ``types`` or ``values``.
        bound: Of ids: how many there are.
    """

    name: str
    dims: tuple[int | str, ...]
    kind: str = "values"
    bound: int = 0

    @property
    def axes(self) -> dict[int, str]:
        """The dynamic axes."""
        return {axis: dim for axis, dim in enumerate(self.dims) if isinstance(dim, str)}

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(evaluate(dim, dict(sizes)) for dim in self.dims)


def example(inputs: tuple[Input, ...], sizes: Sizes) -> list[torch.Tensor]:
    """Tensors to trace with; masks leave nothing out."""
    import torch

    made = []
    for each in inputs:
        shape = each.shape(sizes)
        made.append(
            torch.ones(shape, dtype=torch.int64)
            if each.kind == "mask"
            else torch.zeros(shape, dtype=torch.float32 if each.kind == "values" else torch.int64)
        )
    return made


def sample(inputs: tuple[Input, ...], sizes: Sizes, rng: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    """Random inputs; in batches of several, the first sequence is padded on the left where there is room."""
    made: dict[str, np.ndarray[Any, Any]] = {}
    for each in inputs:
        shape = each.shape(sizes)
        if each.kind == "values":
            made[each.name] = rng.standard_normal(shape, dtype=np.float32)
        elif each.kind == "ids":
            made[each.name] = rng.integers(0, max(each.bound, 1), shape)
        elif each.kind == "types":
            made[each.name] = rng.integers(0, 2, shape)
        elif each.kind == "mask":
            mask = np.ones(shape, np.int64)
            if shape[0] > 1 and shape[1] > 2:
                mask[0, : (shape[1] - 1) // 2] = 0
            made[each.name] = mask
    for each in inputs:
        if each.kind == "positions":
            masks = [made[i.name] for i in inputs if i.kind == "mask"] or [np.ones(each.shape(sizes), np.int64)]
            made[each.name] = np.maximum(np.cumsum(masks[0], 1) - 1, 0)[:, -each.shape(sizes)[1] :]
    return {each.name: made[each.name] for each in inputs}


def setting(config: Any, *names: str) -> Any:
    """The first of several settings that a configuration or one of its parts has; None if none does."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    for part in parts:
        for name in names:
            found = getattr(part, name, None)
            if found is not None:
                return found
    return None


def of_forward(cls: Any, config: Any, folder: Path, *, decoder: bool = False) -> tuple[Input, ...]:
    """The inputs of a model that is run once, with no state.

    Args:
        cls: The model's class.
        config: Its configuration.
        folder: Where the processor's configuration is.
        decoder: Whether ``decoder_input_ids`` are wanted too.

    Raises:
        BadInput: It needs an input of which nothing is known.
    """
    parameters = inspect.signature(cls.forward).parameters
    modalities = getattr(cls, "input_modalities", "text")
    text = "text" in ((modalities,) if isinstance(modalities, str) else modalities) and cls.main_input_name not in (
        "input_features",
        "input_values",
    )
    both = text and "pixel_values" in parameters
    inputs: list[Input] = []
    for name in parameters:
        found = _known(name, config, folder, text=text, both=both)
        if found is not None and (decoder or not name.startswith("decoder_")):
            inputs.append(found)
    known = {each.name for each in inputs}
    lacking = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in known and p.name != "self"
    ]
    if lacking or not known:
        raise BadInput(
            f"{cls.__name__} takes inputs that graphc does not know how to make",
            why=", ".join(lacking or [cls.main_input_name]),
            hint="export it yourself and give graphc the module (package.module:factory)",
        )
    return tuple(inputs)


def _known(name: str, config: Any, folder: Path, *, text: bool, both: bool) -> Input | None:
    vocabulary = setting(config, "vocab_size") or 1
    images = "image_batch_size" if both else BATCH
    texts = "text_batch_size" if both else BATCH
    match name:
        case "input_ids" if text:
            return Input(name, (texts, SEQUENCE), "ids", vocabulary)
        case "attention_mask" if text:
            return Input(name, (texts, SEQUENCE), "mask")
        case "token_type_ids" if text and (setting(config, "type_vocab_size") or 0) > 1:
            return Input(name, (texts, SEQUENCE), "types")
        case "decoder_input_ids":
            return Input(name, (BATCH, "decoder_sequence_length"), "ids", vocabulary)
        case "pixel_values":
            height, width = _pair(setting(config, "image_size") or 224)
            return Input(name, (images, setting(config, "num_channels") or 3, height, width))
        case "input_features":
            # Speech encoders halve the number of frames once.
            frames = _processor(folder, "nb_max_frames") or 2 * (setting(config, "max_source_positions") or 1500)
            return Input(name, (BATCH, setting(config, "num_mel_bins") or 80, frames))
        case "input_values":
            if (mels := setting(config, "num_mel_bins")) and (length := setting(config, "max_length")):
                return Input(name, (BATCH, length, mels))
            return Input(name, (BATCH, "samples"))
    return None


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _processor(folder: Path, key: str) -> int | None:
    """A number from the processor's configuration."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        try:
            document = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for part in (document, *(v for v in document.values() if isinstance(v, dict))):
            if isinstance(part.get(key), int):
                return int(part[key])
    return None
