"""What the tests of ``recognise`` and of ``lower`` share: targets, and models written node by node."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphc import runtime
from graphc.contract import Context, PassResult, Probe
from graphc.passes.recognise import Recognise
from graphc.passes.simplify import Simplify
from tests.small_models import build, feeds, run

CONTEXT = Context(target=runtime.capabilities())
TARGET = dataclasses.replace(runtime.capabilities(), portable=False)
FRAGMENTS = Path(__file__).parent / "data" / "fragments"
LOWEST = float(np.finfo(np.float32).min)


def always(ratio: float) -> Context:
    """A context in which every form is this fast, and every probe computes twice the same."""

    def time(probes: Sequence[Probe]) -> Mapping[str, float]:
        for probe in probes:
            before, after = (
                runtime.session(model, optimise=False, threads=1).run(probe.inputs)
                for model in (probe.before, probe.after)
            )
            for name, array in before.items():
                np.testing.assert_allclose(after[name], array, rtol=0, atol=1e-5 * max(1, np.abs(array).max()))
        return {probe.signature: ratio for probe in probes}

    return dataclasses.replace(CONTEXT, target=TARGET, time=time)


def recognised(model: ir.Model, seed: int = 1, **options: object) -> tuple[ir.Model, PassResult]:
    """Run the pass on a copy, check that it computes the same, and that a second run changes nothing."""
    after = model.clone()
    result = Recognise(**options).run(after, CONTEXT)
    for sizes in ({}, {"N": 1, "B": 1, "S": 1, "T": 2}):
        inputs = feeds(model, seed, **sizes)
        wanted, found = run(model, inputs), run(after, inputs)
        for name, array in wanted.items():
            eps = np.finfo(array.dtype).eps
            assert found[name].dtype == array.dtype and found[name].shape == array.shape
            np.testing.assert_allclose(found[name], array, rtol=0, atol=64 * eps * (1 + np.abs(array).max()))
    assert not Recognise(**options).run(after, CONTEXT).changed
    return after, result


class Writer:
    """ONNX text, node by node."""

    def __init__(self) -> None:
        self.body: list[str] = []
        self.constants: dict[str, np.ndarray] = {}
        self.inputs: list[str] = []

    def __call__(self, operator: str, *inputs: object, **attributes: object) -> str:
        names = [self.hold(i) if not isinstance(i, str) else i for i in inputs]
        name = f"v{len(self.body)}"
        given = ", ".join(f"{k}={list(v) if isinstance(v, tuple) else v}" for k, v in attributes.items())
        self.body.append(f"{name} = {operator}{f'<{given}>' if given else ''}({', '.join(names)})")
        return name

    def hold(self, data: object) -> str:
        array = np.asarray(data)
        array = array.astype(np.float32) if array.dtype.kind == "f" else array
        name = f"c{len(self.constants)}"
        self.constants[name] = array
        return name

    def input(self, name: str, type: str) -> str:
        self.inputs.append(f"{type} {name}")
        return name

    def model(self, result: str) -> ir.Model:
        body = " ".join(self.body)
        model = build(f"{body} y = Identity({result})", x=", ".join(self.inputs), **self.constants)
        Simplify().run(model, CONTEXT)
        return model
