"""The user's data: ``--data`` and ``--calibrate``.

- ``data.npz``, ``data.npy``, a folder of them: arrays, see :mod:`graphc.data.arrays`;
- ``novel.txt``: text, with a tokenizer, see :mod:`graphc.data.text`;
- a folder of pictures, see :mod:`graphc.data.images`;
- ``file.py:function``: whatever a function of the user's yields, see :mod:`graphc.data.function`.

Options follow in braces: ``novel.txt{window=256 samples=64}``, see :class:`graphc.data.Spec`. Nothing is ever
unpickled. From Python, cases themselves may be given (mappings from input name to array), or a function that yields
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphc.data.arrays import BATCH
from graphc.data.samples import Samples
from graphc.data.spec import Spec
from graphc.errors import BadInput

__all__ = ["BATCH", "Given", "Origin", "Samples", "Spec", "load", "origin"]

Origin = Spec | Iterable[Any] | Callable[[], Iterable[Any]]
"""Where samples come from: what was named on the command line, or cases, or a function that yields them."""

Given = Origin | Path | str
"""An origin, or the name of one."""

TEXT = (".txt", ".text", ".md")


def origin(given: Given | None) -> Origin | None:
    """An origin from any form of it."""
    return Spec.of(given) if isinstance(given, Path | str) else given


def load(given: Given, model: ir.Model) -> Samples:
    """Read data that fits a model.

    Args:
        given: Where it is, and how to read it; or the cases.
        model: Whose inputs it must fit.

    Returns:
        The cases, in the dtypes of the interface, and labels if there are some.

    Raises:
        BadInput: It cannot be read, or does not fit; the message names the file and the array.
    """
    if isinstance(given, Samples):
        return given
    if not isinstance(given, Spec | Path | str):
        from graphc.data import function

        found = function.checked(given() if callable(given) else given, model, "the data given")
        if not len(found):
            raise BadInput("the data holds no samples")
        return found
    spec = Spec.of(given)
    found = _load(spec, model)
    if not len(found):
        raise BadInput("the data holds no samples", where=spec.path)
    return found[: spec.samples] if spec.samples else found


def _load(spec: Spec, model: ir.Model) -> Samples:
    from graphc.data import arrays, function, images, text

    path = Path(spec.path)
    if not path.exists() and ":" in spec.path:
        return function.load(spec.path, model)
    if path.suffix.lower() in TEXT and not path.is_dir():
        return text.load(spec, model)
    if images.found(path):
        return images.load(spec, model)
    return arrays.load(path, model)
