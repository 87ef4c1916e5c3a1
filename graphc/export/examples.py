"""Example inputs given on the command line: ``--inputs``.

    inputs = item { " " item }
    item   = name "=" ( dtype "[" [ size { "," size } ] "]" [ "<" bound ] | number | true | false | none )

``input_ids=int64[1,16]<1000 x=float32[1,3,32,32] training=false``. Floats are drawn from a normal distribution,
integers from 0 up to the bound (2 if there is none), booleans at random; always the same for the same text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from graphc.errors import BadInput, nearest

GRAMMAR = "'input_ids=int64[1,16]<1000 x=float32[1,3,32,32]'"
"""An example that says what the grammar is."""

DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64")
_CONSTANTS = {"true": True, "false": False, "none": None}


def read(text: str) -> dict[str, Any]:
    """Example inputs by name: from a ``.npz`` file, or made as the text says.

    Raises:
        BadInput: There is no such file, or the text is not in the grammar.
    """
    if text.endswith(".npz"):
        return _stored(Path(text))
    found: dict[str, Any] = {}
    for number, item in enumerate(re.findall(r"\S+", text)):
        name, value = _item(item, number)
        if name in found:
            raise BadInput(f"input '{name}' is given twice", where=f"--inputs {text}")
        found[name] = value
    if not found:
        raise BadInput("--inputs is empty", hint=f"such as {GRAMMAR}, or a .npz file")
    return found


def _item(item: str, number: int) -> tuple[str, Any]:
    name, equals, value = item.partition("=")
    if not equals or not name.replace(".", "_").isidentifier():
        raise BadInput(f"cannot read '{item}' in --inputs", hint=f"such as {GRAMMAR}, or a .npz file")
    if value in _CONSTANTS:
        return name, _CONSTANTS[value]
    if re.fullmatch(r"-?\d+", value):
        return name, int(value)
    if re.fullmatch(r"-?\d*\.?\d+(e-?\d+)?", value):
        return name, float(value)
    parts = re.fullmatch(r"(\w+)\[((?:\d+(?:,\d+)*)?)\](?:<(\d+))?", value)
    if parts is None:
        raise BadInput(f"cannot read '{item}' in --inputs", hint=f"name=dtype[sizes], such as {GRAMMAR}")
    dtype, sizes, bound = parts.groups()
    if dtype not in DTYPES:
        raise BadInput(f"input '{name}' has the unknown dtype '{dtype}'", hint=nearest(dtype, DTYPES))
    shape = [int(size) for size in sizes.split(",") if size]
    return name, _made(shape, dtype, int(bound) if bound else None, number)


def _made(shape: list[int], dtype: str, bound: int | None, seed: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    if dtype == "bool":
        return torch.rand(shape, generator=generator) < 0.5
    if kind.is_floating_point or kind.is_complex:
        wide = torch.float32 if not kind.is_complex else kind
        return torch.randn(shape, generator=generator, dtype=wide).to(kind)
    return torch.randint(0, max(bound or 2, 1), shape, generator=generator).to(kind)


def _stored(path: Path) -> dict[str, Any]:
    import zipfile

    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        raise BadInput("there is no such file", where=str(path), hint="--inputs takes a .npz or text") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BadInput("the example inputs cannot be read", where=str(path), why=str(error)) from None


def axes(text: str) -> Any:
    """What ``--dynamic`` says: ``auto``, ``batch``, ``none`` or ``x:0=batch,1=sequence y:0=batch``.

    Raises:
        BadInput: It is none of these.
    """
    if text in ("auto", "batch", "none"):
        return None if text == "none" else text
    found: dict[str, dict[int, str]] = {}
    for item in re.findall(r"[^\s;]+", text):
        name, colon, rest = item.partition(":")
        pairs = [re.fullmatch(r"(-?\d+)(?:=([A-Za-z_]\w*))?", each) for each in rest.split(",")]
        if not name or not colon or not all(pairs):
            raise BadInput(
                f"cannot read '{item}' in --dynamic",
                hint="auto, batch, none, or axes by input: 'x:0=batch,1=sequence y:0=batch'",
            )
        found[name] = {int(p[1]): p[2] or "" for p in pairs if p}
    return found
