"""Whole models through the TVM backend: what it takes agrees with ONNX Runtime, and all it does not is said at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from fragments import ALL

from graphc import compiled, pipeline, runtime
from graphc.errors import BadInput
from graphc.model import load
from graphc.shapes import fix
from tests.tvm_models import build, in_child, text, weight

pytestmark = pytest.mark.usefixtures("tvm")

DATA = Path(__file__).parent / "data"
EXPORTS = sorted([*(DATA / "attention").glob("*.onnx"), *(DATA / "foreign").glob("*.onnx")])
SIZE, PICTURE = 4, {"num_channels": 3, "height": 32, "width": 32}
"""The size of every dynamic dimension but those of pictures."""

REFUSED = {
    "loop_carries_value": "Loop: there is no converter",
    "optimum-t5-merged": "tensors without elements",
    "rotary_operator": "tensors without elements",
}
"""Models that are not taken, and what is said of them."""

FOREIGN = "only standard operators are known"
"""What is said of operators of a runtime."""

MISSING = {
    "operators of a runtime": (
        "a = com.microsoft.Gelu(x)\n b = com.microsoft.QuickGelu(a)\n y = Det(b)",
        ["com.microsoft.Gelu: only standard", "com.microsoft.QuickGelu: only standard", "Det: there is no converter"],
    ),
    "integer kernels": (
        "c = Cast<to: int = 2>(x)\n g = ConvInteger(c, c)\n y = Cast<to: int = 1>(g)",
        ["ConvInteger: "],
    ),
    "forms of operators": (
        "b, i = MaxPool<kernel_shape: ints = [2,2]>(x)\n y = Cast<to: int = 1>(i)\n"
        "k = Constant<value_ints: ints = [1,1]>()\n t, j = TopK(x, k)\n z = Det(b)",
        ["MaxPool: only its first output", "Det: there is no converter"],
    ),
}
"""Models of which several operators are missing, and all that must be said."""


def outcome(make: Callable[[], ir.Model], folder: Path) -> str:
    """What comes of a model, in another process: ``agrees``, or why not."""

    def tried() -> str:
        model = make()
        shapes = [f"{name}={PICTURE.get(name, SIZE)}" for name in fix.symbols(model)]
        try:
            verdict = compiled.compare(model, build(model.clone(), folder / "out", " ".join(shapes)))
        except BadInput as error:
            return f"refused: {error.what} {error.where} {error.why}"
        return "agrees" if verdict.checked and verdict.ok else f"wrong: {verdict.why}"

    return in_child(tried, folder)


def _fragment(name: str) -> ir.Model:
    model: ir.Model = ir.from_proto(ALL[name].build())
    return model


def _foreign(name: str) -> bool:
    return any(node.domain for node in _fragment(name).graph)


@pytest.mark.slow
def test_fragments_of_networks_agree(tmp_path: Path) -> None:
    found = {name: outcome(partial(_fragment, name), tmp_path / name) for name in ALL}
    fine = {name for name, said in found.items() if _fine(name, said) or (_foreign(name) and FOREIGN in said)}
    assert {name: said for name, said in found.items() if name not in fine} == {}


@pytest.mark.slow
@pytest.mark.parametrize("path", EXPORTS, ids=[path.stem for path in EXPORTS])
def test_exported_models_agree_or_are_refused(path: Path, tmp_path: Path) -> None:
    said = outcome(lambda: load(path), tmp_path / "case")
    assert _fine(path.stem, said), said


def _fine(name: str, said: str) -> bool:
    return said == "agrees" or (name in REFUSED and said.startswith("refused") and REFUSED[name] in said)


@pytest.mark.parametrize("case", MISSING)
def test_all_that_is_missing_is_listed_before_any_work(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, wanted = MISSING[case]
    outputs = "float y, float z" if " z = " in body else "float y"
    model = text(body, f"(float[1,2,4,4] x) => ({outputs})")
    model.graph.opset_imports["com.microsoft"] = 1
    for number, node in enumerate(model.graph):
        node.name = f"n{number}"
    ir.save(model, tmp_path / "m.onnx")

    def never(*rest: object) -> None:
        raise AssertionError("a pass ran")

    monkeypatch.setattr("graphc.runner.Runner.run", never)
    with pytest.raises(BadInput) as caught:
        pipeline.optimize(tmp_path / "m.onnx", tmp_path / "out", target="tvm", cache=False)
    said = str(caught.value)
    assert all(each in said for each in wanted) and "-t onnxruntime" in said, said
    assert all(f"n{i}" in said for i, node in enumerate(model.graph) if f"{node.op_type}: " in said)


def test_negated_booleans_are_ones(tmp_path: Path) -> None:
    """Vectors of stored booleans were negated bit by bit."""
    body = "n = Less(x, c)\n t = Not(n)\n a = Cast<to: int = 1>(t)\n b = Cast<to: int = 1>(n)\n y = Sub(a, b)"
    model = text(f"c = Constant<value: tensor = float {{0}}>()\n{body}", "(float[4,16] x) => (float y)")
    verdict = compiled.compare(model, build(model.clone(), tmp_path / "out"))
    assert verdict.checked and verdict.ok, verdict.why


@pytest.mark.parametrize(
    "bounds",
    ["y = Relu(n)", "y = Clip(n, c, d)", "y = Clip(n, c)", "y = Clip(n, , d)", "y = Clip(n)"],
)
def test_bounds_let_nan_through(bounds: str, tmp_path: Path) -> None:
    constants = "c = Constant<value: tensor = float {0}>()\n d = Constant<value: tensor = float {6}>()"
    model = text(f"{constants}\n n = Div(x, x)\n {bounds}", "(float[4,16] x) => (float y)")
    given = {"x": np.zeros((4, 16), np.float32)}
    given["x"][1:3] = [[2.0], [-3.0]]
    expected = runtime.session(model, optimise=False).run(given)["y"]
    assert np.isnan(expected[0]).all() and not np.isnan(expected[1]).any()
    np.testing.assert_array_equal(build(model.clone(), tmp_path / "out").run(given)["y"], expected)


def test_integers_are_clipped(tmp_path: Path) -> None:
    body = """c = Constant<value: tensor = int64 {-1}>() d = Constant<value: tensor = int64 {3}>()
              n = Cast<to: int = 7>(x) a = Clip(n, c, d) b = Clip(n, c) e = Clip(n, , d)
              f = Sub(b, e) y = Add(a, f)"""
    model = text(body, "(float[4,16] x) => (int64 y)")
    given = {"x": np.arange(-32, 32, dtype=np.float32).reshape(4, 16)}
    expected = runtime.session(model, optimise=False).run(given)["y"]
    np.testing.assert_array_equal(build(model.clone(), tmp_path / "out").run(given)["y"], expected)


def test_a_transposed_convolution_among_others_compiles(tmp_path: Path) -> None:
    """Others have channels last, for which TVM has no transposed convolution."""
    body = "a = Conv(x, v)\n b = ConvTranspose<strides: ints = [2,2]>(a, w)\n y = Conv(b, v)"
    model = text(body, "(float[1,4,8,8] x) => (float y)")
    for name, shape in {"v": (4, 4, 3, 3), "w": (4, 4, 2, 2)}.items():
        held = weight(name, *shape)
        model.graph.initializers[name] = held
        for node in model.graph:
            for number, value in enumerate(node.inputs):
                if value is not None and value.name == name:
                    node.replace_input_with(number, held)
    verdict = compiled.compare(model, build(model.clone(), tmp_path / "out"))
    assert verdict.checked and verdict.ok, verdict.why
