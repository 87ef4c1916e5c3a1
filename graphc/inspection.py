"""What is in a model: operators, parameters, bytes, FLOPs, dynamic axes, largest tensors, anything suspicious."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphc import edit, flops
from graphc.model import nbytes, parameters
from graphc.views.units import count, size

if TYPE_CHECKING:
    from graphc.frontends import Source

LARGEST = 5
"""How many of the largest tensors are listed."""

_CHECKED = 1 << 24
"""Elements up to which a weight is searched for NaN and infinity."""


def inspect(source: Path | Source) -> dict[str, Any]:
    """Everything ``graphc inspect`` shows, as plain data.

    Args:
        source: A file or folder, or what ``graphc.load`` returned.

    Raises:
        BadInput: The model cannot be read.
    """
    from graphc import frontends

    loaded = source if isinstance(source, frontends.Source) else frontends.load(source)
    model = loaded.original
    bound = flops.bind(model)
    cost: Counter[str] = Counter()
    for node in edit.nodes(bound):
        cost[_operator(node)] += flops.node_flops(node)
    total: Counter[str] = Counter(_operator(node) for node in edit.nodes(model))
    weights: dict[str, int] = defaultdict(int)
    for node in edit.nodes(model):
        weights[_operator(node)] += sum(edit.nbytes(t) for v in node.inputs if (t := edit.tensor(v)) is not None)
    tensors = sorted(_tensors(model), key=lambda t: -edit.nbytes(t[1]))
    summary = {
        "file": str(loaded.path),
        "producer": " ".join(filter(None, (model.producer_name, model.producer_version))) or "unknown",
        "IR version": model.ir_version,
        "opset": ", ".join(f"{domain or 'ai.onnx'} {v}" for domain, v in sorted(model.opset_imports.items())),
        "nodes": f"{sum(total.values())} ({len(model.graph)} in the main graph)",
        "parameters": count(parameters(model)),
        "weights": size(nbytes(model)),
        "FLOPs": f"{count(sum(cost.values()))} (every dynamic dimension 1)",
        "dynamic axes": ", ".join(sorted(_dynamic(model))) or "none",
        "local functions": len(model.functions),
    }
    summary |= _census(loaded)
    return {
        "schema": "graphc-inspect/1",
        "summary": summary,
        "inputs": [_interface(v) for v in model.graph.inputs],
        "outputs": [_interface(v) for v in model.graph.outputs],
        "operators": [
            {"operator": name, "count": n, "flops": cost[name], "bytes": weights[name]}
            for name, n in total.most_common()
        ],
        "largest": [
            {"name": name, "type": t.dtype.name.lower(), "shape": str(list(t.shape)), "bytes": edit.nbytes(t)}
            for name, t in tensors[:LARGEST]
        ],
        "suspicious": list(_suspicious(model)),
    }


def _census(loaded: Source) -> dict[str, str]:
    """How many attentions and mixtures of experts can be recognised, where there are any."""
    from graphc.contract import Capabilities
    from graphc.errors import BadInput
    from graphc.recognition import census

    try:
        from graphc import runtime

        target = runtime.capabilities()
    except BadInput:
        target = Capabilities("onnxruntime", max_ir=10, max_opset={"": 23})
    found = {
        "attention": census.attentions(loaded.model, target),
        "experts": census.mixtures(loaded.model, target),
    }
    return {what: words for what, words in found.items() if words}


def _operator(node: ir.Node) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def _interface(value: ir.Value) -> dict[str, str]:
    kind = value.dtype.name.lower() if value.dtype is not None else str(value.type or "unknown")
    shape = "unknown" if value.shape is None else "[" + ", ".join(str(d) for d in value.shape) + "]"
    return {"name": value.name or "", "type": kind, "shape": shape}


def _dynamic(model: ir.Model) -> set[str]:
    dims = {d for v in model.graph.inputs for d in (v.shape or ()) if not isinstance(d, int)}
    return {d.value or "?" for d in dims}


def _tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    for graph in edit.graphs(model):
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield name, value.const_value
        for node in graph:
            if node.op_type == "Constant" and (tensor := edit.tensor(node.outputs[0])) is not None:
                yield node.outputs[0].name or "", tensor


def _suspicious(model: ir.Model) -> Iterator[str]:
    """What a user would want to know before shipping the model."""
    inputs = {id(v) for v in model.graph.inputs}
    overridable = [name for name, v in model.graph.initializers.items() if id(v) in inputs]
    if overridable and model.ir_version >= 4:
        yield (
            f"{len(overridable)} weights are also inputs ('{overridable[0]}' first): callers may override them, so "
            "nothing can be folded into them; simplify{freeze-initializers=true} makes them constants"
        )
    for name, tensor in _tensors(model):
        if tensor.dtype.is_floating_point() and tensor.size <= _CHECKED:
            array = tensor.numpy()
            if not np.isfinite(array.astype(np.float32, copy=False)).all() and tensor.size > 1:
                yield f"'{name}' holds NaN or infinity"
    unused = [v.name for v in model.graph.inputs if not v.uses() and not v.is_graph_output()]
    if unused:
        yield f"input '{unused[0]}' is never read" + (f", and {len(unused) - 1} more" if len(unused) > 1 else "")
    custom = {n.domain for n in edit.nodes(model)} - {"", "ai.onnx", "com.microsoft", "ai.onnx.ml"}
    custom -= {domain for domain, _, _ in model.functions}
    if custom:
        yield f"operators of domain {', '.join(sorted(custom))} run only where they are registered"
    random = {n.op_type for n in edit.nodes(model) if n.op_type.startswith(("Random", "Multinomial", "Bernoulli"))}
    if random:
        yield f"{', '.join(sorted(random))}: outputs differ from run to run"
    training = [n for n in edit.nodes(model) if n.op_type == "BatchNormalization" and _flag(n, "training_mode")]
    if training:
        yield f"BatchNormalization '{training[0].name}' is in training mode; export with model.eval()"
    doubles = [n for n, t in _tensors(model) if t.dtype == ir.DataType.DOUBLE and t.size > edit.SMALL]
    if doubles:
        yield f"'{doubles[0]}' is float64: twice the size and slow on most hardware"


def _flag(node: ir.Node, name: str) -> bool:
    attr = node.attributes.get(name)
    return attr is not None and not attr.is_ref() and bool(attr.value)
