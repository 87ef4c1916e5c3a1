"""The form in which a model is written: versions that the target loads, nothing about where it was made."""

from __future__ import annotations

import re

import onnx_ir as ir

from graphc import edit
from graphc.contract import Capabilities
from graphc.errors import BadInput
from graphc.opset.lower import dtypes, lower, since

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
    lower(copy)
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
    from graphc.storage.tensors import constants

    known = dtypes(model) or {tensor.dtype for tensor in constants(model)}
    return max([_IR_VERSION, *(_IR_OF_DTYPE.get(dtype, 0) for dtype in known)])
