"""Every rule against the real operator: cutting by the rule equals the operator on cut inputs.

The cases are ONNX's own single-operator tests, and hand-written ones for what they lack. For each axis that a
rule leaves free, some indices are made dead at the inputs (zero; -inf where they compete), and the operator's
output, sliced by the rule, must be what the operator computes from sliced inputs with the attributes and
shapes that the rule implies.
"""

from __future__ import annotations

import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from graphc.axes.algebra import Axis, leaves
from graphc.axes.cut import operate
from graphc.axes.rules import operators
from graphc.axes.selection import Selection
from graphc.axes.trace import Trace
from graphc.contract import PassResult

Array = np.ndarray[Any, np.dtype[Any]]
ort = pytest.importorskip("onnxruntime")

UNTESTED = {
    "com.microsoft.MultiHeadAttention(float32[2,3,4,3,8])",
    "com.microsoft.BiasSplitGelu(float32[2,3,8]; float32[8])",
}
"""Cases that the CPU provider has no kernel for."""
INEXACT = {
    "LayerNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "MeanVarianceNormalization",
    "LpNormalization",
    "BatchNormalization",
    "SkipLayerNormalization",
    "GroupNorm",
    "SkipGroupNorm",
}
"""Operators that divide by a count that a cut changes: along their averaged axes nothing is claimed."""


@dataclass
class Case:
    """One operator with its inputs; shapes, indices and lengths become constants."""

    model: onnx.ModelProto
    inputs: dict[str, Array]
    name: str = ""
    operator: str = field(init=False)

    def __post_init__(self) -> None:
        node = self.model.graph.node[0]
        self.operator = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


def session(model: onnx.ModelProto) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, inputs: dict[str, Array]) -> list[Array]:
    opened = session(model)
    return list(opened.run(None, {i.name: inputs[i.name] for i in opened.get_inputs()}))


def close(a: Array, b: Array) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not np.issubdtype(a.dtype, np.floating):
        return bool(np.array_equal(a, b))
    tolerance = 1e-3 if a.dtype == np.float16 else 1e-4
    return bool(np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True))


def backend_cases() -> Iterator[Case]:
    """ONNX's own tests of one operator each, in its own form (not expanded into a function)."""
    from onnx.backend.test.case.node import collect_testcases

    known = set(operators())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for test in collect_testcases(None):
            model = test.model
            if len(model.graph.node) != 1 or model.graph.node[0].op_type not in known or "expanded" in test.name:
                continue
            version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
            if version > 26 or model.graph.node[0].domain not in ("", "ai.onnx"):
                model = onnx.ModelProto.FromString(model.SerializeToString())
                for opset in model.opset_import:
                    opset.version = min(opset.version, 25)
            arrays = test.data_sets[0][0]
            names = [i.name for i in model.graph.input]
            if not all(isinstance(a, np.ndarray) and a.dtype != object for a in arrays):
                continue
            inputs = dict(zip(names, arrays, strict=False))
            for name, array in inputs.items():
                if "zero_point" in name:
                    # A dead unit is one that dequantizes to zero.
                    inputs[name] = np.zeros_like(array)
            yield Case(prepared(model, inputs), inputs, test.name)


def prepared(model: onnx.ModelProto, inputs: dict[str, Array]) -> onnx.ModelProto:
    """Small integer vectors become constants, dims become static; IR and opset that the runtime loads."""
    made = onnx.ModelProto.FromString(model.SerializeToString())
    made.ir_version = min(made.ir_version, 10)
    kept = []
    for value in made.graph.input:
        array = inputs.get(value.name)
        if array is None:
            continue
        if array.ndim <= 1 and (
            array.dtype in (np.int64, np.int32) or array.size <= 1 or value.name in ("scales", "roi")
        ):
            made.graph.initializer.append(numpy_helper.from_array(array, value.name))
        else:
            kept.append(helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, array.shape))
    del made.graph.input[:]
    made.graph.input.extend(kept)
    for value in made.graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    return made


def free(trace: Trace, value: ir.Value) -> list[Axis]:
    """Leaves of a value that no fact fixes and that have more than one index."""
    fixed = {leaf for fact in trace.facts if fact.what == "fixed" for leaf in leaves(fact.axis)}
    found = dict.fromkeys(leaf for axis in trace.axes.get(value) or () for leaf in leaves(axis))
    return [
        leaf
        for leaf in found
        if leaf not in fixed and isinstance(leaf.size, int) and leaf.size > 1 and leaf.origin is None
    ]


def check(case: Case) -> list[str]:
    """The axes that were cut and compared; an AssertionError names the one that does not hold."""
    try:
        expected_full = run(case.model, case.inputs)
    except Exception:
        return []
    model = ir.from_proto(case.model)
    trace = Trace(model, interface=True)
    node = next(iter(model.graph))
    application = trace.bound.get(node)
    if application is None:
        return []
    for out, array in zip(model.graph.outputs, expected_full, strict=True):
        if trace.axes[out] is None:
            continue
        sizes = [axis.size for axis in trace.axes[out] or ()]
        static = all(isinstance(s, int) for s in sizes)
        assert not static or sizes == list(array.shape), f"{case.name}: {sizes} instead of {array.shape}"
        assert len(sizes) == array.ndim, f"{case.name}: rank {len(sizes)} instead of {array.ndim}"
    done = []
    candidates = dict.fromkeys(
        leaf for value in (*model.graph.inputs, *model.graph.initializers.values()) for leaf in free(trace, value)
    )
    for number, leaf in enumerate(candidates):
        marks = {fact.what for fact in trace.facts if fact.what in "~^" and any(x is leaf for x in leaves(fact.axis))}
        if ("~" in marks and node.op_type in INEXACT) or node.op_type == "Mod":
            continue
        if node.op_type == "Div" and not np.issubdtype(case.inputs["x"].dtype, np.floating):
            continue
        assert isinstance(leaf.size, int)
        count = max(1, leaf.size // 2)
        if node.op_type == "TopK":
            count = max(count, min(leaf.size, int(np.asarray(case.inputs["k"]).item())))
        for fact in trace.facts:
            if fact.what == "multiple" and any(x is leaf for x in leaves(fact.axis)):
                count = max(count // fact.count * fact.count, fact.count)
        mask = np.random.default_rng(number).permutation(leaf.size) < count
        selection = Selection({leaf: mask})
        dead = {}
        for value in model.graph.inputs:
            dead[value.name] = _dead(trace, selection, value, case.inputs[value.name], -np.inf if "^" in marks else 0)
        whole = ir.to_proto(model)
        for name, value in model.graph.initializers.items():
            array = value.const_value.numpy()
            if trace.axes.get(value) and any(selection.touches(a) for a in trace.axes[value] or ()):
                changed = selection.dead(trace.axes[value] or (), array)
                whole = onnx.ModelProto.FromString(whole.SerializeToString())
                for held in whole.graph.initializer:
                    if held.name == name:
                        held.CopyFrom(numpy_helper.from_array(changed, name))
        before = run(whole, dead)
        smaller = ir.from_proto(case.model)
        again = Trace(smaller, interface=True)
        twin = list(
            dict.fromkeys(
                x for v in (*smaller.graph.inputs, *smaller.graph.initializers.values()) for x in free(again, v)
            )
        )[number]
        small = Selection({twin: mask})
        operate(again, small, PassResult())
        cut = {v.name: small.take(again.axes[v] or (), dead[v.name]) for v in smaller.graph.inputs}
        for value in smaller.graph.inputs:
            value.shape = ir.Shape(cut[value.name].shape)
        after = run(ir.to_proto(smaller), cut)
        for out, a, b in zip(model.graph.outputs, before, after, strict=True):
            wanted = selection.take(trace.axes[out] or (), a)
            where = (
                f"{case.name}: axis of size {leaf.size} of {node.op_type}, '{application.rule}', output '{out.name}'"
            )
            assert wanted.shape == b.shape, f"{where}: {b.shape} instead of {wanted.shape}"
            assert close(wanted, b), where
        done.append(f"{case.operator}:{leaf.size}")
    return done


def _dead(trace: Trace, selection: Selection, value: ir.Value, array: Array, neutral: float) -> Array:
    axes = trace.axes[value] or ()
    if not any(selection.touches(axis) for axis in axes):
        return array
    if neutral == 0 or not np.issubdtype(array.dtype, np.floating):
        return selection.dead(axes, array)
    result = array.copy()
    for i, axis in enumerate(axes):
        if selection.touches(axis):
            index: list[Any] = [slice(None)] * array.ndim
            index[i] = ~selection.mask(axis)
            result[tuple(index)] = neutral
    return result


def hand(operator: str, inputs: str, *, outputs: int = 1, **attributes: Any) -> Case:
    """A case from text: ``name: dtype[shape]`` or ``name: dtype = values``, ``_`` for an omitted input."""
    domain, _, op = operator.rpartition(".")
    rng = np.random.default_rng(zlib.crc32(f"{operator}{inputs}".encode()))
    arrays: dict[str, Array] = {}
    names: list[str] = []
    for i, text in enumerate(part.strip() for part in inputs.split(";")):
        if text == "_":
            names.append("")
            continue
        names.append(f"x{i}")
        if "=" in text:
            dtype, _, values = text.partition("=")
            held = [float(v) for v in values.split(",") if v.strip()]
            arrays[names[-1]] = np.array(held if len(held) > 1 or values.endswith(",") else held[0]).astype(
                dtype.strip()
            )
            continue
        dtype, dims = text.rstrip("]").split("[")
        shape = tuple(int(d) for d in dims.split(",") if d)
        if dtype.startswith("float"):
            arrays[names[-1]] = (rng.standard_normal(shape) * 0.5).astype(dtype)
        elif dtype == "bool":
            arrays[names[-1]] = np.ones(shape, dtype)
        else:
            low, high = (0, 3) if dtype in ("int32", "int64") else (-20, 20) if dtype == "int8" else (0, 20)
            arrays[names[-1]] = rng.integers(low, high, shape).astype(dtype)
    made = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, names, made, domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "case",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in arrays.items()
        ],
        [helper.make_empty_tensor_value_info(n) for n in made],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return Case(prepared(helper.make_model(graph, opset_imports=opsets), arrays), arrays, f"{operator}({inputs})")


def hand_cases() -> Iterator[Case]:
    ms = "com.microsoft."
    yield hand("Conv", "float32[2,6,5,5]; float32[8,3,3,3]; float32[8]", group=2)
    yield hand("Conv", "float32[2,6,5,5]; float32[8,6,3,3]; float32[8]", strides=[2, 2], pads=[1, 1, 1, 1])
    yield hand("Conv", "float32[2,4,9]; float32[8,1,3]", group=4, auto_pad="SAME_UPPER")
    yield hand("ConvTranspose", "float32[2,6,4,4]; float32[6,4,2,2]; float32[8]", group=2, strides=[2, 2])
    yield hand("ConvTranspose", "float32[2,6,4,4]; float32[6,5,3,3]; float32[5]", output_padding=[1, 1], strides=[2, 2])
    yield hand("BatchNormalization", "float32[2,4,3,3]; float32[4]; float32[4]; float32[4]; float32[4]")
    yield hand("PRelu", "float32[2,4,3,3]; float32[4,1,1]")
    yield hand("GridSample", "float32[2,4,5,5]; float32[2,3,3,2]")
    yield hand("Resize", "float32[2,4,4,4]; _; _; int64 = 2,4,7,7", mode="linear")
    yield hand("Softmax", "float32[2,6]", axis=1)
    yield hand("Where", "bool[2,4]; float32[4]; float32[2,4]")
    yield hand("GatherElements", "float32[4,6]; int64[4,3]", axis=1)
    yield hand("Gather", "float32[4,6]; int64 = 2,0,1", axis=0)
    yield hand("Gather", "float32[4,3,2]; int64 = 0,0,1,1,2,2", axis=1)
    yield hand("Gather", "float32[4,3,2]; int64 = 0,1,2,0,1,2", axis=1)
    yield hand("Gather", "float32[4,6]; int64 = 2,3,4", axis=1)
    yield hand("Slice", "float32[4,6]; int64 = -1,; int64 = -99,; int64 = 1,; int64 = -1,")
    yield hand("Slice", "float32[4,6]; int64 = 1,; int64 = 99,; int64 = 1,; int64 = 2,")
    yield hand("Einsum", "float32[2,3,4]; float32[3,4,5]", equation="bhd,hdm->bm")
    yield hand(
        "LSTM",
        "float32[3,2,4]; float32[2,20,4]; float32[2,20,5]; float32[2,40]",
        outputs=3,
        hidden_size=5,
        direction="bidirectional",
    )
    yield hand(
        "GRU",
        "float32[3,2,4]; float32[1,15,4]; float32[1,15,5]; float32[1,30]",
        outputs=2,
        hidden_size=5,
        linear_before_reset=1,
    )
    yield hand("QuantizeLinear", "float32[2,4]; float32 = .1,.2,.3,.4; int8 = 0,0,0,0", axis=1)
    yield hand("DequantizeLinear", "int8[3,8]; float32[3,4]", axis=1, block_size=2)
    yield hand("DequantizeLinear", "int8[3,8]; float32 = .1,.2,.3", axis=0)
    yield hand("RMSNormalization", "float32[2,3,8]; float32[8]", axis=-1, epsilon=1e-2)
    yield hand("GroupNormalization", "float32[2,6,3,3]; float32[6]; float32[6]", num_groups=3)
    yield hand("DepthToSpace", "float32[2,12,2,2]", blocksize=2, mode="CRD")
    yield hand("Attention", "float32[2,4,3,8]; float32[2,2,5,8]; float32[2,2,5,6]")
    yield hand(
        "Attention", "float32[2,3,32]; float32[2,5,16]; float32[2,5,12]; float32[3,5]", q_num_heads=4, kv_num_heads=2
    )
    yield hand("RotaryEmbedding", "float32[2,4,3,8]; float32[5,4]; float32[5,4]; int64[2,3]")
    yield hand("RotaryEmbedding", "float32[2,3,32]; float32[5,4]; float32[5,4]; int64[2,3]", num_heads=4, interleaved=1)
    yield hand(f"{ms}FusedConv", "float32[2,6,5,5]; float32[8,3,3,3]; float32[8]", group=2, activation="Relu")
    yield hand(f"{ms}FusedConv", "float32[2,4,5,5]; float32[6,4,1,1]; float32[6]; float32[2,6,5,5]")
    yield hand(f"{ms}FusedMatMul", "float32[2,4,3]; float32[5,4]", transA=1, transB=1, alpha=0.5)
    yield hand(f"{ms}FusedGemm", "float32[2,4]; float32[5,4]; float32[5]", transB=1, activation="Relu")
    yield hand(f"{ms}BiasGelu", "float32[2,3,4]; float32[4]")
    yield hand(f"{ms}FastGelu", "float32[2,3,4]; float32[4]")
    yield hand(f"{ms}QuickGelu", "float32[2,3,4]")
    yield hand(f"{ms}Gelu", "float32[2,3,4]")
    yield hand(f"{ms}SkipLayerNormalization", "float32[2,3,8]; float32[2,3,8]; float32[8]; float32[8]; float32[8]")
    yield hand(f"{ms}SkipSimplifiedLayerNormalization", "float32[2,3,8]; float32[2,3,8]; float32[8]", epsilon=1e-2)
    yield hand(f"{ms}Attention", "float32[2,3,10]; float32[10,48]; float32[48]", num_heads=4)
    yield hand(
        f"{ms}Attention", "float32[2,3,10]; float32[10,40]; float32[40]", num_heads=4, qkv_hidden_sizes=[16, 16, 8]
    )
    yield hand(f"{ms}MultiHeadAttention", "float32[2,3,16]; float32[2,5,16]; float32[2,5,12]; float32[44]", num_heads=4)
    yield hand(f"{ms}MultiHeadAttention", "float32[2,3,16]; float32[2,4,5,4]; float32[2,4,5,4]", num_heads=4)
    yield hand(f"{ms}MultiHeadAttention", "float32[2,3,4,3,8]", num_heads=4)
    yield hand(
        f"{ms}GroupQueryAttention",
        "float32[1,3,64]; float32[1,3,32]; float32[1,3,32]; float32[1,2,6,16]; float32[1,2,6,16]; "
        "int32 = 2,; int32 = 3",
        outputs=3,
        num_heads=4,
        kv_num_heads=2,
    )
    yield hand(
        f"{ms}GroupQueryAttention",
        "float32[1,3,64]; float32[1,3,32]; float32[1,3,32]; float32[1,2,6,16]; float32[1,2,6,16]; "
        "int32 = 2,; int32 = 3; float32[9,8]; float32[9,8]",
        outputs=3,
        num_heads=4,
        kv_num_heads=2,
        do_rotary=1,
    )
    yield hand(f"{ms}RotaryEmbedding", "float32[2,3,32]; int64[2,3]; float32[5,4]; float32[5,4]")
    yield hand(f"{ms}MatMulNBits", "float32[2,64]; uint8[6,4,8]; float32[24]", K=64, N=6, bits=4, block_size=16)
    yield hand(
        f"{ms}MatMulNBits", "float32[2,64]; uint8[6,4,8]; float32[24]; uint8[12]", K=64, N=6, bits=4, block_size=16
    )
    yield hand(
        "QLinearConv",
        "uint8[1,4,5,5]; float32 = .1; uint8 = 0; int8[6,4,3,3]; float32 = .1,.2,.1,.2,.1,.2; "
        "int8 = 0,0,0,0,0,0; float32 = .5; uint8 = 0; int32[6]",
    )
    yield hand(
        "QLinearMatMul",
        "uint8[3,4]; float32 = .1; uint8 = 0; int8[4,5]; float32 = .1,.2,.1,.2,.1; "
        "int8 = 0,0,0,0,0; float32 = .5; uint8 = 0",
    )
    yield hand(
        f"{ms}QLinearAdd",
        "uint8[3,4]; float32 = .1; uint8 = 0; uint8[3,4]; float32 = .1; uint8 = 0; float32 = .2; uint8 = 0",
    )
    yield hand(f"{ms}QLinearGlobalAveragePool", "uint8[1,4,5,5]; float32 = .1; uint8 = 0; float32 = .1; uint8 = 0")
    yield hand(
        f"{ms}QLinearConcat",
        "float32 = .1; uint8 = 0; uint8[2,3]; float32 = .1; uint8 = 0; uint8[2,4]; float32 = .1; uint8 = 0",
        axis=1,
    )
    yield hand(
        f"{ms}QGemm", "uint8[3,4]; float32 = .1; uint8 = 0; int8[5,4]; float32 = .1; int8 = 0; int32[5]", transB=1
    )
    yield hand(f"{ms}DynamicQuantizeMatMul", "float32[3,4]; int8[4,5]; float32 = .1; int8 = 0; float32[5]")
    yield hand(
        f"{ms}MatMulIntegerToFloat",
        "uint8[3,4]; int8[4,5]; float32 = .1; float32 = .1; uint8 = 0; int8 = 0; float32[5]",
    )
    yield hand(f"{ms}NhwcMaxPool", "uint8[1,6,6,4]", kernel_shape=[2, 2])
    yield hand(f"{ms}BiasSplitGelu", "float32[2,3,8]; float32[8]")
    yield hand(
        f"{ms}MoE",
        "float32[3,4]; float32[3,5]; float32[5,6,4]; float32[5,6]; float32[5,4,6]; float32[5,4]",
        k=2,
        activation_type="relu",
    )


@cache
def cases() -> dict[str, Case]:
    return {case.name: case for case in backend_cases()}


HAND = {case.name: case for case in hand_cases()}


@pytest.mark.parametrize("name", HAND)
def test_hand_written_case(name: str) -> None:
    done = check(HAND[name])
    assert done or name in UNTESTED


def _failures(chosen: dict[str, Case]) -> tuple[list[str], set[str]]:
    failed, tested = [], set()
    for case in chosen.values():
        try:
            if check(case):
                tested.add(case.operator)
        except Exception as problem:
            failed.append(f"{case.name}: {problem}")
    return failed, tested


def test_onnx_cases_of_each_operator() -> None:
    chosen: dict[str, Case] = {}
    count: Counter[str] = Counter()
    for name, case in cases().items():
        count[case.operator] += 1
        if count[case.operator] <= 2:
            chosen[name] = case
    failed, tested = _failures(chosen)
    assert not failed, "\n".join(failed)
    assert len(tested) > 110


@pytest.mark.slow
def test_all_onnx_cases() -> None:
    failed, tested = _failures(cases())
    assert not failed, "\n".join(failed)
    assert len(tested) > 115
