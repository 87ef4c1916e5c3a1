"""Which constants of a model are weights, and where they live in a torch module."""

from __future__ import annotations

import keyword
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphc import edit
from graphc.errors import BadInput
from graphc.fx import codes
from graphc.fx.dtypes import TRAINABLE, held_dtype, to_tensor
from graphc.fx.operators import find

_HOST_SIZE = 64
"""Elements up to which a constant int64 list is part of the code rather than a buffer."""

_MASKED = 1e4
"""A float constant with an entry of this size or beyond is a mask, not a weight."""

_BIASED = ("Conv", "ConvTranspose", "Gemm", "BatchNormalization", "LayerNormalization", "MatMul", "PRelu")
"""Operators of which an operand with one element is a weight all the same."""

_RESERVED = frozenset({"training", "graph", "meta", "code", "_graph", "_code"})


def named(model: ir.Model) -> Iterator[tuple[str, ir.Value]]:
    """The initializers and the outputs of Constant nodes of all graphs, each with a name that no other one has.

    That is its own name, and ``name#2``, ``name#3`` ... for what bodies of control flow name alike.
    """
    seen: dict[str, int] = {}
    for graph in (model.graph, *edit.bodies(model.graph)):
        held = [node.outputs[0] for node in graph if edit.is_op(node, "Constant")]
        for value in (*graph.initializers.values(), *held):
            name = str(value.name)
            seen[name] = count = seen.get(name, 0) + 1
            yield (name if count == 1 else f"{name}#{count}"), value


def tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """What a constant holds; the default of an input that has one counts."""
    return value.const_value if value.is_initializer() else edit.tensor(value)


class Constants:
    """The parameters and buffers of a module that is being made.

    Attributes:
        root: The module that holds them.
        initializers: The name of the constant behind each parameter and buffer, by its path in the module.
        values: Buffers that never change, by path: what is computed from them alone can be computed once.
        scales: The path of the codes by that of each of their scales, where scales are parameters.
    """

    def __init__(self, model: ir.Model, *, quantized: bool = False) -> None:
        self.root = torch.nn.Module()
        self.initializers: dict[str, str] = {}
        self.values: dict[str, torch.Tensor] = {}
        self._scales = codes.scales(model) if quantized else {}
        self._codes = set(self._scales.values())
        self._anchor = ""
        self._names = {value: name for name, value in named(model)}

    @property
    def scales(self) -> dict[str, str]:
        paths = {name: path for path, name in self.initializers.items()}
        named = {self._names[scale]: self._names[held] for scale, held in self._scales.items()}
        return {paths[scale]: paths[held] for scale, held in named.items() if scale in paths and held in paths}

    def place(self, value: ir.Value) -> Any:
        """The Python list or number that a constant is part of the code as, or the path where its tensor now lives."""
        held = tensor(value)
        if held is None:
            raise BadInput(f"nothing makes the value '{value.name}'")
        if held_dtype(held.dtype) is None:
            raise BadInput(f"torch has no dtype for {held.dtype.name}", where=f"constant '{value.name}'")
        if held.dtype == ir.DataType.INT64 and len(held.shape) <= 1 and held.size <= _HOST_SIZE:
            return held.numpy().tolist()
        data = to_tensor(held)
        edit.release(held)
        name = self._names[value]
        trains = _floats(held, data) and (value in self._scales or _trains(value, data))
        path = self._register(name, data, trains)
        self.initializers[path] = name
        if not trains and not value.is_graph_input() and value not in self._codes:
            self.values[path] = data
        return path

    def computed(self, name: str, data: torch.Tensor) -> str:
        """The path of a new buffer, which is no part of the state."""
        path = self._register(name, data, trains=False, state=False)
        self.values[path] = data
        return path

    def anchor(self) -> str:
        """The path of a buffer without elements, which tells where the module is."""
        if not self._anchor:
            self._anchor = self._register("device", torch.empty(0), trains=False, state=False)
        return self._anchor

    def _register(self, name: str, data: torch.Tensor, trains: bool, state: bool = True) -> str:
        """Place a tensor in the module at the dotted path of its name, and return the path as it became."""
        *folders, leaf = name.split(".")
        owner, path = self.root, []
        for folder in folders:
            folder = _free(owner, folder, lambda held: isinstance(held, torch.nn.Module))
            if not hasattr(owner, folder):
                owner.add_module(folder, torch.nn.Module())
            owner = getattr(owner, folder)
            path.append(folder)
        leaf = _free(owner, leaf, lambda _: False)
        if trains:
            owner.register_parameter(leaf, torch.nn.Parameter(data))
        else:
            owner.register_buffer(leaf, data, persistent=state)
        return ".".join([*path, leaf])


def _free(owner: torch.nn.Module, name: str, may_share: Callable[[Any], bool]) -> str:
    """The name, with underscores added until torch and Python allow it as an attribute of the module."""
    name = name or "_"
    while (
        keyword.iskeyword(name)
        or hasattr(fx.GraphModule, name)
        or name in _RESERVED
        or (hasattr(owner, name) and not may_share(getattr(owner, name)))
    ):
        name += "_"
    return name


def _floats(held: ir.TensorProtocol, data: torch.Tensor) -> bool:
    """Whether gradients can flow to a constant, which is no single number."""
    return held.dtype in TRAINABLE and data.dim() > 0 and data.numel() > 0


def _trains(value: ir.Value, data: torch.Tensor) -> bool:
    """Whether a float constant is a weight: no mask, read as one somewhere."""
    if not bool(torch.isfinite(data).all()) or bool((data.abs() >= _MASKED).any()):
        return False
    return any(_reads_weight(use.node, use.idx, data) for use in value.uses())


def _reads_weight(node: ir.Node, index: int, data: torch.Tensor) -> bool:
    operator = find(node)
    if operator is None or index in operator.fixed or index in operator.host:
        return False
    return data.numel() > 1 or node.op_type in _BIASED
