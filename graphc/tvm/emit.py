"""Writes a compiled artifact: a library for each combination of sizes, the weights they share, data to check with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphc import runtime
from graphc.checking import inputs
from graphc.contract import Arrays, PassResult, Progress
from graphc.errors import BadInput
from graphc.shapes import fix
from graphc.simplification import whole
from graphc.tvm import build, cuda, importer, lower, schedule, tune


def emit(
    model: ir.Model,
    folder: Path,
    target: Any,
    shapes: Sequence[str],
    budget: tune.Budget,
    progress: Progress,
) -> Mapping[str, Any]:
    """Compile a model into ``folder``; returns what :mod:`graphc.tvm.serve` needs to run it.

    Args:
        model: Any model whose operators TVM takes once its sizes are fixed.
        folder: An empty folder.
        target: A TVM target.
        shapes: The sizes of dynamic dimensions, see ``graphc.shapes.fix.buckets``.
        budget: How much to spend on measuring loops; the combinations of sizes share the time.
        progress: ``progress(what, done, total)``.

    Raises:
        BadInput: A dynamic dimension has no size, an operator cannot be taken, or the compiler failed.
    """
    progress("lowering", 0, 0)
    models = lowered(model, shapes)
    weights, parity = build.TensorFile(folder / "weights.bin"), build.TensorFile(folder / "parity.bin")
    described = []
    plain: dict[str, tuple[int, str]] = {}
    for number, (each, static, simple) in enumerate(models):
        progress("compiling", number, len(models))
        module = build.prepare(importer.to_relax(simple, target), target)
        choices = tune.tune(module, target, budget.part(len(models)), progress) if budget else {}
        gpu = target.kind.name == "cuda"
        if gpu:
            module = cuda.schedule(module, target)
        else:
            plain |= _by_operator(schedule.schedule(module, target, choices))
        module, held = build.detach(module)
        library = "model.so" if number == 0 else f"model.{number}.so"
        build.link(module, target, folder / library)
        bucket: dict[str, Any] = {
            "library": library,
            "sizes": dict(each),
            "inputs": [_interface(value) for value in simple.graph.inputs],
            "outputs": [value.name for value in simple.graph.outputs],
            "weights": [weights.add(array) for array in held],
        }
        if choices:
            bucket["loops"] = {name: asdict(choice) for name, choice in sorted(choices.items())}
        if known := _known(static):
            bucket["parity"] = [{name: parity.add(array) for name, array in part.items()} for part in known]
        described.append(bucket)
    weights.close()
    parity.close()
    return {
        "device": "cuda" if target.kind.name == "cuda" else "cpu",
        "buckets": described,
        "floats": models[0][2].meta["floats"],
        "rounded": models[0][2].meta["rounded"],
        "plain": {operator: [count, why] for operator, (count, why) in sorted(plain.items())},
        "data": {"weights.bin": weights.tensors, "parity.bin": parity.tensors},
    }


def _by_operator(kept: Mapping[str, str]) -> dict[str, tuple[int, str]]:
    """How many functions there are of an operator, and why; TVM names them by operators and numbers."""
    found: dict[str, tuple[int, str]] = {}
    for name, why in kept.items():
        operator = re.sub(r"\d+(?=_|$)", "", name).removeprefix("fused_")
        found[operator] = found.get(operator, (0, ""))[0] + 1, why
    return found


def lowered(model: ir.Model, shapes: Sequence[str]) -> list[tuple[fix.Sizes, ir.Model, ir.Model]]:
    """For each combination of sizes: the sizes, the model with them, and the same in operators that TVM takes.

    Raises:
        BadInput: A dynamic dimension has no size, or operators cannot be taken.
    """
    found: list[tuple[fix.Sizes, ir.Model, ir.Model]] = []
    for sizes in fix.buckets(model, shapes):
        static = fix.fixed(model, sizes)
        whole.simplify(static, PassResult())
        simple = static.clone()
        lower.lower(simple)
        found.append((sizes, static, simple))
    return found


def _interface(value: ir.Value) -> dict[str, Any]:
    assert value.shape is not None and value.dtype is not None
    return {"name": value.name, "shape": list(value.shape.numpy()), "dtype": value.dtype.numpy().name}


def _known(model: ir.Model) -> tuple[Arrays, Arrays] | None:
    """Inputs, and what ONNX Runtime computes from them without optimising; None where it cannot."""
    try:
        session = runtime.session(model, optimise=False, frugal=True)
        case = next(iter(inputs.cases(model)), None)
        return None if case is None else (case.arrays, session.run(case.arrays))
    except BadInput:
        return None
