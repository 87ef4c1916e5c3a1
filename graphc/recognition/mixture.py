"""What is known of a mixture of experts, however it was written."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphc import edit


@dataclass(frozen=True)
class Mixture:
    """One mixture of experts.

    Attributes:
        nodes: From the router's Softmax to the sum, in the order of the graph.
        tokens: ``(tokens, width)``, or with several axes in the place of the first.
        logits: ``(tokens, experts)``.
        chosen: How many experts each token has.
        first, second: Stacks of weights, by expert: of the product that reads tokens, and of the last one.
        output: ``(tokens, width)``.
        biases: Of both products, ``(experts, size)``.
        base: What the sum is added to.
        looped: Whether experts are applied one by one; stacks and biases are then constants in no graph.
    """

    nodes: tuple[ir.Node, ...]
    tokens: ir.Value
    logits: ir.Value
    chosen: int
    first: ir.Value
    second: ir.Value
    output: ir.Value
    biases: tuple[ir.Value | None, ir.Value | None] = (None, None)
    base: ir.Value | None = None
    looped: bool = False


def constant_of(value: ir.Value) -> ir.TensorProtocol | None:
    """The constant that a stack is, be it in the graph or not."""
    return value.const_value if value.graph is None and value.producer() is None else edit.tensor(value)
