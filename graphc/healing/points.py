"""Where two models of the same origin can be compared: outputs, and hidden states that both still compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import onnx_ir as ir

from graphc import edit
from graphc.moves import VIEWS

Kind = Literal["logits", "probabilities", "log-probabilities", "chances", "values"]
"""What an output holds: scores before a softmax, after one, after a log-softmax, after a sigmoid, or anything else."""

_MOVES = ("Cast", "Dropout", "Transpose", *VIEWS)
_SCORES = ("Add", "Conv", "FusedMatMul", "Gemm", "MatMul", "MatMulNBits", "Mul", "Div")
_PRODUCTS = ("Conv", "FusedMatMul", "Gemm", "MatMul", "MatMulNBits")
_KINDS: dict[str, Kind] = {"Softmax": "probabilities", "LogSoftmax": "log-probabilities", "Sigmoid": "chances"}


def kind(output: ir.Value) -> Kind:
    """What an output holds, from the operators that make it: a product is taken for logits."""
    node = output.producer()
    moved = False
    while node is not None:
        if edit.is_op(node, *_KINDS):
            last = edit.attribute(node, "axis", -1)
            rank = len(output.shape) if output.shape is not None else None
            if node.op_type == "Sigmoid" or (not moved and (last == -1 or (rank and last == rank - 1))):
                return _KINDS[node.op_type]
            return "values"
        if node.op_type in _PRODUCTS:
            return "logits"
        if not node.inputs or not edit.is_op(node, *_MOVES, *_SCORES):
            return "values"
        moved = moved or node.op_type in ("Reshape", "Transpose", "Flatten")
        # Behind a bias or a scale stands what is scaled, which is no constant.
        node = next((v.producer() for v in node.inputs if v is not None and v.producer() is not None), None)
    return "values"


def hidden(student: ir.Model, teacher: ir.Model, count: int) -> list[str]:
    """Names of up to ``count`` values, evenly spaced, that both models compute and whose declared shapes do not differ.

    They are sums of two activations, the residual stream, where there are some; else outputs of products.
    """
    known = {v.name: v for node in teacher.graph for v in node.outputs}
    outputs = {v.name for v in student.graph.outputs}
    sums, products = [], []
    for node in student.graph:
        value = node.outputs[0]
        if value.name in outputs or value.name not in known or not _alike(value, known[value.name]):
            continue
        if edit.is_op(node, "Add") and all(v is not None and edit.tensor(v) is None for v in node.inputs):
            sums.append(value.name)
        elif node.op_type in _PRODUCTS and any(v is not None and edit.tensor(v) is not None for v in node.inputs):
            products.append(value.name)
    found = sums or products
    return [str(name) for name in _spaced(found, count)]


def _alike(a: ir.Value, b: ir.Value) -> bool:
    if a.dtype is not None and not a.dtype.is_floating_point():
        return False
    if a.shape is None or b.shape is None:
        return True
    return len(a.shape) == len(b.shape) and all(
        x == y or not isinstance(x, int) or not isinstance(y, int) for x, y in zip(a.shape, b.shape, strict=True)
    )


def _spaced(items: Sequence[str | None], count: int) -> list[str | None]:
    """``count`` items at even distances, the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[(i + 1) * len(items) // count - 1] for i in range(count)]
