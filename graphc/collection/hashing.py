"""What a value depends on, as a hash: equal hashes compute equal values from equal inputs, whatever their names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.contract import Arrays


def value_hashes(model: ir.Model, wanted: Iterable[ir.Value]) -> dict[ir.Value, str]:
    """A SHA-256 for each value that the wanted ones of the main graph are computed from, and for them.

    Every constant that they depend on is read once, one at a time; what comes later in the graph is not looked at.
    """
    functions = _text(str(ir.to_proto(function)) for function in model.functions.values())
    opsets = _text([str(sorted(model.opset_imports.items()))])
    found: dict[ir.Value, str] = {}
    todo = list(wanted)
    while todo:
        value = todo[-1]
        if value in found:
            todo.pop()
            continue
        node = value.producer()
        if (held := edit.tensor(value)) is not None:
            found[value] = _constant(held)
        elif node is None:
            found[value] = _text(["input", value.name or ""])
        else:
            reads = _reads(node)
            if missing := [v for v in reads if v not in found]:
                todo += missing
                continue
            own = _node(node, [found[v] for v in reads], functions, opsets)
            for i, out in enumerate(node.outputs):
                found[out] = _text([own, str(i)])
        todo.pop()
    return found


def data_hash(samples: Sequence[Arrays], extra: Iterable[Arrays] = ()) -> str:
    """A SHA-256 of samples, in order."""
    digest = hashlib.sha256()
    for sample in (*samples, *extra):
        for name in sorted(sample):
            digest.update(_text([name, str(sample[name].dtype), str(sample[name].shape)]).encode())
            _bytes(digest, sample[name])
    return digest.hexdigest()


def _reads(node: ir.Node) -> list[ir.Value]:
    """The values that a node reads, its bodies' captures included."""
    found = dict.fromkeys(v for v in node.inputs if v is not None)
    inside = [body for graph in edit.subgraphs(node) for body in (graph, *edit.bodies(graph))]
    for body in inside:
        for value in (*(v for n in body for v in n.inputs if v is not None), *body.outputs):
            if value.graph is not None and value.graph not in inside:
                found[value] = None
    return list(found)


def _node(node: ir.Node, inputs: Sequence[str], functions: str, opsets: str) -> str:
    names: Mapping[str, ir.Attr] = node.attributes
    attributes = [str(ir.to_proto(names[name])) for name in sorted(names)]
    places = "".join("-" if v is None else "v" for v in node.inputs)
    local = functions if node.domain else ""
    return _text([node.domain, node.op_type, str(node.version), opsets, local, places, *attributes, *inputs])


def _constant(held: ir.TensorProtocol) -> str:
    digest = hashlib.sha256(_text(["constant", str(held.dtype), str(held.shape)]).encode())
    _bytes(digest, held.numpy())
    edit.release(held)
    return digest.hexdigest()


def _bytes(digest: hashlib._Hash, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> None:
    if array.dtype.kind in "OUS":
        digest.update(repr(array.tolist()).encode())
        return
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _text(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()
