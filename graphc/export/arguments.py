"""The example inputs of a module: how they are passed, and the tensors in them by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from graphc.errors import BadInput, nearest

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Leaf:
    """One tensor or constant in the arguments.

    Attributes:
        name: The parameter of ``forward`` and where in its value the leaf is: ``mask``, ``state_0``, ``past_keys_1``.
        parameter: The parameter of ``forward`` alone.
        value: A ``torch.Tensor``, or a number, string or None, which is baked into the graph.
    """

    name: str
    parameter: str
    value: Any

    @property
    def is_tensor(self) -> bool:
        import torch

        return isinstance(self.value, torch.Tensor)


@dataclass(frozen=True)
class Arguments:
    """What a module is called with.

    Attributes:
        args: By position.
        kwargs: By name.
        leaves: All tensors and constants in both, in the order in which torch flattens them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: tuple[Leaf, ...]

    @property
    def tensors(self) -> list[Leaf]:
        return [leaf for leaf in self.leaves if leaf.is_tensor]

    def with_values(self, values: list[Any]) -> Arguments:
        """The same arguments with other leaves, in the order of ``leaves``."""
        from torch.utils import _pytree as pytree

        _, spec = pytree.tree_flatten((self.args, self.kwargs))
        args, kwargs = pytree.tree_unflatten(values, spec)
        leaves = [Leaf(old.name, old.parameter, new) for old, new in zip(self.leaves, values, strict=True)]
        return Arguments(args, kwargs, tuple(leaves))


def arguments(module: torch.nn.Module, example: Any, kwargs: Mapping[str, Any] | None = None) -> Arguments:
    """Read example inputs.

    Args:
        module: What they are for.
        example: A tensor or an array, the positional arguments as a tuple or list, or the arguments as a dict by
            name (a dict that is an argument goes into a tuple).
        kwargs: Arguments by name, besides those in ``example``.

    Raises:
        BadInput: They do not fit the parameters of ``forward``.
    """
    signature = inspect.signature(module.forward)
    args, named = _passed(example)
    named |= kwargs or {}
    args, named = _tensors(args), _tensors(named)
    try:
        signature.bind(*args, **named)
    except TypeError as error:
        raise _unfit(module, signature, error, named) from None
    names = [*_positional(signature, len(args)), *named]
    return Arguments(args, named, _leaves(args, named, names))


def _passed(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example is None:
        return (), {}
    if isinstance(example, tuple | list):
        return tuple(example), {}
    return ((), dict(example)) if isinstance(example, Mapping) else ((example,), {})


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _positional(signature: inspect.Signature, count: int) -> list[str]:
    """The names of the first ``count`` positional parameters; those of ``*args`` are numbered."""
    names: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(count - len(names))]
        elif parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            names.append(parameter.name)
    return names[:count]


def _tensors(tree: Any) -> Any:
    """The same arguments with arrays as tensors."""
    import torch
    from torch.utils import _pytree as pytree

    return pytree.tree_map(lambda x: torch.from_numpy(np.array(x)) if isinstance(x, np.ndarray) else x, tree)


def _leaves(args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]) -> tuple[Leaf, ...]:
    from torch.utils import _pytree as pytree

    leaves: list[Leaf] = []
    taken: set[str] = set()
    for parameter, value in zip(names, (*args, *kwargs.values()), strict=True):
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            name = plain("_".join([parameter, *(key_text(key) for key in path)]))
            while name in taken:
                name += "_"
            taken.add(name)
            leaves.append(Leaf(name, parameter, leaf))
    return tuple(leaves)


def key_text(key: Any) -> str:
    """One step of a pytree path as text: the key of a dict, the index of a list, the name of a field."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def plain(name: str) -> str:
    """The name with only letters, digits, dots and underscores."""
    return re.sub(r"[^\w.]", "_", name)


def _unfit(module: Any, signature: inspect.Signature, error: TypeError, named: Mapping[str, Any]) -> BadInput:
    known = [p.name for p in signature.parameters.values() if p.kind not in _VARIADIC]
    unknown = next((name for name in named if name not in known), None)
    return BadInput(
        "the example inputs do not fit the module",
        where=f"{type(module).__name__}.forward{signature}",
        why=str(error),
        hint=nearest(unknown, known) if unknown else f"give: {', '.join(known) or 'no inputs'}",
    )
