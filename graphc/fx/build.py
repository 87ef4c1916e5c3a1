"""From an ONNX graph to a ``torch.fx`` graph, and trained values back."""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Callable, Iterator
from operator import getitem
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from torch import fx

from graphc import edit
from graphc.errors import BadInput
from graphc.fx.dtypes import TRAINABLE, held_dtype, to_ir, to_tensor, torch_dtype
from graphc.fx.host import Operator
from graphc.fx.operators import OPERATORS

_HOST_SIZE = 64
"""Elements up to which a constant int64 list is part of the code rather than a buffer."""

_MASKED = 1e4
"""A float constant with an entry of this size or beyond is a mask, not a weight."""

_DEAD = ("Constant",)
_LEAST_OPSET = 13


def build(model: ir.Model) -> fx.GraphModule:
    """See :func:`graphc.fx.to_torch`."""
    model = model.clone()
    if model.functions:
        InlinePass()(model)
    _check(model)
    return _Builder(model.graph).build()


def write_back(module: fx.GraphModule, model: ir.Model) -> ir.Model:
    """See :func:`graphc.fx.from_torch`."""
    names: dict[str, str] | None = module.meta.get("initializers")
    if names is None:
        raise BadInput("the module was not made by graphc.fx.to_torch", why="it has no map of initializer names")
    result = model.clone()
    trained = dict(module.named_parameters())
    values = {str(v.name): v for v in _constants(result.graph)}
    gone = sorted(names[key] for key in trained if names.get(key) not in values)
    if gone:
        raise BadInput(f"the model has no constant '{gone[0]}'", hint="give the model that to_torch was given")
    for key, parameter in trained.items():
        value = values[names[key]]
        held = value.const_value if value.is_initializer() else edit.tensor(value)
        assert held is not None
        if tuple(held.shape.numpy()) != tuple(parameter.shape):
            raise BadInput(
                f"parameter '{key}' has shape {list(parameter.shape)}",
                why=f"the model's constant has {list(held.shape.numpy())}",
            )
        new = to_ir(parameter, held)
        producer = value.producer()
        if producer is None:
            value.const_value = new
        else:
            producer.attributes["value"] = ir.AttrTensor("value", new)
    return result


def _constants(graph: ir.Graph) -> Iterator[ir.Value]:
    """The initializers, and the outputs of the Constant nodes that hold a tensor."""
    yield from graph.initializers.values()
    for node in graph:
        if edit.is_op(node, "Constant") and "value" in node.attributes:
            yield node.outputs[0]


def _check(model: ir.Model) -> None:
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", _LEAST_OPSET))
    if opset < _LEAST_OPSET:
        raise BadInput(
            f"opset {opset} is too old for torch",
            hint="load it with graphc.frontends.onnx, which converts it",
        )
    missing: dict[str, str] = {}
    for node in model.graph:
        if node.op_type in _DEAD:
            continue
        if edit.is_op(node, *OPERATORS):
            label = _unknown(node)
        else:
            label = f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        if not label:
            continue
        missing.setdefault(label, node.name or str(node.outputs[0].name))
    if missing:
        raise BadInput(
            "operators without a torch form: " + ", ".join(f"{op} (node '{at}')" for op, at in missing.items()),
            hint="simplify first; a constant condition or a local function may vanish",
        )


def _unknown(node: ir.Node) -> str:
    """What a node of a known operator asks for that is not known: an attribute or a dtype; nothing mostly."""
    for name in ("to", "dtype", "output_dtype"):
        code = edit.attribute(node, name)
        if code and torch_dtype(code) is None:
            return f"{node.op_type} to {ir.DataType(code).name}"
    try:
        accepted = inspect.signature(OPERATORS[node.op_type].run).parameters
    except ValueError:  # a builtin of torch, whose ONNX namesake has no attributes
        return ""
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        return ""
    unknown = [name for name in node.attributes if name not in accepted]
    return f"{node.op_type} with {unknown[0]}" if unknown else ""


class _Builder:
    def __init__(self, graph: ir.Graph) -> None:
        self._source = graph
        self._root = torch.nn.Module()
        self._graph = fx.Graph()
        self._made: dict[ir.Value, Any] = {}
        self._names: dict[str, str] = {}
        self._calls: dict[str, Callable[..., Any]] = {}

    def build(self) -> fx.GraphModule:
        inputs = self._placeholders()
        for node in self._source:
            if node.op_type not in _DEAD:
                self._node(node)
        outputs = {str(value.name): self._output(value) for value in self._source.outputs}
        self._graph.output(outputs)
        self._graph.eliminate_dead_code()
        self._graph.lint()
        module = fx.GraphModule(self._root, self._graph)
        module.meta["initializers"] = self._names
        module.meta["inputs"] = inputs
        return module

    def _placeholders(self) -> dict[str, str]:
        taken: dict[str, str] = {}
        for value in self._source.inputs:
            if value.is_initializer():
                continue
            name = re.sub(r"\W", "_", str(value.name))
            if not name or name[0].isdigit() or keyword.iskeyword(name) or name == "self":
                name = f"_{name}"
            while name in taken:
                name += "_"
            taken[name] = str(value.name)
            self._made[value] = self._graph.placeholder(name)
        return taken

    def _output(self, value: ir.Value) -> Any:
        made = self._argument(value)
        return self._graph.call_function(_finish, (made, torch_dtype(value.dtype) if value.dtype else None))

    def _argument(self, value: ir.Value | None) -> Any:
        if value is None:
            return None
        if value not in self._made:
            self._made[value] = self._constant(value)
        return self._made[value]

    def _constant(self, value: ir.Value) -> Any:
        held = value.const_value if value.is_initializer() else edit.tensor(value)
        if held is None:
            raise BadInput(f"nothing makes the value '{value.name}'")
        if held_dtype(held.dtype) is None:
            raise BadInput(f"torch has no dtype for {held.dtype.name}", where=f"constant '{value.name}'")
        if held.dtype == ir.DataType.INT64 and len(held.shape) <= 1 and held.size <= _HOST_SIZE:
            return held.numpy().tolist()
        data = to_tensor(held)
        edit.release(held)
        key = self._register(str(value.name), data, _trains(value, held, data))
        self._names[key] = str(value.name)
        return self._graph.get_attr(key)

    def _register(self, name: str, data: torch.Tensor, trains: bool) -> str:
        """Place a tensor in the module at the dotted path of its name, and return the path as it became."""
        *folders, leaf = name.split(".")
        owner, path = self._root, []
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
            owner.register_buffer(leaf, data)
        return ".".join([*path, leaf])

    def _node(self, node: ir.Node) -> None:
        operator = OPERATORS[node.op_type]
        attributes = {
            name: _number(held.as_tensor()) if held.type == ir.AttributeType.TENSOR else edit.attribute(node, name)
            for name, held in node.attributes.items()
        }
        attributes = {name: list(v) if isinstance(v, tuple) else v for name, v in attributes.items()}
        if operator.counted:
            last = max((i for i, out in enumerate(node.outputs) if out.name), default=0)
            attributes["outputs"] = last + 1
        call = self._calls.setdefault(node.op_type, operator.bind(node.op_type))
        made = self._graph.call_function(call, tuple(self._argument(v) for v in node.inputs), attributes)
        made.meta["onnx"] = node.name
        for i, output in enumerate(node.outputs):
            if not operator.many:
                self._made[output] = made
            elif output.uses() or output.is_graph_output():
                self._made[output] = self._graph.call_function(getitem, (made, i))


def _number(held: ir.TensorProtocol) -> list[Any]:
    """A tensor attribute, which outside Constant holds one element, as the element and its dtype."""
    return [to_tensor(held).reshape(-1)[0].item(), torch_dtype(held.dtype)]


def _finish(value: Any, dtype: Any) -> torch.Tensor:
    """A graph output as a tensor, in its dtype where sizes were carried in Python."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.tensor(value, dtype=dtype)


def _free(owner: torch.nn.Module, name: str, may_share: Callable[[Any], bool]) -> str:
    """The name, with underscores added until torch allows it as an attribute of the module."""
    name = name or "_"
    plain = fx.GraphModule if "." not in name else torch.nn.Module
    while hasattr(plain, name) or name in _RESERVED or (hasattr(owner, name) and not may_share(getattr(owner, name))):
        name += "_"
    return name


_RESERVED = frozenset({"training", "graph", "meta", "code", "_graph", "_code"})


def _trains(value: ir.Value, held: ir.TensorProtocol, data: torch.Tensor) -> bool:
    """Whether a constant is a weight: a float constant, no single number, no mask, read as one somewhere."""
    if held.dtype not in TRAINABLE or data.dim() == 0 or data.numel() == 0:
        return False
    if not bool(torch.isfinite(data).all()) or bool((data.abs() >= _MASKED).any()):
        return False
    return any(_reads_weight(use.node, use.idx, data) for use in value.uses())


def _reads_weight(node: ir.Node, index: int, data: torch.Tensor) -> bool:
    operator: Operator = OPERATORS[node.op_type]
    if index in operator.fixed or index in operator.host:
        return False
    return data.numel() > 1 or node.op_type in _BIASED


_BIASED = ("Conv", "ConvTranspose", "Gemm", "BatchNormalization", "LayerNormalization", "MatMul", "PRelu")
"""Operators of which an operand with one element is a weight all the same."""
