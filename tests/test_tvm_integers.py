"""Products of codes by codes in compiled artifacts: exact sums, small weights, and floats where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphc import runtime
from graphc.recipe import parse_backend
from tests.small_models import hold
from tests.tvm_models import build, own

pytestmark = pytest.mark.usefixtures("tvm")

Array = np.ndarray[Any, np.dtype[Any]]


def quantized(
    body: str,
    given: tuple[int, ...],
    weight: tuple[int, ...],
    *,
    axis: int,
    x: str = "uint8",
    w: str = "int8",
    zero: int = 0,
    off: int = 0,
    whole: bool = False,
) -> tuple[ir.Model, dict[str, Array]]:
    """``d`` stands for the codes ``x``, ``f`` for constant codes of the full range; ``b`` is a bias."""
    rng = np.random.default_rng(0)
    outputs = weight[axis]
    scale = np.float32(0.01) if whole else rng.random(outputs).astype(np.float32) / 100
    held = {
        "q": rng.integers(np.iinfo(w).min, np.iinfo(w).max, weight, w, endpoint=True),
        "s": scale,
        "z": np.full(np.shape(scale), off, w),
        "t": np.float32(0.03),
        "o": np.array(zero, x),
        "b": rng.standard_normal(outputs).astype(np.float32),
    }
    sizes = ",".join(map(str, given))
    text = f"d = DequantizeLinear(x, t, o)\n f = DequantizeLinear<axis: int = {axis}>(q, s, z)\n {body}"
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]> g ({x}[{sizes}] x) => (float y) {{ {text} }}')
    read = {value.name for node in model.graph for value in node.inputs if value is not None}
    hold(model, **{name: np.asarray(array) for name, array in held.items() if name in read})
    return model, {"x": rng.integers(np.iinfo(x).min, np.iinfo(x).max, given, x, endpoint=True)}


CONV = "y = Conv<pads: ints = [1,1,1,1]>(d, f, b)"
CASES: dict[str, dict[str, Any]] = {
    "a product": {"body": "y = MatMul(d, f)", "given": (2, 37, 64), "weight": (64, 40), "axis": 1, "zero": 128},
    "one row": {"body": "y = MatMul(d, f)", "given": (1, 66), "weight": (66, 128), "axis": 1, "x": "int8", "zero": -3},
    "an odd depth, columns left over": {"body": "y = MatMul(d, f)", "given": (5, 35), "weight": (35, 61), "axis": 1},
    "a Gemm": {
        "body": "y = Gemm<transB: int = 1>(d, f, b)",
        "given": (3, 64),
        "weight": (48, 64),
        "axis": 0,
        "zero": 7,
    },
    "a convolution": {"body": CONV, "given": (2, 16, 9, 11), "weight": (24, 16, 3, 3), "axis": 0, "zero": 100},
    "strides and dilations": {
        "body": "y = Conv<strides: ints = [2,1], dilations: ints = [1,2], pads: ints = [0,2,1,0]>(d, f)",
        "given": (1, 6, 14, 13),
        "weight": (20, 6, 3, 2),
        "axis": 0,
    },
    "three channels": {"body": CONV, "given": (1, 3, 12, 12), "weight": (16, 3, 3, 3), "axis": 0, "zero": 255},
    "one scale for all": {"body": CONV, "given": (1, 8, 6, 6), "weight": (8, 8, 3, 3), "axis": 0, "whole": True},
    "weights without a sign": {
        "body": "y = MatMul(d, f)",
        "given": (4, 64),
        "weight": (64, 32),
        "axis": 1,
        "w": "uint8",
        "off": 128,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_codes_are_multiplied(case: str, tmp_path: Path) -> None:
    model, inputs = quantized(**CASES[case])
    assert own(model) == ["IntegerProduct"]
    found = build(model.clone(), tmp_path / "out").run(inputs)["y"]
    wanted = runtime.session(model, optimise=False).run(inputs)["y"]
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max())
    codes = model.graph.initializers["q"].const_value
    assert codes is not None
    # Filled up to whole vectors, and beside it what is by output.
    outputs = codes.shape.numpy()[CASES[case]["axis"]]
    most = 2 * codes.size * (-(-outputs // 8) * 8) // outputs
    assert (tmp_path / "out" / "weights.bin").stat().st_size <= most


WHY = {
    "weights that need nine bits": "its weights less their zero points need more than 8 bits",
    "depthwise": "a convolution in groups",
    "scales by input": "its scales differ along the inputs",
}

OTHERS: dict[str, dict[str, Any]] = {
    "weights that need nine bits": {
        "body": "y = MatMul(d, f)",
        "given": (4, 64),
        "weight": (64, 32),
        "axis": 1,
        "off": 3,
    },
    "depthwise": {"body": "y = Conv<group: int = 8>(d, f)", "given": (1, 8, 6, 6), "weight": (8, 1, 3, 3), "axis": 0},
    "scales by input": {"body": "y = MatMul(d, f)", "given": (4, 32), "weight": (32, 32), "axis": 0},
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_does_not_fit_is_computed_in_floats(case: str, tmp_path: Path) -> None:
    model, inputs = quantized(**OTHERS[case])
    assert "IntegerProduct" not in own(model)
    folder = tmp_path / "out"
    found = build(model.clone(), folder).run(inputs)["y"]
    said = f"products of 8-bit activations that are computed in floats: 1 ({WHY[case]})"
    assert said in parse_backend("tvm", {}).unrealised(folder)
    wanted = runtime.session(model, optimise=False).run(inputs)["y"]
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max())


def test_the_kernel_is_the_instruction() -> None:
    """No other sequence: TVM's own loops would multiply 32 bits wide. With VNNI, sums belong to it."""
    import tvm

    from graphc.tvm import targets
    from graphc.tvm.kernels import integers
    from graphc.tvm.nest import Machine

    wanted = {"x86-64-v2": 4, "x86-64-v3": 8, "x86-64-v4": 16, "znver4": 16}
    for name, lanes in wanted.items():
        target = targets.resolve(name, 1)
        machine = Machine.of(target)
        assert machine.lanes == lanes
        function = integers.product(integers.Window((1, 5, 6, 4), (3, 3), (1, 1), (1, 1), 40), machine)
        built = tvm.compile(tvm.IRModule({"k": function.with_attr("global_symbol", "k")}), target=target)
        assert ("vpdpwssd" if name == "znver4" else "pmaddwd") in built.mod.inspect_source("asm")
