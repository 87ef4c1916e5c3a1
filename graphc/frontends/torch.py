"""PyTorch modules as sources: ``torch.export`` gives the graph, the ONNX exporter lowers it, names stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphc.contract import PassResult
from graphc.environment import to_install
from graphc.errors import BadInput, CheckFailed
from graphc.export.dims import AUTO, BATCH, Axes, Dynamic
from graphc.frontends import Source
from graphc.model import content_hash
from graphc.opset import WORKING

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from torch.export import ExportedProgram

    from graphc.export.arguments import Arguments
    from graphc.export.capture import Captured
    from graphc.export.entry import Entry


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
        given: The example inputs.
        results: Which leaves of the module's result the outputs are.
    """

    model: ir.Model
    how: str
    notes: tuple[str, ...]
    axes: Mapping[str, Axes]
    given: Arguments = field(repr=False)
    results: tuple[int, ...] = ()


def export(
    module: torch.nn.Module | ExportedProgram,
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
    are as the module has them, so that passes, adapters and ``from_torch`` find them. See ``graphc.export.capture`` for
    what is tried in turn; the last is the TorchScript exporter, which records one run.

    Args:
        module: With values, or on the meta device (then ``weights`` has them); or a program that ``torch.export`` made,
            whose sizes are settled.
        args: Example inputs: a tensor, a tuple of positional arguments, or a dict of arguments by name. A program's own
            are used if there are none.
        kwargs: Further arguments by name.
        dynamic_shapes: ``"auto"`` keeps batch and sequence dynamic where the module allows, ``"batch"`` the batch
            alone, None makes all sizes static, ``{input: {axis: name}}`` asks for these and fails where one cannot be.
            Inputs are named by the parameters of ``forward`` and the keys below them (``mask``, ``state_0``), or as in
            ``input_names``.
        input_names: Names for the tensors among the inputs, in their order.
        output_names: Names for the tensors of the result, in their order.
        weights: Tensors that stand for parameters and buffers, by name, in their dtype and shape; an
            ``ir.ExternalTensor`` is never read. Required for those on the meta device.
        opset: The opset to translate to.

    Raises:
        BadInput: torch is missing, or the module cannot be exported; the message has the module's path and the line.
    """
    _require()
    from torch.export import ExportedProgram

    from graphc.export import naming, trouble
    from graphc.export.arguments import arguments
    from graphc.export.capture import capture, of_program, quiet, standing_in, try_out
    from graphc.export.dims import plan
    from graphc.export.translate import hold, translate

    explicit = isinstance(dynamic_shapes, Mapping)
    if isinstance(module, ExportedProgram):
        program, module = module, _module_of(module)
        args, kwargs = (args, kwargs) if args or kwargs else program.example_inputs or ((), {})
        given = arguments(module, args, kwargs)
        captured = of_program(
            program, given, [{} for _ in given.leaves], "torch.export, by whoever made the program", ()
        )
        with quiet():
            model, writes = translate(program, module, opset)
    else:
        program = None
        given = arguments(module, args, kwargs)
        axes = plan(given, _by_leaf(dynamic_shapes, given, input_names))
        try:
            with quiet(), standing_in(module):
                try_out(module, given)
                captured = capture(module, given, axes, explicit=explicit)
                model, writes = translate(captured.program, module, opset)
        except trouble.Untraceable as error:
            return _recorded(module, given, axes, error, input_names, output_names)
    tied = naming.aliases(module if program is None else program)
    naming.initializers(model, tied)
    hold(model, weights, tied)
    own = naming.inputs(captured.program)
    found, fixed = _dynamic(captured, list(input_names or own), explicit)
    naming.sizes(model, found, captured.sizes)
    naming.nodes(model)
    tree, results = naming.result_of(captured.program)
    inputs = input_names or ([leaf.name for leaf in given.tensors] if program is None else own)
    naming.interface(model, inputs, output_names or naming.results(tree, results))
    notes = (*captured.notes, *fixed, *_fixed_arguments(given), *writes)
    return Exported(model, captured.how, notes, _axes(model), given, tuple(results))


def load(
    source: torch.nn.Module | ExportedProgram | str | Path,
    example: Any = None,
    *,
    dynamic: Dynamic = AUTO,
    verify: bool = True,
    seed: int = 0,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Source:
    """Export a module and compare what was exported with it.

    Args:
        source: A module, a program, a ``.pt2`` file, or ``package.module:name`` (see ``graphc.export.entry``).
        example: Example inputs, see :func:`export`; what the source brings if there are none.
        dynamic: ``dynamic_shapes`` of :func:`export`. With ``"auto"``, axes at which the model computes something else
            at other sizes become static.
        verify: Whether to compare.
        seed: Of the inputs to compare on.
        input_names: As in :func:`export`.
        output_names: As in :func:`export`.

    Raises:
        BadInput: It cannot be exported.
        CheckFailed: The exported model computes something else than the module.
    """
    _require()
    entry = _found(source)
    example = entry.example if example is None else example
    if example is None:
        raise BadInput(
            "a module needs example inputs",
            where=entry.name,
            why="its graph is found by running it",
            hint=f"graphc.load(module, example_inputs), or --inputs {_GRAMMAR}",
        )
    return _checked(entry, example, dynamic, verify, seed, input_names, output_names)


_GRAMMAR = "'x=float32[1,3,32,32]' (see --help)"


def _found(source: Any) -> Entry:
    """The module or program that a source means."""
    from torch.export import ExportedProgram
    from torch.nn import Module

    from graphc.export import entry, pt2

    if isinstance(source, Module | ExportedProgram):
        return entry.Entry(source, getattr(source, "example_inputs", None), (), type(source).__name__)
    if Path(source).suffix == ".pt2":
        program = pt2.load(Path(source))
        return entry.Entry(program, program.example_inputs, (), str(source), (Path(source),))
    return entry.find(str(source))


def _checked(
    entry: Entry,
    example: Any,
    dynamic: Dynamic,
    verify: bool,
    seed: int,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> Source:
    from torch.export import ExportedProgram

    from graphc.export import agreement

    program = isinstance(entry.module, ExportedProgram)
    args, kwargs = (example, None) if not _is_call(example) else example
    attempts: list[Dynamic] = [AUTO, BATCH, None] if dynamic in (AUTO, True) and not program else [dynamic]
    notes: list[str] = []
    for attempt in attempts:
        names = {"input_names": input_names, "output_names": output_names}
        exported = export(entry.module, args, kwargs, dynamic_shapes=attempt, **names)  # type: ignore[arg-type]
        about = [f"exported with {exported.how}; {_words(exported.axes)}", *exported.notes]
        if not verify:
            return _source(entry, exported, [*notes, *about, "not compared with the module: checks are off"])
        module = _module_of(entry.module) if program else entry.module
        found = agreement.compare(module, exported.given, exported.model, exported.results, seed)
        if not found.checked:
            return _source(entry, exported, [*notes, *about, f"not compared with the module: {found.why}"])
        if found.ok:
            worst = found.worst.ratio if found.worst else 0.0
            compared = f"the same as the module on {len(found.cases)} inputs"
            error = f"largest error {worst:.2g} of what rounding explains"
            return _source(entry, exported, [*notes, *about, f"{compared}; {error}"])
        notes.append(f"with {_words(exported.axes)} it computes something else: {found.why}")
    raise CheckFailed(
        "the exported model computes something else than the module",
        where=entry.name,
        why=found.why,
        hint="a module must not be random or keep state from run to run; else please report this with the module",
    )


def _is_call(example: Any) -> bool:
    """Whether example inputs are a pair of positional and named arguments, as programs have them."""
    return (
        isinstance(example, tuple)
        and len(example) == 2
        and isinstance(example[0], tuple)
        and isinstance(example[1], dict)
    )


def _source(entry: Entry, exported: Exported, notes: Sequence[str]) -> Source:
    return Source(
        exported.model.clone(),
        exported.model,
        Path(entry.name),
        (),
        PassResult(),
        notes=tuple(notes),
        depends=(*entry.stored, *entry.files),
        sha256=content_hash(exported.model),
    )


def _words(axes: Mapping[str, Axes]) -> str:
    names = sorted({name for each in axes.values() for name in each.values() if name.isidentifier()})
    return f"dynamic: {', '.join(names)}" if names else "all sizes static"


def _require() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("torch", "onnxscript") if find_spec(name) is None]
    if missing:
        raise BadInput(f"{' and '.join(missing)} must be installed for this", hint=to_install("torch"))


def _module_of(program: ExportedProgram) -> torch.nn.Module:
    module: torch.nn.Module = program.module(check_guards=False)
    return module


def _by_leaf(dynamic: Dynamic, given: Arguments, input_names: Sequence[str] | None) -> Dynamic:
    """The dynamic axes by the names of the arguments' leaves, where they are by the inputs' new names."""
    if not isinstance(dynamic, Mapping) or input_names is None:
        return dynamic
    own = {new: leaf.name for new, leaf in zip(input_names, given.tensors, strict=False)}
    return {own.get(name, name): axes for name, axes in dynamic.items()}


def _recorded(
    module: torch.nn.Module,
    given: Arguments,
    axes: Sequence[Axes],
    error: BadInput,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> Exported:
    """What the TorchScript exporter records; ``error`` if it fails, too."""
    import torch
    from torch.utils import _pytree as pytree

    from graphc.export import naming, torchscript
    from graphc.export.capture import copied, evaluating, quiet, widened

    if any(held.is_meta for held in (*module.parameters(), *module.buffers())):
        raise error
    try:
        with quiet(), evaluating(module):
            wide = widened(module, given, axes)
            tree = module(*copied(wide).args, **copied(wide).kwargs)
            results = [i for i, leaf in enumerate(pytree.tree_leaves(tree)) if isinstance(leaf, torch.Tensor)]
            names = naming.results(tree, results)
            model = torchscript.record(module, wide, axes, names)
    except BadInput:
        raise error from None
    naming.initializers(model, naming.aliases(module))
    naming.interface(model, input_names or [leaf.name for leaf in given.tensors], output_names or names)
    first = f"torch.export failed: {error.why}" + (f" ({error.where})" if error.where else "")
    how = "the TorchScript exporter, which records one run"
    return Exported(model, how, (first, *_fixed_arguments(given)), _axes(model), given, tuple(results))


def _dynamic(captured: Captured, names: Sequence[str], explicit: bool) -> tuple[dict[str, str], list[str]]:
    """New names for the symbols in shapes, and which of the axes asked for became static.

    Raises:
        BadInput: One of those is an axis that the user named.
    """
    from graphc.export import dims

    leaves = [(leaf, axes) for leaf, axes in zip(captured.given.leaves, captured.axes, strict=True) if leaf.is_tensor]
    rows = [(name, shape, axes) for name, shape, (_, axes) in zip(names, captured.sizes, leaves, strict=True)]
    notes = []
    for (name, shape, axes), (leaf, _) in zip(rows, leaves, strict=True):
        fixed = [axis for axis in axes if isinstance(shape[axis], int)]
        if explicit and fixed:
            raise BadInput(
                f"axis {fixed[0]} of input '{name}' cannot be dynamic",
                why=f"the module takes only the size {shape[fixed[0]]} there",
                hint="leave it out of the dynamic axes",
            )
        missed = [axis for axis in fixed if axis == 0 or (axis == 1 and _is_length(leaf.value, fixed))]
        for axis in missed:
            notes.append(f"axis {axis} of input '{name}' stays at {shape[axis]}: the module takes only that size")
    return dims.names(rows), notes


def _is_length(value: Any, fixed: Sequence[int]) -> bool:
    """Whether the second axis is that of a sequence, as far as one can tell; mostly it is that of features."""
    if value.dim() == 2:
        return not value.dtype.is_floating_point
    return value.dim() == 3 and 2 in fixed


def _fixed_arguments(given: Arguments) -> list[str]:
    fixed = [f"{leaf.name} = {leaf.value!r}" for leaf in given.leaves if not leaf.is_tensor and leaf.value is not None]
    return [f"no tensors, hence fixed in the model: {', '.join(fixed)}"] if fixed else []


def _axes(model: ir.Model) -> dict[str, Axes]:
    found: dict[str, Axes] = {}
    for value in model.graph.inputs:
        shape = value.shape or ()
        found[value.name or ""] = {i: str(d.value) for i, d in enumerate(shape) if not isinstance(d, int)}
    return found
