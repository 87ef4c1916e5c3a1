"""The FX graph of a module: ``torch.export``, and what is tried in turn where it fails."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphc.export import trouble
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
    """

    program: ExportedProgram
    given: Arguments
    axes: Sequence[Axes]
    how: str
    notes: tuple[str, ...]


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
            if trouble.is_final(error):
                break
            continue
        return Captured(program, traced, some, how, tuple(notes))
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
    # Sizes of 0 and 1 in the examples say nothing about what the module takes.
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        return torch.export.export(
            module,
            given.args,
            given.kwargs,
            dynamic_shapes=shapes.dynamic_shapes(module, given.args, given.kwargs) if any(axes) else None,
            strict=strict,
        )


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
                module(*_copied(wide).args, **_copied(wide).kwargs)
        except Exception:
            continue
        return wide
    return given.with_values([leaf.value.clone() if leaf.is_tensor else leaf.value for leaf in given.leaves])


def _copied(given: Arguments) -> Arguments:
    """The same with tensors of its own: a module may write into what it is given."""
    return given.with_values([leaf.value.clone() if leaf.is_tensor else leaf.value for leaf in given.leaves])


@contextmanager
def standing_in(module: torch.nn.Module) -> Iterator[set[str]]:
    """Evaluate without gradients, with tensors on the meta device stood in for by fake ones; all is put back after.

    Yields:
        The names of the parameters and buffers that have no values.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    training = {each: each.training for each in module.modules()}
    before: list[tuple[dict[str, Any], str, Any]] = []
    stand_ins: dict[int, Any] = {}
    missing: set[str] = set()
    try:
        module.eval()
        for prefix, each in module.named_modules():
            for tensors in (each._parameters, each._buffers):
                for key, held in tensors.items():
                    if held is None or not (held.is_meta or isinstance(held, FakeTensor)):
                        continue
                    missing.add(f"{prefix}.{key}" if prefix else key)
                    before.append((tensors, key, held))
                    if id(held) not in stand_ins:
                        with mode:
                            made = torch.empty(held.shape, dtype=held.dtype, device="cpu")
                        stand_ins[id(held)] = (
                            torch.nn.Parameter(made, requires_grad=False)
                            if isinstance(held, torch.nn.Parameter)
                            else made
                        )
                    tensors[key] = stand_ins[id(held)]
        with torch.no_grad():
            yield missing
    finally:
        for tensors, key, held in before:
            tensors[key] = held
        for each, was in training.items():
            each.training = was


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's remarks about its own progress from the terminal."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in ("torch.onnx", "torch.export", "torch.fx", "torch._dynamo", "torch._export"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        yield
