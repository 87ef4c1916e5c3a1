"""The pass simplify on random graphs, and on random reshapes of dynamic sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc import runtime
from tests.test_simplify import check, feeds_of, read, run

T = TypeVar("T")

UNARY = ("Relu", "Exp", "Neg", "Identity", "Abs")
BINARY = ("Add", "Mul", "Sub", "Max")
PLAIN = ("unary", "binary", "transpose")


def plain(draw: st.DrawFn, kind: str, source: str, shapes: Mapping[str, tuple[T, ...]]) -> tuple[str, tuple[T, ...]]:
    """A random operator of a kind that computes or transposes, as text, and the shape of what it gives."""
    shape = shapes[source]
    if kind == "unary":
        return f"{draw(st.sampled_from(UNARY))}({source})", shape
    if kind == "binary":
        other = draw(st.sampled_from(sorted(k for k, s in shapes.items() if s == shape)))
        return f"{draw(st.sampled_from(BINARY))}({source}, {other})", shape
    perm = draw(st.permutations(range(len(shape))))
    return f"Transpose<perm={list(perm)}>({source})", tuple(shape[p] for p in perm)


def given_out(draw: st.DrawFn, lines: list[str], shapes: Mapping[str, Sequence[object]]) -> str:
    """Let one to three random values be outputs; returns how they are declared."""
    outputs = draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, max_size=3, unique=True))
    lines += [f"out_{name} = Identity({name})" for name in outputs]
    dims = {name: ",".join(f"{name}_{i}" for i in range(len(shapes[name]))) for name in outputs}
    return ", ".join(f"float[{dims[name]}] out_{name}" for name in outputs)


@st.composite
def random_models(draw: st.DrawFn) -> ir.Model:
    """Layout and arithmetic operators on tensors of 24 elements with a dynamic batch, in random order."""
    n = draw(st.integers(1, 3))
    shapes: dict[str, tuple[int, ...]] = {"x": (n, 2, 3, 4), "z": (n, 2, 3, 4)}
    lines: list[str] = []
    constants: dict[str, Sequence[int]] = {}
    for i in range(draw(st.integers(1, 14))):
        name, source = f"v{i}", draw(st.sampled_from(sorted(shapes)))
        shape = shapes[source]
        kind = draw(st.sampled_from(("unary", "binary", "transpose", "reshape", "flatten", "slice", "sizes")))
        if kind in PLAIN:
            line, shape = plain(draw, kind, source, shapes)
            lines.append(f"{name} = {line}")
        elif kind == "flatten":
            axis = draw(st.integers(0, len(shape)))
            shape = (int(np.prod(shape[:axis])), int(np.prod(shape[axis:])))
            lines.append(f"{name} = Flatten<axis={axis}>({source})")
        elif kind == "reshape":
            count = int(np.prod(shape))
            first = draw(st.sampled_from([d for d in range(1, count + 1) if count % d == 0]))
            shape = (first, count // first)
            constants[f"{name}_t"] = draw(st.sampled_from([(first, -1), (-1, count // first), shape]))
            lines.append(f"{name} = Reshape({source}, {name}_t)")
        elif kind == "slice":
            axis = draw(st.integers(0, len(shape) - 1))
            start, end = draw(st.integers(-5, 3)), draw(st.integers(-3, 30))
            step = draw(st.sampled_from((1, 2, -1)))
            length = len(range(shape[axis])[start if step > 0 else end : end if step > 0 else start : step])
            if not length:
                continue
            shape = (*shape[:axis], length, *shape[axis + 1 :])
            bounds = (start, end) if step > 0 else (end, start)
            for key, each in zip("beas", (*bounds, axis, step), strict=True):
                constants[f"{name}_{key}"] = (each,)
            lines.append(f"{name} = Slice({source}, {name}_b, {name}_e, {name}_a, {name}_s)")
        else:
            lines.append(f"{name}_s = Shape({source})  {name} = Reshape({source}, {name}_s)")
        shapes[name] = shape
    results = given_out(draw, lines, shapes)
    values = ", ".join(f"int64[{len(v)}] {k} = {{{','.join(map(str, v))}}}" for k, v in constants.items())
    model = read(f"g (float[B,2,3,4] x, float[B,2,3,4] z) => ({results}) <{values}> {{ {'  '.join(lines)} }}")
    model.graph.meta["batch"] = n
    return model


@settings(max_examples=60, deadline=None)
@given(random_models())
def test_random_graphs_compute_the_same(model: ir.Model) -> None:
    check(model, {"B": model.graph.meta["batch"]})


Size = tuple[int, str]
"""A dim of a random dynamic model: a number times the product of the named dims in the text."""


def _elements(shape: Sequence[Size]) -> Size:
    count = 1
    for number, _ in shape:
        count *= number
    return count, "".join(sorted("".join(names for _, names in shape)))


@st.composite
def dynamic_models(draw: st.DrawFn) -> ir.Model:
    """Reshapes whose targets are computed from shapes, transposes and arithmetic on tensors with two named dims."""
    start: tuple[Size, ...] = ((1, "B"), (6, ""), (1, "S"), (4, ""))
    shapes = {"x": start, "z": start}
    lines: list[str] = []
    constants = {"k0": 0, "k1": 1, "km": -1}
    for i in range(draw(st.integers(1, 10))):
        name, source = f"v{i}", draw(st.sampled_from(sorted(shapes)))
        shape = shapes[source]
        kinds = ["unary", "binary", "transpose", "expand", "fill"] + (["merge"] * 2 if len(shape) > 1 else [])
        splittable = [axis for axis, (number, _) in enumerate(shape) if number % 2 == 0]
        kind = draw(st.sampled_from([*kinds, *(["split"] * 2 if splittable and len(shape) < 6 else [])]))
        if kind in PLAIN:
            line, shape = plain(draw, kind, source, shapes)
            lines.append(f"{name} = {line}")
        elif kind == "expand":
            lines.append(f"{name}_s = Shape({source})  {name} = Expand({source}, {name}_s)")
        elif kind == "fill":
            fill = draw(st.sampled_from((0.0, 1.0, 2.5)))
            lines.append(
                f"{name}_s = Shape({source})  {name}_f = ConstantOfShape<value=float[1]{{{fill}}}>({name}_s)"
                f"  {name} = Add({source}, {name}_f)"
            )
        else:
            lines.append(f"{name}_s = Shape({source})")
            parts = []
            for axis in range(len(shape)):
                constants[f"i{axis}"] = axis
                lines.append(
                    f"{name}_g{axis} = Gather({name}_s, i{axis})  {name}_u{axis} = Unsqueeze({name}_g{axis}, k0)"
                )
                parts.append(f"{name}_u{axis}")
            if kind == "merge":
                axis = draw(st.integers(0, len(shape) - 2))
                lines.append(f"{name}_m = Mul({parts[axis]}, {parts[axis + 1]})")
                parts[axis : axis + 2] = [f"{name}_m"]
                shape = (*shape[:axis], _elements(shape[axis : axis + 2]), *shape[axis + 2 :])
            else:
                axis = draw(st.sampled_from(splittable))
                constants["two"] = 2
                number, names = shape[axis]
                lines.append(f"{name}_h = Div({parts[axis]}, two)")
                order = draw(st.booleans())
                halves = [("two", (2, "")), (f"{name}_h", (number // 2, names))]
                pieces = halves if order else halves[::-1]
                parts[axis : axis + 1] = [part for part, _ in pieces]
                shape = (*shape[:axis], *(size for _, size in pieces), *shape[axis + 1 :])
            if draw(st.booleans()):
                parts[draw(st.integers(0, len(parts) - 1))] = "km"
            lines.append(f"{name}_t = Concat<axis=0>({', '.join(parts)})  {name} = Reshape({source}, {name}_t)")
        shapes[name] = shape
    results = given_out(draw, lines, shapes)
    scalars = {name for name in constants if name[0] == "i"}
    values = ", ".join(f"int64{'' if k in scalars else '[1]'} {k} = {{{v}}}" for k, v in constants.items())
    return read(f"g (float[B,6,S,4] x, float[B,6,S,4] z) => ({results}) <{values}> {{ {'  '.join(lines)} }}")


@settings(max_examples=60, deadline=None)
@given(dynamic_models())
def test_random_dynamic_reshapes_compute_the_same(model: ir.Model) -> None:
    after, _ = check(model, {"B": 1, "S": 1}, {"B": 3, "S": 5}, {"B": 2, "S": 2})
    try:
        want = run(model, feeds_of(model, {"B": 0, "S": 3}))
    except runtime.CannotRun:
        return
    got = run(after, feeds_of(model, {"B": 0, "S": 3}))
    assert {name: array.shape for name, array in got.items()} == {name: array.shape for name, array in want.items()}
