"""Which operators a session really runs as one: its own optimised graph, read back."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from graphc import edit

_NAMES: Mapping[str, tuple[str, ...]] = {
    "Attention": ("Attention", "MultiHeadAttention", "GroupQueryAttention"),
    "RMSNormalization": ("RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"),
    "RotaryEmbedding": ("RotaryEmbedding", "GroupQueryAttention"),
    "LayerNormalization": ("LayerNormalization", "SkipLayerNormalization", "EmbedLayerNormalization"),
    "Gelu": ("Gelu", "BiasGelu", "FastGelu"),
    "GroupNormalization": ("GroupNormalization", "GroupNorm"),
    "Swish": ("Swish", "QuickGelu"),
}
"""Operators that runtimes may compute piece by piece, and the names under which a session runs them as one."""


def unrealised(model: ir.Model, path: Path, *, provider: str, options: Mapping[str, str]) -> list[str]:
    """What a session computes piece by piece, or not at all, of the operators that a model has as one; in words.

    Args:
        model: What was emitted.
        path: The file that it was emitted to.
        provider: The execution provider.
        options: Configuration entries of the session.

    Raises:
        CannotRun: The runtime rejects the model.
    """
    from graphc import runtime

    planned = Counter(name for node in edit.nodes(model) if (name := _planned(node)))
    if not planned:
        return []
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "optimised.onnx"
        settings = runtime.settings(optimise=True, options=dict(options))
        settings.optimized_model_filepath = str(written)
        runtime.handle(str(path), settings, provider, where=str(path))
        found = Counter(node.op_type for node in edit.nodes(ir.load(written)))
    missing = []
    for name, count in sorted(planned.items()):
        whole = sum(found[each] for each in _NAMES.get(name, (name,)))
        if whole < count:
            missing.append(f"{count - whole} of {count} {name}")
    return missing


def _planned(node: ir.Node) -> str:
    return node.op_type if node.domain == "com.microsoft" or (not node.domain and node.op_type in _NAMES) else ""
