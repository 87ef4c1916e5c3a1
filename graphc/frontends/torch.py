"""PyTorch modules as sources: ``torch.export`` gives the graph, the ONNX exporter lowers it, names stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphc.errors import BadInput
from graphc.export.dims import AUTO, Axes, Dynamic
from graphc.opset import WORKING

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from graphc.export.arguments import Arguments
    from graphc.export.capture import Captured


@dataclass(frozen=True)
class Exported:
    """A module as an ONNX model.

    Attributes:
        model: Initializers are named as the module's parameters and buffers, tied ones by their first name
            (metadata ``graphc.aliases`` has the others), and have torch's layout. Nodes are named after the module they
            are in (metadata ``graphc.module`` and ``graphc.class``). Weights share memory with the module.
        how: How the graph was captured.
        notes: What the user should know: what else was tried, sizes that could not stay dynamic.
        axes: The dynamic axes of every input, by name: ``{"input_ids": {0: "batch", 1: "sequence"}}``.
    """

    model: ir.Model
    how: str
    notes: tuple[str, ...]
    axes: Mapping[str, Axes]


def export(
    module: torch.nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Dynamic = AUTO,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    weights: Mapping[str, ir.TensorProtocol] | None = None,
    opset: int = WORKING,
) -> Exported:
    """Export a module to ONNX under its own names.

    The module is traced in eval mode and without gradients, and is as it was afterwards. Nothing is optimised: weights
    are as the module has them, so that passes, adapters and ``from_torch`` find them.

    Args:
        module: With values, or on the meta device (then ``weights`` has them).
        args: Example inputs: a tensor, a tuple of positional arguments, or a dict of arguments by name.
        kwargs: Further arguments by name.
        dynamic_shapes: ``"auto"`` keeps batch and sequence dynamic where the module allows, None makes all sizes
            static, ``{input: {axis: name}}`` asks for these and fails where one cannot be. Inputs are named by the
            parameters of ``forward`` and the keys below them (``mask``, ``state_0``), or as in ``input_names``.
        input_names: Names for the tensors among the inputs, in their order.
        output_names: Names for the tensors of the result, in their order.
        weights: Tensors that stand for parameters and buffers, by name, in their dtype and shape; an
            ``ir.ExternalTensor`` is never read. Required for those on the meta device.
        opset: The opset to translate to.

    Raises:
        BadInput: torch is missing, or the module cannot be exported; the message has the module's path and the line.
    """
    _require()
    from graphc.export import naming, translate
    from graphc.export.arguments import arguments
    from graphc.export.capture import capture, quiet, standing_in
    from graphc.export.dims import plan

    given = arguments(module, args, kwargs)
    explicit = isinstance(dynamic_shapes, Mapping)
    axes = plan(given, _by_leaf(dynamic_shapes, given, input_names))
    tied = naming.aliases(module)
    with quiet(), standing_in(module):
        captured = capture(module, given, axes, explicit=explicit)
        model = translate.translate(captured.program, module, opset)
    naming.initializers(model, tied)
    translate.hold(model, weights, tied)
    found, fixed = _dynamic(captured, list(input_names or naming.inputs(captured.program)), explicit)
    naming.sizes(model, found)
    naming.nodes(model)
    inputs = list(input_names or [leaf.name for leaf in given.tensors][: len(model.graph.inputs)])
    naming.interface(model, inputs, list(output_names or naming.results(captured.program)))
    notes = (*captured.notes, *fixed, *_constants(given))
    return Exported(model, captured.how, notes, _axes(model))


def _require() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("torch", "onnxscript") if find_spec(name) is None]
    if missing:
        raise BadInput(f"{' and '.join(missing)} must be installed for this", hint="pip install 'graphc[torch]'")


def _by_leaf(dynamic: Dynamic, given: Arguments, input_names: Sequence[str] | None) -> Dynamic:
    """The dynamic axes by the names of the arguments' leaves, where they are by the inputs' new names."""
    if not isinstance(dynamic, Mapping) or input_names is None:
        return dynamic
    own = {new: leaf.name for new, leaf in zip(input_names, given.tensors, strict=False)}
    return {own.get(name, name): axes for name, axes in dynamic.items()}


def _dynamic(captured: Captured, names: Sequence[str], explicit: bool) -> tuple[dict[str, str], list[str]]:
    """New names for the symbols in shapes, and which of the axes asked for became static.

    Raises:
        BadInput: One of those is an axis that the user named.
    """
    from graphc.export import dims

    values = {n.name: n.meta.get("val") for n in captured.program.graph.nodes if n.op == "placeholder"}
    from graphc.export.naming import inputs

    asked = [axes for leaf, axes in zip(captured.given.leaves, captured.axes, strict=True) if leaf.is_tensor]
    shapes = [_shape(values[name]) for name in inputs(captured.program)]
    rows = [*zip(names, shapes, asked, strict=True)]
    notes = []
    for name, shape, axes in rows:
        fixed = [axis for axis in axes if isinstance(shape[axis], int)]
        if explicit and fixed:
            raise BadInput(
                f"axis {fixed[0]} of input '{name}' cannot be dynamic",
                why=f"the module takes only the size {shape[fixed[0]]} there",
                hint="leave it out of the dynamic axes",
            )
        if 0 in fixed or (fixed and len(fixed) == len(axes)):
            notes.append(
                f"axis {fixed[0]} of input '{name}' stays at {shape[fixed[0]]}: the module takes only that size"
            )
    return dims.names(rows), notes


def _shape(value: Any) -> list[int | str]:
    """Its sizes; a symbol that torch found to have one value is that number."""
    return [int(text) if (text := str(size)).isdigit() else text for size in value.shape]


def _constants(given: Arguments) -> list[str]:
    baked = [
        f"'{leaf.name}' = {leaf.value!r}" for leaf in given.leaves if not leaf.is_tensor and leaf.value is not None
    ]
    return [f"no tensors, hence fixed in the model: {', '.join(baked)}"] if baked else []


def _axes(model: ir.Model) -> dict[str, Axes]:
    found: dict[str, Axes] = {}
    for value in model.graph.inputs:
        shape = value.shape or ()
        found[value.name or ""] = {i: str(d.value) for i, d in enumerate(shape) if not isinstance(d, int)}
    return found
