"""Experts that are applied one by one, to the tokens that chose them, as a mixture whose stacks are to be written."""

from __future__ import annotations

import onnx_ir as ir

from graphc import edit
from graphc.moves import REPEATS, VIEWS
from graphc.recognition import loops, stacked
from graphc.recognition.graph import Graph
from graphc.recognition.loops import Loop
from graphc.recognition.mixture import Mixture
from graphc.rewrites.base import Refused

_SHAPED = (*VIEWS, *REPEATS, "ConstantOfShape", "Shape", "Slice", "Gather", "Concat", "Cast", "Mul", "Add", "Range")
"""What zeros and the sizes that something is expanded to are made of."""


def mixture(loop: Loop, router: ir.Node, logits: ir.Value, graph: Graph) -> Mixture:
    """A loop over experts as a mixture: two products each, the first of them joined.

    Raises:
        Refused: The experts compute something else, or read what is neither tokens nor router.
    """
    products = [found for node in loop.nodes if (found := stacked.product(node, loop)) is not None]
    first = [found for found in products if found.node.inputs[0] is loop.rows]
    if not first or len(products) != len(first) + 1 or products[-1] in first:
        raise Refused("the experts are not two products each")
    weights = stacked.beside([found.weights for found in first]), products[-1].weights
    made = []
    for name, stack in zip(("first", "second"), weights, strict=True):
        label = f"{products[0 if name == 'first' else -1].node.inputs[1].name}.{name}"  # type: ignore[union-attr]
        made.append(_outside(label, stack.tensor(label, swapped=True), graph))
    biases = _bias(first, loop, graph), _bias(products[-1:], loop, graph)
    end = loop.output.producer()
    assert end is not None
    # Tokens that are added to what the experts make of them are read under one name.
    base = (
        loop.tokens if loop.base is not None and loops.root(loop.base, loop.width, graph) is loop.tokens else loop.base
    )
    inside = _before(end, router, {loop.tokens, logits, *([base] if base is not None else [])})
    order = tuple(each for each in edit.nodes(graph.model) if each in inside)
    slots = (graph.dims(loop.indices) or ())[1]
    assert isinstance(slots, int)
    return Mixture(order, loop.tokens, logits, slots, made[0], made[1], loop.output, biases, base, True)


def _bias(products: list[stacked.Product], loop: Loop, graph: Graph) -> ir.Value | None:
    """What is added to products side by side, ``(experts, size)``; None for nothing."""
    found = []
    for each in products:
        bias = each.bias
        readers = list(dict.fromkeys(each.node.outputs[0].consumers()))
        if bias is None and len(readers) == 1 and edit.is_op(readers[0], "Add") and readers[0] in loop.nodes:
            held = [stacked.stack(v, loop) for v in readers[0].inputs if v is not each.node.outputs[0]]
            bias = held[0] if held else None
        found.append(bias)
    if any(bias is None for bias in found):
        return None
    joined = stacked.beside([bias for bias in found if bias is not None])
    name = f"{products[0].node.outputs[0].name}.bias"
    experts, _, size = joined.shape
    held_whole = joined.tensor(name)

    def compute() -> ir.TensorProtocol:
        return ir.tensor(held_whole.numpy().reshape(experts, size), name=name)

    lazy = ir.LazyTensor(compute, dtype=held_whole.dtype, shape=ir.Shape([experts, size]), name=name, cache=False)
    return _outside(name, lazy, graph)


def _outside(name: str, held: ir.TensorProtocol, graph: Graph) -> ir.Value:
    """A constant in no graph, of which the graph knows the shape."""
    shape = tuple(int(size) for size in held.shape.numpy())
    value = ir.Value(name=name, type=ir.TensorType(held.dtype), shape=ir.Shape(shape), const_value=held)
    return graph.note(value, value, shape)


def _before(end: ir.Node, router: ir.Node, known: set[ir.Value]) -> set[ir.Node]:
    """All that a sum is made of, up to what is known and to values of which only the shape matters."""
    after: set[ir.Node] = {router}
    source = {loops.chosen_from(router)}
    for node in loops.after(router):
        if any(value is not None and value.producer() in after for value in node.inputs):
            after.add(node)
        if node is end:
            break
    found, queue = {end}, [end]
    while queue:
        node = queue.pop()
        for value in node.inputs:
            if value is None or value in known or edit.tensor(value) is not None:
                continue
            producer = value.producer()
            inside = producer is not None and (producer in after or producer in source or producer.op_type in _SHAPED)
            if producer is None or not inside:
                if edit.is_op(node, "Shape"):
                    continue
                raise Refused("the experts read something besides tokens and router")
            if producer not in found:
                found.add(producer)
                queue.append(producer)
    return found
