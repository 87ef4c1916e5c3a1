"""The decoder with a cache that ``bench/fuse.py`` measures: SmolLM2 as ``torch.onnx.export`` writes it.

    PYTHON bench/fuse_decoder.py

makes ``smollm2-decoder.onnx``, one graph with a past that may be empty, and ``smollm2-decode.onnx``, the same for one
token at a time, with sizes named as Optimum names them: the mask is as long as the past and the token. ``PYTHON`` is
the interpreter of an environment with ``bench/requirements-torch.txt``.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import cache
import numpy as np

Arrays = dict[str, "np.ndarray[Any, Any]"]

SIZES = {"smollm2-decoder": ((128, 0), (512, 0), (1, 128), (1, 512)), "smollm2-decode": ((1, 128), (1, 512))}
"""By model: how many tokens are read, after how many in the cache."""


def cases(name: str) -> dict[str, Arrays]:
    """The inputs that a model is measured with, by what they are."""
    return {_words(new, past): _inputs(cache.model(name), new, past) for new, past in SIZES[name]}


def _words(new: int, past: int) -> str:
    return f"{new} token{'s' * (new > 1)}" + (f" after {past}" if past else "")


def _inputs(path: Path, new: int, past: int) -> Arrays:
    from graphc import model

    rng = np.random.default_rng(0)
    found: Arrays = {
        "input_ids": rng.integers(0, 49152, (1, new)),
        "attention_mask": np.ones((1, past + new), np.int64),
        "position_ids": np.arange(past, past + new)[None],
    }
    for value in model.load(path).graph.inputs:
        if value.name not in found and value.name is not None and value.shape is not None:
            heads, size = value.shape[1], value.shape[3]
            found[value.name] = rng.standard_normal((1, heads, past, size), np.float32)  # type: ignore[arg-type]
    return found


def make() -> None:
    """Export both graphs from the folder ``smollm2-hf`` of the cache."""
    import frontend_folders
    import onnx

    whole = cache.model("smollm2-decoder")
    if not whole.exists():
        with tempfile.TemporaryDirectory(dir=cache.root()) as scratch:
            frontend_folders.export(cache.root() / "smollm2-hf", Path(scratch) / "made", "merged")
            shutil.move(Path(scratch) / "made" / "model.onnx", whole)
    proto = onnx.load(whole)
    dims = {value.name: value.type.tensor_type.shape.dim for value in (*proto.graph.input, *proto.graph.output)}
    length, total = (dims[name][1].dim_param for name in ("input_ids", "attention_mask"))
    for name, own in dims.items():
        for dim in own:
            if dim.dim_param == length:
                dim.dim_value = 1
            elif dim.dim_param == total or length in dim.dim_param.split():
                dim.dim_param = "past_sequence_length + 1"
        if name.startswith("past"):
            own[2].dim_param = "past_sequence_length"
    del proto.graph.value_info[:]
    partial = cache.model("smollm2-decode").with_suffix(".partial")
    onnx.save(proto, partial)
    partial.replace(cache.model("smollm2-decode"))


if __name__ == "__main__":
    make()
