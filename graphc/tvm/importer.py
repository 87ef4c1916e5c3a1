"""From a lowered ONNX model to a Relax module."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import Any

import onnx_ir as ir

from graphc import edit
from graphc.errors import BadInput

WEIGHT = 1024
"""Elements from which a constant is a weight: it stays out of the message that is imported, and of the library."""


def to_relax(model: ir.Model, target: Any) -> Any:
    """Import a lowered model.

    Args:
        model: Static shapes, and only operators that ``graphc.tvm.lower`` lets pass.
        target: A TVM target, whose vectors the loop nests of own operators have.

    Returns:
        An ``IRModule`` whose function ``main`` takes the inputs in order and gives the outputs; weights are constants.

    Raises:
        BadInput: The importer refuses the model; the message has its reason.
    """
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    from graphc.tvm import own

    copy = model.clone()
    _drop_unused_outputs(copy)
    names = [value.name or "" for value in copy.graph.inputs]
    weights = _inputs_for_weights(copy)
    for i, value in enumerate(copy.graph.inputs):
        value.name = f"graphc_in{i}"
    proto = ir.to_proto(copy)
    said = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said):
            warnings.simplefilter("ignore")
            with own.known(target):
                module = from_onnx(proto, keep_params_in_input=False)
    except BadInput:
        raise
    except Exception as error:  # it raises whatever happens inside
        last = str(error).strip().splitlines() or [type(error).__name__]
        where = said.getvalue().partition(", with inputs")[0].removeprefix("Error converting operator ")
        raise BadInput(
            "TVM's importer does not take the model",
            where=where.strip(),
            why=last[-1][:300],
            hint="-t onnxruntime runs it; please report this as a defect of graphc, with the model if you may",
        ) from None
    parameters = module["main"].params[len(names) :]
    bound = {v.name: _tensor(t) for v, t in zip(parameters, weights, strict=True)}
    module = relax.transform.BindParams("main", bound)(module)
    function = module["main"]
    module["main"] = function.without_attr("num_input") if "num_input" in (function.attrs or {}) else function
    assert isinstance(module, tvm.IRModule)
    return module


def _drop_unused_outputs(model: ir.Model) -> None:
    """The importer counts outputs, whether anybody reads them or not."""
    for node in edit.nodes(model):
        used = [i for i, value in enumerate(node.outputs) if value.uses() or value.is_graph_output()]
        node.resize_outputs(max(used, default=0) + 1)


def _inputs_for_weights(model: ir.Model) -> list[ir.TensorProtocol]:
    """Turn large initializers into inputs at the end, and return what they hold."""
    graph = model.graph
    found = []
    for value in list(graph.initializers.values()):
        held = edit.tensor(value)
        if held is None or held.size < WEIGHT or value.name is None:
            continue
        del graph.initializers[value.name]
        value.const_value = None
        graph.inputs.append(value)
        found.append(held)
    return found


def _tensor(held: ir.TensorProtocol) -> Any:
    import tvm

    return tvm.runtime.tensor(held.numpy())
