"""LSTM, GRU and RNN: products with all inputs at once, and steps in an operator of graphc's own.

``Steps(given, weight, first, cells or bias) -> y, c`` is one direction; see :mod:`graphc.tvm.kernels.recurrent`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from graphc import edit
from graphc.edit import Array, attribute
from graphc.tvm.kernels.recurrent import GATES
from graphc.tvm.placing import OWN

STEPS = "Steps"

KINDS = tuple(GATES)
"""The kinds of layers; a ``Steps`` node names its kind by its place here."""

_ACTIVATIONS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}

_WEIGHTS = (1, 2, 3)
"""The inputs that must be constants: W, R and B."""


def obstacle(node: ir.Node) -> str:
    """Why a recurrent layer is not taken, or ""."""
    if any(attr.is_ref() for attr in node.attributes.values()):
        return "its attributes are bound by the caller of a function"
    if attribute(node, "layout", 0):
        return "the batch comes first (layout=1)"
    ways = 2 if attribute(node, "direction", "forward") == "bidirectional" else 1
    known = _ACTIVATIONS[node.op_type]
    given = tuple(name.lower() for name in attribute(node, "activations", known * ways))
    if given != tuple(name.lower() for name in known * ways):
        return "its activations are not the usual ones"
    if attribute(node, "clip") is not None or attribute(node, "input_forget", 0):
        return "it is clipped, or its gates are coupled"
    inputs = [*node.inputs, *[None] * (8 - len(node.inputs))]
    if inputs[4] is not None:
        return "its sequences differ in length"
    if inputs[7] is not None:
        return "it has peepholes"
    if any(inputs[i] is not None and edit.tensor(inputs[i]) is None for i in _WEIGHTS):
        return "its weights are no constants"
    x = inputs[0]
    if x is None or x.dtype != ir.DataType.FLOAT or x.shape is None or not x.shape.is_static():
        return "its input is not float32"
    return ""


def write(model: ir.Model) -> int:
    """Let every recurrent layer become products and steps, in place; returns how many did."""
    found = [node for node in edit.nodes(model) if edit.is_op(node, *KINDS) and not obstacle(node)]
    names = edit.Names(model)
    for node in found:
        _Writer(model, node, names).write()
    return len(found)


class _Writer:
    """Writes what takes the place of one layer."""

    def __init__(self, model: ir.Model, node: ir.Node, names: edit.Names) -> None:
        self._model, self._node, self._names = model, node, names
        self._home = node.graph
        self._base = node.name or node.op_type

    def write(self) -> None:
        node, kind = self._node, self._node.op_type
        inputs = [*node.inputs, *[None] * (8 - len(node.inputs))]
        weights = [edit.constant(inputs[i]) for i in _WEIGHTS]
        x, hidden = inputs[0], int(attribute(node, "hidden_size") or weights[1].shape[2])  # type: ignore[union-attr]
        assert x is not None and x.shape is not None and weights[0] is not None and weights[1] is not None
        _, batch, _ = x.shape.numpy()
        direction = attribute(node, "direction", "forward")
        backwards = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
        made: list[list[ir.Value]] = []
        for number, backward in enumerate(backwards):
            w, r = weights[0][number], weights[1][number]
            gates = GATES[kind] * hidden
            both = np.zeros(2 * gates, np.float32) if weights[2] is None else weights[2][number]
            bias, inner = both[:gates] + both[gates:], np.zeros(hidden, np.float32)
            if kind == "GRU":
                # The bias of the last gate's product with the state stays with that product.
                bias[2 * hidden :], inner = both[2 * hidden : gates], both[gates + 2 * hidden :]
            product = self._op("MatMul", [x, self._constant(np.ascontiguousarray(w.T))])
            given = self._op("Add", [product, self._constant(bias)])
            operands = [given, self._constant(np.ascontiguousarray(r.T)), self._state(inputs[5], number, batch, hidden)]
            if kind == "LSTM":
                operands.append(self._state(inputs[6], number, batch, hidden))
            elif kind == "GRU":
                operands.append(self._constant(np.ascontiguousarray(inner)))
            settings = {
                "kind": KINDS.index(kind),
                "backward": int(backward),
                "late": int(bool(attribute(node, "linear_before_reset", 0))),
            }
            steps = ir.node(STEPS, operands, settings, domain=OWN, num_outputs=2 if kind == "LSTM" else 1)
            y = self._place(steps)
            last = self._op("Gather", [y, self._constant(np.array(0 if backward else -1, np.int64))], axis=0)
            made.append([y, last, *steps.outputs[1:]])
        for number, out in enumerate(node.outputs):
            if out.name and (out.uses() or out.is_graph_output()):
                new = self._stacked([each[number] for each in made], 1 if number == 0 else 0)
                new.type, new.shape = out.type, out.shape
                edit.replace(out, new)
        edit.remove(node)
        for value in inputs:
            edit.drop_unused(value)

    def _state(self, value: ir.Value | None, number: int, batch: int, hidden: int) -> ir.Value:
        """The first state of a direction, ``(batch, hidden)``."""
        if value is None:
            return self._constant(np.zeros((batch, hidden), np.float32))
        return self._op("Gather", [value, self._constant(np.array(number, np.int64))], axis=0)

    def _stacked(self, parts: list[ir.Value], axis: int) -> ir.Value:
        axes = self._constant(np.array([axis], np.int64))
        wide = [self._op("Unsqueeze", [part, axes]) for part in parts]
        return wide[0] if len(wide) == 1 else self._op("Concat", wide, axis=axis)

    def _constant(self, array: Array) -> ir.Value:
        return edit.initializer(self._model.graph, array, self._names.fresh(f"{self._base}.constant"))

    def _op(self, operator: str, inputs: list[ir.Value], **settings: Any) -> ir.Value:
        return self._place(ir.node(operator, inputs, settings))

    def _place(self, made: ir.Node) -> ir.Value:
        assert self._home is not None
        self._home.insert_before(self._node, made)
        for value in made.outputs:
            value.name = self._names.fresh(f"{self._base}.part")
            value.type = ir.TensorType(ir.DataType.FLOAT)
        return made.outputs[0]
