"""From an ONNX graph to a ``torch.fx`` graph, and trained values back."""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Callable
from operator import getitem
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from torch import fx

from graphc import edit
from graphc.errors import BadInput
from graphc.fx import control
from graphc.fx.constants import Constants, named, tensor
from graphc.fx.dtypes import to_ir, to_tensor, torch_dtype
from graphc.fx.host import Operator, as_tensor, is_host
from graphc.fx.operators import CONTROL, find

_LEAST_OPSET = 13

_FOLDED = 1 << 22
"""Elements up to which what constants alone determine is computed while the module is made."""

_KIND = "kind"
"""Key of what is known of a value before it is computed: TENSOR, HOST, or nothing."""
TENSOR, HOST = "tensor", "host"


def build(model: ir.Model, *, quantized: bool = False) -> fx.GraphModule:
    """See :func:`graphc.fx.to_torch`."""
    model = model.clone()
    if model.functions:
        InlinePass()(model)
    _check(model)
    constants = Constants(model, quantized=quantized)
    scope = _Scope(model.graph, constants)
    inputs = scope.inputs()
    scope.nodes()
    outputs = {str(value.name): scope.output(value) for value in model.graph.outputs}
    scope.graph.output(outputs)
    _merge(scope.graph)
    scope.graph.eliminate_dead_code()
    scope.graph.lint()
    module = fx.GraphModule(constants.root, scope.graph)
    module.meta["initializers"] = constants.initializers
    module.meta["inputs"] = inputs
    module.meta["scales"] = constants.scales
    return module


def write_back(module: fx.GraphModule, model: ir.Model) -> ir.Model:
    """See :func:`graphc.fx.from_torch`."""
    names: dict[str, str] | None = module.meta.get("initializers")
    if names is None:
        raise BadInput("the module was not made by graphc.fx.to_torch", why="it has no map of initializer names")
    result = model.clone()
    if result.functions:
        InlinePass()(result)
    codes = set(module.meta["scales"].values())
    trained = dict(module.named_parameters()) | {k: held for k, held in module.named_buffers() if k in codes}
    values = dict(named(result))
    gone = sorted(names[key] for key in trained if names.get(key) not in values)
    if gone:
        raise BadInput(f"the model has no constant '{gone[0]}'", hint="give the model that to_torch was given")
    for key, parameter in trained.items():
        value = values[names[key]]
        held = tensor(value)
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
            producer.attributes.clear()
            producer.attributes["value"] = ir.AttrTensor("value", new)
    return result


def _check(model: ir.Model) -> None:
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", _LEAST_OPSET))
    if opset < _LEAST_OPSET:
        raise BadInput(
            f"opset {opset} is too old for torch",
            hint="load it with graphc.frontends.onnx, which converts it",
        )
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            raise BadInput(f"'{value.name}' is no tensor", why="a torch module of a model takes and gives tensors only")
    missing: dict[str, str] = {}
    for node in edit.nodes(model):
        if label := _unknown(node):
            missing.setdefault(label, node.name or str(node.outputs[0].name))
    if missing:
        raise BadInput(
            "operators without a torch form: " + ", ".join(f"{op} (node '{at}')" for op, at in missing.items()),
            hint="simplify first; a constant condition or a local function may vanish",
        )


def _unknown(node: ir.Node) -> str:
    """What of a node has no torch form: the operator, an attribute or a dtype; nothing mostly."""
    if edit.is_op(node, "Constant", *CONTROL):
        return ""
    operator = find(node)
    if operator is None:
        return f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
    for name in ("to", "dtype", "output_dtype"):
        code = edit.attribute(node, name)
        if code and torch_dtype(code) is None:
            return f"{node.op_type} to {ir.DataType(code).name}"
    try:
        accepted = inspect.signature(operator.run).parameters
    except ValueError:  # a builtin of torch, whose ONNX namesake has no attributes
        return ""
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        return ""
    unknown = [name for name in node.attributes if name not in accepted]
    if unknown:
        return f"{node.op_type} with {unknown[0]}"
    room = [p for p in accepted.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    if not any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in room) and len(node.inputs) > len(room):
        return f"{node.op_type} with {len(node.inputs)} inputs"
    return ""


class _Scope:
    """One graph, the main one or a body, as a torch.fx graph.

    A body holds nothing: constants live in the main module, and reach it, as all outer values, as arguments.
    """

    def __init__(self, source: ir.Graph, constants: Constants, parent: _Scope | None = None) -> None:
        self.graph = fx.Graph()
        self.captured: list[fx.Node] = []
        self._source = source
        self._constants = constants
        self._parent = parent
        self._made: dict[ir.Value, Any] = {}
        self._last: fx.Node = self.graph._root  # after which the next argument goes
        self._paths: dict[str, Any] = {}
        self._where: Any = None
        self._calls: dict[tuple[str, str], Callable[..., Any]] = {}

    def inputs(self) -> dict[str, str]:
        """Make the arguments; the graph inputs' names by theirs."""
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
            self._made[value] = self._last = made = self.graph.placeholder(name)
            if self._parent is None:
                made.meta[_KIND] = TENSOR
        return taken

    def nodes(self) -> None:
        for node in self._source:
            if edit.is_op(node, *CONTROL):
                self._control(node)
            elif not edit.is_op(node, "Constant"):
                self._node(node)

    def output(self, value: ir.Value) -> Any:
        made = self.argument(value)
        if isinstance(made, fx.Node) and made.meta.get(_KIND) == TENSOR:
            return made
        return self.graph.call_function(_finish, (made, torch_dtype(value.dtype) if value.dtype else None))

    def argument(self, value: ir.Value | None) -> Any:
        """What a value is in this graph: a node, or a Python list or number that is part of the code."""
        if value is None:
            return None
        if value not in self._made:
            self._made[value] = self._outer(value) if self._parent else self._placed(self._constants.place(value))
        return self._made[value]

    def _placed(self, place: Any) -> Any:
        return self._read(place) if isinstance(place, str) else place

    def _read(self, path: str) -> fx.Node:
        if path not in self._paths:
            self._paths[path] = made = self.graph.get_attr(path)
            made.meta[_KIND] = TENSOR
        return self._paths[path]

    def _outer(self, value: ir.Value) -> Any:
        """A value from outside a body, constants among them: as an argument, unless it is part of the code."""
        assert self._parent is not None
        return self._capture(self._parent.argument(value))

    def _capture(self, outer: Any) -> Any:
        if not isinstance(outer, fx.Node):
            return outer
        with self.graph.inserting_after(self._last):
            self._last = made = self.graph.placeholder(f"outer_{len(self.captured)}")
        made.meta[_KIND] = outer.meta.get(_KIND)
        self.captured.append(outer)
        return made

    def _node(self, node: ir.Node) -> None:
        operator = find(node)
        assert operator is not None
        attributes = {
            name: _number(held.as_tensor()) if held.type == ir.AttributeType.TENSOR else edit.attribute(node, name)
            for name, held in node.attributes.items()
        }
        attributes = {name: list(v) if isinstance(v, tuple) else v for name, v in attributes.items()}
        if operator.counted:
            last = max((i for i, out in enumerate(node.outputs) if out.name), default=0)
            attributes["outputs"] = last + 1
        arguments = [self.argument(value) for value in node.inputs]
        if not self._computed(node, operator, arguments, attributes):
            self._made.update(self._call(node, operator, arguments, attributes))

    def _call(self, node: ir.Node, operator: Operator, arguments: list[Any], attributes: Any) -> dict[ir.Value, Any]:
        """Emit a node: the operator's own function where all kinds are known, else one that looks at run time."""
        kinds = [a.meta.get(_KIND) if isinstance(a, fx.Node) else HOST for a in arguments]
        certain = TENSOR in kinds or not operator.on_host
        ready, direct = list(arguments), TENSOR in kinds
        for i, (argument, kind) in enumerate(zip(arguments, kinds, strict=True)):
            if argument is None or i in operator.host or kind == TENSOR:
                if i in operator.host and (held := self._held(argument)) is not None:
                    ready[i] = held.tolist()
                elif i in operator.numbers and (held := self._held(argument)) is not None and not held.dim():
                    ready[i] = held.item()
                continue
            if certain and not isinstance(argument, fx.Node) and self._parent is None:
                ready[i] = self._read(self._constants.computed("literal", as_tensor(argument)))
            else:
                direct = False
        if direct:
            made = self.graph.call_function(operator.run, tuple(ready), attributes)
        else:
            call = self._calls.setdefault((node.domain, node.op_type), operator.bind(node.op_type))
            where = {} if TENSOR in kinds else {"device": self._device()}
            made = self.graph.call_function(call, tuple(arguments), attributes | where)
        made.meta["onnx"] = node.name
        made.meta["op"] = node.op_type
        made.meta[_KIND] = HOST if operator.sizes else TENSOR if certain else None
        return self._results(node, made, operator.many, made.meta[_KIND])

    def _held(self, argument: Any) -> torch.Tensor | None:
        """The constant behind an argument, if it never changes."""
        if not isinstance(argument, fx.Node) or argument.op != "get_attr":
            return None
        return self._constants.values.get(str(argument.target))

    def _device(self) -> Any:
        """Where the module is: that of a buffer without elements, which moves with it."""
        if self._where is None:
            if self._parent is not None:
                self._where = self._capture(self._parent._device())
            else:
                self._where = self.graph.call_function(getattr, (self._read(self._constants.anchor()), "device"))
        return self._where

    def _results(self, node: ir.Node, made: fx.Node, many: bool, kind: str | None) -> dict[ir.Value, Any]:
        if not many:
            return {node.outputs[0]: made}
        results = {}
        for i, output in enumerate(node.outputs):
            if output.uses() or output.is_graph_output():
                results[output] = part = self.graph.call_function(getitem, (made, i))
                part.meta[_KIND] = kind
        return results

    def _computed(self, node: ir.Node, operator: Operator, arguments: list[Any], attributes: Any) -> bool:
        """Compute a node now, if constants that are not trained determine it."""
        if self._parent is not None or not arguments:
            return False
        values = []
        for argument in arguments:
            if isinstance(argument, fx.Node):
                held = self._held(argument)
                if held is None or held.numel() > _FOLDED:
                    return False
                values.append(held)
            else:
                values.append(argument)
        with torch.no_grad():
            results = operator.bind(node.op_type)(*values, **attributes)
        items = results if operator.many else (results,)
        if any(isinstance(item, torch.Tensor) and item.numel() > _FOLDED for item in items):
            return False
        for output, item in zip(node.outputs, items, strict=False):
            if is_host(item):
                self._made[output] = item
            elif output.uses() or output.is_graph_output():
                # A view of a buffer would not move to another device with it.
                self._made[output] = self._read(self._constants.computed(str(output.name), item.clone()))
        return True

    def _control(self, node: ir.Node) -> None:
        bodies = {
            name: self._body(held.as_graph())
            for name, held in node.attributes.items()
            if held.type == ir.AttributeType.GRAPH
        }
        given = [self.argument(value) for value in node.inputs]
        if node.op_type == "If":
            (then, by_then), (otherwise, by_else) = bodies["then_branch"], bodies["else_branch"]
            made = self.graph.call_function(control.branch(then, otherwise), (given[0], by_then, by_else))
        else:
            run, captured = bodies["body"]
            if node.op_type == "Loop":
                states = len(given) - 2
                empty = _empty(node.attributes["body"].as_graph().outputs[1 + states :])
                made = self.graph.call_function(control.loop(run, empty), (*given[:2], given[2:], captured))
            else:
                made = self._scan(node, run, given, captured)
        made.meta["onnx"] = node.name
        self._made.update(self._results(node, made, True, None))

    def _scan(self, node: ir.Node, run: control.Body, given: list[Any], captured: list[fx.Node]) -> fx.Node:
        inputs = edit.attribute(node, "num_scan_inputs")
        empty = _empty(node.attributes["body"].as_graph().outputs[len(given) - inputs :])
        call = control.scan(
            run,
            empty,
            inputs,
            axes=edit.attribute(node, "scan_input_axes"),
            reverse=edit.attribute(node, "scan_input_directions"),
            output_axes=edit.attribute(node, "scan_output_axes"),
            output_reverse=edit.attribute(node, "scan_output_directions"),
        )
        return self.graph.call_function(call, (given, captured))

    def _body(self, source: ir.Graph) -> tuple[control.Body, list[fx.Node]]:
        """A body as a function, and what of this graph it captures."""
        scope = _Scope(source, self._constants, self)
        scope.inputs()
        scope.nodes()
        scope.graph.output([scope.argument(value) for value in source.outputs])
        _merge(scope.graph)
        scope.graph.eliminate_dead_code()
        scope.graph.lint()
        return fx.GraphModule(torch.nn.Module(), scope.graph).forward, scope.captured


def _merge(graph: fx.Graph) -> None:
    """Let what is computed twice be computed once; everything here is a function of its arguments alone."""
    seen: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        key = (node.target, repr(node.args), repr(node.kwargs))
        if (first := seen.setdefault(key, node)) is not node:
            node.replace_all_uses_with(first)


def _empty(outputs: Any) -> list[torch.Tensor]:
    """What a body's outputs are, collected over no step."""
    none = []
    for value in outputs:
        shape = [n if isinstance(n, int) else 0 for n in value.shape] if value.shape is not None else []
        none.append(torch.empty([0, *shape], dtype=torch_dtype(value.dtype) if value.dtype else None))
    return none


def _number(held: ir.TensorProtocol) -> list[Any]:
    """A tensor attribute, which outside Constant holds one element, as the element and its dtype."""
    return [to_tensor(held).reshape(-1)[0].item(), torch_dtype(held.dtype)]


def _finish(value: Any, dtype: Any) -> torch.Tensor:
    """A graph output as a tensor, in its dtype where sizes were carried in Python."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.tensor(value, dtype=dtype)
