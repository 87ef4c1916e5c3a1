"""The FX graph of a module: ``torch.export``, and what is tried in turn where it fails."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphc.errors import BadInput
from graphc.export import naming, trouble
from graphc.export.arguments import Arguments
from graphc.export.dims import Axes

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class Captured:
    """A module's graph.

    Attributes:
        program: What ``torch.export`` gave.
        given: The arguments it was traced with.
        axes: The axes that were asked to be dynamic, by leaf.
        how: How it was captured, in words.
        notes: What was tried before and why it failed.
        sizes: The sizes of every input tensor: a number, or an expression over torch's symbols. (Translation
            replaces symbols in the program by numbers where it unrolls an LSTM.)
    """

    program: ExportedProgram
    given: Arguments
    axes: Sequence[Axes]
    how: str
    notes: tuple[str, ...]
    sizes: tuple[tuple[int | str, ...], ...]


def of_program(
    program: ExportedProgram, given: Arguments, axes: Sequence[Axes], how: str, notes: Sequence[str]
) -> Captured:
    """A program with the sizes that its inputs have now."""
    tensors = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and "val" in n.meta}
    sizes = tuple(
        tuple(int(text) if (text := str(size)).isdigit() else text for size in tensors[name].shape)
        for name in naming.inputs(program)
    )
    return Captured(program, given, axes, how, tuple(notes), sizes)


def capture(module: torch.nn.Module, given: Arguments, axes: Sequence[Axes], *, explicit: bool) -> Captured:
    """Trace a module with ``torch.export``.

    Tried in turn: tracing as Python runs it (``strict=False``); by its byte code (``strict=True``); both with the first
    axes alone dynamic; both with static sizes. The last two only where the dynamic axes were not named by the user.

    Args:
        module: In eval mode, with parameters that ``standing_in`` prepared.
        given: The arguments.
        axes: The axes to keep dynamic, by leaf.
        explicit: Whether the user named these axes.

    Raises:
        BadInput: Nothing worked; the message says what was wrong first, and where.
    """
    first: Exception | None = None
    notes: list[str] = []
    for strict, some, words in _attempts(axes, explicit):
        how = f"torch.export{' (strict)' if strict else ''}{words}"
        try:
            traced = widened(module, given, some)
            program = _export(module, traced, some, strict)
        except Exception as error:  # whatever tracing somebody's code may raise
            notes.append(f"{how} failed: {trouble.summary(error)}")
            first = first or error
            if trouble.is_final(error) or (strict and trouble.is_data_dependent(first)):
                break
            continue
        return of_program(program, traced, some, how, notes)
    assert first is not None
    raise trouble.explain(module, first) from first


def _attempts(axes: Sequence[Axes], explicit: bool) -> Iterator[tuple[bool, Sequence[Axes], str]]:
    variants = [(axes, "")]
    if not explicit and any(axes):
        batch: list[Axes] = [{0: each[0]} if 0 in each else {} for each in axes]
        if batch != list(axes):
            variants.append((batch, ", only the first axes dynamic"))
        variants.append(([{} for _ in axes], ", static sizes"))
    for some, words in variants:
        for strict in (False, True):
            yield strict, some, words


def _export(module: torch.nn.Module, given: Arguments, axes: Sequence[Axes], strict: bool) -> ExportedProgram:
    import torch

    shapes = torch.export.ShapesCollection()
    for leaf, wanted in zip(given.leaves, axes, strict=True):
        if wanted:
            shapes[leaf.value] = dict.fromkeys(wanted, torch.export.Dim.AUTO)
    with ExitStack() as stack:
        # Sizes of 0 and 1 in the examples say nothing about what the module takes.
        stack.enter_context(torch.fx.experimental._config.patch(backed_size_oblivious=True))
        if any(axes):
            _let_lengths_vary(stack)
        return torch.export.export(
            module,
            given.args,
            given.kwargs,
            dynamic_shapes=shapes.dynamic_shapes(module, given.args, given.kwargs) if any(axes) else None,
            strict=strict,
        )


def _let_lengths_vary(stack: ExitStack) -> None:
    """Let LSTM and GRU be traced without unrolling them, which would fix the length of the sequence."""
    with suppress(ImportError):  # torch 2.13 has these; the exporter makes one operator of each in any case
        import torch
        from torch.export import _patches

        for operator in (torch.ops.aten.lstm.input, torch.ops.aten.gru.input):
            # What it was last run with is remembered, whatever is registered.
            operator._dispatch_cache.clear()
            stack.callback(operator._dispatch_cache.clear)
        stack.enter_context(_patches.register_lstm_while_loop_decomposition())
        stack.enter_context(_patches.register_gru_while_loop_decomposition())


def try_out(module: torch.nn.Module, given: Arguments) -> None:
    """Run the module on the example inputs, so that what is wrong with these is not taken for trouble with tracing.

    Raises:
        BadInput: It does not run.
    """
    own = copied(given)
    try:
        module(*own.args, **own.kwargs)
    except Exception as error:  # whatever somebody's code may raise
        found = trouble.explain(module, error, "the module does not run on the example inputs")
        raise BadInput(found.what, where=found.where, why=found.why, hint=found.hint) from error


def widened(module: torch.nn.Module, given: Arguments, axes: Sequence[Axes]) -> Arguments:
    """The arguments with dynamic axes of size 1 repeated, where the module runs with them.

    Tracing takes a size of 1 for one that broadcasts. Every tensor becomes one of its own, too, so that the
    same one given twice can have different sizes.
    """
    import torch

    firsts: list[Axes] = [{0: ""} if 0 in each else {} for each in axes]
    for some in (axes, firsts):
        values = []
        grown = False
        for leaf, wanted in zip(given.leaves, some, strict=True):
            if not leaf.is_tensor:
                values.append(leaf.value)
                continue
            ones = [axis for axis in wanted if leaf.value.shape[axis] == 1]
            grown = grown or bool(ones)
            repeats = [2 if axis in ones else 1 for axis in range(leaf.value.dim())]
            values.append(leaf.value.repeat(repeats) if ones else leaf.value.clone())
        wide = given.with_values(values)
        if not grown:
            return wide
        try:
            with torch.no_grad():
                module(*copied(wide).args, **copied(wide).kwargs)
        except Exception:
            continue
        return wide
    return copied(given)


def copied(given: Arguments) -> Arguments:
    """The same with tensors of its own: a module may write into what it is given."""
    return given.with_values([leaf.value.clone() if leaf.is_tensor else leaf.value for leaf in given.leaves])


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; every submodule gets its mode back."""
    import torch

    training = {each: each.training for each in module.modules()}
    try:
        with suppress(NotImplementedError):  # of an exported program, whose mode is settled
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for each, was in training.items():
            each.training = was


@contextmanager
def standing_in(module: torch.nn.Module) -> Iterator[None]:
    """Evaluate a module with its tensors on the meta device stood in for by fake ones on the CPU; all is put back."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    before: list[tuple[dict[str, Any], str, Any]] = []
    stand_ins: dict[int, Any] = {}
    try:
        for tensors in [held for each in module.modules() for held in (each._parameters, each._buffers)]:
            for key, held in tensors.items():
                if held is None or not (held.is_meta or isinstance(held, FakeTensor)):
                    continue
                before.append((tensors, key, held))
                if id(held) not in stand_ins:
                    with mode:
                        made = torch.empty(held.shape, dtype=held.dtype, device="cpu")
                    is_parameter = isinstance(held, torch.nn.Parameter)
                    stand_ins[id(held)] = torch.nn.Parameter(made, requires_grad=False) if is_parameter else made
                tensors[key] = stand_ins[id(held)]
        with evaluating(module):
            yield
    finally:
        for tensors, key, held in before:
            tensors[key] = held


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's remarks about its own progress from the terminal."""
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(redirect_stderr(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in ("torch.onnx", "torch.export", "torch.fx", "torch._dynamo", "torch._export"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        yield
