"""A Pad before a convolution or pooling becomes its own padding."""

from __future__ import annotations

import math

import onnx_ir as ir

from graphc import edit
from graphc.rewrites.base import Refused, Rewriter, Rule, sole_reader

_NOT_NEGATIVE = ("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Softplus", "Abs", "Exp")


def absorb(node: ir.Node, rewriter: Rewriter) -> str | None:
    """Let a convolution or pooling do the padding of its input itself."""
    padded = node.inputs[0]
    pad = padded.producer() if padded is not None else None
    if not edit.is_op(pad, "Pad"):
        return None
    assert padded is not None and pad is not None
    sole_reader(padded)
    amounts, rank = _amounts(pad, node, rewriter)
    begin, end = amounts[:rank], amounts[rank:]
    if any(amounts[i] for i in (0, 1, rank, rank + 1)):
        raise Refused("the Pad adds batches or channels")
    if any(amount < 0 for amount in amounts):
        raise Refused("the Pad cuts")
    if edit.attribute(pad, "mode", "constant") != "constant":
        raise Refused(f"the Pad repeats values ({edit.attribute(pad, 'mode')})")
    held = pad.inputs[2] if len(pad.inputs) > 2 else None
    value = 0.0 if held is None else edit.scalar(held)
    if value is None:
        raise Refused("the value of the Pad is not constant")
    if edit.attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise Refused(f"the {node.op_type} pads automatically")
    own = edit.attribute(node, "pads", (0,) * (2 * (rank - 2)))
    match node.op_type:
        case "Conv" if value != 0:
            raise Refused("the Pad adds another value than zero")
        case "AveragePool":
            _check_average(node, value, any(own))
        case "MaxPool":
            _check_maximum(node, pad, value, [a + b for a, b in zip(own, (*begin[2:], *end[2:]), strict=True)])
    total = [a + b for a, b in zip(own, (*begin[2:], *end[2:]), strict=True)]
    node.attributes.pop("auto_pad", None)
    node.attributes["pads"] = ir.AttrInt64s("pads", total)
    if node.op_type == "AveragePool":
        node.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 1)
    node.replace_input_with(0, pad.inputs[0])
    rewriter.drop(pad)
    return f"Pad folded into {node.op_type}"


def _amounts(pad: ir.Node, node: ir.Node, rewriter: Rewriter) -> tuple[list[int], int]:
    """Elements added at the begin and then at the end of each axis, and the number of axes."""
    given = edit.constant(pad.inputs[1], limit=64)
    if given is None:
        raise Refused("the amounts of the Pad are computed")
    kernel = edit.attribute(node, "kernel_shape")
    weight = edit.tensor(node.inputs[1]) if node.op_type == "Conv" else None
    if kernel is not None:
        rank = len(kernel) + 2
    elif weight is not None:
        rank = len(weight.shape)
    else:
        raise Refused("the rank of the padded tensor is not known")
    listed = pad.inputs[3] if len(pad.inputs) > 3 else None
    axes = list(range(rank))
    if listed is not None:
        found = edit.constant(listed, limit=64)
        if found is None:
            raise Refused("the axes of the Pad are computed")
        axes = [int(a) % rank for a in found]
    amounts = [0] * (2 * rank)
    for i, axis in enumerate(axes):
        amounts[axis] = int(given[i])
        amounts[rank + axis] = int(given[len(axes) + i])
    return amounts, rank


def _check_average(node: ir.Node, value: float, has_own: bool) -> None:
    if value != 0:
        raise Refused("the Pad adds another value than zero")
    if edit.attribute(node, "ceil_mode", 0):
        raise Refused("the AveragePool rounds its size up, which counts its own padding differently")
    if has_own and not edit.attribute(node, "count_include_pad", 0):
        raise Refused("the AveragePool does not count its own padding, but counts the Pad's")


def _check_maximum(node: ir.Node, pad: ir.Node, value: float, total: list[int]) -> None:
    """MaxPool's own padding never wins; the Pad's must not either."""
    if len(node.outputs) > 1:
        raise Refused("the MaxPool returns positions")
    if any(d != 1 for d in edit.attribute(node, "dilations", ())):
        raise Refused("the MaxPool is dilated: a window may see nothing but padding")
    kernel = edit.attribute(node, "kernel_shape")
    if any(amount >= size for amount, size in zip(total, (*kernel, *kernel), strict=True)):
        raise Refused("a window of the MaxPool would see nothing but padding")
    if value == -math.inf:
        return
    if edit.attribute(node, "ceil_mode", 0):
        raise Refused("the MaxPool rounds its size up: a window may see nothing but padding")
    producer = pad.inputs[0].producer() if pad.inputs[0] is not None else None
    is_positive = edit.is_op(producer, *_NOT_NEGATIVE)
    if edit.is_op(producer, "Clip"):
        assert producer is not None
        low = edit.scalar(producer.inputs[1]) if len(producer.inputs) > 1 else None
        is_positive = low is not None and low >= 0
    if value > 0 or not is_positive:
        raise Refused("the Pad adds zeros, which win over negative values in a MaxPool")


RULES = (
    Rule(
        {"pad": "Pad before Conv, AveragePool or MaxPool becomes its padding."},
        ("Conv", "AveragePool", "MaxPool"),
        absorb,
    ),
)
