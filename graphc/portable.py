"""The form in which a model is written: versions that the target loads, nothing about where it was made."""

from __future__ import annotations

import re
from functools import cache

import onnx
import onnx_ir as ir

from graphc import edit
from graphc.contract import Capabilities
from graphc.errors import BadInput

WORKING_OPSET = 21
"""The opset that frontends bring models to, and the lowest one that is written."""

_IR_VERSION = 10
"""The IR version that is written, unless a dtype needs a higher one."""

_IR_OF_DTYPE = {
    ir.DataType.FLOAT4E2M1: 11,
    ir.DataType.FLOAT8E8M0: 12,
    ir.DataType.INT2: 13,
    ir.DataType.UINT2: 13,
}
"""The IR version that introduced a dtype (``onnx.proto``)."""

_TRACES = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.original_node_stack_trace")
_SOURCE_LINE = re.compile(r'File ".*", line \d+|\.py:\d+')
"""How a stack trace, and TorchScript's doc strings, name a file."""


def portable(model: ir.Model, target: Capabilities) -> ir.Model:
    """A copy of a model as it is written for a target; weights are shared.

    IR version 10, or what its dtypes need; the lowest opset from 21 on in which its operators mean the same;
    no unused opset imports; no stack traces.

    Raises:
        BadInput: The model needs a newer opset or IR version than the target loads; the node is named.
    """
    copy = model.clone()
    _strip_traces(copy)
    for graph in edit.graphs(copy):
        graph.name = graph.name or "graph"
    lower_opset(copy)
    _drop_unused_imports(copy)
    copy.ir_version = _ir_version(copy)
    if copy.ir_version > target.max_ir:
        raise BadInput(
            f"the model needs IR version {copy.ir_version}; {target.name} loads up to {target.max_ir}",
            hint=f"install a newer {target.name}",
        )
    for domain, version in copy.opset_imports.items():
        limit = target.max_opset.get(domain, version)
        if version > limit:
            node = next((n for n in edit.nodes(copy) if since(n, version) > limit), None)
            raise BadInput(
                f"the model needs {domain or 'ai.onnx'} opset {version}; {target.name} loads up to {limit}",
                where=f"node '{node.name}' ({node.op_type})" if node else "",
                hint=f"install a newer {target.name}, or export the model with opset {limit}",
            )
    return copy


def lower_opset(model: ir.Model, floor: int = WORKING_OPSET) -> int:
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
    known = _dtypes(model)
    lowest = max((since(n, now, known) for n in edit.nodes(model)), default=floor)
    version = max(floor, min(lowest, now))
    model.opset_imports[""] = version
    for function in bodies:
        function.opset_imports[""] = version
    return version


def since(node: ir.Node, version: int, dtypes: frozenset[ir.DataType] | None = None) -> int:
    """The lowest opset in which a standard operator means what it means in ``version``; ``version`` if unknown.

    Args:
        node: Of any domain; the answer is 0 for others than the standard one.
        version: The opset that the node is written in.
        dtypes: All dtypes of the model if they are known; more dtypes alone are then no change.
    """
    return _since(node.op_type, version, dtypes) if node.domain in ("", "ai.onnx") else 0


@cache
def _since(operator: str, version: int, dtypes: frozenset[ir.DataType] | None) -> int:
    try:
        schema = onnx.defs.get_schema(operator, version)
    except onnx.defs.SchemaError:
        return version
    first = int(schema.since_version)
    if dtypes is None or first == 1:
        return first
    try:
        before = onnx.defs.get_schema(operator, first - 1)
    except onnx.defs.SchemaError:
        return first
    added = {name for _, name in _allowed(schema) - _allowed(before)}
    if _form(before) != _form(schema) or added & {_NAMES[dtype] for dtype in dtypes}:
        return first
    return _since(operator, first - 1, dtypes)


_NAMES = {d: d.name.lower() for d in ir.DataType} | {ir.DataType.DOUBLE: "double"}
"""Dtypes as operator definitions call them."""


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


def _dtypes(model: ir.Model) -> frozenset[ir.DataType] | None:
    """All dtypes in a model; None if an operator of another domain may make ones that are not known."""
    from graphc.model import constants

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
                    if attr.is_ref():
                        return None
                    found.add(ir.DataType(attr.value))
    return frozenset(found)


def _strip_traces(model: ir.Model) -> None:
    """Remove what names source files: stack traces in metadata, and the doc strings of TorchScript."""
    holders: list[ir.Model | ir.Function | ir.Graph | ir.Node] = [model, *model.functions.values()]
    holders += [*edit.graphs(model), *edit.nodes(model)]
    for item in holders:
        for key, text in list(item.metadata_props.items()):
            if key in _TRACES or _SOURCE_LINE.search(text):
                del item.metadata_props[key]
        if item.doc_string and _SOURCE_LINE.search(item.doc_string):
            item.doc_string = None


def _drop_unused_imports(model: ir.Model) -> None:
    """Drop imports of domains that nothing is of: a runtime may know only older versions of them."""
    used = {"" if n.domain == "ai.onnx" else n.domain for n in edit.nodes(model)}
    used |= {"", *(f.domain for f in model.functions.values())}
    for imports in (model.opset_imports, *(f.opset_imports for f in model.functions.values())):
        for domain in set(imports) - used - {"ai.onnx"}:
            del imports[domain]


def _ir_version(model: ir.Model) -> int:
    from graphc.model import constants

    known = _dtypes(model) or {tensor.dtype for tensor in constants(model)}
    return max([_IR_VERSION, *(_IR_OF_DTYPE.get(dtype, 0) for dtype in known)])
