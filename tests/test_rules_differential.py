"""Every rule against the real operator: cutting by the rule equals the operator on cut inputs.

The cases are ONNX's own single-operator tests, and hand-written ones for what they lack. For each axis that a
rule leaves free, some indices are made dead at the inputs (zero; -inf where they compete), and the operator's
output, sliced by the rule, must be what the operator computes from sliced inputs with the attributes and
shapes that the rule implies.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from graphc.axes.algebra import Axis, Kind, find, leaves
from graphc.axes.cut import operate
from graphc.axes.rules import operators
from graphc.axes.selection import Selection
from graphc.axes.trace import Trace
from graphc.contract import PassResult

Array = np.ndarray[Any, np.dtype[Any]]
ort = pytest.importorskip("onnxruntime")

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
        assert isinstance(leaf.size, int)
        count = max(1, leaf.size // 2)
        if node.op_type == "TopK":
            count = max(count, min(leaf.size, int(np.asarray(case.inputs["k"]).item())))
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


@cache
def cases() -> dict[str, Case]:
    return {case.name: case for case in backend_cases()}


assert find and Kind and dataclass


if __name__ == "__main__":
    import sys
    from collections import Counter

    tally: Counter[str] = Counter()
    bad = 0
    for name, case in cases().items():
        if len(sys.argv) > 1 and not any(a in name for a in sys.argv[1:]):
            continue
        try:
            tally.update(x.split(":")[0] for x in check(case))
        except Exception as e:
            bad += 1
            print("BAD", name, type(e).__name__, str(e).split("\n")[0][:260])
    print(len(cases()), bad, sorted(tally.items()))
