"""Matrix products, Einsum and convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array, attribute
from graphc.known.elementwise import added
from graphc.known.facets import NOTHING, Facets, collapse, contract, elementwise, tidy
from graphc.known.knowledge import Knowledge
from graphc.known.registry import operand, rule
from graphc.shapes.symbolic import Dim

_BATCH = "abcdefgh"


def matmul_letters(ra: int, rb: int) -> tuple[str, str, str] | None:
    """One letter per axis of both operands of a MatMul and of its result; ``k`` is summed. None below two axes."""
    if ra < 2 or rb < 2 or max(ra, rb) - 2 > len(_BATCH):
        return None
    batch = _BATCH[: max(ra, rb) - 2]
    left, right = batch[len(batch) - (ra - 2) :] + "mk", batch[len(batch) - (rb - 2) :] + "kn"
    return left, right, batch + "mn"


@rule("MatMul", "FusedMatMul")
def _matmul(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    a, b = known(node.inputs[0]), known(node.inputs[1])
    sa, sb = known.shape(node.inputs[0]), known.shape(node.inputs[1])
    assert sa is not None and sb is not None
    letters = matmul_letters(len(sa), len(sb))
    if letters is None or attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        return ()
    left, right, out = letters
    if attribute(node, "transA", 0):
        left = left[:-2] + "km"
    if attribute(node, "transB", 0):
        right = right[:-2] + "nk"
    result = contract(a, b, (left, right, out), {"k": sa[left.index("k")]})
    alpha = attribute(node, "alpha", 1.0)
    return [tuple(f * alpha for f in result)]


def empty_blocks(node: ir.Node, known: Knowledge) -> Array | None:
    """The blocks of a MatMulNBits whose scales are zero, ``(outputs, blocks)``; None if there is none.

    What its codes are does not matter then; and a code that is 0 does not stand for 0.
    """
    scale, held = node.inputs[2], edit.tensor(node.inputs[2])
    dead = known.zeros(scale) if scale is not None and held is not None else None
    if dead is None or held is None:
        return None
    return np.broadcast_to(dead, tuple(held.shape.numpy())).reshape(int(attribute(node, "N", 0)), -1)


@rule("MatMulNBits")
def _packed(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    empty, shape = empty_blocks(node, known), known.shape(node.inputs[0])
    if empty is None or shape is None:
        return ()
    found = np.where(empty.all(axis=1), 0.0, np.nan).reshape(*(1,) * (len(shape) - 1), -1)
    if operand(node, 5) is None:
        return [tidy([found])]
    return [elementwise(lambda x, c: x + c, [(found,), known(node.inputs[5])], len(shape))]


@rule("Gemm")
def _gemm(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    left = "km" if attribute(node, "transA", 0) else "mk"
    right = "nk" if attribute(node, "transB", 0) else "kn"
    shape = known.shape(node.inputs[0])
    assert shape is not None
    product = contract(known(node.inputs[0]), known(node.inputs[1]), (left, right, "mn"), {"k": shape[left.index("k")]})
    alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    result = tuple(f * alpha for f in product)
    if operand(node, 2) is not None:
        result = elementwise(lambda x, c: x + beta * c, [result, known(node.inputs[2])], 2)
    return [result]


@rule("Einsum")
def _einsum(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    terms, _, out = str(attribute(node, "equation", "")).replace(" ", "").partition("->")
    operands = terms.split(",")
    if "." in terms or len(operands) != 2 or not out or any(len(set(t)) != len(t) for t in (*operands, out)):
        return ()
    sizes: dict[str, Dim | None] = {}
    for value, letters in zip(node.inputs, operands, strict=True):
        shape = known.shape(value)
        assert shape is not None
        sizes.update(zip(letters, shape, strict=True))
    return [contract(known(node.inputs[0]), known(node.inputs[1]), (operands[0], operands[1], out), sizes)]


def unpadded(node: ir.Node) -> bool:
    """Whether a convolution or pooling reads nothing beyond its input's border."""
    auto = attribute(node, "auto_pad", "NOTSET")
    return auto == "VALID" or (auto == "NOTSET" and not any(attribute(node, "pads", ())))


@rule("Conv", "FusedConv", "ConvTranspose")
def _conv(node: ir.Node, known: Knowledge) -> Sequence[Facets]:
    shape, kernel = known.shape(node.inputs[0]), known.shape(node.inputs[1])
    assert shape is not None and kernel is not None
    rank, group = len(shape), attribute(node, "group", 1)
    spatial = tuple(range(2, rank))
    transposed = node.op_type == "ConvTranspose"
    if not isinstance(shape[1], int) or any(not isinstance(d, int) for d in kernel[:2]):
        return ()
    channels = int(shape[1]) // group
    inputs = []
    for facet in known(node.inputs[0]):
        flat = collapse(facet, (0, *spatial)).reshape(-1)
        if not unpadded(node) or transposed:
            # At the border, fewer taps see the channel: only zeros stay what they are.
            flat = np.where(flat == 0, 0.0, np.nan)
        inputs.append(flat.reshape(group, channels) if flat.size > 1 else flat.reshape(1, 1))
    weights = []
    for facet in known(node.inputs[1]):
        total = (
            facet.sum(axis=spatial)
            if facet.shape[2:] == kernel[2:]
            else collapse(facet, spatial).reshape(facet.shape[:2])
        )
        zero = (facet == 0).all(axis=spatial)
        # A kernel that sums to zero is not a zero kernel where the input is not constant.
        total = np.where(zero, 0.0, np.where((total == 0) | (facet.shape[2:] != kernel[2:]), np.nan, total))
        if transposed:
            total = total.reshape(group if total.shape[0] > 1 else 1, -1, total.shape[1])
        else:
            total = total.reshape(group if total.shape[0] > 1 else 1, -1, total.shape[1])
        weights.append(total)
    letters = ("gi", "gio" if transposed else "goi", "go")
    outputs = int(kernel[1]) if transposed else int(kernel[0]) // group  # type: ignore[arg-type]
    results = []
    for facet in contract(tuple(inputs), tuple(weights), letters, {"i": channels}):
        spread = np.broadcast_to(facet, (group, outputs)) if facet.size > 1 else facet
        results.append(spread.reshape(1, -1, *(1,) * len(spatial)))
    result: Facets = tuple(results)
    if operand(node, 2) is not None:
        bias = tuple(f.reshape(1, -1, *(1,) * len(spatial)) for f in known(node.inputs[2]))
        result = elementwise(added, [result, bias], rank)
    if operand(node, 3) is not None:
        result = elementwise(added, [result, known(node.inputs[3])], rank)
    if node.op_type == "FusedConv":
        activation = attribute(node, "activation", "")
        if activation != "Relu":
            return [
                tidy(np.where(f == 0, 0.0, np.nan) for f in result) if activation in ("Tanh", "LeakyRelu") else NOTHING
            ]
        result = elementwise(lambda x: np.maximum(x, 0), [result], rank)
    return [result]
