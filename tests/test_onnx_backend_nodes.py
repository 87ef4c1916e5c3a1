"""ONNX's own operator tests as a differential check: whatever ONNX Runtime computes, it computes after the passes.

Each case runs as it is, and once more with its inputs turned into constants, so that the whole model is folded
and what the passes computed stands against what ONNX Runtime computes.
"""

from __future__ import annotations

import contextlib
import string
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphc import edit, runtime
from graphc.contract import Capabilities, Context
from graphc.errors import GraphcError
from graphc.opset.adapters import Unconvertible
from graphc.opset.upgrade import upgrade
from graphc.passes.fuse import Fuse
from graphc.passes.simplify import Simplify
from graphc.shapes import fold

OPSET = 21
CONTEXT = Context(target=Capabilities("portable", 10, {"": OPSET}))
NEWEST = 25
"""Cases of newer opsets are left out: neither the working opset nor the runtime has their operators."""

Arrays = dict[str, np.ndarray[Any, Any]]


@cache
def cases() -> dict[str, list[tuple[str, Any, list[Any]]]]:
    """Name, model and input arrays of ONNX's node tests, by the first letter of the operator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        found = collect_testcases(None)
    by_letter: dict[str, list[tuple[str, Any, list[Any]]]] = {}
    for case in found:
        letter = case.model.graph.node[0].op_type[0].lower()
        inputs = case.data_sets[0][0]
        if all(isinstance(array, np.ndarray | np.generic) for array in inputs):
            by_letter.setdefault(letter, []).append((case.name, case.model, [np.asarray(a) for a in inputs]))
    return by_letter


def models(letter: str) -> Iterator[tuple[str, ir.Model, Arrays, Arrays]]:
    """Name, model, inputs and outputs of each case of a letter that ONNX Runtime runs the same each time."""
    for name, proto, inputs in cases().get(letter, ()):
        if any(o.domain in ("", "ai.onnx") and o.version > NEWEST for o in proto.opset_import):
            continue
        model = ir.from_proto(proto)
        if not all(fold.deterministic(node) for node in edit.nodes(model)):
            continue
        feeds = {v.name or "": array for v, array in zip(model.graph.inputs, inputs, strict=False)}
        try:
            yield name, model, feeds, run(model, feeds)
        except GraphcError:
            continue  # ONNX Runtime has no kernel for it, or not for these types


def run(model: ir.Model, feeds: Arrays) -> Arrays:
    return dict(runtime.session(model, optimise=False, threads=1).run(feeds))


def bound(model: ir.Model, feeds: Arrays) -> ir.Model:
    """The model with its inputs as constants."""
    model = model.clone()
    for value in list(model.graph.inputs):
        array = feeds[value.name or ""]
        if value.dtype == ir.DataType.STRING:
            texts = [str(text).encode() for text in array.reshape(-1)]
            value.const_value = ir.StringTensor(texts, shape=ir.Shape(array.shape), name=value.name)
        else:
            value.const_value = ir.tensor(array, dtype=value.dtype, name=value.name)
        model.graph.register_initializer(value)
    model.graph.inputs.clear()
    return model


def optimised(model: ir.Model) -> ir.Model:
    model = model.clone()
    if 13 <= model.graph.opset_imports.get("", OPSET) < OPSET:
        with contextlib.suppress(Unconvertible):
            upgrade(model, OPSET)
    for each in (Simplify(), Fuse(), Simplify()):
        each.run(model, CONTEXT)
    return model


def difference(wanted: Arrays, found: Arrays) -> str:
    """What is different beyond 32 roundings of the largest value; "" if nothing is."""
    if list(wanted) != list(found):
        return f"outputs {list(found)} instead of {list(wanted)}"
    for name, a in wanted.items():
        b = found[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{name} is {b.dtype}{list(b.shape)} instead of {a.dtype}{list(a.shape)}"
        if a.dtype.kind not in "fV" or a.dtype.itemsize < 2:
            if a.tobytes() != b.tobytes() and not np.array_equal(a, b):
                return f"{name} differs"
            continue
        a, b = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(a)
        error = np.abs(a[finite] - b[finite]).max(initial=0)
        scale = np.abs(a[finite]).max(initial=1)
        eps = float(np.finfo(wanted[name].dtype).eps) if wanted[name].dtype.kind == "f" else 2.0**-7
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            return f"{name} has other infinities or NaNs"
        if not error <= 32 * eps * scale:
            return f"{name} is off by {error}"
    return ""


@pytest.mark.parametrize("letter", string.ascii_lowercase)
def test_node_cases(letter: str) -> None:
    wrong = []
    for name, model, feeds, wanted in models(letter):
        for kind, candidate, inputs in (("as it is", model, feeds), ("all constant", bound(model, feeds), {})):
            try:
                problem = difference(wanted, run(optimised(candidate), inputs))
            except Exception as error:  # one failure must not hide the others
                problem = f"{type(error).__name__}: {str(error)[:300]}"
            if problem:
                wrong.append(f"{name}, {kind}: {problem}")
    assert not wrong, f"{len(wrong)} differ:\n" + "\n".join(wrong)


def test_most_cases_are_covered() -> None:
    """Guards the filters above: they must not silently empty the check."""
    assert sum(1 for _ in models("m")) > 60
