"""Models as text, to read and to compare: a line a node, small constants in full, large ones by their hash."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc.storage.tensors import digest

_SHOWN = 16
"""Elements up to which a constant is printed in full."""


def lines(model: ir.Model) -> Iterator[str]:
    """The text form of a model, line by line."""
    yield f"ir_version {model.ir_version}"
    for domain, version in sorted(model.opset_imports.items()):
        yield f"opset {domain or 'ai.onnx'} {version}"
    for key, value in sorted(model.metadata_props.items()):
        yield f"metadata {key} = {value!r}"
    yield ""
    yield f"graph {model.graph.name or ''} {{"
    yield from _graph(model.graph, "  ")
    yield "}"
    for function in model.functions.values():
        inputs = ", ".join(v.name or "" for v in function.inputs)
        outputs = ", ".join(v.name or "" for v in function.outputs)
        name = ":".join(part for part in (function.name, function.overload) if part)
        yield ""
        yield f"function {function.domain}.{name}<{', '.join(function.attributes)}>({inputs}) -> {outputs} {{"
        for domain, version in sorted(function.opset_imports.items()):
            yield f"  opset {domain or 'ai.onnx'} {version}"
        yield from _nodes(function, "  ")
        yield "}"


def _graph(graph: ir.Graph, indent: str) -> Iterator[str]:
    for value in graph.inputs:
        default = f" = {_tensor(value.const_value)}" if value.name in graph.initializers else ""
        yield f"{indent}input {_typed(value)}{default}"
    for name, value in graph.initializers.items():
        if not value.is_graph_input():
            yield f"{indent}constant {name} = {_tensor(value.const_value)}"
    yield from _nodes(graph, indent)
    for value in graph.outputs:
        yield f"{indent}output {_typed(value)}"


def _nodes(nodes: Iterable[ir.Node], indent: str) -> Iterator[str]:
    for node in nodes:
        outputs = ", ".join(_typed(v) for v in node.outputs)
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        overload = f":{node.overload}" if node.overload else ""
        attributes, bodies = [], []
        for key, attr in sorted(node.attributes.items()):
            if attr.is_ref():
                attributes.append(f"{key}=@{attr.ref_attr_name}")
            elif attr.type == ir.AttributeType.GRAPH:
                bodies.append((key, attr.as_graph()))
            elif attr.type == ir.AttributeType.GRAPHS:
                bodies += [(f"{key}[{i}]", g) for i, g in enumerate(attr.as_graphs())]
            else:
                attributes.append(f"{key}={_attribute(attr)}")
        options = f"<{', '.join(attributes)}>" if attributes else ""
        inputs = ", ".join("_" if v is None else str(v.name) for v in node.inputs)
        yield f"{indent}{outputs} = {name}{overload}{options}({inputs})"
        for key, body in bodies:
            yield f"{indent}  {key} {{"
            yield from _graph(body, indent + "    ")
            yield f"{indent}  }}"


def _typed(value: ir.Value) -> str:
    name = value.name or "_"
    if value.type is None:
        return name
    shape = "" if value.shape is None else f"[{','.join(_dim(d) for d in value.shape)}]"
    kind = str(value.type) if not isinstance(value.type, ir.TensorType) else value.type.dtype.name.lower()
    return f"{name}: {kind}{shape}"


def _dim(dim: int | ir.SymbolicDim) -> str:
    return str(dim) if isinstance(dim, int) else dim.value or "?"


def _tensor(tensor: ir.TensorProtocol | None) -> str:
    if tensor is None:
        return "missing"
    kind = f"{tensor.dtype.name.lower()}[{','.join(str(d) for d in tensor.shape)}]"
    if tensor.size > _SHOWN:
        return f"{kind} sha256:{digest(tensor)[:16]}"
    values = np.asarray(tensor.numpy())
    if tensor.dtype.is_floating_point() and values.dtype not in (np.float32, np.float64, np.float16):
        values = values.astype(np.float32)
    return f"{kind} {_number(values.tolist())}"


def _number(value: Any) -> str:
    match value:
        case list():
            return "{" + ",".join(map(_number, value)) + "}"
        case float():
            return f"{value:.9g}"
        case bytes():
            return repr(value.decode(errors="replace"))
        case str():
            return repr(value)
        case _:
            return str(value)


def _attribute(attr: ir.Attr) -> str:
    match attr.type:
        case ir.AttributeType.TENSOR:
            return _tensor(attr.as_tensor())
        case ir.AttributeType.TENSORS:
            return f"[{', '.join(_tensor(t) for t in attr.as_tensors())}]"
        case ir.AttributeType.STRING:
            return repr(attr.as_string())
        case ir.AttributeType.FLOAT | ir.AttributeType.INT:
            return _number(attr.value)
        case ir.AttributeType.FLOATS | ir.AttributeType.INTS:
            return f"[{','.join(map(_number, attr.value))}]"
        case _:
            return str(attr.value)
