"""Weights as codes in compiled artifacts: as small as they are, and the same results as in ONNX Runtime."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphc import compiled, pipeline
from graphc.recipe import parse_backend
from graphc.tvm import emit
from tests.small_models import hold
from tests.tvm_models import build, own, weight

pytestmark = pytest.mark.usefixtures("tvm")

Array = np.ndarray[Any, np.dtype[Any]]
SIGNED = {2: ir.DataType.INT2, 4: ir.DataType.INT4, 8: ir.DataType.INT8}
UNSIGNED = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}


def quantized(
    body: str,
    head: str,
    shape: tuple[int, int],
    *,
    dtype: ir.DataType,
    axis: int,
    block: int = 0,
    zeros: bool = False,
    half: bool = False,
) -> ir.Model:
    """A model from text, in which ``w`` is the dequantized constant ``q`` of random codes."""
    rng = np.random.default_rng(0)
    blocks = f", block_size: int = {block}" if block else ""
    points = ", z" if zeros else ""
    kind = "float16" if half else "float"
    text = f"w = DequantizeLinear<axis: int = {axis}{blocks}>(q, s{points})\n {body}"
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]> g {head.replace("float", kind)} {{ {text} }}')
    low, high = (
        (-(1 << dtype.bitwidth - 1), 1 << dtype.bitwidth - 1) if dtype in SIGNED.values() else (0, 1 << dtype.bitwidth)
    )
    scales = list(shape)
    scales[axis] = -(-shape[axis] // block) if block else shape[axis]
    scale_shape = tuple(scales) if block else (shape[axis],)
    held = {
        "q": ir.Tensor(rng.integers(low, high, shape).astype(dtype.numpy()), dtype=dtype, name="q"),
        "s": ir.tensor(
            (rng.random(scale_shape) / (high - low) / math.sqrt(max(shape))).astype(np.float16 if half else np.float32),
            name="s",
        ),
    }
    if zeros:
        held["z"] = ir.Tensor(rng.integers(low, high, scale_shape).astype(dtype.numpy()), dtype=dtype, name="z")
    return hold(model, **held)


CASES: dict[str, dict[str, Any]] = {
    "one row, int4 in blocks": {"rows": 1, "dtype": SIGNED[4], "axis": 0, "block": 32},
    "one row, int8 per channel": {"rows": 1, "dtype": SIGNED[8], "axis": 1},
    "one row, uint4 with zero points": {"rows": 1, "dtype": UNSIGNED[4], "axis": 0, "block": 32, "zeros": True},
    "three rows, int8 with zero points": {"rows": 3, "dtype": SIGNED[8], "axis": 1, "zeros": True},
    "many rows, int4 in blocks": {"rows": 37, "dtype": SIGNED[4], "axis": 0, "block": 32},
    "many rows, uint8 with zero points": {"rows": 64, "dtype": UNSIGNED[8], "axis": 0, "block": 32, "zeros": True},
    "columns that fill no vector": {"rows": 2, "dtype": SIGNED[4], "axis": 1, "columns": 93},
    "columns that leave a vector over": {"rows": 2, "dtype": SIGNED[4], "axis": 1, "columns": 40},
    "many rows of such columns": {"rows": 19, "dtype": SIGNED[8], "axis": 1, "columns": 93},
    "inputs that fill no block": {"rows": 5, "dtype": SIGNED[4], "axis": 0, "block": 32, "depth": 91},
    "half precision": {"rows": 2, "dtype": SIGNED[4], "axis": 0, "block": 32, "half": True},
}


@pytest.mark.parametrize("case", CASES)
def test_a_product_reads_codes(case: str, tmp_path: Path) -> None:
    given = dict(CASES[case])
    rows, depth, columns = given.pop("rows"), given.pop("depth", 96), given.pop("columns", 80)
    model = quantized("y = MatMul(x, w)", f"(float[1,{rows},{depth}] x) => (float y)", (depth, columns), **given)
    assert own(model) == ["PackedProduct"]
    verdict = compiled.compare(model, build(model.clone(), tmp_path / "out"))
    assert verdict.checked and verdict.ok, verdict.why
    bits = given["dtype"].bitwidth + (2 if given.get("zeros") else 1) * 32 / (given.get("block") or depth)
    filled = -(-depth // 32) * 32 * (-(-columns // 16) * 16)
    assert (tmp_path / "out" / "weights.bin").stat().st_size <= filled * bits / 8 + 64


READERS = {
    "a Gemm with a bias": ("y = Gemm(x, w, b)", 1, ["PackedProduct"]),
    "a Gemm that reads it transposed": ("y = Gemm<transB: int = 1>(x, w)", 0, ["PackedProduct"]),
    "a product with its transposition": (
        "t = Transpose<perm: ints = [1, 0]>(w)\n y = MatMul(x, t)",
        0,
        ["PackedProduct"],
    ),
    "rows by index": ("i = Constant<value_ints: ints = [5, -1, 0, 63]>()\n y = Gather(w, i)", 0, ["PackedLookup"]),
    "a table and a head": (
        "i = Constant<value_ints: ints = [5, -1, 0, 63]>()\n e = Gather(w, i)\n t = Transpose<perm: ints = [1, 0]>(w)\n"
        "y = MatMul(e, t)",
        0,
        ["PackedLookup", "PackedProduct"],
    ),
    "something else as well": ("a = MatMul(x, w)\n b = ReduceSum<keepdims: int = 0>(w)\n y = Add(a, b)", 1, []),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_reads_a_weight(reader: str, tmp_path: Path) -> None:
    body, axis, wanted = READERS[reader]
    model = quantized(body, "(float[4,64] x) => (float y)", (64, 64), dtype=UNSIGNED[4], axis=axis, zeros=True)
    for node in model.graph:
        if node.op_type == "Gemm" and len(node.inputs) == 3:
            held = ir.tensor(np.arange(64, dtype=np.float32), name="b")
            bias = ir.Value(name="b", shape=ir.Shape((64,)), type=ir.TensorType(ir.DataType.FLOAT), const_value=held)
            model.graph.initializers["b"] = bias
            node.replace_input_with(2, bias)
    assert sorted(own(model)) == wanted
    verdict = compiled.compare(model, build(model.clone(), tmp_path / "out"))
    assert verdict.checked and verdict.ok, verdict.why
    target = parse_backend("tvm", {})
    said = target.unrealised(tmp_path / "out")
    wanted_said = [] if wanted else ["weights stored as floats instead of the codes that the model has: 1 (ReduceSum"]
    assert len(said) == len(wanted_said) and all(map(str.startswith, said, wanted_said))
    size = (tmp_path / "out" / "weights.bin").stat().st_size
    assert size < 64 * 64 if wanted else size >= 4 * 64 * 64


FOLLOWED = {
    "a bias": ("a = MatMul(x, w)\n y = Add(a, b)", ["PackedProduct"]),
    "a bias, first": ("a = MatMul(x, w)\n y = Add(b, a)", ["PackedProduct"]),
    "a bias and a Relu": ("a = MatMul(x, w)\n c = Add(a, b)\n y = Relu(c)", ["PackedProduct"]),
    "a Relu": ("a = MatMul(x, w)\n y = Relu(a)", ["PackedProduct"]),
    "a Gemm's bias and a Relu": ("a = Gemm(x, w, b)\n y = Relu(a)", ["PackedProduct"]),
    "read twice": ("a = MatMul(x, w)\n c = Add(a, b)\n y = Mul(a, c)", ["PackedProduct", "Add", "Mul"]),
    "a sum of rows": ("a = MatMul(x, w)\n y = Add(a, x)", ["PackedProduct", "Add"]),
    "a sum that a Gemm has": ("a = Gemm(x, w, x)\n y = Relu(a)", ["PackedProduct", "Add", "Relu"]),
}


@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("case", FOLLOWED)
def test_what_follows_a_product_belongs_to_it(case: str, rows: int, tmp_path: Path) -> None:
    body, wanted = FOLLOWED[case]
    model = quantized(body, f"(float[{rows},92] x) => (float y)", (92, 92), dtype=SIGNED[4], axis=1)
    held = ir.tensor(np.random.default_rng(1).standard_normal(92).astype(np.float32), name="b")
    bias = ir.Value(name="b", shape=ir.Shape((92,)), type=ir.TensorType(ir.DataType.FLOAT), const_value=held)
    for node in model.graph:
        for number, value in enumerate(node.inputs):
            if value is not None and value.name == "b":
                model.graph.initializers["b"] = bias
                node.replace_input_with(number, bias)
    ((_, _, simple),) = emit.lowered(model.clone(), ())
    assert [node.op_type for node in simple.graph] == wanted
    made = build(model.clone(), tmp_path / "out")
    verdict = compiled.compare(model, made)
    assert verdict.checked and verdict.ok, verdict.why
    given = {"x": np.full((rows, 92), np.nan, np.float32)}
    assert np.isnan(made.run(given)["y"]).all()


@pytest.mark.parametrize(("bits", "signed", "zeros"), [(4, True, False), (8, False, True), (2, True, False)])
def test_the_expressions_for_other_targets_say_the_same(bits: int, signed: bool, zeros: bool) -> None:
    """What CUDA code is made of, here compiled for this processor."""
    import tvm
    from tvm import relax

    from graphc.tvm import targets
    from graphc.tvm.kernels import packed as kernels

    rng = np.random.default_rng(0)
    layout = kernels.Layout(16, 64, bits, 32, signed, zeros, lanes=1)
    low, high = (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)
    codes = rng.integers(low, high, (16, 64))
    parts = (codes & ((1 << bits) - 1)).reshape(16, -1, layout.per).astype(np.uint32)
    words = sum(parts[..., i] << np.uint32(bits * i) for i in range(layout.per)).astype(np.uint32).view(np.int32)
    scales = rng.random((16, 2)).astype(np.float32)
    points = rng.integers(low, high, (16, 2)).astype(np.float32) if zeros else np.zeros((16, 2), np.float32)
    dense = ((codes - np.repeat(points, 32, 1)) * np.repeat(scales, 32, 1)).astype(np.float32)
    held = [words, scales, *([points] if zeros else [])]
    x, index = rng.standard_normal((3, 64)).astype(np.float32), np.array([3, -1], np.int64)
    cases = [
        (kernels.computed_row(layout), x[:1], x[:1] @ dense.T),
        (kernels.computed_numbers(layout), x, dense),
        (kernels.computed_lookup(layout), index, dense[index]),
    ]
    for expression, first, wanted in cases:
        arrays = [first, *(array[..., None] for array in held)]
        builder = relax.BlockBuilder()
        variables = [relax.Var(f"v{i}", relax.TensorType(a.shape, str(a.dtype))) for i, a in enumerate(arrays)]
        with builder.function("main", variables):
            builder.emit_func_output(builder.emit_te(expression, *variables))
        built = tvm.compile(builder.finalize(), target=targets.resolve("x86-64-v3", 1))
        machine = relax.VirtualMachine(built, tvm.cpu())
        found = machine["main"](*(tvm.runtime.tensor(array) for array in arrays)).numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_what_quantize_writes_stays_packed(tmp_path: Path) -> None:
    """A table whose rows are looked up as codes, a head tied to it, a Gemm, and a convolution, which reads floats."""
    body = (
        "e = Gather(t, i)\n a = MatMul(e, w)\n f = Transpose<perm: ints = [1, 0]>(t)\n h = MatMul(a, f)\n"
        "y = Gemm<transB: int = 1>(h, v)"
    )
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 21]> g (int64[4] i) => (float[4,32] y) {{ {body} }}'
    )
    for name, shape in {"t": (200, 64), "w": (64, 64), "v": (32, 200)}.items():
        own_value = weight(name, *shape)
        model.graph.initializers[name] = own_value
        for node in model.graph:
            for number, value in enumerate(node.inputs):
                if value is not None and value.name == name:
                    node.replace_input_with(number, own_value)
    path, out = tmp_path / "m.onnx", tmp_path / "out"
    ir.save(model, path)
    target = parse_backend("tvm", {"runtime": False, "threads": 1})
    report = pipeline.optimize(path, out, recipe="simplify,quantize{bits=4 block=32 least=0},simplify", target=target)
    assert report.rewrite["checked"] and not any(each.rolled_back for each in report.passes)
    assert sorted(own(report.model)) == ["PackedLookup", "PackedProduct", "PackedProduct", "PackedProduct"]
    numbers = 200 * 64 + 64 * 64 + 32 * 200
    assert (out / "weights.bin").stat().st_size < 1.1 * numbers
