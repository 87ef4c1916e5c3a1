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
        y = rest[-2] if layer.kind == "LSTM" else rest[-1]
        if layer.kind == "LSTM":
            with loop(layer.batch) as row, loop(layer.hidden) as at:
                T.buffer_store(rest[-1], rest[0][row, at], [row, at])
        scratch = T.alloc_buffer((2, *layer.state), "float32", layout=None) if layer.kind == "GRU" else None
        last = layer.steps - 1

        def step(now: Any, before: Callable[[Any, Any], Any]) -> None:
            write(layer, machine, now, before, given, weight, y, scratch, rest)

        step(T.int32(last if layer.backward else 0), lambda row, at: first[row, at])
        if last:
            with loop(last) as number:
                now = last - 1 - number if layer.backward else number + 1
                then = now + 1 if layer.backward else now - 1
                step(now, lambda row, at: y[then, row, at])

    return kernel(arguments, body)


def _panels(layer: Layer, machine: Machine, gates: int, write: Callable[[Any, Any, int], None]) -> None:
    """Call ``write(row, column, lanes)`` for every vector of a state."""
    lanes = next(lanes for lanes in (machine.lanes, 8, 4, 2, 1) if layer.hidden % lanes == 0)
    parallel = layer.batch * layer.hidden * layer.hidden * gates > PARALLEL
    with loop(layer.batch * (layer.hidden // lanes), parallel=parallel) as panel:
        count = layer.hidden // lanes
        write(panel // count, panel % count * lanes, lanes)


def _products(
    layer: Layer, weight: Any, factor: Callable[[Any], Any], column: Any, lanes: int, gates: tuple[int, ...]
) -> list[Any]:
    """The products of a state with the weights of some gates, a vector for each."""
    from tvm.tirx.script.builder import ir as T

    sums = registers(len(gates) * lanes)
    for place in range(len(gates)):
        T.buffer_store(sums, spread(T.float32(0), lanes), [lanes_from(place * lanes, lanes)])
    with loop(layer.hidden) as k:
        for place, gate in enumerate(gates):
            at = lanes_from(place * lanes, lanes)
            part = weight[k, lanes_from(gate * layer.hidden + column, lanes)]
            T.buffer_store(sums, sums[at] + spread(factor(k), lanes) * part, [at])
    return [sums[lanes_from(place * lanes, lanes)] for place in range(len(gates))]


def _kept(value: Any, lanes: int) -> Any:
    """A vector that is read several times, computed once."""
    from tvm.tirx.script.builder import ir as T

    held = registers(lanes)
    T.buffer_store(held, value, [lanes_from(0, lanes)])
    return held[lanes_from(0, lanes)]


def _lstm(
    layer: Layer,
    machine: Machine,
    now: Any,
    before: Callable[[Any, Any], Any],
    given: Any,
    weight: Any,
    y: Any,
    scratch: Any,
    rest: Any,
) -> None:
    from tvm.tirx.script.builder import ir as T

    cells = rest[-1]

    def write(row: Any, column: Any, lanes: int) -> None:
        at = lanes_from(column, lanes)
        sums = _products(layer, weight, lambda k: before(row, k), column, lanes, (0, 1, 2, 3))
        parts = [
            part + given[now, row, lanes_from(gate * layer.hidden + column, lanes)] for gate, part in enumerate(sums)
        ]
        let, out, keep = (sigmoid(part, lanes) for part in parts[:3])
        cell = _kept(keep * cells[row, at] + let * tanh(parts[3], lanes), lanes)
        T.buffer_store(cells, cell, [row, at])
        T.buffer_store(y, out * tanh(cell, lanes), [now, row, at])

    _panels(layer, machine, layer.gates, write)


def _gru(
    layer: Layer,
    machine: Machine,
    now: Any,
    before: Callable[[Any, Any], Any],
    given: Any,
    weight: Any,
    y: Any,
    scratch: Any,
    rest: Any,
) -> None:
    from tvm.tirx.script.builder import ir as T

    bias, hidden = rest[0], layer.hidden

    def part(gate: int, row: Any, column: Any, lanes: int) -> Any:
        return given[now, row, lanes_from(gate * hidden + column, lanes)]

    def mixed(update: Any, new: Any, row: Any, column: Any, lanes: int) -> None:
        at = lanes_from(column, lanes)
        new = _kept(new, lanes)
        T.buffer_store(y, new + update * (before(row, at) - new), [now, row, at])

    def late(row: Any, column: Any, lanes: int) -> None:
        z, r, h = _products(layer, weight, lambda k: before(row, k), column, lanes, (0, 1, 2))
        reset = sigmoid(r + part(1, row, column, lanes), lanes)
        inner = (h + bias[lanes_from(column, lanes)]) * reset
        update = sigmoid(z + part(0, row, column, lanes), lanes)
        mixed(update, tanh(part(2, row, column, lanes) + inner, lanes), row, column, lanes)

    def gates(row: Any, column: Any, lanes: int) -> None:
        at = lanes_from(column, lanes)
        z, r = _products(layer, weight, lambda k: before(row, k), column, lanes, (0, 1))
        T.buffer_store(scratch, sigmoid(z + part(0, row, column, lanes), lanes), [0, row, at])
        reset = sigmoid(r + part(1, row, column, lanes), lanes)
        T.buffer_store(scratch, reset * before(row, at), [1, row, at])

    def early(row: Any, column: Any, lanes: int) -> None:
        at = lanes_from(column, lanes)
        (h,) = _products(layer, weight, lambda k: scratch[1, row, k], column, lanes, (2,))
        new = tanh(part(2, row, column, lanes) + h + bias[at], lanes)
        mixed(scratch[0, row, at], new, row, column, lanes)

    if layer.late:
        _panels(layer, machine, 3, late)
    else:
        _panels(layer, machine, 2, gates)
        _panels(layer, machine, 1, early)


def _rnn(
    layer: Layer,
    machine: Machine,
    now: Any,
    before: Callable[[Any, Any], Any],
    given: Any,
    weight: Any,
    y: Any,
    scratch: Any,
    rest: Any,
) -> None:
    from tvm.tirx.script.builder import ir as T

    def write(row: Any, column: Any, lanes: int) -> None:
        at = lanes_from(column, lanes)
        (h,) = _products(layer, weight, lambda k: before(row, k), column, lanes, (0,))
        T.buffer_store(y, tanh(h + given[now, row, at], lanes), [now, row, at])

    _panels(layer, machine, 1, write)
