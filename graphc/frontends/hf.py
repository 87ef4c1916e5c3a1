"""Hugging Face folders as sources: the config decides what is exported, the weights stay where they are on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphc import edit
from graphc.contract import PassResult
from graphc.errors import BadInput
from graphc.frontends import Source
from graphc.frontends.huggingface.folder import CONFIG, HUB, Folder, knows, open_folder

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphc.frontends.huggingface.parts import Part

__all__ = ["HUB", "knows", "load"]


def load(path: Path, *, task: str = "", kv_cache: str = "merged", verify: bool = True, seed: int = 0) -> Source:
    """Export a model of Hugging Face's to one or several graphs.

    Initializers are named as in the model's state dict. Weights in float32 are mapped from their files, others are
    converted when they are read; the model itself is never in memory unless it is compared with torch.

    Args:
        path: A folder that ``save_pretrained`` wrote, a GGUF file or a folder with one, or ``hf:`` and a model's name
            on the hub. Only the last may use the network.
        task: What to export instead of the saved head, see ``tasks.model_class``.
        kv_cache: ``"merged"``, ``"split"`` or ``"none"``, see ``parts.CACHES``.
        verify: Whether to compare the graphs with torch, if their weights fit into memory.
        seed: Of the inputs to compare on.

    Returns:
        The first graph; the others are its ``others``.

    Raises:
        BadInput: The folder cannot be used, or the model has no such graphs.
        CheckFailed: A graph computes something else than the torch model.
    """
    folder = open_folder(path)
    from graphc.frontends.huggingface import parts as graphs
    from graphc.frontends.huggingface.tasks import model_class

    _refuse_quantized(folder)
    cls = model_class(folder.config, task, generates=folder.gguf is not None)
    found = _with_weights(cls, folder)
    exported = [(part, _export(found, part)) for part in graphs.parts(found.model, folder.path, kv_cache)]
    result = PassResult()
    measured = _compare(cls, folder, found, exported, kv_cache, seed) if verify else [{} for _ in exported]
    sources = [
        Source(
            model.clone(),
            model,
            path,
            found.files,
            result if not i else PassResult(),
            name=part.name,
            companions=folder.companions(),
            warnings=(*(found.notes if not i else ()), *notes),
            measurements=measured[i],
        )
        for i, (part, (model, notes)) in enumerate(exported)
    ]
    return sources[0].with_others(sources[1:])


@dataclass
class _Found:
    """A model and its weights.

    Attributes:
        model: Without values, or with them where transformers had to load it.
        weights: Tensors by parameter and buffer; None where the model has its values.
        files: The files read or mapped.
        notes: What the user should know.
    """

    model: Any
    weights: Mapping[str, ir.TensorProtocol] | None
    files: tuple[Path, ...]
    notes: list[str] = field(default_factory=list)


def _refuse_quantized(folder: Folder) -> None:
    quantized = getattr(folder.config, "quantization_config", None)
    if quantized is not None and folder.gguf is None:
        kind = quantized.get("quant_method", "?") if isinstance(quantized, dict) else type(quantized).__name__
        raise BadInput(
            "the weights are quantized in a form that graphc does not read",
            where=str(folder.path / CONFIG),
            why=f"quantization_config says {kind}",
            hint="give the folder of the model before it was quantized",
        )


def _with_weights(cls: Any, folder: Folder) -> _Found:
    """The model's modules without values and its tensors on disk, or the model as transformers loads it."""
    from graphc.frontends.huggingface import skeleton
    from graphc.frontends.huggingface.weights import Unmatched
    from graphc.storage import safetensors

    config = folder.path / CONFIG
    configs = (config,) if config.is_file() else ()
    if folder.gguf is not None:
        note = f"{folder.gguf.name} was dequantized to float32 in memory"
        return _Found(skeleton.loaded(cls, folder), None, (folder.gguf, *configs), [note])
    place = folder.weights
    if place is None:
        return _pickled(cls, folder, configs)
    stored = safetensors.index(place) if place.suffix == ".safetensors" else safetensors.shards(place)
    files = tuple(dict.fromkeys((place, *(each.path for each in stored.values()), *configs)))
    model = skeleton.skeleton(cls, folder.config)
    try:
        tensors, notes = _matched(cls, folder, model, stored)
    except Unmatched as why:
        note = f"the weights were loaded into memory by transformers: {why}"
        return _Found(skeleton.loaded(cls, folder), None, files, [note])
    return _Found(model, tensors, files, notes)


def _pickled(cls: Any, folder: Folder, configs: tuple[Path, ...]) -> _Found:
    from graphc.frontends.huggingface import skeleton

    if not folder.pickles:
        raise BadInput(
            "the folder has no weights",
            where=str(folder.path),
            why="there is no model.safetensors, no index of several, and no .gguf",
            hint="copy or download them into the folder",
        )
    try:
        model = skeleton.loaded(cls, folder)
    except BadInput as error:
        raise BadInput(
            "cannot load the pickled weights without running code from them",
            where=str(folder.pickles[0]),
            why=error.why,
            hint="where you trust them, convert them: from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)",
        ) from error
    note = "the weights were loaded into memory from pickled tensors; as safetensors they would be mapped"
    return _Found(model, None, (*folder.pickles, *configs), [note])


def _matched(cls: Any, folder: Folder, model: Any, stored: Any) -> tuple[dict[str, ir.TensorProtocol], list[str]]:
    import onnx_ir as ir

    from graphc.frontends.huggingface import skeleton, weights

    found = weights.match(model, stored)
    if found.misfit:
        name, shapes = next(iter(found.misfit.items()))
        raise BadInput(
            "the weights do not fit the config",
            where=str(folder.path),
            why=f"'{name}' is {shapes}" + (f", and {len(found.misfit) - 1} more" if len(found.misfit) > 1 else ""),
            hint="the config and the weights are of different models",
        )
    if found.missing:
        raise skeleton.missing_weights(folder, cls, found.missing)
    tensors = dict(found.tensors)
    for name, buffer in model.named_buffers():
        if name not in tensors and not buffer.is_meta:
            tensors[name] = ir.tensor(buffer.detach().numpy(), name=name)
    notes = []
    if found.unexpected:
        more = f" and {len(found.unexpected) - 1} more" if len(found.unexpected) > 1 else ""
        notes.append(f"weights that {cls.__name__} has no use for were left out: {found.unexpected[0]}{more}")
    if found.changed:
        notes.append(f"{found.changed} weights are computed when they are read (another dtype, or put together)")
    return tensors, notes


def _export(found: _Found, part: Part) -> tuple[ir.Model, tuple[str, ...]]:
    """One graph, with the weights that it uses."""
    from graphc.frontends import torch as frontend
    from graphc.frontends.huggingface.inputs import example
    from graphc.frontends.huggingface.masks import exportable
    from graphc.frontends.huggingface.parts import SIZES
    from graphc.frontends.huggingface.skeleton import calling

    with exportable(), calling(found.model, part.forward):
        exported = frontend.export(
            found.model,
            (example(part.inputs, SIZES),),
            dynamic_shapes={each.name: each.axes for each in part.inputs},
            input_names=[each.name for each in part.inputs],
            output_names=part.outputs,
            weights=found.weights,
        )
    model = exported.model
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
    _name_sizes(model, part)
    edit.rename_duplicate_nodes(model)
    model.graph.name = part.name
    return model, exported.notes


def _name_sizes(model: ir.Model, part: Part) -> None:
    """Call the dynamic sizes what the part calls them, also where torch has another expression for one."""
    import onnx_ir as ir

    by: dict[str, str] = {}
    for value, each in zip(model.graph.inputs, part.inputs, strict=True):
        for axis, name in each.axes.items():
            size = value.shape[axis] if value.shape is not None else None
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                by[size.value] = name
    for value in (*model.graph.inputs, *(v for node in edit.nodes(model) for v in node.outputs)):
        if value.shape is not None and not value.shape.frozen:
            value.shape = ir.Shape(
                [by.get(str(d.value), d) if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
            )


def _compare(
    cls: Any,
    folder: Folder,
    found: _Found,
    exported: list[tuple[Part, tuple[ir.Model, tuple[str, ...]]]],
    kv_cache: str,
    seed: int,
) -> list[dict[str, Any]]:
    """What comparing each graph with torch found; nothing where the model is too large, with a note."""
    from graphc.frontends.huggingface import against, skeleton
    from graphc.frontends.huggingface import parts as graphs

    nothing: list[dict[str, Any]] = [{} for _ in exported]
    if not against.can_compare():
        return nothing
    if sum(p.numel() for p in found.model.parameters()) * 4 > against.LARGEST:
        found.notes.append("not compared with torch, to spare memory")
        return nothing
    model = found.model if found.weights is None else skeleton.loaded(cls, folder)
    parts = graphs.parts(model, folder.path, kv_cache)
    return [
        {"torch": against.against_torch(part, graph, seed)}
        for part, (_, (graph, _)) in zip(parts, exported, strict=True)
    ]
