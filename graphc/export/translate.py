"""From the graph of ``torch.export`` to an ONNX model whose weights carry the module's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphc.errors import BadInput
from graphc.export import trouble

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram


def translate(program: ExportedProgram, module: torch.nn.Module, opset: int) -> tuple[ir.Model, list[str]]:
    """The ONNX model of an exported program, not optimised, so that every parameter keeps its name.

    Returns:
        The model, and notes on what the module writes into, which a model cannot do.

    Raises:
        BadInput: ONNX has no form for something in it.
    """
    import torch

    try:
        made = torch.onnx.export(program, args=(), dynamo=True, optimize=False, opset_version=opset, verbose=False)
    except Exception as error:
        raise untranslatable(program, module, error) from error
    assert made is not None
    return made.model, _writes(made.exported_program)


def _writes(program: ExportedProgram) -> list[str]:
    signature = program.graph_signature
    notes = []
    buffers = sorted(signature.buffers_to_mutate.values())
    if buffers:
        more = f" and {len(buffers) - 1} more" if len(buffers) > 1 else ""
        notes.append(f"the module writes into its buffer '{buffers[0]}'{more}; every run of the model starts anew")
    for name in sorted(signature.user_inputs_to_mutate.values()):
        notes.append(f"the module writes into its input '{name}'; the model does not")
    return notes


def untranslatable(program: ExportedProgram, module: torch.nn.Module, error: Exception) -> BadInput:
    """Name the operator that has no ONNX form, and the place in the module that uses it."""
    found = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(error))
    if found is None:
        return trouble.explain(module, error)
    operator = found[1].rpartition(".")[2].strip("_")
    # It may come from the decomposition of another operator, which then has a part of its name.
    names = [
        (node, str(node.target).rsplit(".", 2)[-2:][0]) for node in program.graph.nodes if node.op == "call_function"
    ]
    node = next((node for node, name in names if name.strip("_") in operator or operator in name), None)
    return trouble.Untraceable(
        "the module cannot be exported",
        where=_place(node, module) if node is not None else type(module).__name__,
        why=f"ONNX has no form for the operator {found[1]}",
        hint="write that part with other torch operations",
    )


def _place(node: Any, module: torch.nn.Module) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = stack[-1] if stack else ("", type(module))
    name = (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]
    code = trouble.user_code(node.meta.get("stack_trace") or "")
    return ", ".join(filter(None, (f"{path} ({name})" if path else name, code)))


def hold(model: ir.Model, weights: Mapping[str, ir.TensorProtocol] | None, aliases: Mapping[str, list[str]]) -> None:
    """Give every initializer its tensor: NumPy's view of torch's memory, or the one in ``weights``.

    Args:
        model: Its initializers hold torch tensors; those without values are replaced from ``weights``.
        weights: Tensors by parameter name, in the dtype and shape of the parameter.
        aliases: All names of the parameter that an initializer is.

    Raises:
        BadInput: A tensor has no values and none are given, or they do not fit.
    """
    empty = []
    for name, value in model.graph.initializers.items():
        held = value.const_value
        given = next((weights[n] for n in [name, *aliases.get(name, ())] if n in weights), None) if weights else None
        if given is not None:
            _check(name, value, given)
            value.const_value = given
        elif _raw(held) is not None and _is_empty(_raw(held)):
            empty.append(name)
        elif _raw(held) is not None:
            value.const_value = _tensor(_raw(held), name)
    if empty:
        more = f", and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise BadInput(
            f"the parameter '{empty[0]}' has no values{more}",
            why="the module is on the meta device",
            hint="give them as weights={name: tensor}, or load them into the module first",
        )


def _raw(held: Any) -> Any:
    import torch

    raw = getattr(held, "raw", None)
    return raw if isinstance(raw, torch.Tensor) else None


def _is_empty(tensor: torch.Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return bool(tensor.is_meta) or isinstance(tensor, FakeTensor)


def _tensor(raw: torch.Tensor, name: str) -> ir.TensorProtocol:
    """A tensor that shares torch's memory."""
    import torch
    from onnx_ir import tensor_adapters

    plain = raw.detach().cpu()
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    return tensor_adapters.TorchTensor(plain, name=name)


def _check(name: str, value: ir.Value, given: ir.TensorProtocol) -> None:
    wanted = tuple(value.shape.numpy()) if value.shape is not None else ()
    found = tuple(given.shape.numpy())
    if wanted != found or value.dtype != given.dtype:
        expected = f"{value.dtype.name.lower() if value.dtype else '?'} {list(wanted)}"
        raise BadInput(
            f"the weight given for '{name}' does not fit",
            why=f"it is {given.dtype.name.lower()} {list(found)}, the parameter is {expected}",
            hint="give the weights of this module, in its dtype",
        )
