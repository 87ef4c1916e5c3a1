"""Bring a model from an older opset to a newer one, operator by operator.

Most operators only gained dtypes or attributes whose defaults say what was so before; they need nothing. The
others have an adapter for the version that changed them. What is not of the standard domain, names, metadata,
subgraphs, functions and weights are left alone. (onnx's own converter skips subgraphs, renames values, drops
functions and metadata, and holds all weights in memory.)
"""

from __future__ import annotations

from functools import cache
from typing import Any

import onnx
import onnx_ir as ir

from graphc import edit
from graphc.opset.adapters import ADAPTED, ADAPTERS, Tools, Unconvertible

OLDEST = 6
"""The oldest opset that can be converted; the ones before it were experiments of the first months of ONNX."""


def upgrade(model: ir.Model, version: int) -> None:
    """Convert all standard operators of a model, in place, from the opset it imports to ``version``.

    Shapes of values help where they are known. The model is unusable if an error is raised.

    Raises:
        Unconvertible: For the first node that cannot be converted.
    """
    names = edit.Names(model)
    bodies = [(model.graph, model.opset_imports)]
    bodies += [(f.graph, f.opset_imports) for f in model.functions.values() if "" in f.opset_imports]
    for body, imports in bodies:
        tools = Tools(names, in_function=body is not model.graph)
        begin = imports.get("", 1)
        graphs = [body, *body.subgraphs()]
        # What adapters add is right for every later opset, so that only these nodes change, some more than once.
        adapted = [n for g in graphs for n in g if n.op_type in ADAPTED and n.domain in ("", "ai.onnx")]
        for step in range(begin + 1, version + 1):
            for node in adapted:
                adapter = ADAPTERS.get((node.op_type, step))
                if adapter is not None:
                    adapter(node, tools)
        imports[""] = max(begin, version)
        for graph in graphs:
            for node in graph:
                _check(node, max(begin, version))


def _check(node: ir.Node, version: int) -> None:
    """Refuse a node that the definition of its operator in ``version`` does not allow."""
    if node.domain not in ("", "ai.onnx"):
        return
    schema = _schema(node.op_type, version)
    if schema is None or schema.deprecated:
        raise Unconvertible(node, f"opset {version} has no operator {node.op_type}")
    if not schema.min_input <= len(node.inputs) <= schema.max_input:
        raise Unconvertible(node, f"opset {version} does not take its {len(node.inputs)} inputs")
    if len(node.outputs) > schema.max_output:
        raise Unconvertible(node, f"opset {version} does not give its {len(node.outputs)} outputs")
    unknown = set(node.attributes) - set(schema.attributes)
    if unknown:
        raise Unconvertible(node, f"opset {version} does not know its attribute '{min(unknown)}'")
    for name, attribute in schema.attributes.items():
        if attribute.required and name not in node.attributes:
            raise Unconvertible(node, f"opset {version} needs an attribute '{name}'")


@cache
def _schema(operator: str, version: int) -> Any:
    try:
        return onnx.defs.get_schema(operator, version)
    except onnx.defs.SchemaError:
        return None
