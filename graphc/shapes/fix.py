"""Fixes the symbolic dimensions of a model to sizes: what a target without dynamic shapes needs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from graphc import edit
from graphc.errors import BadInput, nearest
from graphc.shapes.expressions import evaluate, symbols_in

Sizes = Mapping[str, int]
"""A size for every symbol of a model's inputs."""


def symbols(model: ir.Model) -> dict[str, list[str]]:
    """The symbols in the shapes of the inputs, with the places ``input[axis]`` where each occurs.

    A dimension without a name is called after its only place, ``input.axis``.

    Raises:
        BadInput: An input is no tensor of known rank.
    """
    found: dict[str, list[str]] = {}
    for value in _inputs(model):
        for axis, dim in enumerate(_dims(value)):
            place = f"{value.name}[{axis}]"
            for symbol in symbols_in(dim) if isinstance(dim, str) else ():
                found.setdefault(symbol, []).append(place)
    return found


def buckets(model: ir.Model, given: Sequence[str]) -> list[dict[str, int]]:
    """Every combination of the sizes given for the symbols of a model's inputs.

    Args:
        model: Any model.
        given: Texts such as ``batch=1,8``; spaces separate several in one text.

    Returns:
        One mapping from symbol to size a combination, in the order given; a single empty one for a static model.

    Raises:
        BadInput: A symbol has no size, or there is no such symbol, or a text cannot be read.
    """
    known = symbols(model)
    choices: dict[str, list[int]] = {}
    for word in itertools.chain.from_iterable(re.split(r"[\s;]+", text.strip()) for text in given):
        name, equals, sizes = word.rpartition("=")
        if not equals or not re.fullmatch(r"\d+(,\d+)*", sizes):
            raise BadInput("cannot read a size", where=f"--shapes {word}", hint="write NAME=SIZE or NAME=SIZE,SIZE,...")
        if name not in known:
            raise BadInput(f"the model's inputs have no dimension '{name}'", hint=nearest(name, known))
        choices.setdefault(name, []).extend(dict.fromkeys(map(int, sizes.split(","))))
    if missing := [name for name in known if name not in choices]:
        where = "; ".join(f"{name}: {', '.join(known[name][:4])}" for name in missing)
        raise BadInput(
            "the target needs fixed sizes, and some dimensions of the inputs are dynamic",
            where=where,
            hint=f"--shapes {' '.join(f'{name}=1' for name in missing)}  (NAME=1,8 makes one artifact for both)",
        )
    names = [name for name in known if name in choices]
    return [dict(zip(names, sizes, strict=True)) for sizes in itertools.product(*(choices[n] for n in names))]


def fix(model: ir.Model, sizes: Sizes) -> None:
    """Give the inputs of a model fixed shapes, in place; what was inferred from the symbols is forgotten."""
    if not symbols(model):
        return
    for value in _inputs(model):
        value.shape = ir.Shape([evaluate(dim, sizes) for dim in _dims(value)])
    _forget(model)


def fixed(model: ir.Model, sizes: Sizes) -> ir.Model:
    """A copy of a model, sharing its weights, with fixed input shapes."""
    copy = model.clone()
    fix(copy, sizes)
    return copy


def shaped(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> ir.Model:
    """A copy of a model, sharing its weights, whose inputs have the given shapes, by name."""
    copy = model.clone()
    for value in _inputs(copy):
        if (shape := shapes.get(value.name or "")) is not None:
            value.shape = ir.Shape(shape)
    _forget(copy)
    return copy


def _forget(model: ir.Model) -> None:
    """Drop the shapes of everything that is computed."""
    for graph in edit.graphs(model):
        for node in graph:
            for value in node.outputs:
                value.shape = None


def _inputs(model: ir.Model) -> Iterator[ir.Value]:
    return (value for value in model.graph.inputs if not value.is_initializer())


def _dims(value: ir.Value) -> list[int | str]:
    if value.shape is None or not isinstance(value.type, ir.TensorType):
        raise BadInput(
            "the target needs tensors of fixed shape as inputs",
            where=f"input '{value.name}'",
            why="it is no tensor" if value.shape is not None else "its number of dimensions is not declared",
        )
    dims: list[int | str] = []
    for axis, size in enumerate(value.shape):
        dim = size if isinstance(size, int) else size.value
        # Some exporters write -1 for what is not known.
        nameless = dim in (None, "", "?") or (isinstance(dim, int) and dim < 0)
        dims.append(f"{value.name}.{axis}" if nameless or dim is None else dim)
    return dims
