"""Which tensor on disk is which parameter, by transformers' own loading rules, without loading any.

A parameter that is stored as it is becomes an ``ir.ExternalTensor`` at its place in the safetensors file; one in
another float dtype, or one that transformers puts together from several (stacked experts), an ``ir.LazyTensor``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphc.storage.safetensors import Stored

if TYPE_CHECKING:
    import torch


class Unmatched(Exception):
    """The rules need something that only transformers' own loading does; the message says what."""


@dataclass
class Matched:
    """What the tensors on disk are for a model.

    Attributes:
        tensors: By the name of the parameter or buffer, in its dtype and shape.
        missing: Parameters without a tensor.
        unexpected: Tensors without a parameter.
        misfit: Parameters whose tensor has another shape, with both shapes.
        changed: How many are stored in another dtype or put together.
    """

    tensors: dict[str, ir.TensorProtocol] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misfit: dict[str, str] = field(default_factory=dict)
    changed: int = 0


@dataclass
class _Conversion:
    """Tensors that one of transformers' converters makes parameters of."""

    converter: Any
    sources: list[tuple[str, str, Stored]] = field(default_factory=list)


def match(model: Any, stored: Mapping[str, Stored]) -> Matched:
    """Find the tensor of every parameter and persistent buffer.

    Args:
        model: Without values; parameters that turn out not to be tied are untied in it.
        stored: The tensors on disk by name.

    Raises:
        Unmatched: The installed transformers has rules that cannot be followed without loading.
    """
    state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    found = Matched()
    direct, conversions = _sorted_out(model, stored, state, found)
    for name, source in direct.items():
        wanted = tuple(state[name].shape)
        if source.shape != wanted:
            found.misfit[name] = f"{list(source.shape)} on disk, {list(wanted)} in the config's model"
            continue
        found.tensors[name] = _as(source, name, _dtype(state[name]), found)
    for first, conversion in conversions.items():
        _convert(model, first, conversion, state, found)
    _untie(model, found.tensors)
    names = _all_names(model)
    found.missing = [
        name
        for name, held in model.state_dict(keep_vars=True).items()
        if not any(each in found.tensors or each in found.misfit for each in names[id(held)])
        and not _ignored(name, model._keys_to_ignore_on_load_missing)
    ]
    found.unexpected = [
        name for name in found.unexpected if not _ignored(name, model._keys_to_ignore_on_load_unexpected)
    ]
    return found


def _sorted_out(
    model: Any, stored: Mapping[str, Stored], state: Mapping[str, Any], found: Matched
) -> tuple[dict[str, Stored], dict[str, _Conversion]]:
    """Tensors that are parameters as they are, and those to be converted, by the first parameter they go to."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError as error:
        raise Unmatched(f"this version of transformers has other loading rules ({error})") from error
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    direct: dict[str, Stored] = {}
    conversions: dict[str, _Conversion] = {}
    prefix = model.base_model_prefix
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            found.unexpected.append(key)
        elif pattern is None:
            direct.setdefault(name, stored[key])
        else:
            entry = conversions.setdefault(name, _Conversion(by_pattern[pattern]))
            entry.sources.append((key, pattern, stored[key]))
    return direct, conversions


def _convert(model: Any, first: str, conversion: _Conversion, state: Mapping[str, Any], found: Matched) -> None:
    """The parameters that a converter makes, each computed when it is read."""
    import torch

    def run(read: Callable[[Stored], torch.Tensor]) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(conversion.converter)
        for key, pattern, source in conversion.sources:
            converter.add_tensor(first, key, pattern, read(source))
        made = converter.convert(first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def lazily(name: str) -> Callable[[], ir.TensorProtocol]:
        return lambda: ir.tensor(run(_read)[name].contiguous().numpy(), name=name)

    try:
        made = run(lambda source: torch.empty(source.shape, device="meta"))
    except Exception as error:  # converters are free to look at values
        raise Unmatched(f"'{first}' is converted in a way that needs its values ({error})") from error
    for name, value in made.items():
        if name not in state:
            raise Unmatched(f"a conversion makes '{name}', which the model has not")
        if value.shape != state[name].shape:
            found.misfit[name] = f"{list(value.shape)} on disk, {list(state[name].shape)} in the config's model"
            continue
        shape = ir.Shape(tuple(value.shape))
        found.tensors[name] = ir.LazyTensor(lazily(name), dtype=_dtype(state[name]), shape=shape, name=name)
        found.changed += 1


def _as(source: Stored, name: str, dtype: ir.DataType, found: Matched) -> ir.TensorProtocol:
    """The tensor, in a dtype."""
    if source.dtype == dtype:
        return source.tensor(name)
    found.changed += 1
    return ir.LazyTensor(
        lambda: ir.tensor(_cast(source, dtype), name=name), dtype=dtype, shape=ir.Shape(source.shape), name=name
    )


def _cast(source: Stored, dtype: ir.DataType) -> np.ndarray[Any, Any]:
    if source.dtype == ir.DataType.BFLOAT16 and dtype == ir.DataType.FLOAT:
        # bfloat16 is the upper half of a float32.
        halves = source.tensor().numpy().view(np.uint16)
        return np.left_shift(halves.astype(np.uint32), 16).view(np.float32)
    return np.array(source.tensor().numpy(), dtype=dtype.numpy())


def _read(source: Stored) -> torch.Tensor:
    import torch

    floating = source.dtype.is_floating_point()
    return torch.from_numpy(_cast(source, ir.DataType.FLOAT if floating else source.dtype))


def _dtype(tensor: torch.Tensor) -> ir.DataType:
    from onnx_ir.tensor_adapters import from_torch_dtype

    return from_torch_dtype(tensor.dtype)


def _all_names(model: Any) -> dict[int, list[str]]:
    """All names of every tensor, by its ``id``."""
    names: dict[int, list[str]] = {}
    for name, held in model.state_dict(keep_vars=True).items():
        names.setdefault(id(held), []).append(name)
    return names


def _untie(model: Any, tensors: dict[str, ir.TensorProtocol]) -> None:
    """Give a parameter its own tensor where the config ties it to another but both are stored and differ."""
    import torch

    from graphc.storage.tensors import digest

    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        if target not in tensors or source not in tensors:
            continue
        if digest(tensors[target]) == digest(tensors[source]):
            del tensors[target]
            continue
        path, _, key = target.rpartition(".")
        held = model.get_parameter(target)
        setattr(model.get_submodule(path), key, torch.nn.Parameter(torch.empty_like(held), requires_grad=False))


def _ignored(name: str, patterns: Any) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())
