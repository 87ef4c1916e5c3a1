"""Recurrent layers in compiled artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphc import compiled, edit
from graphc.errors import BadInput
from graphc.tvm import emit
from tests.tvm_models import build

pytestmark = pytest.mark.usefixtures("tvm")

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def layer(
    kind: str,
    *,
    steps: int = 5,
    batch: int = 2,
    inputs: int = 12,
    hidden: int = 16,
    states: bool = False,
    **settings: Any,
) -> ir.Model:
    """A model of one recurrent layer, all of whose outputs are outputs."""
    rng = np.random.default_rng(0)
    ways = 2 if settings.get("direction") == "bidirectional" else 1
    gates = GATES[kind] * hidden
    shapes = {"w": (ways, gates, inputs), "r": (ways, gates, hidden), "b": (ways, 2 * gates)}
    x = ir.val("x", ir.DataType.FLOAT, [steps, batch, inputs])
    given = [x]
    graph = ir.Graph(given, [], nodes=[], opset_imports={"": 21}, name="g")
    held = [
        edit.initializer(graph, (rng.standard_normal(shape) / 3).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    read: list[ir.Value | None] = [x, *held]
    outputs = 3 if kind == "LSTM" else 2
    if states:
        first = [ir.val(f"s{i}", ir.DataType.FLOAT, [ways, batch, hidden]) for i in range(outputs - 1)]
        graph.inputs.extend(first)
        read += [None, *first]
    node = ir.node(kind, read, {"hidden_size": hidden, **settings}, num_outputs=outputs, name="layer")
    graph.append(node)
    for number, value in enumerate(node.outputs):
        value.name, value.type = f"y{number}", ir.TensorType(ir.DataType.FLOAT)
        value.shape = ir.Shape([steps, ways, batch, hidden] if number == 0 else [ways, batch, hidden])
        graph.outputs.append(value)
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("kind", GATES)
def test_it_computes_what_onnx_runtime_does(kind: str, direction: str, tmp_path: Path) -> None:
    states = direction == "bidirectional"
    late = {"linear_before_reset": int(direction != "forward")} if kind == "GRU" else {}
    model = layer(kind, direction=direction, states=states, **late)
    verdict = compiled.compare(model, build(model.clone(), tmp_path / "out"))
    assert verdict.checked and verdict.ok, verdict.why


@pytest.mark.parametrize(("steps", "hidden"), [(1, 8), (40, 20), (3, 7), (2, 256)])
def test_all_sizes(steps: int, hidden: int, tmp_path: Path) -> None:
    """One step, states that fill vectors of four or none, and a layer that threads share."""
    model = layer("LSTM", steps=steps, hidden=hidden, batch=1)
    verdict = compiled.compare(model, build(model.clone(), tmp_path / "out"))
    assert verdict.checked and verdict.ok, verdict.why


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"clip": 1.0}, "it is clipped"),
        ({"activations": ["Sigmoid", "Relu", "Tanh"]}, "its activations are not the usual ones"),
        ({"input_forget": 1}, "its gates are coupled"),
    ],
)
def test_what_is_not_taken_is_named(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadInput, match=rf"(?s)LSTM: .*{reason}.*\(layer\).*-t onnxruntime"):
        emit.lowered(layer("LSTM", **settings), ())
