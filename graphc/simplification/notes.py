"""Notes that exporters leave in a file and that no runtime reads: module stacks, source lines, documentation."""

from __future__ import annotations

from collections.abc import MutableMapping

import onnx_ir as ir

from graphc import edit
from graphc.adapters.sites import SCOPES, module, weight_of

_EXPORTERS = ("pkg.torch.", "pkg.onnxscript.")
"""How the keys of ``torch.onnx.export`` and of onnxscript's rewriter begin."""


def remove(model: ir.Model) -> int:
    """Remove what exporters note of graphs, nodes and values, in place; returns how many notes went.

    What others note stays, and so does all that the model as a whole, its inputs and its outputs say of themselves. Of
    a node whose weight cannot be told by its name, the module that it came from stays, by which adapters find it.
    """
    count = 0
    for graph in edit.graphs(model):
        count += _clean(graph.metadata_props)
        interface = {id(value) for value in (*graph.inputs, *graph.outputs)}
        values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
        for node in graph:
            kept = _scope(node)
            count += _clean(node.metadata_props) + bool(node.doc_string)
            node.doc_string = None
            if kept:
                node.metadata_props[SCOPES] = kept
                count -= 1
            values += node.outputs
        for value in {id(value): value for value in values}.values():
            count += _clean(value.metadata_props)
            if id(value) not in interface:
                count += bool(value.doc_string)
                value.doc_string = None
    return count


def _clean(notes: MutableMapping[str, str]) -> int:
    gone = [key for key in notes if key == "namespace" or key.startswith(_EXPORTERS)]
    for key in gone:
        del notes[key]
    return len(gone)


def _scope(node: ir.Node) -> str:
    """Torch's note of a node's module, the modules around it left out, where it says more than the weight's name."""
    if SCOPES not in node.metadata_props:
        return ""
    held = weight_of(node)
    path = module(node) if held is not None else ""
    return repr([path, ""]) if path and held is not None and held.name != f"{path}.weight" else ""
