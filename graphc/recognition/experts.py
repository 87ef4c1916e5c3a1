"""Mixtures of experts: a router that takes the k largest, stacks of weights picked by them, a sum over what they give.

The region between logits, tokens and the sum is found by what depends on the router's choice; how an exporter repeats
tokens and picks weights does not matter. What the region computes is tried out by who replaces it. Experts that are
applied one by one, to the tokens that chose them, are shown to be such (``loops``) and described alike.
"""

from __future__ import annotations

import onnx_ir as ir

from graphc import edit
from graphc.moves import REPEATS, VIEWS
from graphc.recognition import looped, loops, stacked
from graphc.recognition.graph import Graph
from graphc.recognition.mixture import Mixture
from graphc.rewrites.base import Refused, Rewriter, Rule
from graphc.shapes.symbolic import product

_VIEWS = (*VIEWS, *REPEATS)
_LONGEST = 64
"""Nodes of a region at most."""


def is_router(node: ir.Node, graph: Graph) -> bool:
    """Whether a TopK chooses, by row, a few of what a Softmax or a product gives, to pick or to compare with."""
    if not edit.is_op(node, "TopK") or len(node.outputs) < 2 or not edit.attribute(node, "largest", 1):
        return False
    dims, count = graph.dims(node.inputs[0]), edit.scalar(node.inputs[1])
    if dims is None or len(dims) < 2 or not isinstance(dims[-1], int) or count is None:
        return False
    if edit.attribute(node, "axis", -1) not in (-1, len(dims) - 1) or not 0 < int(count) < dims[-1]:
        return False
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    return edit.is_op(source, "Softmax", "MatMul", "Gemm", "Add") and bool(_picked(node, dims[-1]) or _compared(node))


def find(node: ir.Node, graph: Graph) -> Mixture | None:
    """The mixture of a router; None if the TopK is none.

    Raises:
        Refused: Why it is not one that can be written as a whole.
    """
    if not is_router(node, graph):
        return None
    probabilities = node.inputs[0]
    assert probabilities is not None
    softmax = probabilities.producer()
    logits = softmax.inputs[0] if edit.is_op(softmax, "Softmax") and softmax is not None else probabilities
    dims = graph.dims(logits)
    if logits is None or dims is None or len(dims) != 2 or not isinstance(dims[1], int):
        raise Refused("the router's logits are no matrix of tokens and experts")
    stacks = _picked(node, dims[1])
    if not stacks:
        return looped.mixture(loops.find(node, dims[1], graph), node, logits, graph)
    if len(stacks) != 2:
        raise Refused(f"the experts have {len(stacks)} stacks of weights, not two")
    end = _end(node, dims, graph)
    region = _region(end, node)
    if softmax is not None and logits is not probabilities:
        region.add(softmax)
    tokens = _tokens(region, logits, dims, graph)
    order = tuple(each for each in edit.nodes(graph.model) if each in region)
    last = _reaching(order, stacks)
    return Mixture(
        order, tokens, logits, int(edit.scalar(node.inputs[1]) or 0), stacks[1 - last], stacks[last], end.outputs[0]
    )


def weight_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The constant that a value is, or the codes that it is dequantized from; None of others."""
    node = value.producer() if value is not None else None
    if node is not None and edit.is_op(node, "DequantizeLinear"):
        return edit.tensor(node.inputs[0])
    return edit.tensor(value)


def _readers(value: ir.Value) -> list[ir.Node]:
    return list(dict.fromkeys(value.consumers()))


def _picked(router: ir.Node, experts: int) -> list[ir.Value]:
    """The stacks of weights that the indices of a router pick from."""
    found: dict[ir.Value, None] = {}
    queue, seen = [router.outputs[1]], set()
    while queue:
        for reader in _readers(queue.pop()):
            if reader in seen:
                continue
            seen.add(reader)
            stack = reader.inputs[0]
            held = weight_of(stack)
            if edit.is_op(reader, "Gather", "GatherND") and held is not None and stack is not None:
                if len(held.shape) == 3 and held.shape[0] == experts:
                    found[stack] = None
            elif edit.is_op(reader, *_VIEWS, "Cast", "Transpose", "Clip"):
                queue.append(reader.outputs[0])
    return list(found)


def _compared(router: ir.Node) -> bool:
    """Whether the indices are compared with the number of each expert, or sorted."""
    queue, seen = [router.outputs[1]], set()
    while queue:
        for reader in _readers(queue.pop()):
            if edit.is_op(reader, "OneHot", "Equal", "ScatterElements", "TopK"):
                return True
            if reader not in seen and edit.is_op(reader, *_VIEWS, "Cast", "Transpose"):
                seen.add(reader)
                queue.append(reader.outputs[0])
    return False


def _after(node: ir.Node) -> set[ir.Node]:
    """A node and what depends on it, not further than a region may be."""
    found, queue = {node}, [node]
    while queue:
        for value in queue.pop(0).outputs:
            for reader in _readers(value):
                if reader not in found and len(found) < 4 * _LONGEST:
                    found.add(reader)
                    queue.append(reader)
    return found


def _end(router: ir.Node, dims: tuple[object, ...], graph: Graph) -> ir.Node:
    """The first sum over the experts of each token that weights and indices of the router both reach."""
    for node in edit.nodes(graph.model):
        if node not in _after(router) or not edit.is_op(node, "ReduceSum"):
            continue
        shape = graph.dims(node.outputs[0])
        region = _region(node, router)
        if shape is not None and len(shape) == 2 and shape[0] == dims[0] and len(region) <= _LONGEST:
            read = {value for each in region for value in each.inputs}
            if all(value in read for value in router.outputs[:2] if value.uses()):
                return node
    raise Refused("what the experts give is not summed by token")


def _region(end: ir.Node, router: ir.Node) -> set[ir.Node]:
    """What lies between a router and a sum."""
    after = _after(router)
    found, queue = {end}, [end]
    while queue:
        for value in queue.pop().inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer in after and producer not in found:
                found.add(producer)
                queue.append(producer)
    return found


def _tokens(region: set[ir.Node], logits: ir.Value, dims: tuple[object, ...], graph: Graph) -> ir.Value:
    """What a region reads besides logits and constants, behind the views that repeat it; they join the region."""
    found: set[ir.Value] = set()
    made = {value for node in region for value in node.outputs}
    for node in list(region):
        for value in node.inputs:
            if value is None or value in made or value is logits or weight_of(value) is not None:
                continue
            while True:
                shape, producer = graph.dims(value), value.producer()
                if shape is not None and len(shape) > 1 and product(shape[:-1]) == dims[0]:
                    break
                if producer is None or not edit.is_op(producer, *_VIEWS) or producer.inputs[0] is None:
                    raise Refused("the experts read something besides tokens and router")
                region.add(producer)
                value = producer.inputs[0]
            found.add(value)
    if len(found) != 1:
        raise Refused("the experts read something besides tokens and router")
    return found.pop()


def _reaching(order: tuple[ir.Node, ...], stacks: list[ir.Value]) -> int:
    """Which of two stacks is picked from for the last product."""
    products = [node for node in order if edit.is_op(node, "MatMul", "Einsum", "Gemm")]
    if len(products) != 2:
        raise Refused("the experts are not two products each")
    for value in products[1].inputs:
        node = value.producer() if value is not None else None
        while node is not None and edit.is_op(node, *_VIEWS, "Transpose"):
            node = node.inputs[0].producer() if node.inputs[0] is not None else None
        if edit.is_op(node, "Gather", "GatherND") and node is not None and node.inputs[0] in stacks:
            return stacks.index(node.inputs[0])
    raise Refused("the weights of the last product are not picked from a stack")


def recognise(node: ir.Node, rewriter: Rewriter) -> str | None:
    """Replace experts that are applied one by one by stacks that their tokens pick from."""
    assert isinstance(rewriter, Graph)
    dims = rewriter.dims(node.inputs[0])
    if not is_router(node, rewriter) or dims is None or not isinstance(dims[-1], int) or _picked(node, dims[-1]):
        return None
    stacked.write(loops.find(node, dims[-1], rewriter), rewriter)
    return "experts stacked"


EXPERTS = Rule({"experts": "Stacks of experts that were applied one by one."}, ("TopK",), recognise)
