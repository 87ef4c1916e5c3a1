"""Pictures as samples: a folder of them, or of one folder for each class.

The model must have one input of four axes with 1 or 3 channels, first or last. Each picture is resized so that it
covers the wanted size, its centre is cut out, and pixels become ``(pixel * scale - mean) / std``; an integer input
gets the pixels. A ``preprocessor_config.json`` says the same in its own words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc.contract import Arrays
from graphc.data.arrays import BATCH
from graphc.data.samples import Samples
from graphc.data.spec import Spec
from graphc.errors import BadInput

Array = np.ndarray[Any, np.dtype[Any]]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
CONFIG = "preprocessor_config.json"


def found(path: Path) -> bool:
    """Whether a path is a picture, or a folder of pictures."""
    if path.is_file():
        return path.suffix.lower() in SUFFIXES
    return path.is_dir() and any(_pictures(path))


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


@dataclass(frozen=True)
class _Preparation:
    """What is done to a picture.

    Attributes:
        resize: ``(height, width)`` that it is scaled to; with ``covers`` the smallest size that covers it.
        crop: ``(height, width)`` of the centre that is cut out.
        covers: Whether the picture keeps its proportions.
        scale, mean, std: Of the pixels.
    """

    resize: tuple[int, int]
    crop: tuple[int, int]
    covers: bool
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = 2


@dataclass(frozen=True)
class _Target:
    """The input that takes pictures: its name, dtype, whether channels come last, and its sizes."""

    name: str
    dtype: ir.DataType
    last: bool
    batch: int
    channels: int
    height: int
    width: int


def load(spec: Spec, model: ir.Model) -> Samples:
    """Read pictures; they are decoded case by case when looked at.

    Raises:
        BadInput: The model takes no pictures, Pillow is missing, a picture cannot be read, or no size is known.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise BadInput("Pillow is not installed", why=str(error), hint="pip install pillow") from None
    path = Path(spec.path)
    pictures = _pictures(path) if path.is_dir() else [path]
    target = _target(model, spec.path)
    preparation = _preparation(spec, target)
    classes = sorted({p.parent for p in pictures})
    batch = target.batch or BATCH
    rows = [pictures[i : i + batch] for i in range(0, len(pictures), batch)]
    rows = [row for row in rows if not target.batch or len(row) == batch]
    labels = [np.array([classes.index(p.parent) for p in row]) for row in rows] if len(classes) > 1 else []
    return Samples([partial(_case, row, target, preparation) for row in rows], labels)


def _target(model: ir.Model, where: str) -> _Target:
    required = [v for v in model.graph.inputs if not v.is_initializer()]
    shape = list(required[0].shape) if len(required) == 1 and required[0].shape is not None else []
    sizes = [d if isinstance(d, int) else 0 for d in shape]
    dtype = required[0].dtype if required else None
    for axis, last in ((1, False), (3, True)):
        if len(sizes) == 4 and sizes[axis] in (1, 3) and dtype is not None:
            height, width = (sizes[1], sizes[2]) if last else (sizes[2], sizes[3])
            return _Target(required[0].name or "", dtype, last, sizes[0], sizes[axis], height, width)
    raise BadInput(
        "the model takes no pictures",
        where=where,
        why="they need one input of four axes, of which one has 1 or 3 channels",
        hint="give arrays (.npz), or a function FILE.py:FUNCTION that yields them",
    )


def _preparation(spec: Spec, target: _Target) -> _Preparation:
    folder = Path(spec.path)
    config = spec.preprocess or (folder / CONFIG if (folder / CONFIG).is_file() else None)
    if config is not None:
        found = _configured(config / CONFIG if config.is_dir() else config, target)
    else:
        size = (target.height or spec.size, target.width or spec.size)
        found = _Preparation(size, size, True, spec.scale, spec.mean, spec.std)
    if not all(found.crop):
        raise BadInput("the size of pictures is not known", where=spec.path, hint="give {size=224}")
    for name, values in (("mean", found.mean), ("std", found.std)):
        if len(values) not in (0, 1, target.channels):
            raise BadInput(f"{name} has {len(values)} numbers for {target.channels} channels", where=spec.path)
    return found


def _configured(path: Path, target: _Target) -> _Preparation:
    """What a ``preprocessor_config.json`` says."""
    try:
        config: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput("the preprocessor configuration cannot be read", where=str(path), why=str(error)) from None
    size = config.get("size", 0)
    crop = config.get("crop_size") if config.get("do_center_crop") else None
    edge = isinstance(size, Mapping) and "shortest_edge" in size
    resize = _pair(size) if config.get("do_resize", True) else (0, 0)
    wanted = _pair(crop) if crop else (target.height, target.width) if edge or not all(resize) else resize
    wanted = (target.height or wanted[0], target.width or wanted[1])
    normalise = config.get("do_normalize", True)
    scale = float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0
    return _Preparation(
        resize=resize if all(resize) else wanted,
        crop=wanted,
        covers=edge or bool(crop),
        scale=scale,
        mean=tuple(config.get("image_mean", ())) if normalise else (),
        std=tuple(config.get("image_std", ())) if normalise else (),
        resample=int(config.get("resample", 2)),
    )


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        if "shortest_edge" in size:
            return int(size["shortest_edge"]), int(size["shortest_edge"])
        return int(size.get("height", 0)), int(size.get("width", 0))
    if isinstance(size, Sequence):
        return int(size[0]), int(size[-1])
    return int(size or 0), int(size or 0)


def _case(paths: Sequence[Path], target: _Target, preparation: _Preparation) -> Arrays:
    rows = np.stack([_picture(path, target, preparation) for path in paths])
    if not target.last:
        rows = np.moveaxis(rows, 3, 1)
    if target.dtype.is_integer():
        rows = np.clip(np.rint(rows), 0, 255)
    return {target.name: np.ascontiguousarray(rows.astype(target.dtype.numpy()))}


def _picture(path: Path, target: _Target, preparation: _Preparation) -> Array:
    """One picture, ``(height, width, channels)``, float32."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB" if target.channels == 3 else "L")
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise BadInput("the picture cannot be read", where=str(path), why=str(error)) from None
    height, width = preparation.resize
    if preparation.covers:
        factor = max(height / image.height, width / image.width)
        height, width = max(height, round(image.height * factor)), max(width, round(image.width * factor))
    image = image.resize((width, height), resample=Image.Resampling(preparation.resample))
    pixels = np.asarray(image, dtype=np.float32).reshape(height, width, target.channels)
    pixels = _centre(pixels, preparation.crop)
    if target.dtype.is_integer():
        return pixels
    pixels = pixels * preparation.scale
    if preparation.mean:
        pixels = pixels - np.array(preparation.mean, dtype=np.float32)
    return pixels / np.array(preparation.std, dtype=np.float32) if preparation.std else pixels


def _centre(pixels: Array, crop: tuple[int, int]) -> Array:
    """The centre of a picture, with zeros around it where it is too small."""
    missing = [max(0, want - have) for want, have in zip(crop, pixels.shape, strict=False)]
    if any(missing):
        pixels = np.pad(pixels, [(m // 2, m - m // 2) for m in missing] + [(0, 0)])
    top, left = (pixels.shape[0] - crop[0]) // 2, (pixels.shape[1] - crop[1]) // 2
    return pixels[top : top + crop[0], left : left + crop[1]]
