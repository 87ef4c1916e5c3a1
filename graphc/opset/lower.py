"""Bring a model to the lowest opset in which its operators mean the same, so that older runtimes load it."""

from __future__ import annotations

from functools import cache

import onnx
import onnx_ir as ir

from graphc import edit
from graphc.opset import WORKING


def lower(model: ir.Model, floor: int = WORKING) -> int:
    """Import the lowest version of the standard operators from ``floor`` on that means the same to all nodes.

    An operator means the same in two versions if its definition did not change between them, or only allowed
    more dtypes, none of which the model has. A model below ``floor``, or with an operator that is unknown, stays
    as it is.

    Returns:
        The version that is imported now.
    """
    now = model.opset_imports.get("", 1)
    bodies = [f for f in model.functions.values() if "" in f.opset_imports]
    if now <= floor or any(f.opset_imports[""] != now for f in bodies):
        return now
    known = dtypes(model)
    lowest = max((since(n, now, known) for n in edit.nodes(model)), default=floor)
    version = max(floor, min(lowest, now))
    model.opset_imports[""] = version
    for function in bodies:
        function.opset_imports[""] = version
    return version


def since(node: ir.Node, version: int, known: frozenset[ir.DataType] | None = None) -> int:
    """The lowest opset in which a standard operator means what it means in ``version``; ``version`` if unknown.

    Args:
        node: Of any domain; the answer is 0 for others than the standard one.
        version: The opset that the node is written in.
        known: All dtypes of the model, if they are known; more dtypes alone are then no change.
    """
    return _since(node.op_type, version, known) if node.domain in ("", "ai.onnx") else 0


@cache
def _since(operator: str, version: int, known: frozenset[ir.DataType] | None) -> int:
    try:
        schema = onnx.defs.get_schema(operator, version)
    except onnx.defs.SchemaError:
        return version
    first = int(schema.since_version)
    if known is None or first == 1:
        return first
    try:
        before = onnx.defs.get_schema(operator, first - 1)
    except onnx.defs.SchemaError:
        return first
    added = {name for _, name in _allowed(schema) - _allowed(before)}
    if _form(before) != _form(schema) or added & {_NAMES[dtype] for dtype in known}:
        return first
    return _since(operator, first - 1, known)


_NAMES = {d: d.name.lower() for d in ir.DataType} | {ir.DataType.DOUBLE: "double"}
"""Dtypes as operator definitions call them."""


_NUMBERS = frozenset(d.value for d in ir.DataType)


def _form(schema: onnx.defs.OpSchema) -> tuple[object, ...]:
    """All of an operator's definition but the dtypes it allows and the layout of its documentation."""
    return (
        [(p.name, p.option, p.is_homogeneous, p.type_str) for p in (*schema.inputs, *schema.outputs)],
        len(schema.inputs),
        {k: (a.type, a.required, a.default_value.SerializeToString()) for k, a in schema.attributes.items()},
        [c.type_param_str for c in schema.type_constraints],
        (schema.doc or "").split(),
    )


def _allowed(schema: onnx.defs.OpSchema) -> set[tuple[str, str]]:
    """Each type parameter with each dtype it allows, e.g. ``("T", "float")`` for ``seq(tensor(float))``."""
    return {
        (constraint.type_param_str, name.replace("(", " ").replace(")", " ").split()[-1])
        for constraint in schema.type_constraints
        for name in constraint.allowed_type_strs
    }


def dtypes(model: ir.Model) -> frozenset[ir.DataType] | None:
    """All dtypes in a model; None if an operator of another domain may make ones that are not known."""
    from graphc.storage.tensors import constants

    found = {tensor.dtype for tensor in constants(model)}
    for graph in edit.graphs(model):
        for value in (*graph.inputs, *(v for node in graph for v in node.outputs)):
            if value.dtype is not None:
                found.add(value.dtype)
            elif (node := value.producer()) is not None and node.domain not in ("", "ai.onnx"):
                return None
        for node in graph:
            for name in ("to", "dtype", "output_dtype", "output_datatype"):
                attr = node.attributes.get(name)
                if attr is not None and attr.type == ir.AttributeType.INT:
                    if attr.is_ref() or attr.value not in _NUMBERS:
                        return None
                    found.add(ir.DataType(attr.value))
    return frozenset(found)
