"""The last fallback: the TorchScript exporter, which records one run of the module.

What it records may hold for the example alone: a branch on a tensor's value is taken once and for all. It warns
of that, and then the module is refused.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from graphc.errors import BadInput
from graphc.export import trouble
from graphc.export.arguments import Arguments
from graphc.export.dims import Axes, usual
from graphc.opset import WORKING
from graphc.opset.adapters import Unconvertible
from graphc.opset.upgrade import upgrade

if TYPE_CHECKING:
    import torch

_OPSET = 20
"""The highest opset that it writes (``ONNX_TORCHSCRIPT_EXPORTER_MAX_OPSET``)."""


def record(module: torch.nn.Module, given: Arguments, axes: Sequence[Axes], outputs: Sequence[str]) -> ir.Model:
    """The ONNX model of one run of a module, at the working opset; parameters keep their names.

    Args:
        module: In eval mode, with values.
        given: The arguments.
        axes: The axes to keep dynamic, by leaf; those without a name are called after their input.
        outputs: The names of the result's tensors.

    Raises:
        BadInput: It cannot be recorded, or the record would hold for these arguments alone.
    """
    import torch

    buffer = io.BytesIO()
    names = [leaf.name for leaf in given.tensors]
    chosen = {
        leaf.name: {
            axis: name or usual(axis, leaf.value.dim()) or f"{leaf.name}_{axis}" for axis, name in wanted.items()
        }
        for leaf, wanted in zip(given.leaves, axes, strict=True)
        if wanted
    }
    with warnings.catch_warnings(record=True) as caught, _no_log():
        warnings.simplefilter("always")
        try:
            torch.onnx.export(
                module,
                given.args,
                buffer,
                kwargs=given.kwargs,
                dynamo=False,
                export_params=False,
                do_constant_folding=False,
                opset_version=_OPSET,
                input_names=names,
                output_names=list(outputs),
                dynamic_axes=chosen,
                verbose=False,
            )
        except Exception as error:  # whatever tracing somebody's code may raise
            raise trouble.explain(module, error) from error
    for each in caught:
        if "trace might not generalize" in str(each.message) or "incorrect" in str(each.message):
            raise BadInput(
                "the module cannot be exported",
                where=f"{each.filename}:{each.lineno}",
                why="recording one run would fix what depends on the values of a tensor",
            )
    return _model(buffer.getvalue(), module, names)


@contextmanager
def _no_log() -> Iterator[None]:
    """Keep the exporter's C++ part from printing the graph when it fails."""
    import torch

    was = torch._C._jit_is_onnx_log_enabled()
    torch._C._jit_set_onnx_log_enabled(False)
    try:
        yield
    finally:
        torch._C._jit_set_onnx_log_enabled(was)


def _model(content: bytes, module: torch.nn.Module, inputs: Sequence[str]) -> ir.Model:
    model: ir.Model = ir.from_proto(onnx.load_from_string(content))
    state = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    graph = model.graph
    for value in [v for v in graph.inputs if v.name not in inputs]:
        graph.inputs.remove(value)
        value.const_value = ir.tensor_adapters.TorchTensor(state[value.name or ""].detach().cpu(), name=value.name)
        graph.initializers.add(value)
    try:
        upgrade(model, WORKING)
    except Unconvertible as error:
        raise BadInput(
            "the module cannot be exported", why=f"opset {_OPSET} is not opset {WORKING}: {error.reason}"
        ) from error
    return model
