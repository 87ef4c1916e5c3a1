"""How each operator turns the facts of its inputs into those of its outputs, for :mod:`graphc.shapes`.

The operators that shape arithmetic and large models are made of have a rule, with symbolic dims; the rest goes,
one node at a time, through ONNX's own inference, which knows every operator but no arithmetic on dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from graphc import edit, tiles
from graphc.shapes import RULES, UNKNOWN, Fact, Facts, Shape, control_flow, network_rules, size_rules, tensor_rules
from graphc.shapes.symbolic import Dim, Unrepresentable

Facts_ = Sequence[Fact]

MODULES = (control_flow, network_rules, size_rules, tensor_rules)
"""The modules that hold the rules; importing them fills the table."""


def infer(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    """The facts of the outputs of a node; None if nothing is known about its operator."""
    if edit.is_op(node, tiles.OPERATOR, domain=tiles.DOMAIN):
        return [Fact(inputs[0].dtype, edit.attribute(node, "shape"))]
    if node.domain not in ("", "ai.onnx"):
        return _onnx_inference(node, inputs, facts)
    found: Facts_ | None = None
    known = RULES.get(node.op_type)
    if known is not None:
        try:
            found = known(node, inputs, facts)
        except (Unrepresentable, IndexError, TypeError, ValueError, ZeroDivisionError):
            # A node whose axes or shapes do not fit: the runtime will reject it, nothing is known about it.
            found = None
    return found if found is not None else _onnx_inference(node, inputs, facts)


def _onnx_inference(node: ir.Node, inputs: Facts_, facts: Facts) -> Facts_ | None:
    """The facts by ONNX's own inference of this one node; None where it has no schema or cannot tell."""
    import onnx
    import onnx.checker
    import onnx.defs
    import onnx.shape_inference

    version = facts.opsets.get(node.domain) or (facts.version if not node.domain else 0)
    if not version or not onnx.defs.has(node.op_type, node.domain):
        return None
    names: dict[str, Dim] = {}
    data: dict[str, onnx.TensorProto] = {}
    types: dict[str, onnx.TypeProto] = {}
    for value, fact in zip(node.inputs, inputs, strict=True):
        if value is None or value.name is None:
            continue
        kind = fact.type or (None if fact.dtype is None else ir.TensorType(fact.dtype))
        if kind is None:
            return None
        types[value.name] = _type_proto(kind, fact.shape, names)
        array = facts.array(value)
        if array is not None:
            tensor = edit.tensor(value)
            assert tensor is not None
            data[value.name] = ir.to_proto(tensor)
    for attr in node.attributes.values():
        if attr.is_ref() or attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            return None
    try:
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        outputs = onnx.shape_inference.infer_node_outputs(
            schema,
            ir.to_proto(node),
            types,
            data,
            opset_imports=[onnx.helper.make_opsetid(domain, v) for domain, v in facts.opsets.items()],
        )
    except (
        onnx.checker.ValidationError,
        onnx.defs.SchemaError,
        onnx.shape_inference.InferenceError,
        RuntimeError,
        ValueError,
    ):
        return None
    return [_read(outputs.get(value.name or ""), names, facts) for value in node.outputs]


def _type_proto(kind: ir.TypeProtocol, shape: Shape | None, names: dict[str, Dim]) -> Any:
    dims: ir.Shape | None = None
    if shape is not None:
        for dim in shape:
            names[str(dim)] = dim
        dims = ir.Shape([dim if isinstance(dim, int) else str(dim) for dim in shape])
    return ir.serde.serialize_type(kind) if dims is None else _tensor_type(kind, shape or ())


def _tensor_type(kind: ir.TypeProtocol, shape: Shape) -> Any:
    import onnx

    return onnx.helper.make_tensor_type_proto(
        int(kind.dtype), [dim if isinstance(dim, int) else str(dim) for dim in shape]
    )


def _read(found: Any | None, names: dict[str, Dim], facts: Facts) -> Fact:
    if found is None:
        return UNKNOWN
    if not found.HasField("tensor_type"):
        return Fact(type=ir.serde.deserialize_type_proto_for_type(found))
    tensor = found.tensor_type
    dtype = ir.DataType(tensor.elem_type) if tensor.elem_type else None
    if not tensor.HasField("shape"):
        return Fact(dtype)
    dims: list[Dim] = []
    for dim in tensor.shape.dim:
        if dim.HasField("dim_value"):
            dims.append(dim.dim_value)
        else:
            dims.append(names[dim.dim_param] if dim.dim_param in names else facts.fresh())
    return Fact(dtype, tuple(dims))
