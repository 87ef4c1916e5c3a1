"""The steps of LSTM, GRU and RNN: what the inputs contribute is known for all of them, states go from one to the next.

ONNX's equations and order of gates. ``given`` ``(steps, batch, gates * hidden)`` has the products with the inputs and
all biases, but that of a GRU's last gate within the reset; ``weight`` is ``(hidden, gates * hidden)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graphc.tvm.kernels.math import sigmoid, tanh
from graphc.tvm.kernels.writing import kernel, lanes_from, loop, registers, spread
from graphc.tvm.nest import Machine

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}

PARALLEL = 1 << 17
"""Products of a step from which threads share it."""


@dataclass(frozen=True)
class Layer:
    """One direction of a recurrent layer.

    Attributes:
        kind: LSTM, GRU or RNN.
        steps: Of the sequence.
        batch: Sequences.
        hidden: Numbers in a state.
        backward: Whether the last step comes first.
        late: Of a GRU: whether the reset gate comes after the product.
    """

    kind: str
    steps: int
    batch: int
    hidden: int
    backward: bool
    late: bool

    @property
    def gates(self) -> int:
        return GATES[self.kind]

    @property
    def state(self) -> tuple[int, int]:
        return self.batch, self.hidden


@dataclass(frozen=True)
class Step:
    """One step of a layer, as it is written.

    Attributes:
        layer: The layer.
        machine: What it is for.
        now: The number of the step.
        before: The state that it begins with, by row and column.
        given: What the inputs contribute, ``(steps, batch, gates * hidden)``.
        weight: What states are multiplied with, ``(hidden, gates * hidden)``.
        y: The states, ``(steps, batch, hidden)``, of which it writes one.
        bias: Of a GRU: what is added within the reset, ``(hidden,)``.
        cells: Of an LSTM: the cells, ``(batch, hidden)``, which it updates.
        scratch: Of a GRU: update gates and reset states, ``(2, batch, hidden)``.
    """

    layer: Layer
    machine: Machine
    now: Any
    before: Callable[[Any, Any], Any]
    given: Any
    weight: Any
    y: Any
    bias: Any
    cells: Any
    scratch: Any

    def panels(self, gates: int, write: Callable[[Any, Any, int], None]) -> None:
        """Call ``write(row, column, lanes)`` for every vector of a state."""
        layer = self.layer
        lanes = next(lanes for lanes in (self.machine.lanes, 8, 4, 2, 1) if layer.hidden % lanes == 0)
        parallel = layer.batch * layer.hidden * layer.hidden * gates > PARALLEL
        with loop(layer.batch * (layer.hidden // lanes), parallel=parallel) as panel:
            count = layer.hidden // lanes
            write(panel // count, panel % count * lanes, lanes)

    def part(self, gate: int, row: Any, column: Any, lanes: int) -> Any:
        """What the inputs contribute to a gate."""
        return self.given[self.now, row, lanes_from(gate * self.layer.hidden + column, lanes)]

    def products(self, factor: Callable[[Any], Any], column: Any, lanes: int, gates: tuple[int, ...]) -> list[Any]:
        """The products of a state with the weights of some gates, a vector for each."""
        from tvm.tirx.script.builder import ir as T

        sums = registers(len(gates) * lanes)
        for place in range(len(gates)):
            T.buffer_store(sums, spread(T.float32(0), lanes), [lanes_from(place * lanes, lanes)])
        with loop(self.layer.hidden) as k:
            for place, gate in enumerate(gates):
                at = lanes_from(place * lanes, lanes)
                part = self.weight[k, lanes_from(gate * self.layer.hidden + column, lanes)]
                T.buffer_store(sums, sums[at] + spread(factor(k), lanes) * part, [at])
        return [sums[lanes_from(place * lanes, lanes)] for place in range(len(gates))]


def steps(layer: Layer, machine: Machine) -> Any:
    """``y[steps, batch, hidden]``, and the last cells ``c[batch, hidden]`` of an LSTM.

    Arguments are ``given``, ``weight``, the first states, then those cells (LSTM) or the bias ``(hidden,)`` within the
    reset (GRU), float32.
    """
    whole = layer.gates * layer.hidden
    arguments: list[tuple[str, tuple[int, ...], str]] = [
        ("given", (layer.steps, layer.batch, whole), "float32"),
        ("weight", (layer.hidden, whole), "float32"),
        ("first", layer.state, "float32"),
    ]
    if layer.kind == "LSTM":
        arguments.append(("cells", layer.state, "float32"))
    elif layer.kind == "GRU":
        arguments.append(("bias", (layer.hidden,), "float32"))
    arguments += [("y", (layer.steps, *layer.state), "float32")]
    arguments += [("c", layer.state, "float32")] if layer.kind == "LSTM" else []

    def body(given: Any, weight: Any, first: Any, *rest: Any) -> None:
        from tvm.tirx.script.builder import ir as T

        write = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}[layer.kind]
        bias = cells = None
        if layer.kind == "LSTM":
            start, y, cells = rest
            with loop(layer.batch) as row, loop(layer.hidden) as at:
                T.buffer_store(cells, start[row, at], [row, at])
        elif layer.kind == "GRU":
            bias, y = rest
        else:
            (y,) = rest
        scratch = T.alloc_buffer((2, *layer.state), "float32", layout=None) if layer.kind == "GRU" else None
        last = layer.steps - 1

        def step(now: Any, before: Callable[[Any, Any], Any]) -> None:
            write(Step(layer, machine, now, before, given, weight, y, bias, cells, scratch))

        step(T.int32(last if layer.backward else 0), lambda row, at: first[row, at])
        if last:
            with loop(last) as number:
                now = last - 1 - number if layer.backward else number + 1
                then = now + 1 if layer.backward else now - 1
                step(now, lambda row, at: y[then, row, at])

    return kernel(arguments, body)


def _kept(value: Any, lanes: int) -> Any:
    """A vector that is read several times, computed once."""
    from tvm.tirx.script.builder import ir as T

    held = registers(lanes)
    T.buffer_store(held, value, [lanes_from(0, lanes)])
    return held[lanes_from(0, lanes)]


def _lstm(step: Step) -> None:
    from tvm.tirx.script.builder import ir as T

    cells = step.cells

    def write(row: Any, column: Any, lanes: int) -> None:
        at = lanes_from(column, lanes)
        sums = step.products(lambda k: step.before(row, k), column, lanes, (0, 1, 2, 3))
        parts = [part + step.part(gate, row, column, lanes) for gate, part in enumerate(sums)]
        let, out, keep = (sigmoid(part, lanes) for part in parts[:3])
        cell = _kept(keep * cells[row, at] + let * tanh(parts[3], lanes), lanes)
        T.buffer_store(cells, cell, [row, at])
        T.buffer_store(step.y, out * tanh(cell, lanes), [step.now, row, at])

    step.panels(step.layer.gates, write)


def _gru(step: Step) -> None:
    from tvm.tirx.script.builder import ir as T

    bias, scratch, part = step.bias, step.scratch, step.part

    def mixed(update: Any, new: Any, row: Any, column: Any, lanes: int) -> None:
        at = lanes_from(column, lanes)
        new = _kept(new, lanes)
        T.buffer_store(step.y, new + update * (step.before(row, at) - new), [step.now, row, at])

    def late(row: Any, column: Any, lanes: int) -> None:
        z, r, h = step.products(lambda k: step.before(row, k), column, lanes, (0, 1, 2))
        reset = sigmoid(r + part(1, row, column, lanes), lanes)
        inner = (h + bias[lanes_from(column, lanes)]) * reset
        update = sigmoid(z + part(0, row, column, lanes), lanes)
        mixed(update, tanh(part(2, row, column, lanes) + inner, lanes), row, column, lanes)

    def gates(row: Any, column: Any, lanes: int) -> None:
        at = lanes_from(column, lanes)
        z, r = step.products(lambda k: step.before(row, k), column, lanes, (0, 1))
        T.buffer_store(scratch, sigmoid(z + part(0, row, column, lanes), lanes), [0, row, at])
        reset = sigmoid(r + part(1, row, column, lanes), lanes)
        T.buffer_store(scratch, reset * step.before(row, at), [1, row, at])

    def early(row: Any, column: Any, lanes: int) -> None:
        at = lanes_from(column, lanes)
        (h,) = step.products(lambda k: scratch[1, row, k], column, lanes, (2,))
        new = tanh(part(2, row, column, lanes) + h + bias[at], lanes)
        mixed(scratch[0, row, at], new, row, column, lanes)

    if step.layer.late:
        step.panels(3, late)
    else:
        step.panels(2, gates)
        step.panels(1, early)


def _rnn(step: Step) -> None:
    from tvm.tirx.script.builder import ir as T

    def write(row: Any, column: Any, lanes: int) -> None:
        at = lanes_from(column, lanes)
        (h,) = step.products(lambda k: step.before(row, k), column, lanes, (0,))
        T.buffer_store(step.y, tanh(h + step.part(0, row, column, lanes), lanes), [step.now, row, at])

    step.panels(1, write)
