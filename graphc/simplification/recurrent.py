"""Recurrent operators: inputs that say what is the default anyway."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from graphc.edit import attribute, is_op
from graphc.moves import MOVES
from graphc.simplification.rules import Become, Outcome, Rules, kept_attributes

if TYPE_CHECKING:
    from graphc.simplification.sweep import Sweep

RULES = Rules()

_STATES = {"GRU": (5,), "LSTM": (5, 6), "RNN": (5,)}
"""The inputs that hold an initial state; left out, it is zero."""


@RULES.add(*_STATES)
def _zero_state(node: ir.Node, sweep: Sweep) -> Outcome:
    inputs = list(node.inputs)
    zero = [i for i in _STATES[node.op_type] if i < len(inputs) and _is_zero(inputs[i], sweep)]
    if not zero:
        return None
    for i in zero:
        inputs[i] = None
    while inputs[-1] is None:
        inputs.pop()
    return Become(inputs, kept_attributes(node), "zero initial state left out")


def _is_zero(value: ir.Value | None, sweep: Sweep) -> bool:
    """Whether all elements are zero, however many there are."""
    array = sweep.facts.array(value)
    if array is not None:
        return not np.any(array)
    producer = None if value is None else value.producer()
    if is_op(producer, "Cast", *MOVES) and producer is not None:
        return _is_zero(producer.inputs[0], sweep)
    if is_op(producer, "ConstantOfShape") and producer is not None:
        fill = attribute(producer, "value")
        return fill is None or not np.any(fill.numpy())
    return False
