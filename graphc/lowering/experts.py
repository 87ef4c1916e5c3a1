"""Mixtures of experts as MoE of ``com.microsoft``: which of its settings computes the same is tried out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array
from graphc.errors import BadInput
from graphc.lowering.site import DOMAIN, Site
from graphc.lowering.steps import Step, between, constant, ints
from graphc.lowering.timed import models
from graphc.recognition import experts
from graphc.recognition.graph import Graph
from graphc.recognition.mixture import Mixture, constant_of
from graphc.rewrites.base import Refused
from graphc.rewrites.base import dims as sizes_of
from graphc.shapes.symbolic import Expr, symbol

_LARGEST = 1 << 29
"""Bytes of weights up to which an equal is looked for: they are held in memory for it."""

_GATED: dict[str, Any] = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
}
_PLAIN = ("silu", "gelu", "relu")

_TOLERANCE = 1e-4
"""Relative to the largest number; another setting differs by more than a hundredth."""


def find(node: ir.Node, graph: Graph) -> Site | None:
    """The mixture of a router, if MoE computes the same."""
    found = experts.find(node, graph)
    if found is None:
        return None
    held = [t for t in map(constant_of, (found.first, found.second)) if t is not None]
    if len(held) < 2 or {found.tokens.dtype, *(t.dtype for t in held)} != {ir.DataType.FLOAT}:
        raise Refused("MoE computes in float32, with constant weights")
    if sum(edit.nbytes(t) for t in held) > _LARGEST:
        raise Refused("the weights of the experts are too large to try them out")
    dims = graph.dims(found.tokens)
    if dims is None or not isinstance(dims[-1], int):
        raise Refused("the width of the tokens is not known")
    for site in _candidates(found, dims[-1], held, graph):
        if equal(site, graph):
            return site
    raise Refused("no setting of MoE computes the same")


@dataclass(frozen=True)
class Setting:
    """How an operator computes a mixture.

    Attributes:
        first: How the rows of the first product's weights are arranged.
        second: How those of the last product's are.
        attributes: The operator's.
        turned: For both, whether the stack is ``(experts, in, out)``.
        order: Where the gates among the first product's rows are.
        shared: Whether the shares of the chosen experts add up to 1. The operator can do without, but ONNX Runtime 1.31
            then gives 0 wherever it reuses memory; so the result is multiplied by what they add up to.
    """

    first: Callable[[Array], Array]
    second: Callable[[Array], Array]
    attributes: dict[str, Any]
    turned: tuple[bool, bool]
    order: str = ""
    shared: bool = True


def settings(
    first: Sequence[int], second: Sequence[int], width: int, chosen: int
) -> Iterator[tuple[Setting, tuple[int, int]]]:
    """Every setting that the sizes of the stacks allow, and how many rows the two products have.

    Args:
        first, second: The shapes of the stacks.
        width: Of the tokens.
        chosen: Experts of each token.
    """
    for turned in (False, True) if first[1] == first[2] else (first[2] != width,):
        inner = first[2] if turned else first[1]
        outer = first[1] if turned else first[2]
        if outer != width:
            continue
        for swapped in (False, True):
            hidden = second[1] if swapped else second[2]
            if (second[2] if swapped else second[1]) != width or inner not in (hidden, 2 * hidden):
                continue
            last = partial(_rows, turned=swapped, order="")
            for order in ("halves", "swapped halves", "pairs") if inner == 2 * hidden else ("",):
                rows = partial(_rows, turned=turned, order=order)
                for attributes in [_GATED] if inner == 2 * hidden else [{"activation_type": name} for name in _PLAIN]:
                    how = {"k": chosen, "normalize_routing_weights": 1, **attributes}
                    for shared in (True, False):
                        yield Setting(rows, last, how, (turned, swapped), order, shared), (inner, hidden)


def written(
    form: str,
    operator: str,
    found: Mixture,
    operands: Sequence[ir.Value | None],
    attributes: dict[str, Any],
    graph: Graph,
    beside: Sequence[ir.Node] = (),
    shared: bool = True,
) -> Site:
    """An operator in the place of a mixture.

    Args:
        form: Its form's name.
        operator: Its name.
        found: The mixture.
        operands: What it reads after tokens and logits.
        attributes: Its attributes.
        graph: The graph.
        beside: What else it takes the place of: what makes the weights.
        shared: See ``Setting``.
    """
    dims, tokens, steps = graph.dims(found.tokens) or (), found.tokens, []
    if len(dims) != 2 and isinstance(width := dims[-1], int):
        tokens = between(f"{tokens.name}.rows", tokens, (symbol("rows"), width))
        steps.append(Step("Reshape", (found.tokens, ints(-1, width)), (tokens,)))
    output = found.output
    if found.base is not None:
        output = between(f"{output.name}.sum", output, graph.dims(output) or ())
    mixed = output if shared else between(f"{output.name}.mixed", output, graph.dims(tokens) or ())
    steps.append(Step(operator, (tokens, found.logits, *operands), (mixed,), attributes, DOMAIN))
    if not shared:
        steps += _times_share(found, mixed, output, graph)
    if found.base is not None:
        base = tokens if found.base is found.tokens else found.base
        steps.append(Step("Add", (base, output), (found.output,)))
    made = {value for node in beside for value in node.outputs}
    weights = [v for node in beside for v in node.inputs if v is not None]
    inputs = (found.tokens, found.logits, *(v for v in (found.first, found.second) if v not in made), *weights)
    nodes = (*found.nodes[::-1], *beside)
    how = {"k": found.chosen, **({"looped": 1} if found.looped else {})}
    return Site(form, operator, nodes, inputs, (found.output,), how, steps=tuple(steps))


def _times_share(found: Mixture, mixed: ir.Value, output: ir.Value, graph: Graph) -> list[Step]:
    """What multiplies the mean over the chosen experts by the part of the softmax over all that they have."""
    logits, dims = found.logits, graph.dims(found.logits) or ()
    parts, best = between(f"{output.name}.parts", logits, dims), (*dims[:-1], found.chosen)
    chosen = between(f"{output.name}.chosen", logits, best)
    which = between(f"{output.name}.which", ir.DataType.INT64, best)
    share = between(f"{output.name}.share", logits, (*dims[:-1], 1))
    return [
        Step("Softmax", (logits,), (parts,), {"axis": -1}),
        Step("TopK", (parts, ints(found.chosen)), (chosen, which)),
        Step("ReduceSum", (chosen, ints(-1)), (share,), {"keepdims": 1}),
        Step("Mul", (mixed, share), (output,)),
    ]


def _candidates(found: Mixture, width: int, held: Sequence[ir.TensorProtocol], graph: Graph) -> Iterator[Site]:
    """MoE in every setting."""
    first, second = (sizes_of(t) for t in held)
    for setting, (rows, hidden) in settings(first, second, width, found.chosen):
        reads = [
            _weights(held[0], "first", setting.first, (rows, width)),
            None,
            _weights(held[1], "second", setting.second, (width, hidden)),
            None,
        ]
        for place, (bias, order) in enumerate(zip(found.biases, (setting.order, ""), strict=True)):
            if bias is not None and bias.const_value is not None:
                rows_of = bias.const_value.numpy()
                reads[2 * place + 1] = constant(str(bias.name), ir.tensor(_ordered(rows_of, order)))
        while reads[-1] is None:
            reads.pop()
        yield written("moe", "MoE", found, reads, setting.attributes, graph, shared=setting.shared)


def _rows(stack: Array, turned: bool, order: str) -> Array:
    """The weights of the first product, ``(experts, rows, width)``, gates and their factors in turns."""
    return _ordered(stack.transpose(0, 2, 1) if turned else stack, order)


def _ordered(stack: Array, order: str) -> Array:
    """The second axis with gates and their factors in turns."""
    if order not in ("halves", "swapped halves"):
        return stack
    half = stack.shape[1] // 2
    pair = stack[:, :half], stack[:, half:]
    if order == "swapped halves":
        pair = pair[1], pair[0]
    return np.stack(pair, axis=2).reshape(stack.shape)


def _weights(held: ir.TensorProtocol, name: str, change: Callable[[Array], Array], shape: tuple[int, int]) -> ir.Value:
    """A constant that is not in the graph yet."""
    sizes = ir.Shape([int(sizes_of(held)[0]), *shape])
    label = f"{held.name}.{name}"

    def compute() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(change(held.numpy())), name=label)

    return constant(label, ir.LazyTensor(compute, dtype=held.dtype, shape=sizes, name=label, cache=False))


def equal(site: Site, graph: Graph) -> bool:
    """Whether both compute the same of random tokens that reach every expert, what may take the place within others."""
    from graphc import runtime

    # Sizes that are not known are those of as many tokens.
    tokens = graph.dims(site.inputs[0]) or ()
    atoms = {atom for dim in tokens if isinstance(dim, Expr) for term, _ in dim.terms for atom in term}
    numbers = {atom: 8 if len(atoms) > 1 else 64 for atom in atoms}

    def shape(value: ir.Value) -> list[int]:
        return [_number(dim, numbers) for dim in graph.dims(value) or ()]

    rng = np.random.default_rng(0)
    before, after, (shapes,) = models(site, graph, [shape])
    dtypes = {str(v.name): v.dtype.numpy() for v in before.graph.inputs if v.dtype is not None}
    feeds = {name: rng.standard_normal(size).astype(dtypes[name]) for name, size in shapes.items()}
    _enclose(after, shapes)
    try:
        wanted, found = (runtime.session(m, optimise=False, threads=1).run(feeds).values() for m in (before, after))
    except BadInput:
        return False
    return all(map(_close, wanted, found))


def _close(a: Array, b: Array) -> bool:
    return a.shape == b.shape and bool(np.abs(a - b).max() <= _TOLERANCE * np.abs(a).max())


def _enclose(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> None:
    """Put operators that change nothing between a model's operators and its inputs and outputs, of known sizes.

    What an operator reads there and nobody reads later is memory that ONNX Runtime lets it write its result to.
    """
    graph = model.graph

    def twice(value: ir.Value) -> tuple[ir.Node, ir.Node]:
        first = ir.node("Neg", [value])
        second = ir.node("Neg", first.outputs)
        second.outputs[0].type = value.type
        return first, second

    for value in graph.inputs:
        value.shape = ir.Shape(shapes[str(value.name)])
        if value.dtype is not None and value.dtype.is_floating_point():
            nodes = twice(value)
            value.replace_all_uses_with(nodes[1].outputs[0])
            nodes[0].replace_input_with(0, value)
            graph.insert_before(graph[0], nodes)
    for i, value in enumerate(graph.outputs):
        nodes = twice(value)
        graph.extend(nodes)
        graph.outputs[i] = nodes[1].outputs[0]


def _number(dim: object, numbers: Mapping[str, int]) -> int:
    if not isinstance(dim, Expr):
        return int(dim)  # type: ignore[call-overload, no-any-return]
    return sum(factor * math.prod(numbers.get(atom, 1) for atom in term) for term, factor in dim.terms)
